"""Training steps of programs of libraries, measured and traced on the GPUs at hand, for docs/imported-steps.md.

    python tools/measure_library_steps.py --out FOLDER [--mode one] [--half 0 | 1] [--seconds 200] [--list]
    torchrun --nproc-per-node 2 tools/measure_library_steps.py --out FOLDER --mode many

A case is a few layers of a published architecture in bf16, by transformers or by torchtitan (its DeepSeek model), on
one GPU or on two: DDP, FSDP2 (each layer a unit), or torchtitan's expert parallelism with one all-reduce of all other
gradients behind the backward pass. Forward, loss, backward, fused AdamW, eager. The first size of each program is
traced; the third is kept out of every choice of the simulator. Needs torch, transformers, torchtitan and GPUs, and
nothing of moesim.
"""

import argparse
import contextlib
import functools
import gc
import gzip
import importlib.util
import json
import math
import os
import statistics
import sys
import time
import traceback
import types
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._profiler import _ExperimentalConfig
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).parent))
from architectures import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3_LIKE,
    DEEPSEEK_V3_OTHER,
    DOTS,
    ERNIE,
    GLM_SMALL,
    GLM_WIDE,
    GPT_OSS,
    GPT_OSS_NARROW,
    GRANITE,
    MIXTRAL,
    MIXTRAL_SMALL,
    OLMOE,
    OLMOE_NARROW,
    QWEN2,
    QWEN3,
    QWEN3_WIDE,
    transformers_model,
)

TITAN = "torchtitan"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A program, its layers and the sequences and tokens of one rank's step."""

    name: str
    family: str
    layers: int
    batch: int
    sequence: int
    sizes: dict[str, Any]
    mode: str = "one"
    traced: bool = False
    blind: bool = False


def _three(
    name: str,
    family: str,
    sizes: dict[str, Any],
    *shapes: tuple[int, int, int],
    mode: str = "one",
    letters: str = "abc",
    blind: str = "cde",
) -> Any:
    """Layers, sequences and tokens of each size of one program: a traced, b seen, others blind."""
    return [
        Case(
            name=f"{name}-{letter}",
            family=family,
            layers=layers,
            batch=batch,
            sequence=sequence,
            sizes=sizes,
            mode=mode,
            traced=letter == "a",
            blind=letter in blind,
        )
        for letter, (layers, batch, sequence) in zip(letters, shapes, strict=True)
    ]


def _small(name: str, family: str, sizes: dict[str, Any], *, mode: str = "one", blind: bool = False) -> Case:
    """Eight layers of few experts and tokens, whose host is the bound."""
    counts = "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"
    experts = {key: 8 for key in counts if key in sizes}
    top = "moe_k" if "moe_k" in sizes else "num_experts_per_tok"
    tops = {top: 2, "vocab_size": 4096} | ({"n_group": 1, "topk_group": 1} if "n_group" in sizes else {})
    small = sizes | experts | tops
    return Case(name=name, family=family, layers=8, batch=1, sequence=256, sizes=small, mode=mode, blind=blind)


