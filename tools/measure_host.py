"""What a step costs the host: small models whose GPU waits for it, part by part, for docs/imported-steps.md.

    python tools/measure_host.py --out FOLDER [--device cpu] [--only PART_OF_A_NAME]

Programs of transformers and torchtitan with narrow layers and few tokens: seconds of the host in forward pass, backward
pass and optimizer, and of whole steps in a row. Needs torch, transformers, torchtitan and a GPU, and nothing of moesim;
`python tools/host_table.py` sets them beside what recordings of the same programs predict.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))
from architectures import DEEPSEEK_V2_LITE, DEEPSEEK_V3_LIKE, GLM_SMALL, GPT_OSS, MIXTRAL_SMALL, OLMOE, QWEN3
from measure_library_steps import TITAN, Case, closure, module

WARM_UP, STEPS = 4, 15
NARROW = {"hidden_size": 512, "num_attention_heads": 8, "vocab_size": 4096, "num_experts_per_tok": 2}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
WIDTHS = {"moe_intermediate_size": 256, "intermediate_size": 512, "q_lora_rank": 192, "kv_lora_rank": 128}


def _narrow(sizes: dict[str, Any]) -> dict[str, Any]:
    """The same architecture with layers that a GPU does in no time."""
    kv = {"num_key_value_heads": 8 if sizes.get("num_key_value_heads") == sizes.get("num_attention_heads") else 2}
    few = {key: 8 for key in EXPERTS if key in sizes}
    groups = {"n_group": 1, "topk_group": 1} if "n_group" in sizes else {}
    widths = {key: size for key, size in WIDTHS.items() if sizes.get(key) is not None}
    return sizes | NARROW | kv | few | groups | widths


def _two(name: str, family: str, sizes: dict[str, Any], *, blind: bool) -> list[Case]:
    first = Case(name=f"{name}-8", family=family, layers=8, batch=1, sequence=256, sizes=_narrow(sizes), blind=blind)
    return [first, replace(first, name=f"{name}-4", layers=4, batch=2, sequence=512)]


CASES = (
    *_two("qwen3", "Qwen3MoeConfig", QWEN3, blind=False),
    *_two("olmoe", "OlmoeConfig", OLMOE, blind=False),
    *_two("titan", TITAN, DEEPSEEK_V2_LITE, blind=False),
    *_two("gpt-oss", "GptOssConfig", GPT_OSS | {"head_dim": 64, "intermediate_size": 1}, blind=False),
    *_two("mixtral", "MixtralConfig", MIXTRAL_SMALL, blind=True),
    *_two("deepseek-v2", "DeepseekV2Config", DEEPSEEK_V2_LITE, blind=True),
    *_two("deepseek-v3", "DeepseekV3Config", DEEPSEEK_V3_LIKE, blind=True),
    *_two("glm", "Glm4MoeConfig", GLM_SMALL, blind=True),
)


def measure(case: Case, device: str) -> dict[str, Any]:
    """Median seconds of the host in each part, and of a step in a row of steps; how many modules ran, and weights."""
    torch.manual_seed(0)
    model = module(case, device)
    loss_of = closure(case, model, device)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)
    ran = [0]
    handles = [each.register_forward_pre_hook(lambda *_: ran.__setitem__(0, ran[0] + 1)) for each in model.modules()]
    loss_of()
    for handle in handles:
        handle.remove()
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None

    def step() -> tuple[float, float, float]:
        times = [time.perf_counter()]
        loss = loss_of()
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
        return times[1] - times[0], times[2] - times[1], times[3] - times[2]

    for _ in range(WARM_UP):
        step()
    wait()
    began = time.perf_counter()
    parts = [step() for _ in range(STEPS)]
    wait()
    sustained = (time.perf_counter() - began) / STEPS
    names = ("forward_s", "backward_s", "optimizer_s")
    medians = {name: statistics.median(each) for name, each in zip(names, zip(*parts, strict=True), strict=True)}
    return medians | {"sustained_s": sustained, "modules": ran[0], "weights": len(weights)}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def main() -> None:
    """Measure and write after every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    gpu = torch.cuda.get_device_name() if args.device != "cpu" else "none"
    found: dict[str, Any] = {"gpu": gpu, "cpu": _cpu(), "torch": torch.__version__, "steps": []}
    for case in (each for each in CASES if args.only in each.name):
        try:
            measured = measure(case, args.device)
        except Exception as error:  # a case that fails is told, and the others go on
            measured = {"failed": f"{type(error).__name__}: {error}"[:500]}
        found["steps"].append({"case": asdict(case)} | measured)
        print(case.name, measured, flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "host.json").write_text(json.dumps(found), encoding="utf-8")
        gc.collect()


if __name__ == "__main__":
    main()
