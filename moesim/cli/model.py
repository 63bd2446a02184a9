"""`moesim model`: parameters, FLOPs and memory of a model of the catalogue, of a config.json or of a scenario."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli.flags import add_csv, add_json, add_overrides
from moesim.cli.outputs import print_csv
from moesim.errors import UserError
from moesim.strict_json import json_text

if TYPE_CHECKING:
    from moesim.scenario import Model

NAME = "model"
SUMMARY = "Print the parameters, FLOPs and memory of a model, or list the catalogue."

# Bytes per parameter of weights, gradients, master copy and both optimizer states together.
RECIPES = {
    "bf16, optimizer fp32": (2, 2, 0, 8),
    "bf16, all else fp32": (2, 4, 4, 8),
    "bf16, gradients and master fp32": (2, 4, 4, 4),
    "all bf16": (2, 2, 0, 4),
    "all fp32": (4, 4, 0, 8),
}
PARTS = ("weights", "gradients", "master", "optimizer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME, --list, --set, --sequence-length, --json, --csv."""
    text = "a model of the catalogue, a Hugging Face config.json (or its folder) or a scenario file"
    name: Any = parser.add_argument("model", metavar="NAME", nargs="?", help=text)
    name.completer = _names  # read by argcomplete alone
    parser.add_argument("--list", action="store_true", help="list the catalogue, as without NAME")
    add_overrides(parser)
    parser.add_argument("--sequence-length", metavar="TOKENS", type=int, default=4096, help="4096 by default")
    add_csv(add_json(parser))
    parser.set_defaults(execute=execute)


def _names(**_: object) -> tuple[str, ...]:
    from moesim.scenario import model_names

    return model_names()


def execute(args: argparse.Namespace) -> int:
    """Print the counts, or the catalogue when no model is named. Raises UserError."""
    if args.list or args.model is None:
        return _list(args)
    if args.sequence_length <= 0:
        raise UserError(f"--sequence-length {args.sequence_length} is not a number of tokens; use e.g. 4096")
    model = find(args.model, args.overrides)
    counts = count(model, sequence_length=args.sequence_length) | _source(args.model, model)
    if args.json:
        print(json_text(counts, indent=1))
    elif args.csv:
        print_csv([{"name": args.model} | counts])
    else:
        from moesim.report.catalogue_screens import print_model

        print_model(args.model, counts)
    return 0


def _list(args: argparse.Namespace) -> int:
    from moesim.scenario import model_names
    from moesim.scenario.flops import parameters

    sizes = {}
    for name in model_names():
        model = find(name, [])
        held = parameters(model)
        sizes[name] = {
            "total": held.total,
            "activated": held.activated,
            "layers": model.layers,
            "experts": model.experts,
            "top_k": model.top_k,
            "attention": model.attention.kind,
        }
    if args.json:
        print(json_text(sizes, indent=1))
    elif args.csv:
        print_csv([{"name": name} | _with_units(size) for name, size in sizes.items()])
    else:
        from moesim.report.catalogue_screens import print_catalogue

        print_catalogue(sizes)
    return 0


def _with_units(size: dict[str, Any]) -> dict[str, Any]:
    return {f"{key}_parameters" if key in ("total", "activated") else key: value for key, value in size.items()}


def find(name: str, overrides: list[str]) -> "Model":
    """The model called `name`, or that of the file `name`, with `--set model.key=value` applied.

    Raises UserError with the names there are, and for a model that contradicts itself.
    """
    from moesim.scenario import load_scenario, model_names, scenario_from_mapping
    from moesim.scenario.overrides import override_label

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


def _source(name: str, model: "Model") -> dict[str, Any]:
    """What became of the keys of a config.json, and what of the model's source is left out."""
    from moesim.scenario import model_names

    found: dict[str, Any] = {"left_out": list(model.left_out)}
    if Path(name).suffix == ".json" or (Path(name).is_dir() and name not in model_names()):
        from moesim.scenario.hf_config import read_hf_config

        keys = read_hf_config(Path(name)).keys
        found["config"] = {"model_type": keys.model_type, "read": list(keys.read), "harmless": list(keys.harmless)}
    return found


def count(model: "Model", *, sequence_length: int) -> dict[str, Any]:
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
            recipe: {part: held.total * size for part, size in zip(PARTS, sizes, strict=True)}
            for recipe, sizes in RECIPES.items()
        },
    }
