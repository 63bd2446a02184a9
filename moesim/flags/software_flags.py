"""The `implementation` section and the flags of Megatron-LM that choose kernels: both ways, by one table.

A launch of Megatron-LM is `megatron`, or `megatron_local` without Transformer Engine's layers; every flag below sets
switches (`moesim.scenario.software`) otherwise, some of them only in Transformer Engine's layers, as in 0.19's code:
rows, router, activation and loss are not theirs.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from moesim.flags.arguments import Arguments
from moesim.flags.commands import Draft
from moesim.scenario import Scenario
from moesim.scenario.software import MEGATRON, MEGATRON_LOCAL

# Bare flags, and what they set. An activation's is that of gated networks, or of those that are not.
KERNELS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "--moe-permute-fusion": {"permute": "fused", "gather_backward": "fused", "combine": "fused"},
        "--moe-router-fusion": {"router": "fused"},
        "--cross-entropy-loss-fusion": {"loss": "fused"},
        "--fused-residual-rmsnorm": {"norm": "fused"},
        "--no-gradient-accumulation-fusion": {"accumulation": "buffer"},
        "--no-rope-fusion": {"rotary": "cached"},
        "--no-bias-swiglu-fusion": {"activation": "unfused"},
        "--no-bias-gelu-fusion": {"activation": "unfused"},
        "--enable-cuda-graph": {"cuda_graphs": "attention"},
        "--external-cuda-graph": {"cuda_graphs": "attention"},
    }
)
# What local layers take no notice of.
_OF_ENGINE = ("--fused-residual-rmsnorm", "--no-rope-fusion")
_OF_EXPERTS = ("--moe-permute-fusion", "--moe-router-fusion")
_ACTIVATION = {True: "--no-bias-swiglu-fusion", False: "--no-bias-gelu-fusion"}  # of gated networks, of others
_SAME = ("--external-cuda-graph",)  # another flag says as much
DROPOUT = 0.1  # of attention, as Megatron-LM has it without a word


def implementation_fields(args: Arguments, model: Mapping[str, Any]) -> dict[str, Any]:
    """The section: Megatron-Core at its defaults, and the switches that the flags set."""
    layers = args.word("--transformer-impl", "transformer_engine")
    local = layers == "local"
    if layers == "inference_optimized":
        args.note("--transformer-impl", "Transformer Engine's layers are simulated")
    fields: dict[str, Any] = {"kind": (MEGATRON_LOCAL if local else MEGATRON).name}
    other = _ACTIVATION[not model.get("gated", True)]
    for flag, settings in KERNELS.items():
        if args.has(flag) and local and flag in _OF_ENGINE:
            args.take(f"{flag}: local layers are without it")
        elif args.has(flag) and flag != other:
            fields |= settings
    fields |= _choices(args, model, local=local)
    if args.word("--moe-router-dtype", "") in ("fp32", "fp64"):
        fields["router_dtype"] = "fp32"
    if args.number("--attention-dropout", DROPOUT) > 0:
        fields["dropout"] = True
        if not args.has("--attention-dropout"):
            args.take(f"--attention-dropout {DROPOUT}, as Megatron-LM has it without a word")
    if not args.has("--sequence-parallel") and args.count("--tensor-model-parallel-size", 1) > 1:
        if model.get("experts"):
            args.note("--sequence-parallel", "with experts tensor ranks are simulated with it, as Megatron-LM wants it")
        else:
            fields["sequence_parallel"] = False
    return fields


def _choices(args: Arguments, model: Mapping[str, Any], *, local: bool) -> dict[str, Any]:
    """Attention and the experts' GEMMs: Transformer Engine's layers have the choice, local ones have neither."""
    fields: dict[str, Any] = {}
    backend = args.word("--attention-backend", "auto")
    if local and backend not in ("auto", "local"):
        args.take(f"--attention-backend {backend}: local layers have their own attention, unfused")
    elif backend in ("unfused", "local") and not local:
        fields["attention"] = "unfused"
    grouped = args.has("--moe-grouped-gemm")
    if local and grouped:
        args.take("--moe-grouped-gemm: local layers multiply expert by expert, as those of Megatron-Core 0.19 do")
    elif model.get("experts") and not grouped and not local:
        fields["expert_gemms"] = "each"
        args.take("without --moe-grouped-gemm: expert by expert, as Megatron-LM multiplies without a word")
    return fields


def write_implementation(draft: Draft, scenario: Scenario) -> None:
    """Flags of the kernels that the scenario's software has; what Megatron-Core has otherwise is left."""
    software, model, mesh = scenario.implementation.software, scenario.model, scenario.parallelism
    wanted = vars(scenario.implementation.switches)
    local = software is MEGATRON_LOCAL
    draft.say("--transformer-impl", "local", when=local)
    got = dict(vars((MEGATRON_LOCAL if local else MEGATRON).switches))
    for flag, settings in KERNELS.items():
        fits = all(wanted[name] == value for name, value in settings.items())
        meant = (
            flag not in _SAME and flag != _ACTIVATION[not model.gated] and (model.experts or flag not in _OF_EXPERTS)
        )
        if (
            fits
            and meant
            and not (local and flag in _OF_ENGINE)
            and any(got[name] != value for name, value in settings.items())
        ):
            draft.say(flag)
            got |= settings
    grouped = model.experts > 0 and not local and wanted["expert_gemms"] == "grouped"
    draft.say("--moe-grouped-gemm", when=grouped)
    draft.say("--attention-backend", "unfused", when=not local and wanted["attention"] == "unfused")
    draft.say("--attention-dropout", DROPOUT if wanted["dropout"] else 0.0)
    draft.say("--moe-router-dtype", "fp32", when=wanted["router_dtype"] == "fp32" and model.experts > 0)
    draft.say("--sequence-parallel", when=mesh.tensor > 1 and (wanted["sequence_parallel"] or model.experts > 0))
    got |= {name: wanted[name] for name in (("dropout",) if local else ("attention", "dropout"))}
    if model.experts:
        got["router_dtype"] = wanted["router_dtype"]
        got |= {} if local else {"expert_gemms": wanted["expert_gemms"]}
    if mesh.tensor > 1:
        got["sequence_parallel"] = wanted["sequence_parallel"] or model.experts > 0
    if software not in (MEGATRON, MEGATRON_LOCAL):
        draft.leave("implementation", f"Megatron-Core's kernels, not {software.about}")
        return
    for name, value in got.items():
        draft.leave(f"implementation.{name}", f"{value}", when=value != wanted[name])