CASES = (
    *_three("qwen3", "Qwen3MoeConfig", QWEN3, (3, 2, 4096), (5, 1, 8192), (2, 6, 4096)),
    *_three("mixtral", "MixtralConfig", MIXTRAL, (2, 1, 4096), (3, 4, 2048), (2, 4, 4096)),
    *_three("olmoe", "OlmoeConfig", OLMOE, (4, 2, 2048), (8, 4, 2048), (5, 3, 4096)),
    *_three("deepseek-v2-lite", "DeepseekV2Config", DEEPSEEK_V2_LITE, (3, 2, 2048), (5, 4, 2048), (4, 3, 4096)),
    *_three("deepseek-v3-like", "DeepseekV3Config", DEEPSEEK_V3_LIKE, (3, 2, 2048), (5, 4, 2048), (4, 6, 2048)),
    *_three("glm-small", "Glm4MoeConfig", GLM_SMALL, (4, 2, 2048), (3, 3, 4096), (6, 6, 2048)),
    *_three("gpt-oss", "GptOssConfig", GPT_OSS, (3, 1, 2048), (2, 2, 2048), (4, 3, 1024)),
    *_three("titan", TITAN, DEEPSEEK_V2_LITE, (3, 2, 2048), (4, 2, 4096), (3, 6, 2048)),
    *_three("ddp-olmoe", "OlmoeConfig", OLMOE, (4, 2, 2048), (4, 4, 2048), (6, 2, 4096), mode="ddp"),
    *_three("ddp-mixtral", "MixtralConfig", MIXTRAL_SMALL, (2, 2, 4096), (4, 2, 2048), (3, 4, 4096), mode="ddp"),
    *_three("fsdp-qwen3", "Qwen3MoeConfig", QWEN3, (3, 2, 2048), (4, 2, 4096), (6, 1, 4096), mode="fsdp2"),
    *_three("fsdp-mixtral", "MixtralConfig", MIXTRAL, (2, 1, 4096), (2, 4, 2048), (3, 2, 4096), mode="fsdp2"),
    *_three("ep-titan", TITAN, DEEPSEEK_V2_LITE, (3, 2, 2048), (4, 2, 4096), (3, 4, 2048), mode="ep"),
)
SECOND_CASES = (
    *_three("qwen3", "Qwen3MoeConfig", QWEN3, (4, 2, 6144), letters="d"),
    *_three("mixtral", "MixtralConfig", MIXTRAL, (2, 5, 2048), letters="d"),
    *_three("olmoe", "OlmoeConfig", OLMOE, (6, 5, 2048), letters="d"),
    *_three("deepseek-v2-lite", "DeepseekV2Config", DEEPSEEK_V2_LITE, (6, 1, 8192), letters="d"),
    *_three("deepseek-v3-like", "DeepseekV3Config", DEEPSEEK_V3_LIKE, (7, 2, 4096), letters="d"),
    *_three("glm-small", "Glm4MoeConfig", GLM_SMALL, (5, 1, 8192), letters="d"),
    *_three("gpt-oss", "GptOssConfig", GPT_OSS, (3, 2, 1536), letters="d"),
    *_three("titan", TITAN, DEEPSEEK_V2_LITE, (5, 2, 3072), letters="d"),
    _small("small-qwen3", "Qwen3MoeConfig", QWEN3),
    _small("small-mixtral", "MixtralConfig", MIXTRAL_SMALL, blind=True),
    _small("small-olmoe", "OlmoeConfig", OLMOE),
    _small("small-deepseek-v2-lite", "DeepseekV2Config", DEEPSEEK_V2_LITE),
    _small("small-deepseek-v3-like", "DeepseekV3Config", DEEPSEEK_V3_LIKE, blind=True),
    _small("small-glm", "Glm4MoeConfig", GLM_SMALL, blind=True),
    _small("small-gpt-oss", "GptOssConfig", GPT_OSS),
    _small("small-titan", TITAN, DEEPSEEK_V2_LITE),
    *_three("ep-titan", TITAN, DEEPSEEK_V2_LITE, (5, 2, 2048), (2, 6, 4096), mode="ep", letters="de"),
    *_three("fsdp-titan", TITAN, DEEPSEEK_V2_LITE, (3, 2, 2048), (4, 2, 4096), (3, 4, 2048), mode="fsdp2"),
    *_three("ddp-qwen3", "Qwen3MoeConfig", QWEN3, (3, 1, 4096), (2, 4, 2048), mode="ddp", letters="ac"),
    *_three("fsdp-olmoe", "OlmoeConfig", OLMOE, (4, 2, 2048), (6, 4, 2048), mode="fsdp2", letters="ac"),
    *_three(
        "ddp-deepseek-v2-lite",
        "DeepseekV2Config",
        DEEPSEEK_V2_LITE,
        (3, 2, 2048),
        (4, 2, 4096),
        mode="ddp",
        letters="ac",
    ),
    *_three("fsdp-glm-small", "Glm4MoeConfig", GLM_SMALL, (3, 2, 2048), (5, 3, 4096), mode="fsdp2", letters="ac"),
    *_three("ddp-glm-small", "Glm4MoeConfig", GLM_SMALL, (3, 2, 2048), (4, 3, 4096), mode="ddp", letters="ac"),
    *_three(
        "fsdp-deepseek-v2-lite",
        "DeepseekV2Config",
        DEEPSEEK_V2_LITE,
        (3, 2, 2048),
        (5, 2, 4096),
        mode="fsdp2",
        letters="ac",
    ),
    *_three("ddp-gpt-oss", "GptOssConfig", GPT_OSS, (2, 1, 2048), (3, 2, 1024), mode="ddp", letters="ac"),
    *_three("fsdp-gpt-oss", "GptOssConfig", GPT_OSS, (2, 1, 2048), (3, 2, 1024), mode="fsdp2", letters="ac"),
    _small("ddp-small-olmoe", "OlmoeConfig", OLMOE, mode="ddp"),
    _small("fsdp-small-qwen3", "Qwen3MoeConfig", QWEN3, mode="fsdp2"),
    _small("fsdp-small-mixtral", "MixtralConfig", MIXTRAL_SMALL, mode="fsdp2", blind=True),
)
TP_QWEN3 = ((3, 2, 2048), (3, 2, 4096), (3, 4, 4096), (6, 2, 2048))
_sizes = functools.partial(_three, letters="ac", blind="ac")
# Models and widths of which nothing was seen before; each size was predicted before it was looked at. tp and hf-ep are
# transformers' own tensor and expert parallelism, whose ranks share their tokens.
THIRD_CASES = (
    *_sizes("qwen3-wide", "Qwen3MoeConfig", QWEN3_WIDE, (3, 2, 3072), (4, 3, 4096)),
    *_sizes("olmoe-narrow", "OlmoeConfig", OLMOE_NARROW, (5, 2, 2048), (7, 4, 3072)),
    *_sizes("deepseek-v3-other", "DeepseekV3Config", DEEPSEEK_V3_OTHER, (3, 2, 2048), (4, 2, 5120)),
    *_sizes("glm-wide", "Glm4MoeConfig", GLM_WIDE, (3, 2, 2048), (4, 2, 5120)),
    *_sizes("gpt-oss-narrow", "GptOssConfig", GPT_OSS_NARROW, (3, 1, 2048), (4, 2, 2048)),
    *_sizes("qwen2", "Qwen2MoeConfig", QWEN2, (3, 2, 2048), (4, 3, 4096)),
    *_sizes("ernie", "Ernie4_5_MoeConfig", ERNIE, (3, 2, 2048), (4, 2, 4096)),
    *_sizes("dots", "Dots1Config", DOTS, (4, 2, 2048), (5, 2, 6144)),
    *_sizes("granite", "GraniteMoeConfig", GRANITE, (6, 2, 2048), (9, 4, 3072)),
    _small("small-qwen2", "Qwen2MoeConfig", QWEN2, blind=True),
    _small("small-ernie", "Ernie4_5_MoeConfig", ERNIE, blind=True),
    _small("small-dots", "Dots1Config", DOTS, blind=True),
    _small("small-granite", "GraniteMoeConfig", GRANITE, blind=True),
    _small("small-olmoe-narrow", "OlmoeConfig", OLMOE_NARROW, blind=True),
    *_three("tp-qwen3", "Qwen3MoeConfig", QWEN3, *TP_QWEN3, mode="tp", letters="acde", blind=""),
    *_three("hf-ep-qwen3", "Qwen3MoeConfig", QWEN3, *TP_QWEN3[:3], mode="hf-ep", letters="acd", blind="ac"),
    *_three("tp-mixtral", "MixtralConfig", MIXTRAL, (2, 2, 4096), mode="tp", letters="c", blind=""),
    *_three("hf-ep-mixtral", "MixtralConfig", MIXTRAL, (2, 2, 4096), mode="hf-ep", letters="c"),
    *_three("tp-glm-small", "Glm4MoeConfig", GLM_SMALL, (4, 2, 4096), mode="tp", letters="c", blind=""),
    *_three("ddp-qwen2", "Qwen2MoeConfig", QWEN2, (3, 2, 4096), mode="ddp", letters="c"),
    *_three("fsdp-ernie", "Ernie4_5_MoeConfig", ERNIE, (4, 2, 4096), mode="fsdp2", letters="c"),
    *_three("ddp-granite", "GraniteMoeConfig", GRANITE, (8, 2, 4096), mode="ddp", letters="c"),
    *_three("fsdp-dots", "Dots1Config", DOTS, (5, 2, 4096), mode="fsdp2", letters="c"),
    _small("ddp-small-qwen2", "Qwen2MoeConfig", QWEN2, mode="ddp", blind=True),
    _small("fsdp-small-granite", "GraniteMoeConfig", GRANITE, mode="fsdp2", blind=True),
)
_more = functools.partial(_three, letters="e", blind="e")
# Further sizes of the same, measured behind the rules of corrections: predicted from their first sizes' traces.
FOURTH_CASES = (
    *_more("qwen3-wide", "Qwen3MoeConfig", QWEN3_WIDE, (5, 1, 8192)),
    *_more("olmoe-narrow", "OlmoeConfig", OLMOE_NARROW, (6, 2, 4096)),
    *_more("deepseek-v3-other", "DeepseekV3Config", DEEPSEEK_V3_OTHER, (3, 4, 4096)),
    *_more("glm-wide", "Glm4MoeConfig", GLM_WIDE, (3, 4, 3072)),
    *_more("gpt-oss-narrow", "GptOssConfig", GPT_OSS_NARROW, (3, 2, 1536)),
    *_more("qwen2", "Qwen2MoeConfig", QWEN2, (5, 2, 6144)),
    *_more("ernie", "Ernie4_5_MoeConfig", ERNIE, (5, 4, 2048)),
    *_more("dots", "Dots1Config", DOTS, (6, 3, 3072)),
    *_more("granite", "GraniteMoeConfig", GRANITE, (7, 3, 4096)),
    *_more("qwen3", "Qwen3MoeConfig", QWEN3, (4, 3, 3072)),
    *_more("olmoe", "OlmoeConfig", OLMOE, (7, 2, 4096)),
    *_more("deepseek-v2-lite", "DeepseekV2Config", DEEPSEEK_V2_LITE, (5, 2, 6144)),
    *_more("deepseek-v3-like", "DeepseekV3Config", DEEPSEEK_V3_LIKE, (6, 3, 3072)),
    *_more("glm-small", "Glm4MoeConfig", GLM_SMALL, (5, 4, 3072)),
    *_more("mixtral", "MixtralConfig", MIXTRAL, (3, 3, 3072)),
)
SETS = {"first": CASES, "second": SECOND_CASES, "third": THIRD_CASES, "fourth": FOURTH_CASES}
STEPS_AHEAD = 3


