"""Megatron-LM (`pretrain_gpt.py`): a scenario from a launch script or a YAML file, and the command line of a scenario.

Law: what a command does not list as unsaid is the same in the scenario that is read from it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.flags.arguments import Arguments, why_harmless
from moesim.flags.commands import Command, Draft, launch_words
from moesim.flags.flag_table import READ
from moesim.flags.given_flags import Launched, read_file
from moesim.flags.layout_flags import (
    dispatch_fields,
    layout_fields,
    overlap_fields,
    workload_fields,
    write_layout,
    write_training,
)
from moesim.flags.model_flags import Choice, capacity_fields, model_fields, routing_section, write_model
from moesim.flags.software_flags import implementation_fields
from moesim.scenario import Scenario, gpu_spec, scenario_from_mapping, yaml_text

PROGRAM = "pretrain_gpt.py"
DEFAULT_GPU = "h100"
PER_NODE = 8  # GPUs of a node where only their total is known
_WORDS = 1_000  # characters of one remark in a scenario


@dataclass(frozen=True, kw_only=True)
class FlagFate:
    """A flag as it was given and what became of it: the key of a scenario, a reason, or what is left out."""

    flag: str
    becomes: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A launch as it was read.

    taken: what was assumed where the launch says nothing. left_out: what the simulated step does not have; it stands in
    the scenario too, so that every run warns of it.
    """

    source: str
    scenario: Scenario
    read: tuple[FlagFate, ...]
    harmless: tuple[FlagFate, ...]
    left_out: tuple[str, ...]
    taken: tuple[str, ...]


def read_megatron(
    path: Path,
    *,
    gpu: str | None = None,
    gpus: int | None = None,
    variables: Mapping[str, str] | None = None,
    routing: Choice | None = None,
    overrides: Sequence[str] = (),
) -> Reading:
    """The launch in the file at `path` as a scenario on GPUs of the kind `gpu`; nothing of the file is run.

    `gpus` is the number of GPUs where the file does not say it (or says another), `variables` are set before the script
    is read, `routing` is what to simulate with (see `routing_section`), `overrides` are `a.b=c` of the scenario. Raises
    UserError, one line that names the flag and its place.
    """
    launched = read_file(path, variables=variables or {})
    keys = (override.partition("=")[0].strip() for override in overrides)
    args = Arguments(launched.flags, source=path.name, overridden=keys)
    for remark in launched.remarks:
        args.take(remark)
    data = _scenario(args, launched, name=_name(path), gpu=gpu, gpus=gpus, routing=routing)
    try:
        scenario = scenario_from_mapping(data, overrides)
    except UserError as error:
        raise type(error)(_with_flags(args, str(error))) from None
    fates = args.by_fate()
    return Reading(
        source=path.name,
        scenario=scenario,
        read=tuple(FlagFate(flag=flag.shown, becomes=READ[flag.name].key) for flag in fates["read"]),
        harmless=tuple(FlagFate(flag=flag.shown, becomes=why_harmless(flag)) for flag in fates["harmless"]),
        left_out=tuple(args.left_out),
        taken=tuple(args.taken),
    )


def scenario_text(reading: Reading) -> str:
    """The scenario as YAML, with where it comes from and what was assumed."""
    head = [f"# Read from {reading.source}, a launch of Megatron-LM."]
    head += [f"# Assumed: {line}" for line in reading.taken]
    head += [f"# Not modelled: {line}" for line in reading.left_out]
    scenario = reading.scenario
    data = {"schema_version": 1} | scenario.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    if scenario.model.experts:  # required with experts, its default, too
        data["routing"] = scenario.routing.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    pools = data["cluster"].pop("pools")
    data["cluster"] = {**pools[0], **data["cluster"]} if len(pools) == 1 else {"pools": pools, **data["cluster"]}
    return "\n".join(head) + "\n" + yaml_text(data)


def _with_flags(args: Arguments, message: str) -> str:
    """A message about a key of a scenario, with the flags that it comes from."""
    found = re.match(r"scenario: ([a-z_.]+)", message)
    if found is None:
        return f"{args.source}: {message}"
    names = [flag.name for flag in READ.values() if found[1] in flag.key.split(", ") and args.has(flag.name)]
    key = f"{found[1]} ({', '.join(names)})" if names else found[1]
    return f"{args.source}: {key}{message[found.end() :]}"


def _scenario(
    args: Arguments, launched: Launched, *, name: str, gpu: str | None, gpus: int | None, routing: Choice | None
) -> dict[str, Any]:
    if gpu is None:
        args.take(f"GPUs are {DEFAULT_GPU}: flags do not say it (--gpu NAME)")
    nodes, per_node = _machines(args, launched, gpus)
    args.take(f"{nodes} x {per_node} GPUs behind one 400 Gbps NIC each (--set cluster.fabric.nic=...)")
    kind = gpu or DEFAULT_GPU
    model = model_fields(args)
    layout = layout_fields(args, num_gpus=nodes * per_node)
    data = {
        "name": name,
        "model": model,
        **routing_section(args, model, routing),
        "capacity": capacity_fields(args),
        "cluster": {"gpu": kind, "nodes": nodes, "gpus_per_node": per_node},
        "parallelism": layout,
        "workload": workload_fields(args, model, data=layout["data"], stages=layout.get("stages", [model["layers"]])),
        "dispatch": dispatch_fields(args, sm_count=gpu_spec(kind).sm_count),
        "implementation": implementation_fields(args, model),
        "overlap": overlap_fields(args),
    }
    model["left_out"] = [line[:_WORDS] for line in args.left_out]
    return data


def _machines(args: Arguments, launched: Launched, gpus: int | None) -> tuple[int, int]:
    """Nodes and GPUs of each, as the user says, as the launcher is called, or as variables are named."""
    per_node = _whole(launched.gpus_per_node)
    if gpus is None and per_node and (nodes := _whole(launched.nodes)):
        return nodes, per_node
    total = gpus or _whole(launched.world_size)
    if not total:
        what = (
            "does not say how many GPUs it runs on: add --nnodes and --nproc_per_node to its launcher, or pass --gpus N"
        )
        raise UserError(f"{args.source} {what}")
    per_node = min(total, per_node or PER_NODE)
    if total % per_node:
        raise UserError(f"{args.source}: {total} GPUs are not whole nodes of {per_node}; pass another --gpus")
    return total // per_node, per_node


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and 0 < len(text) < 7 and int(text) else None


def _name(path: Path) -> str:
    kept = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in path.stem)
    return kept[:200] or "megatron"


def megatron_command(scenario: Scenario) -> Command:
    """The flags of the scenario's model and layout; data, learning rate and checkpoints are the user's own."""
    draft = Draft()
    write_model(draft, scenario)
    write_layout(draft, scenario)
    write_training(draft, scenario)
    launcher = ("torchrun", *launch_words(scenario), PROGRAM)
    return Command(software="Megatron-LM", launcher=launcher, flags=tuple(draft.flags), unsaid=tuple(draft.unsaid))
