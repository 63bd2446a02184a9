"""Host time of vLLM's schedulers in a step in which n requests get a token each: CPU time, in no need of a GPU.

    python tools/measure_scheduler.py tests/data/vllm_scheduler.json

Needs vllm (its Python files and what they import; none of its kernels run). The scheduler forms a step, and takes the
tokens of a runner that only says 17; prompts are computed before. Rows of 16, 64 and 256 requests are kept out of the
constants in moesim/serving/software.py.
"""

import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import vllm
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

COUNTS, KEPT_OUT = (1, 4, 16, 32, 64, 128, 256, 512), (16, 64, 256)
PROMPT, STEPS, PAGE, LONGEST = 512, 60, 16, 32_768
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2048, "num_hidden_layers": 4,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 4096,
    "vocab_size": 151_936, "max_position_embeddings": LONGEST, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def scheduler_of(kind: type[Scheduler], requests: int, folder: str) -> Scheduler:
    """A scheduler with room for all requests."""
    pages = requests * (PROMPT + 400) // PAGE + 1_000
    load = SchedulerConfig(
        max_num_seqs=max(requests, 16), max_num_batched_tokens=8_192, max_model_len=LONGEST,
        enable_chunked_prefill=True, async_scheduling=kind is AsyncScheduler, is_encoder_decoder=False,
    )  # fmt: skip
    model = ModelConfig(
        model=folder, tokenizer=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=LONGEST
    )
    cache = CacheConfig(block_size=PAGE, enable_prefix_caching=True)
    config = VllmConfig(
        scheduler_config=load, model_config=model, cache_config=cache, device_config=DeviceConfig("cpu")
    )
    cache.num_gpu_blocks = pages
    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=4, head_size=128, dtype=torch.bfloat16)
    room = KVCacheConfig(num_blocks=pages, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return kind(
        vllm_config=config, kv_cache_config=room, log_stats=True, block_size=PAGE,
        structured_output_manager=StructuredOutputManager(config),
    )  # fmt: skip


def measure(kind: type[Scheduler], requests: int, folder: str) -> dict[str, Any]:
    """Seconds of a step in which every request gets a token."""
    scheduler = scheduler_of(kind, requests, folder)
    init_none_hash(sha256)
    hasher = get_request_block_hasher(PAGE, sha256)
    for number in range(requests):
        chosen = SamplingParams(max_tokens=100_000, ignore_eos=True)
        chosen.update_from_generation_config({}, 151_645)
        prompt = [number * 7 % 1000 + 1, *range(1, PROMPT)]
        job = Request(f"r{number}", prompt, sampling_params=chosen, pooling_params=None, block_hasher=hasher)
        scheduler.add_request(job)
    seconds = []
    while len(seconds) < STEPS:
        begin = time.thread_time()
        step = scheduler.schedule()
        formed = time.thread_time() - begin
        ids = list(step.num_scheduled_tokens)
        are_done = [scheduler.requests[each].num_computed_tokens >= PROMPT for each in ids]
        result = ModelRunnerOutput(
            req_ids=ids, req_id_to_index={each: place for place, each in enumerate(ids)},
            sampled_token_ids=[[17] if is_done else [] for is_done in are_done], pooler_output=[],
        )  # fmt: skip
        begin = time.thread_time()
        scheduler.update_from_output(step, result)
        if step.total_num_scheduled_tokens == len(ids) == requests:
            seconds.append(formed + time.thread_time() - begin)
    seconds.sort()
    return {
        "scheduler": kind.__name__, "requests": requests, "seconds": float(f"{seconds[STEPS // 10]:.4g}"),
        "median": float(f"{seconds[STEPS // 2]:.4g}"), "kept_out": requests in KEPT_OUT,
    }  # fmt: skip


def main() -> None:
    """Measure and write."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        rows = [measure(kind, count, folder) for kind in (AsyncScheduler, Scheduler) for count in COUNTS]
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    found = {
        "cpu": names[0].partition(":")[2].strip(), "python": platform.python_version(), "vllm": vllm.__version__,
        "clock": f"CPU time of the thread; 10th percentile of {STEPS} steps", "rows": rows,
    }  # fmt: skip
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