def closure(case: Case, model: torch.nn.Module, device: str) -> Any:
    """The loss of one micro-batch of random tokens."""
    tokens = torch.randint(case.sizes["vocab_size"], (case.batch, case.sequence), device=device)
    if case.family == TITAN:
        return lambda: cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
    return lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss


def module(case: Case, device: str) -> torch.nn.Module:
    """The program's module in bf16 on a device."""
    with torch.device(device):
        return _titan(case, device) if case.family == TITAN else _transformers(case)


def _transformers(case: Case) -> torch.nn.Module:
    attention = "eager" if case.family == "GptOssConfig" else "sdpa"
    return transformers_model(case.family, case.sizes, layers=case.layers, length=case.sequence, attention=attention)


def _titan(case: Case, device: str) -> torch.nn.Module:
    arguments, moe_arguments, model_class = titan_classes()
    size = case.sizes
    moe = moe_arguments(
        num_experts=size["n_routed_experts"],
        num_shared_experts=size["n_shared_experts"],
        top_k=size["num_experts_per_tok"],
        score_func="softmax",
        score_before_experts=False,
    )
    given = arguments(
        vocab_size=size["vocab_size"],
        dim=size["hidden_size"],
        inter_dim=size["intermediate_size"],
        moe_inter_dim=size["moe_intermediate_size"],
        n_layers=case.layers,
        n_heads=size["num_attention_heads"],
        moe_args=moe,
        max_seq_len=case.sequence,
    )
    given.moe_impl = "standard"  # as the trainer sets it
    model = model_class(given)
    if device != "meta":
        with torch.no_grad():
            model.init_weights(buffer_device=torch.device(device))
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    return model  # type: ignore[no-any-return]


