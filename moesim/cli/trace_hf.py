"""`moesim trace hf MODEL_DIR --text FILE --out TRACE`: how the routers of a transformers model route a text."""

import argparse
from pathlib import Path

from moesim.cli.flags import add_force, add_json, add_quiet, check_new, check_positive
from moesim.strict_json import json_text

NAME = "trace hf"
SUMMARY = "Make a routing trace of a transformers MoE model in a local folder (safetensors) that reads a text."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL_DIR, --text, --out, --tokens, --sequence-length, --batch, --device, --json, --quiet, --force."""
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, help="folder with config.json and safetensors")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="what the model reads")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the trace, for routing.kind: trace")
    parser.add_argument("--tokens", metavar="N", type=int, default=65_536, help="read at most; 65,536 by default")
    text = "4,096 by default, or fewer where the model or the text ends before"
    parser.add_argument("--sequence-length", metavar="TOKENS", type=int, help=text)
    parser.add_argument("--batch", metavar="N", type=int, default=1, help="sequences read at a time; 1 by default")
    parser.add_argument("--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1 ...; auto: CUDA if any")
    add_json(parser)
    add_quiet(parser)
    add_force(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Load the model, read the text, save the trace, say what was seen. Raises UserError."""
    check_new(args.out, force=args.force)
    check_positive(args, "tokens", "sequence_length", "batch")
    from moesim.display import opened_display
    from moesim.routing.hooks import Reading, record_model
    from moesim.trace import save_trace

    reading = Reading(tokens=args.tokens, sequence_length=args.sequence_length, batch=args.batch, device=args.device)
    with opened_display(quiet=args.quiet) as display:

        def show(completed: int, total: int) -> None:
            if display is not None:
                display.show("tokens", completed=completed, total=total)

        trace = record_model(args.model, args.text, reading=reading, progress=show)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_trace(trace, args.out, replace=args.force)
    if args.json:
        print(json_text(_summary(args, trace), indent=1))
    elif not args.quiet:
        for key, value in _summary(args, trace).items():
            print(f"{key.replace('_', ' ')}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return 0


def _summary(args: argparse.Namespace, trace: object) -> dict[str, object]:
    from moesim.trace import RoutingTrace
    from moesim.trace.metrics import expert_load_LE, imbalance

    assert isinstance(trace, RoutingTrace)
    load_LE = expert_load_LE(trace.final, num_experts=trace.router.num_experts)
    return {
        "trace": str(args.out),
        "routers": trace.provenance["routers"],
        "router": trace.router.kind,
        "layers": trace.provenance["layers"],
        "experts": trace.router.num_experts,
        "top_k": trace.router.top_k,
        "groups": f"{trace.router.group_limit} of {trace.router.num_groups}",
        "sequences": trace.num_sequences,
        "sequence_length": trace.sequence_length,
        "imbalance": round(float(imbalance(load_LE).mean()), 3),
        "notes": trace.provenance["notes"] or ["none"],
    }
