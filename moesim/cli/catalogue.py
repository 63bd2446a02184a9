"""Verbs that show what there is: `moesim scenarios`, `gpus`, `model`, `schema`, `completion`.

`scenarios` lists what ships with the package, or copies it; `gpus` says where each number of a GPU comes from; `model`
counts parameters, FLOPs and memory of a model of the catalogue, of a config.json or of a scenario; `schema` is for
editors and other programs; `completion` is the line that teaches a shell to complete verbs, flags, names and files.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli.flags import (
    FORCE,
    JSON,
    JSON_OR_CSV,
    OVERRIDES,
    QUIET,
    Flag,
    verb,
    wants_screen,
)
from moesim.errors import UserError
from moesim.shipped import KINDS, VERBS, copy, shipped
from moesim.strict_json import json_text

if TYPE_CHECKING:
    from moesim.scenario import Model

HEADS = {"scenario": "scenarios", "study": "studies", "plan": "plans", "serving": "serving"}


@verb(
    "scenarios",
    "List the scenarios, studies and plans that ship with moesim; `scenarios copy NAME|all DIR` copies them.",
    Flag(
        "words",
        metavar="copy NAME DIR",
        nargs="*",
        help="copy NAME|all DIR: put a shipped file, with what it refers to, into a folder; without it: list them",
    ),
    JSON,
    QUIET,
    FORCE,
)
def scenarios(args: argparse.Namespace) -> int:
    """List or copy. Raises UserError for words that are neither, and for what `copy` refuses."""
    if not args.words:
        _list_shipped(args)
        return 0
    action, *rest = args.words
    if action != "copy" or len(rest) != 2:
        raise UserError(
            f"`scenarios {' '.join(args.words)}`: write `scenarios copy NAME DIR`, `scenarios copy all DIR` "
            "or `scenarios from-megatron ARGS.sh`"
        )
    places = copy(rest[0], Path(rest[1]), force=args.force)
    if wants_screen(args, [str(place) for place in places]):
        print("\n".join(str(place) for place in places))
    return 0


def _list_shipped(args: argparse.Namespace) -> None:
    files = shipped()
    rows = [{"kind": f.kind, "name": f.name, "file": f.place.as_posix(), "purpose": f.purpose} for f in files]
    if wants_screen(args, rows):
        from moesim.report.catalogue_view import print_shipped

        print_shipped([(HEADS[kind], VERBS[kind], [f for f in files if f.kind == kind]) for kind in KINDS])


def _gpu_names(**_: object) -> tuple[str, ...]:
    from moesim.scenario import gpu_names

    return gpu_names()


@verb(
    "gpus",
    "List the GPUs that scenarios and plans may name: peaks, memory, links, rent, and their sources.",
    Flag("names", metavar="NAME", nargs="*", help="these GPUs alone", completer=_gpu_names),
    JSON_OR_CSV,
)
def gpus(args: argparse.Namespace) -> int:
    """Print the catalogue. Raises UserError for a name that it lacks."""
    found = [_facts_of_gpu(name) for name in args.names or _gpu_names()]
    if wants_screen(args, found, found):
        from moesim.report.catalogue_view import print_gpus

        print_gpus(found)
    return 0


def _facts_of_gpu(name: str) -> dict[str, Any]:
    """The catalogue's entry with SI units in the names of its keys; peaks are dense, bandwidths per direction."""
    from moesim.scenario import gpu_spec

    spec = gpu_spec(name)
    return {
        "name": spec.name,
        "peak_flop_per_s": dict(spec.peak_flops),
        "memory_bytes": spec.memory_bytes,
        "memory_bytes_per_s": spec.memory_bandwidth,
        "l2_bytes": spec.l2_bytes,
        "nvlink_bytes_per_s": spec.nvlink_bandwidth,
        "sm_count": spec.sm_count,
        "clock_hz": spec.clock_hz,
        "usd_per_gpu_hour": spec.price_per_gpu_hour,
        "source": spec.source,
        "price_source": spec.price_source,
    }