@functools.cache
def titan_classes() -> Any:
    """Of torchtitan's DeepSeek model, without what its trainer alone imports (datasets, tokenizers, tyro)."""
    found = importlib.util.find_spec("torchtitan")
    assert found is not None and found.submodule_search_locations, "pip install torchtitan==0.2.2"
    root = Path(next(iter(found.submodule_search_locations)))

    def package(name: str, path: str, **members: Any) -> None:
        made = types.ModuleType(f"torchtitan{name}")
        made.__path__ = [str(root / path)]
        vars(made).update(members)
        sys.modules[made.__name__] = made

    nothing = type("Nothing", (), {})
    for name in ("", ".models", ".models.deepseek_v3", ".protocols", ".distributed", ".components"):
        package(name, name[1:].replace(".", "/"))
    package(".config", "config", JobConfig=nothing, TORCH_DTYPE_MAP={})
    package(".components.tokenizer", "components", BaseTokenizer=nothing)
    from torchtitan.protocols.model import ModelProtocol

    package(".protocols.train_spec", "protocols", ModelProtocol=ModelProtocol)
    with _triton():
        import torchtitan.models.moe.kernels  # noqa: F401
    from torchtitan.models.deepseek_v3.model.args import DeepSeekV3ModelArgs
    from torchtitan.models.deepseek_v3.model.model import DeepSeekV3Model
    from torchtitan.models.moe import MoEArgs

    return DeepSeekV3ModelArgs, MoEArgs, DeepSeekV3Model


