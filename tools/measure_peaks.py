"""Peaks of memory of programs of transformers, measured on a GPU by moment of a step: docs/memory.md.

    python tools/measure_peaks.py --out FOLDER [--half 0 | 1] [--seconds 250] [--only NAME] [--list]
    torchrun --nproc-per-node 2 tools/measure_peaks.py --out FOLDER --libraries
    python tools/measure_peaks.py --out FOLDER --scenarios [--gpus 1 2]

A training case is a few layers of a published architecture: forward and loss, backward, optimizer, with the attention,
checkpointing, optimizer and micro-batches that it names. A serving case prefills prompts into a static cache and
decodes. Of each: bytes held between steps, the allocator's peak at each moment, what it reserved, and what the device
has in use beyond that (the CUDA context and the libraries, as nvidia-smi counts them). `--libraries`: what a process
takes that holds no tensors, before and after its first GEMMs and collectives. Cases marked blind are kept out of
every choice of the simulator. Needs torch, transformers and a GPU, and nothing of moesim but for `--scenarios`: a few
short steps of each scenario of the shipped validation tables, with `memory` per rank by part of a step in
`FOLDER/NAME.json`; an interrupted call goes on where it was.
"""

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parent))
from architectures import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3_LIKE,
    GLM_SMALL,
    MIXTRAL,
    MIXTRAL_SMALL,
    OLMOE,
    QWEN3,
    QWEN3_235,
    QWEN3_SMALL,
    transformers_model,
)