# Bytes per parameter of weights, gradients, master copy and both optimizer states together.
PRECISIONS = {
    "bf16, optimizer fp32": (2, 2, 0, 8),
    "bf16, all else fp32": (2, 4, 4, 8),
    "bf16, gradients and master fp32": (2, 4, 4, 4),
    "all bf16": (2, 2, 0, 4),
    "all fp32": (4, 4, 0, 8),
}
STATES = ("weights", "gradients", "master", "optimizer")


def _model_names(**_: object) -> tuple[str, ...]:
    from moesim.scenario import model_names

    return model_names()


@verb(
    "model",
    "Print the parameters, FLOPs and memory of a model, or list the catalogue.",
    Flag(
        "model",
        metavar="NAME",
        nargs="?",
        help="a model of the catalogue, a Hugging Face config.json (or its folder) or a scenario file",
        completer=_model_names,
    ),
    Flag("--list", action="store_true", help="list the catalogue, as without NAME"),
    OVERRIDES,
    Flag("--sequence-length", metavar="TOKENS", type=int, default=4096, help="4096 by default"),
    JSON_OR_CSV,
)
def model(args: argparse.Namespace) -> int:
    """Print the counts, or the catalogue when no model is named. Raises UserError."""
    if args.list or args.model is None:
        return _list_models(args)
    if args.sequence_length <= 0:
        raise UserError(f"--sequence-length {args.sequence_length} is not a number of tokens; use e.g. 4096")
    found = find_model(args.model, args.overrides)
    counts = count_model(found, sequence_length=args.sequence_length) | _source_of_model(args.model, found)
    if wants_screen(args, counts, [{"name": args.model} | counts]):
        from moesim.report.catalogue_view import print_model

        print_model(args.model, counts)
    return 0


def _list_models(args: argparse.Namespace) -> int:
    from moesim.scenario import model_names
    from moesim.scenario.flops import parameters

    sizes = {}
    for name in model_names():
        model = find_model(name, [])
        held = parameters(model)
        sizes[name] = {
            "total": held.total,
            "activated": held.activated,
            "layers": model.layers,
            "experts": model.experts,
            "top_k": model.top_k,
            "attention": model.attention.kind,
        }
    units = {"total": "total_parameters", "activated": "activated_parameters"}
    rows = [{"name": name} | {units.get(key, key): size[key] for key in size} for name, size in sizes.items()]
    if wants_screen(args, sizes, rows):
        from moesim.report.catalogue_view import print_catalogue

        print_catalogue(sizes)
    return 0


def find_model(name: str, overrides: list[str]) -> "Model":
    """The model called `name`, or that of the file `name`, with `--set model.key=value` applied.

    Raises UserError with the names there are, and for a model that contradicts itself.
    """
    from moesim.scenario import load_scenario, model_names, scenario_from_mapping
    from moesim.scenario.short_forms import override_label

    suffix = Path(name).suffix
    if name not in model_names() and Path(name).is_dir():
        name, suffix = str(Path(name) / "config.json"), ".json"
    if name not in model_names() and suffix in (".yaml", ".yml"):
        return load_scenario(name, overrides).model
    if name not in model_names() and suffix != ".json":
        known = ", ".join(model_names())
        raise UserError(f"unknown model {name!r}; use one of {known}, a config.json or a scenario file")
    for override in overrides:
        if not override.startswith("model."):
            raise UserError(
                f"{override_label(override)}: a model has only the keys of model, e.g. --set model.layers=30"
            )
    # The smallest scenario around the model, so that it passes the same checks as in any other.
    around = {
        "name": "model",
        "model": {"preset": name} if name in model_names() else {"hf_config": name},
        "cluster": {"gpu": "h200", "nodes": 1, "gpus_per_node": 1},
        "workload": {"sequence_length": 4096, "global_batch": 1},
    }
    return scenario_from_mapping(around | {"routing": {"kind": "uniform"}}, overrides).model