class _NoKernel:
    """A kernel of Triton that does nothing: on the meta device."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def _triton() -> Any:
    """Triton, or where there is none what torchtitan needs of it to be imported and recorded on the meta device."""
    if importlib.util.find_spec("triton") is not None:
        yield
        return
    stub, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    vars(stub).update(jit=lambda function: _NoKernel(), language=language)
    vars(language).update(constexpr=int)
    sys.modules |= {"triton": stub, "triton.language": language}
    try:
        yield
    finally:
        del sys.modules["triton"], sys.modules["triton.language"]


def spread(case: Case, model: torch.nn.Module) -> tuple[Any, Any]:
    """The module over all ranks, and what comes between the backward pass and the optimizer."""
    if case.mode == "ddp":
        local = int(os.environ["LOCAL_RANK"])
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=[local]), lambda: None
    if case.mode == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        layers = model.layers.values() if case.family == TITAN else model.model.layers
        for layer in layers:
            fully_shard(layer)
        return fully_shard(model), lambda: None
    if case.mode in ("tp", "hf-ep"):
        return _of_transformers(case, model), lambda: None
    if case.mode == "ep":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import parallelize_module
        from torchtitan.distributed.expert_parallel import ExpertParallel

        mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("ep",))
        for name, part in model.named_modules():
            if name.endswith("moe.experts"):
                parallelize_module(part, mesh, ExpertParallel())
        dense = [weight for name, weight in model.named_parameters() if ".moe.experts." not in name]
        return model, lambda: _sum_gradients(dense)
    return model, lambda: None


def _of_transformers(case: Case, model: Any) -> Any:
    """By transformers' own plan of tensor or expert parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    ranks = dist.get_world_size()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (ranks,), mesh_dim_names=("tp",))
    model.config.distributed_config = DistributedConfig(tp_size=ranks, enable_expert_parallel=case.mode == "hf-ep")
    return apply_tensor_parallelism(model, mesh)


def _sum_gradients(weights: list[torch.nn.Parameter]) -> None:
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    torch._foreach_copy_(
        gradients,
        [
            each.view_as(gradient)
            for each, gradient in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)
        ],
    )