QWEN, MIX, OLM = "Qwen3MoeConfig", "MixtralConfig", "OlmoeConfig"
V2, V3, GLM = "DeepseekV2Config", "DeepseekV3Config", "Glm4MoeConfig"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its layers, sequences and tokens of a micro-batch; `cache`: tokens of a static cache, 0 for training."""

    name: str
    family: str
    sizes: dict[str, Any]
    layers: int
    batch: int
    sequence: int
    attention: str = "sdpa"
    checkpointing: bool = False
    optimizer: str = "fused"
    micro_batches: int = 1
    cache: int = 0
    blind: bool = False


def _cases(*rows: tuple[str, str, dict[str, Any], tuple[int, int, int], dict[str, Any]]) -> list[Case]:
    """Every second row is blind."""
    return [
        Case(
            name=name,
            family=family,
            sizes=sizes,
            layers=shape[0],
            batch=shape[1],
            sequence=shape[2],
            blind=number % 2 > 0,
            **more,
        )
        for number, (name, family, sizes, shape, more) in enumerate(rows)
    ]


AGAIN, EACH, EAGER = {"checkpointing": True}, {"optimizer": "foreach"}, {"attention": "eager"}
CASES = _cases(
    ("qwen3", QWEN, QWEN3, (4, 2, 4096), {}),
    ("qwen3-short", QWEN, QWEN3, (4, 1, 2048), {}),
    ("qwen3-again", QWEN, QWEN3, (3, 4, 4096), AGAIN),
    ("qwen3-wide-batch", QWEN, QWEN3, (2, 8, 2048), {}),
    ("qwen3-eager", QWEN, QWEN3, (2, 1, 4096), EAGER),
    ("qwen3-each", QWEN, QWEN3, (3, 2, 2048), EACH),
    ("qwen3-small", QWEN, QWEN3_SMALL, (6, 4, 4096), {}),
    ("qwen3-small-again", QWEN, QWEN3_SMALL, (12, 4, 4096), AGAIN),
    ("qwen3-small-twice", QWEN, QWEN3_SMALL, (6, 2, 4096), {"micro_batches": 2}),
    ("qwen3-235", QWEN, QWEN3_235, (1, 2, 4096), {}),
    ("mixtral", MIX, MIXTRAL, (2, 2, 4096), {}),
    ("mixtral-small", MIX, MIXTRAL_SMALL, (4, 2, 4096), {}),
    ("mixtral-small-again", MIX, MIXTRAL_SMALL, (6, 4, 4096), AGAIN),
    ("mixtral-long", MIX, MIXTRAL_SMALL, (3, 1, 16384), {}),
    ("mixtral-each", MIX, MIXTRAL_SMALL, (4, 2, 2048), EACH),
    ("mixtral-eager", MIX, MIXTRAL_SMALL, (3, 2, 4096), EAGER),
    ("mixtral-thrice", MIX, MIXTRAL_SMALL, (4, 2, 2048), {"micro_batches": 3}),
    ("olmoe", OLM, OLMOE, (6, 2, 4096), {}),
    ("olmoe-big", OLM, OLMOE, (4, 8, 2048), {}),
    ("olmoe-again", OLM, OLMOE, (8, 8, 2048), AGAIN),
    ("olmoe-eager", OLM, OLMOE, (3, 4, 2048), EAGER),
    ("olmoe-each", OLM, OLMOE, (8, 1, 2048), EACH),
    ("olmoe-short", OLM, OLMOE, (8, 1, 1024), {}),
    ("olmoe-twice", OLM, OLMOE, (6, 2, 4096), {"micro_batches": 2}),
    ("v2-lite", V2, DEEPSEEK_V2_LITE, (4, 2, 4096), {}),
    ("v2-lite-big", V2, DEEPSEEK_V2_LITE, (3, 6, 2048), {}),
    ("v2-lite-again", V2, DEEPSEEK_V2_LITE, (5, 4, 2048), AGAIN),
    ("v3-like", V3, DEEPSEEK_V3_LIKE, (5, 4, 2048), {}),
    ("v3-like-again", V3, DEEPSEEK_V3_LIKE, (7, 8, 2048), AGAIN),
    ("v3-like-short", V3, DEEPSEEK_V3_LIKE, (4, 1, 2048), {}),
    ("glm", GLM, GLM_SMALL, (5, 2, 4096), {}),
    ("glm-again", GLM, GLM_SMALL, (6, 6, 4096), AGAIN),
    ("glm-each", GLM, GLM_SMALL, (4, 3, 2048), EACH),
    ("glm-big", GLM, GLM_SMALL, (3, 6, 4096), {}),
    ("serve-olmoe", OLM, OLMOE, (8, 16, 1024), {"cache": 2048}),
    ("serve-qwen3", QWEN, QWEN3, (6, 32, 512), {"cache": 1024}),
    ("serve-mixtral", MIX, MIXTRAL_SMALL, (8, 8, 4096), {"cache": 8192}),
    ("serve-qwen3-small", QWEN, QWEN3_SMALL, (16, 64, 256), {"cache": 1280}),
    ("serve-olmoe-long", OLM, OLMOE, (8, 2, 8192), {"cache": 16384}),
    ("serve-glm", GLM, GLM_SMALL, (8, 16, 2048), {"cache": 4096}),
)


def module(case: Case, device: str) -> torch.nn.Module:
    """The model in bf16 on a device."""
    with torch.device(device):
        model = transformers_model(
            case.family,
            case.sizes,
            layers=case.layers,
            length=max(case.sequence, case.cache),
            attention=case.attention,
            caches=case.cache > 0,
        )
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    return model  # type: ignore[no-any-return]


def loss_of(case: Case, model: torch.nn.Module, device: str) -> Callable[[], torch.Tensor]:
    """The loss of one micro-batch of random tokens."""
    tokens = torch.randint(case.sizes["vocab_size"], (case.batch, case.sequence), device=device)
    return lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss


class Peaks:
    """The allocator's peak at each moment."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def begin(self) -> None:
        """From here on a moment runs."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def end(self, moment: str) -> None:
        """It ends."""
        torch.cuda.synchronize()
        self.found[moment] = max(self.found.get(moment, 0), torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()


def training(case: Case, peaks: Peaks, device: str) -> dict[str, int]:
    """Three steps, of which the last counts."""
    model = module(case, device)
    loss = loss_of(case, model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, **{case.optimizer: True})
    for number in range(3):
        counts = number == 2
        peaks.begin()
        for _ in range(case.micro_batches):
            value = loss()
            if counts:
                peaks.found["kept"] = max(peaks.found.get("kept", 0), torch.cuda.memory_allocated())
                peaks.end("forward")
            value.backward()
            if counts:
                peaks.end("backward")
            del value
        optimizer.step()
        if counts:
            peaks.end("optimizer")
        optimizer.zero_grad(set_to_none=True)
    return {"parameters": sum(weight.numel() for weight in model.parameters())}


@torch.no_grad()
def serving(case: Case, peaks: Peaks, device: str) -> dict[str, int]:
    """Prompts into a static cache, then four tokens each."""
    import transformers

    model = module(case, device).eval()
    found = {"parameters": sum(weight.numel() for weight in model.parameters())}
    found["weights"] = torch.cuda.memory_allocated()
    cache = transformers.StaticCache(config=model.config, max_cache_len=case.cache)
    tokens = torch.randint(case.sizes["vocab_size"], (case.batch, case.sequence), device=device)
    peaks.begin()
    last = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
    peaks.end("prefill")
    found["held"] = torch.cuda.memory_allocated()
    for number in range(4):
        at = torch.tensor([case.sequence + number], device=device)
        out = model(
            input_ids=last[:, None], past_key_values=cache, use_cache=True, position_ids=at.expand(case.batch, 1)
        )
        last = out.logits[:, -1].argmax(-1)
        del out
    peaks.end("decode")
    return found


def measured(case: Case, device: str) -> dict[str, int]:
    """Bytes of one case."""
    peaks = Peaks()
    found = (serving if case.cache else training)(case, peaks, device)
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    more = {"reserved": torch.cuda.max_memory_reserved(), "beside": total - free - reserved}
    return found | peaks.found | more


def libraries(out: Path) -> None:
    """What a process takes of the device beside its tensors, step by step, on every rank."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    found: dict[str, dict[str, int]] = {}

    def note(name: str) -> None:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        found[name] = {"used": total - free, "reserved": torch.cuda.memory_reserved(),
                       "allocated": torch.cuda.memory_allocated()}  # fmt: skip

    x = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
    note("context")
    x @ x
    note("gemm")
    torch.nn.functional.scaled_dot_product_attention(*(torch.ones(1, 8, 256, 64, device="cuda").bfloat16(),) * 3)
    note("attention")
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    dist.all_reduce(x)
    note("all-reduce")
    big = torch.ones(1 << 28, device="cuda", dtype=torch.uint8)
    dist.all_reduce(big)
    note("all-reduce of 256 MB")
    dist.all_to_all_single(torch.empty_like(big), big)
    note("all-to-all of 256 MB")
    group = dist.new_group(list(range(dist.get_world_size())))
    dist.all_reduce(big, group=group)
    note("second group")
    if rank == 0:
        (out / "libraries.json").write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "found": found}))
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def scenarios(out: Path, gpus: list[int]) -> None:
    """Every case of the validation tables on so many GPUs once, whichever table names it."""
    from moesim.validation.comparison import SHIPPED_TABLES, shipped_table
    from moesim.validation.measurement import Effort
    from moesim.validation.real_runs import measure_cases

    cases = {row.case.name: row.case for name in SHIPPED_TABLES for row in shipped_table(name).rows}
    chosen = [case for case in cases.values() if case.gpus in gpus]
    effort = Effort(seconds=0.2, least=2, most=3, warm=2, instrumented=1)
    measure_cases(chosen, device="cuda", folder=out, effort=effort, log=print)


