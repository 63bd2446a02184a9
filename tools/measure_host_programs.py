"""What small steps cost the host, beside what single pieces cost it on the same machine: docs/imported-steps.md.

    python tools/measure_host_programs.py --out FOLDER [--set first | second] [--device cpu] [--rounds 6]
    torchrun --nproc-per-node 2 tools/measure_host_programs.py --out FOLDER ...      # the cases of two GPUs

Pieces first (moesim/kernels/benchmarks/host_in_situ.py), then programs in rounds: of each a few steps in a row, part by
part, and between any two programs the steps of the pieces' surroundings, which tell how fast the host is just then.
Programs of transformers and torchtitan with narrow layers, and two in plain torch. Needs torch, transformers and
torchtitan, and nothing of moesim but that file.
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

sys.path.append(str(Path(__file__).parent))
from architectures import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3_LIKE,
    DOTS,
    ERNIE,
    GLM_SMALL,
    GPT_OSS,
    GRANITE,
    MIXTRAL_SMALL,
    OLMOE,
    QWEN2,
    QWEN3,
    dense_model,
)
from measure_host import _cpu, _narrow
from measure_library_steps import TITAN, Case, closure, module, spread

OWN, DENSE = "own", "dense"
IN_A_ROW, WARM_UP = 5, 4


class OwnLayer(nn.Module):
    """Attention with few keys, and experts with a shared one, as one writes them oneself."""

    def __init__(self, width: int, *, experts: int, biases: bool) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width, bias=biases), nn.Linear(width, width // 2, bias=biases)
        self.out, self.gate = nn.Linear(width, width, bias=biases), nn.Linear(width, experts)
        self.shared = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) if biases else None
        self.up = nn.Parameter(0.02 * torch.randn(experts, width, width))
        self.down = nn.Parameter(0.02 * torch.randn(experts, width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] to the same."""
        y = self.first(x)
        q = self.query(y).unflatten(-1, (-1, 64)).transpose(1, 2)
        k, v = self.key_value(y).unflatten(-1, (2, -1, 64)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.second(x)
        done = self.experts(y.flatten(0, 1)).view_as(x)
        return x + (done if self.shared is None else done + self.shared(y))

    def experts(self, x: Tensor) -> Tensor:
        """[T, H] to the same."""
        gates, chosen = self.gate(x).softmax(-1, dtype=torch.float32).topk(2, sorted=False)
        gates = gates / gates.sum(-1, keepdim=True)
        order = chosen.flatten().argsort()
        ends = torch.nn.functional.one_hot(chosen.flatten(), self.up.shape[0]).sum(0).cumsum(0).to(torch.int32)
        rows = nn.functional.grouped_mm(x[order // 2], self.up, offs=ends)
        rows = nn.functional.grouped_mm(nn.functional.gelu(rows), self.down, offs=ends)
        rows = rows * gates.flatten()[order].unsqueeze(-1).to(rows.dtype)
        return torch.zeros_like(x).index_add_(0, order // 2, rows)


class OwnModel(nn.Module):
    """Embedding, layers, head."""

    def __init__(self, *, layers: int, biases: bool, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 512)
        self.layers = nn.ModuleList(OwnLayer(512, experts=8, biases=biases) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(512), nn.Linear(512, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, S] to [B, S, V]."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def _case(name: str, family: str, sizes: dict[str, Any], *, layers: int, mode: str = "one") -> Case:
    own = sizes if family in (OWN, DENSE) else _narrow(sizes)
    if family == "GptOssConfig":
        own |= {"head_dim": 64}
    if "moe_k" in own:
        own = {key: size for key, size in own.items() if key != "num_experts_per_tok"} | {
            "moe_num_experts": 8,
            "moe_k": 2,
        }
    tokens = (1, 256) if layers % 8 == 0 else (2, 256)
    return Case(name=name, family=family, layers=layers, batch=tokens[0], sequence=tokens[1], sizes=own, mode=mode)


PLAIN = {"biases": False, "vocab_size": 4096}
BIASED = {"biases": True, "vocab_size": 4096}
LLAMA = {
    "class": "LlamaConfig",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}
GPT2 = {
    "class": "GPT2Config",
    "n_embd": 512,
    "n_head": 8,
    "vocab_size": 4096,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
}
FIRST = (
    _case("qwen3", "Qwen3MoeConfig", QWEN3, layers=8),
    _case("gpt-oss", "GptOssConfig", GPT_OSS | {"intermediate_size": 512}, layers=8),
    _case("titan", TITAN, DEEPSEEK_V2_LITE, layers=8),
    _case("granite", "GraniteMoeConfig", GRANITE, layers=6),
    _case("own", OWN, PLAIN, layers=10),
    _case("llama", DENSE, LLAMA, layers=8),
)
SECOND = (
    _case("olmoe", "OlmoeConfig", OLMOE, layers=6),
    _case("mixtral", "MixtralConfig", MIXTRAL_SMALL, layers=8),
    _case("deepseek-v2", "DeepseekV2Config", DEEPSEEK_V2_LITE, layers=6),
    _case("deepseek-v3", "DeepseekV3Config", DEEPSEEK_V3_LIKE, layers=8),
    _case("glm", "Glm4MoeConfig", GLM_SMALL, layers=8),
    _case("qwen2", "Qwen2MoeConfig", QWEN2, layers=6),
    _case("ernie", "Ernie4_5_MoeConfig", ERNIE, layers=8),
    _case("dots", "Dots1Config", DOTS, layers=6),
    _case("own-biased", OWN, BIASED, layers=8),
    _case("gpt2", DENSE, GPT2, layers=12),
    _case("titan-short", TITAN, DEEPSEEK_V2_LITE, layers=4),
)


def _wrapped(cases: tuple[Case, ...], *names: str, modes: tuple[str, ...] = ("ddp", "fsdp2")) -> tuple[Case, ...]:
    chosen = [case for name in names for case in cases if case.name == name]
    return tuple(replace(case, name=f"{mode}-{case.name}", mode=mode) for case in chosen for mode in modes)


FIRST_TWO = _wrapped(FIRST, "qwen3", "own")
SECOND_TWO = _wrapped(SECOND, "olmoe", "mixtral", "glm", "own-biased") + _wrapped(FIRST, "granite", "llama")
SECOND_TWO += _wrapped(FIRST + SECOND, "qwen3", "glm", modes=("tp",))
SETS = {("first", 1): FIRST, ("second", 1): FIRST + SECOND, ("first", 2): FIRST_TWO, ("second", 2): SECOND_TWO}


def built(case: Case, device: str) -> nn.Module:
    """The module of any case."""
    with torch.device(device):
        if case.family == OWN:
            own = OwnModel(layers=case.layers, biases=case.sizes["biases"], vocabulary=case.sizes["vocab_size"])
            return own.to(torch.bfloat16)
        if case.family == DENSE:
            sizes = {key: size for key, size in case.sizes.items() if key != "class"}
            layers = {"n_layer" if "n_embd" in sizes else "num_hidden_layers": case.layers}
            return dense_model(case.sizes["class"], sizes | layers | {"use_cache": False})  # type: ignore[no-any-return]
    return module(case, device)


def loss_of(case: Case, model: nn.Module, device: str) -> Any:
    """The closure of any case."""
    if case.family != OWN:
        return closure(case, model, device)
    tokens = torch.randint(case.sizes["vocab_size"], (case.batch, case.sequence), device=device)
    return lambda: nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())


def wrapped(case: Case, model: nn.Module) -> nn.Module:
    """The module over all ranks."""
    if case.mode == "fsdp2" and (case.family == OWN or "class" in case.sizes):
        from torch.distributed.fsdp import fully_shard

        inner = model if case.family == OWN else getattr(model, "model", None) or model.transformer
        for layer in getattr(inner, "layers", None) or inner.h:  # type: ignore[union-attr]
            fully_shard(layer)
        return fully_shard(model)
    return spread(case, model)[0] if case.mode != "one" else model


class Program:
    """A case that is ready to run."""

    def __init__(self, case: Case, device: str) -> None:
        torch.manual_seed(0)
        model = wrapped(case, built(case, device))
        self.case, self.loss = case, loss_of(case, model, device)
        self.weights = [*model.parameters()]
        shared = [isinstance(weight, DTensor) for weight in self.weights]  # an optimizer's group is of one kind
        kinds = [
            [each for each, is_one in zip(self.weights, shared, strict=True) if is_one is kind] for kind in set(shared)
        ]
        self.optimizer = torch.optim.AdamW([{"params": group} for group in kinds], lr=1e-5, fused=True)
        self.rows: list[list[float]] = []

    def step(self) -> list[float]:
        """Seconds of the host in the forward pass, the backward pass and the optimizer."""
        times = [time.perf_counter()]
        loss = self.loss()
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad()
        times.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(times)]


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


class Collections:
    """Seconds of Python's garbage collector."""

    def __init__(self) -> None:
        self.seconds, self.begin = 0.0, 0.0
        gc.callbacks.append(self.called)

    def called(self, phase: str, info: Any) -> None:
        """As gc calls it."""
        if phase == "start":
            self.begin = time.perf_counter()
        else:
            self.seconds += time.perf_counter() - self.begin


def run(cases: tuple[Case, ...], meter: Any, device: str, rounds: int) -> list[dict[str, Any]]:
    """Each case: medians of its parts and of steps in a row, and of the surroundings' steps around it."""
    programs, found = [], []
    for case in cases:
        try:
            program = Program(case, device)
            for _ in range(WARM_UP):
                program.step()
            _wait(device)
            programs.append(program)
        except Exception as error:  # told, and the others go on
            print(case.name, f"{type(error).__name__}: {error}"[:400], flush=True)
            found.append({"case": asdict(case), "failed": f"{type(error).__name__}: {error}"[:400]})
    collected = Collections()
    rows: dict[str, list[Any]] = {program.case.name: [] for program in programs}
    for _ in range(rounds):
        for program in programs:
            bare = [meter.step() for _ in range(4)][1:]
            program.step()
            _wait(device)
            before, begin = collected.seconds, time.perf_counter()
            parts = [program.step() for _ in range(IN_A_ROW)]
            if device != "cpu":
                torch.cuda.synchronize()
            whole = (time.perf_counter() - begin) / IN_A_ROW
            rows[program.case.name].append((bare, parts, whole, (collected.seconds - before) / IN_A_ROW))
    gc.callbacks.remove(collected.called)
    for program in programs:
        mine = rows[program.case.name]
        parts = [part for _, each, _, _ in mine for part in each]
        bare = [one for each, _, _, _ in mine for one in each]
        row = {
            f"{part}_s": statistics.median(each[at] for each in parts)
            for at, part in enumerate(("forward", "backward", "optimizer"))
        }
        row |= {"sustained_s": statistics.median(each[2] for each in mine), "each_s": [each[2] for each in mine]}
        row |= {"collector_s": statistics.mean(each[3] for each in mine)}
        row |= {"bare_forward_s": statistics.median(each[0] for each in bare)}
        row |= {"bare_backward_s": statistics.median(each[1] for each in bare)}
        row |= {"weights": len(program.weights), "case": asdict(program.case)}
        found.append(row)
    return found


def _busy(meter: Any) -> dict[str, float]:
    """The surroundings' passes while the GPU has nothing to do, and while it is busy all along; with one core held."""
    idle, busy, pinned = [], [], []
    for _ in range(20):
        idle.append(meter.step())
        meter.wait()
        torch.cuda._sleep(int(60e-3 * 1.7e9))
        busy.append(meter.step())
        meter.wait()
        meter.step()
    known = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(known)[2:4]))
    for _ in range(20):
        pinned.append(meter.step())
    os.sched_setaffinity(0, known)
    names = {"idle": idle, "busy": busy, "two cores": pinned}
    return {
        f"{name} {part}": statistics.median(each[at] for each in rows[5:])
        for name, rows in names.items()
        for at, part in enumerate(("forward", "backward"))
    }


def _in_situ() -> Any:
    for place in (Path(__file__).parent, Path(__file__).parent.parent / "moesim" / "kernels" / "benchmarks"):
        if (place / "host_in_situ.py").exists():
            sys.path.append(str(place))
    import host_in_situ

    return host_in_situ


def main() -> None:
    """Pieces, then programs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", choices=("first", "second"), default="first")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--piece-rounds", type=int, default=100)
    parser.add_argument("--quiet", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = given.device
    if device != "cpu":
        torch.cuda.set_device(rank)
    if ranks > 1:
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
    in_situ = _in_situ()
    meter = in_situ.Meter(device)
    found: dict[str, Any] = {"cpu": _cpu(), "torch": torch.__version__, "ranks": ranks}
    begin = time.perf_counter()
    if given.piece_rounds:
        each = in_situ.in_situ(device, rounds=given.piece_rounds) | in_situ.optimizer_in_situ(device)
        found["pieces"] = [[*key, seconds] for key, seconds in each.items()]
    if device != "cpu":
        found["gpu"] = torch.cuda.get_device_name()
        found["busy"] = _busy(meter)
    print(f"pieces: {time.perf_counter() - begin:.0f} s", flush=True)
    found["steps"] = run(SETS[given.set, ranks], meter, device, given.rounds)
    print(f"programs: {time.perf_counter() - begin:.0f} s", flush=True)
    if rank == 0 or ranks > 1:
        (given.out / f"programs-{given.set}-{ranks}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    if not given.quiet and rank == 0:
        for row in found["steps"]:
            print(
                row["case"]["name"],
                row.get("failed")
                or {
                    key: round(1e3 * row[key], 2)
                    for key in (
                        "forward_s",
                        "backward_s",
                        "optimizer_s",
                        "sustained_s",
                        "collector_s",
                        "bare_forward_s",
                        "bare_backward_s",
                    )
                },
                flush=True,
            )
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