def measure(case: Case, out: Path, *, seconds: float) -> dict[str, Any]:
    """Seconds of steps in a row; a traced case writes the trace of one more."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    model, between = spread(case, module(case, device))
    torch.manual_seed(1 + (0 if case.mode in ("tp", "hf-ep") else int(os.environ.get("RANK", 0))))
    loss_of = closure(case, model, device)
    weights = [*model.parameters()]
    shared = [isinstance(weight, DTensor) for weight in weights]  # an optimizer's group is of one kind
    groups = [
        [each for each, is_shared in zip(weights, shared, strict=True) if is_shared is kind] for kind in set(shared)
    ]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-5, fused=True)

    def step() -> None:
        loss_of().backward()
        between()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    count = torch.tensor([max(12, math.ceil(seconds / ((time.perf_counter() - begin) / 2)))], device=device)
    if dist.is_initialized():
        dist.broadcast(count, 0)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(int(count) + 1)]
    marks[0].record()
    for number, mark in enumerate(marks[1:]):
        step()
        mark.record()
        if number >= STEPS_AHEAD:
            marks[number - STEPS_AHEAD].synchronize()
    torch.cuda.synchronize()
    times = [first.elapsed_time(second) / 1e3 for first, second in pairwise(marks)]
    found = {"sustained_s": statistics.median(times[len(times) // 2 :]), "spread_s": statistics.stdev(times[2:])}
    found |= {"steps": len(times), "parameters": sum(weight.numel() for weight in model.parameters())}
    found["memory"] = torch.cuda.max_memory_allocated()
    if case.traced:
        _trace(case, step, out)
    return found


def _trace(case: Case, step: Any, out: Path) -> None:
    waits = _ExperimentalConfig(enable_cuda_sync_events=True) if case.mode != "one" else None
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, record_shapes=True, experimental_config=waits) as profiler:
        step()
        torch.cuda.synchronize()
    if int(os.environ.get("RANK", 0)) == 0:
        plain = out / f"{case.name}.trace.json"
        profiler.export_chrome_trace(str(plain))
        (out / f"{case.name}.trace.json.gz").write_bytes(gzip.compress(plain.read_bytes(), 9))
        plain.unlink()


def main() -> None:
    """Measure the cases in turn until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mode", choices=("one", "many"), default="one")
    parser.add_argument("--set", choices=SETS, default="first", help="all but the first: measured on other days")
    parser.add_argument("--only", default="")
    parser.add_argument("--skip", default="", help="torchtitan leaves another order of attention kernels behind")
    parser.add_argument("--half", type=int)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--each", type=float, default=2.0)
    parser.add_argument("--quiet", action="store_true", help="print no times, so that predictions can be made blind")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    known = SETS[args.set]
    cases = [case for case in known if (case.mode == "one") == (args.mode == "one") and args.only in case.name]
    cases = [case for case in cases if not args.skip or args.skip not in case.name]
    cases = cases if args.half is None else cases[args.half :: 2]
    if args.list:
        print(*(json.dumps(asdict(case)) for case in cases), sep="\n")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if args.mode == "many":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    begin, done = time.perf_counter(), []
    file = args.out / f"steps-{args.mode}-{args.half or 0}.json"
    for case in cases:
        started = time.perf_counter()
        late = torch.tensor([float(started - begin > args.seconds - 12)], device="cuda")
        if dist.is_initialized():
            dist.broadcast(late, 0)
        if late.item():
            print(f"{case.name}: no time left", flush=True)
            continue
        try:
            found = measure(case, args.out, seconds=args.each)
        except Exception as error:  # the next case may well run
            place = traceback.format_exc(limit=-2)
            found = {"error": f"{type(error).__name__}: {error}; {place}"[:1200]}
        done.append({"case": asdict(case), **found})
        if int(os.environ.get("RANK", 0)) == 0:
            shown = found.get("error", "measured" if args.quiet else f"{1e3 * found.get('sustained_s', 0):.1f} ms")
            print(f"{case.name}: {shown[:900]} ({time.perf_counter() - started:.0f} s)", flush=True)
            machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
            file.write_text(json.dumps({"machine": machine, "steps": done}))
        gc.collect()
        torch.cuda.empty_cache()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