def main() -> None:
    """Measure the cases in turn until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--half", type=int)
    parser.add_argument("--seconds", type=float, default=250.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--libraries", action="store_true")
    parser.add_argument("--scenarios", action="store_true")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="of --scenarios")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.libraries:
        libraries(given.out)
        return
    if given.scenarios:
        scenarios(given.out, given.gpus)
        return
    cases = [case for case in CASES if given.only in case.name]
    if given.half is not None:  # both halves have blind cases
        cases = [case for number, case in enumerate(cases) if number // 2 % 2 == given.half]
    if given.list:
        print(*(json.dumps(asdict(case)) for case in cases), sep="\n")
        return
    device = f"cuda:{given.half or 0}"
    torch.cuda.set_device(device)
    begin, rows = time.perf_counter(), []
    for case in cases:
        started = time.perf_counter()
        if started - begin > given.seconds:
            break
        try:
            found: dict[str, Any] = dict(measured(case, device))
        except Exception as error:  # the next case may well run
            found = {"error": f"{type(error).__name__}: {error}; {traceback.format_exc(limit=-2)}"[:900]}
        rows.append({"case": asdict(case), **found})
        print(f"{case.name}: {found.get('error', found)} ({time.perf_counter() - started:.0f} s)", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        (given.out / f"peaks-{given.half or 0}.json").write_text(json.dumps({"machine": machine, "steps": rows}))


if __name__ == "__main__":
    main()