def _source_of_model(name: str, model: "Model") -> dict[str, Any]:
    """What became of the keys of a config.json, and what of the model's source is left out."""
    from moesim.scenario import model_names

    found: dict[str, Any] = {"left_out": list(model.left_out)}
    if Path(name).suffix == ".json" or (Path(name).is_dir() and name not in model_names()):
        from moesim.scenario.hf_config import read_hf_config

        keys = read_hf_config(Path(name)).keys
        found["config"] = {"model_type": keys.model_type, "read": list(keys.read), "harmless": list(keys.harmless)}
    return found


def count_model(model: "Model", *, sequence_length: int) -> dict[str, Any]:
    """Parameters in elements, FLOPs and bytes of states, as plain values.

    `training_flops_per_sequence` is 3 x the forward pass of all tokens by part, attention counted causal and whole.
    `state_bytes` holds weights, gradients, master copy and optimizer states of all parameters at common precisions.
    Layers of multi-token prediction are outside of all totals. `routing`: what a scenario without that section gets.
    """
    from moesim.scenario.flops import TRAINING_PASSES, forward_flops_per_token, model_flops_per_token, parameters

    held = parameters(model)
    counts = (("causal", True), ("non_causal", False))
    forward = {
        name: forward_flops_per_token(model, sequence_length=sequence_length, causal=causal) for name, causal in counts
    }
    return {
        "sequence_length": sequence_length,
        "routing": (model.routing or "uniform") if model.experts else None,
        "parameters": {"total": held.total, "activated": held.activated, **asdict(held)},
        "forward_flops_per_token": dict(forward["causal"]),
        "training_flops_per_token": {
            name: model_flops_per_token(model, sequence_length=sequence_length, causal=causal)
            for name, causal in counts
        },
        "training_flops_per_sequence": {
            name: {part: TRAINING_PASSES * sequence_length * value for part, value in parts.items() if value}
            for name, parts in forward.items()
        },
        "state_bytes": {
            recipe: {part: held.total * size for part, size in zip(STATES, sizes, strict=True)}
            for recipe, sizes in PRECISIONS.items()
        },
    }


SCHEMA_KINDS = ("scenario", "study", "plan", "serving")


@verb(
    "schema",
    "Print the JSON Schema of scenario files, or of studies, plans or serving scenarios.",
    Flag(
        "what",
        metavar="WHAT",
        nargs="?",
        choices=SCHEMA_KINDS,
        default="scenario",
        help="whose keys: scenario if left out",
    ),
    Flag("--out", metavar="FILE", type=Path, help="write it there instead of printing it"),
)
def schema(args: argparse.Namespace) -> int:
    """Print or write the schema."""
    text = json_text(_schema(args.what), indent=1)
    if args.out is None:
        print(text)
    else:
        from moesim.files import write_atomically

        write_atomically(args.out, (text + "\n").encode())
    return 0


def _schema(what: str) -> dict[str, Any]:
    if what == "plan":
        from moesim.planner.serving_plan import any_plan_json_schema

        return any_plan_json_schema()
    if what == "serving":
        from moesim.serving.loading import serving_json_schema

        return serving_json_schema()
    if what == "study":
        from moesim.sweeper.study import study_json_schema

        return study_json_schema()
    from moesim.scenario.loader import json_schema

    return json_schema()


SHELLS = ("bash", "zsh", "fish", "tcsh")


@verb(
    "completion",
    "Print what a shell needs to complete moesim's verbs, flags and names.",
    Flag(
        "shell",
        metavar="SHELL",
        choices=SHELLS,
        help=f"one of {', '.join(SHELLS)}; "
        'put eval "$(moesim completion bash)" into ~/.bashrc, the same with zsh into ~/.zshrc',
    ),
)
def completion(args: argparse.Namespace) -> int:
    """Print the shell code. Raises UserError when argcomplete is not installed."""
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError:
        raise UserError("completion needs argcomplete: install moesim[completion]") from None
    print(shellcode(["moesim"], shell=args.shell))
    return 0
