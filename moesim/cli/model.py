"""`moesim model`: parameters and FLOPs of a model of the catalogue or of a scenario."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli.flags import add_json
from moesim.errors import UserError

if TYPE_CHECKING:
    from moesim.scenario import Model

NAME = "model"
SUMMARY = "Print the parameters and FLOPs of a model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME, --sequence-length, --json."""
    parser.add_argument("model", metavar="NAME", nargs="?", help="a model of the catalogue, or a scenario file")
    parser.add_argument("--sequence-length", metavar="TOKENS", type=int, default=4096, help="4096 by default")
    add_json(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Print the counts, or the names of the catalogue when no model is named. Raises UserError."""
    from moesim.scenario import model_names

    if args.model is None:
        print("\n".join(model_names()))
        return 0
    if args.sequence_length <= 0:
        raise UserError(f"--sequence-length {args.sequence_length} is not a number of tokens; use e.g. 4096")
    counts = count(find(args.model), sequence_length=args.sequence_length)
    if args.json:
        print(json.dumps(counts, indent=1))
    else:
        from moesim.report.terminal import print_model

        print_model(args.model, counts)
    return 0


def find(name: str) -> "Model":
    """The model called `name`, or that of the scenario file `name`. Raises UserError with the names there are."""
    from moesim.scenario import Model, load_scenario, model_names
    from moesim.scenario.catalogue import model_preset

    if name in model_names():
        return Model.model_validate(model_preset(name))
    if Path(name).suffix in (".yaml", ".yml"):
        return load_scenario(name).model
    raise UserError(f"unknown model {name!r}; use one of {', '.join(model_names())}, or a scenario file")


def count(model: "Model", *, sequence_length: int) -> dict[str, Any]:
    """Parameters in elements and training FLOPs per token, as plain values."""
    from dataclasses import asdict

    from moesim.scenario.flops import forward_flops_per_token, model_flops_per_token, parameters

    held = parameters(model)
    forward = forward_flops_per_token(model, sequence_length=sequence_length, causal=True)
    return {
        "sequence_length": sequence_length,
        "parameters": {"total": held.total, "activated": held.activated, **asdict(held)},
        "forward_flops_per_token": dict(forward),
        "training_flops_per_token": {
            name: model_flops_per_token(model, sequence_length=sequence_length, causal=causal)
            for name, causal in (("causal", True), ("non_causal", False))
        },
    }
