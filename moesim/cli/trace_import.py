"""`moesim trace import KIND PATH --out FILE`: a routing trace from what others recorded; KIND auto finds out."""

import argparse
from pathlib import Path

from moesim.cli.flags import add_force, add_json, add_quiet, check_new, check_positive
from moesim.errors import UserError
from moesim.strict_json import json_text

NAME = "trace import"
SUMMARY = (
    "Make a routing trace of what others recorded: flame, megatron, sglang, vllm, trtllm, olmoe, a table (parquet), "
    "counts (CSV, JSON)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """KIND PATH, --out, --model, --experts, --top-k, --sequence-length, --tokens, --seed, --json, --quiet, --force."""
    text = "flame, megatron, sglang, vllm, trtllm, olmoe, table or counts; auto tells the form by the content"
    parser.add_argument("kind", metavar="KIND", help=text)
    parser.add_argument("path", metavar="PATH", type=Path, help="the file or folder that was recorded")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the trace, for routing.kind: trace")
    text = "a model of the catalogue or a config.json: gives experts and top-K, and refuses what differs"
    parser.add_argument("--model", metavar="NAME", help=text)
    parser.add_argument(
        "--experts", metavar="N", type=int, help="routed experts of a layer, where the source is silent"
    )
    parser.add_argument(
        "--top-k", metavar="K", type=int, help="experts of a token, where the source holds counts alone"
    )
    parser.add_argument(
        "--sequence-length", metavar="TOKENS", type=int, help="where the source does not part sequences"
    )
    parser.add_argument("--tokens", metavar="N", type=int, default=65_536, help="drawn from counts; 65,536 by default")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of what is drawn; 0 by default")
    add_json(parser)
    add_quiet(parser)
    add_force(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Read the source, save the trace, say what was read. Raises UserError."""
    check_new(args.out, force=args.force)
    check_positive(args, "experts", "top_k", "tokens", "sequence_length")
    from moesim.routing.importing import Asked, import_routing
    from moesim.trace import save_trace

    experts, top_k = _of_model(args)
    asked = Asked(
        experts=experts, top_k=top_k, sequence_length=args.sequence_length, tokens=args.tokens, seed=args.seed
    )
    trace = import_routing(args.kind, args.path, asked=asked)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_trace(trace, args.out, replace=args.force)
    if args.json:
        print(json_text(_summary(args, trace), indent=1))
    elif not args.quiet:
        for key, value in _summary(args, trace).items():
            print(f"{key.replace('_', ' ')}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return 0


def _of_model(args: argparse.Namespace) -> tuple[int | None, int | None]:
    """Experts and top-K: those of --model where it is given, else of their flags."""
    if args.model is None:
        return args.experts, args.top_k
    from moesim.cli.model import find

    model = find(args.model, [])
    if model.experts == 0:
        raise UserError(f"--model {args.model} is dense; name a model that has experts")
    for flag, value, of_model in (("experts", args.experts, model.experts), ("top-k", args.top_k, model.top_k)):
        if value not in (None, of_model):
            raise UserError(f"--{flag} {value}, but {args.model} has {of_model}; leave one of them out")
    return model.experts, model.top_k


def _summary(args: argparse.Namespace, trace: object) -> dict[str, object]:
    from moesim.scenario.routers import ROUTERS
    from moesim.trace import RoutingTrace

    assert isinstance(trace, RoutingTrace)
    drawn = ROUTERS[trace.router.kind].drawn
    return {
        "trace": str(args.out),
        "form": trace.provenance["form"],
        "read": f"counts, from which {trace.final.num_tokens} tokens were drawn" if drawn else "experts of every token",
        "steps": [step.step for step in trace.steps],
        "layers": trace.provenance["layers"],
        "experts": trace.router.num_experts,
        "top_k": trace.router.top_k,
        "sequences": trace.num_sequences,
        "sequence_length": trace.sequence_length,
        "notes": trace.provenance["notes"] or ["none"],
    }
