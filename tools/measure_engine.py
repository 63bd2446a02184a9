"""Measures a whole serving engine beside which `moesim serve` is set: continuous batching of transformers 5.17.

    python tools/measure_engine.py --out engine_h100.json [--models qwen3,olmoe,mixtral] [--tiny]

Models have the layers of published ones, fewer of them, and random weights; requests come as bursts of several sizes
and one by one. Scheduler, pages, host and MoE kernels are those of transformers; attention is its `paged|sdpa`, or
`flash_attention_2` with the kernel that torch carries in the place of flash-attn's (`varlen`, no block table).
Written: for each run its requests (arrival, first token, last token, lengths) and its steps (host before, device,
host after; rows, keys, requests), and a profile of decoding steps.

Legend: T tokens, S requests.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

STREAMS = {  # requests, tokens of prompts in turn, tokens of answers in turn, requests per second (0: at once)
    "one": (1, (512,), (64,), 0.0),
    "burst-4": (4, (256, 1024), (48, 64), 0.0),
    "burst-16": (16, (128, 512, 256, 1024), (32, 64, 96), 0.0),
    "burst-64": (64, (384, 512, 640, 256, 768), (48, 64, 80), 0.0),
    "steady": (32, (256, 768, 512), (32, 64, 48), 12.0),
    "answers": (32, (64,), (128,), 0.0),
    "prompts": (24, (1536, 1024), (8,), 0.0),
}
SHIM = """
import torch
def flash_attn_varlen_func(q, k, v, cq, ck, mq, mk, softmax_scale=None, causal=True, window_size=(-1, -1), **_):
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cq, ck, mq, mk, 0.0, causal, False, scale=softmax_scale)[0]
flash_attn_func = None
flash_attn_with_kvcache = None
"""


def offer_flash_attention() -> None:
    """A package of the name that transformers looks for, with torch's own kernel."""
    folder = Path(tempfile.mkdtemp())
    (folder / "flash_attn").mkdir()
    (folder / "flash_attn/__init__.py").write_text(SHIM)
    (folder / "flash_attn/bert_padding.py").write_text("pad_input = unpad_input = None\n")
    info = folder / "flash_attn-2.8.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    (info / "top_level.txt").write_text("flash_attn\n")
    (info / "RECORD").write_text("flash_attn/__init__.py,,\n")
    sys.path.insert(0, str(folder))


def configs(tiny: bool) -> dict:
    from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig

    shrink = (
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "num_hidden_layers": 2,
        }
        if tiny
        else {}
    )
    qwen3 = {
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "vocab_size": 151936,
        "num_hidden_layers": 12,
        "norm_topk_prob": True,
    }
    olmoe = {
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "intermediate_size": 1024,
        "vocab_size": 50304,
        "num_hidden_layers": 16,
    }
    mixtral = {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "num_hidden_layers": 6,
        "sliding_window": None,
    }
    made = {"qwen3": (Qwen3MoeConfig, qwen3), "olmoe": (OlmoeConfig, olmoe), "mixtral": (MixtralConfig, mixtral)}
    return {
        name: kind(**{**sizes, **shrink}, eos_token_id=-1, pad_token_id=0, bos_token_id=0, tie_word_embeddings=False)
        for name, (kind, sizes) in made.items()
    }


class Watch:
    """Notes when the parts of every step begin and end."""

    def __init__(self, manager) -> None:
        self.steps, self._now, processor = [], [0.0] * 4, manager.batch_processor
        prepare, generate, update = processor.prepare_next_batch, processor._generation_step, processor.update_batch

        def prepared() -> bool:
            self._now[0] = time.perf_counter()
            found = prepare()
            self._now[1] = time.perf_counter()
            return found

        def generated(model) -> None:
            generate(model)
            self._now[2] = time.perf_counter()
            io = processor.inputs_and_outputs
            io = (
                getattr(io, "io_pairs", [None])[getattr(io, "current_pair", 0)].host_io
                if hasattr(io, "io_pairs")
                else io
            )
            states = io.requests_in_batch
            rows = sum(each.query_length for each in states)
            keys = sum(each.state.position_offset for each in states)
            self.row = [
                rows,
                keys,
                len(states),
                sum(each.query_length == 1 for each in states),
                io.num_q_tokens,
                io.max_kv_read,
            ]

        def updated() -> None:
            update()
            end = time.perf_counter()
            self.steps.append([*self._now[:3], end, *self.row])

        processor.prepare_next_batch, processor._generation_step, processor.update_batch = prepared, generated, updated


def stream(manager, watch, vocab: int, name: str, seed: int, turn: int = 0) -> dict:
    """One run; another turn has the same lengths and gaps, and other tokens, so that no prefix is found."""
    count, prompts, answers, rate = STREAMS[name]
    gaps = torch.empty(count).exponential_(generator=torch.Generator().manual_seed(seed)).tolist()
    rng = torch.Generator().manual_seed(seed + 1000 * (turn + 1))
    ids = [torch.randint(0, vocab, (prompts[i % len(prompts)],), generator=rng).tolist() for i in range(count)]
    watch.steps.clear()
    begin = time.perf_counter()

    def send() -> None:
        for number in range(count):
            if rate:
                time.sleep(gaps[number] / rate)
            manager.add_request(
                ids[number],
                request_id=f"{name}-{seed}-{turn}-{number}",
                max_new_tokens=answers[number % len(answers)],
                record_timestamps=True,
            )

    sender = threading.Thread(target=send)
    sender.start()
    found = []
    while len(found) < count and time.perf_counter() - begin < 60:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            found.append(
                [
                    result.created_time - begin,
                    result.timestamps[0] - begin,
                    result.timestamps[-1] - begin,
                    len(result.prompt_ids),
                    len(result.generated_tokens),
                ]
            )
    sender.join()
    steps = [[*(round(1e6 * (t - begin)) for t in step[:4]), *step[4:]] for step in watch.steps]
    return {
        "stream": name,
        "seed": seed,
        "requests": [[round(x, 6) for x in each] for each in sorted(found)],
        "steps": steps,
    }


def routed(model, vocab: int) -> list:
    """Tokens, distinct experts, and rows of the fullest expert over the mean, in every layer."""
    found = []
    for tokens in (1, 4, 16, 64):
        with torch.no_grad():
            logits = model(
                input_ids=torch.randint(0, vocab, (tokens, 8), device=model.device),
                output_router_logits=True,
                use_cache=False,
            ).router_logits
        for layer in logits:
            experts = layer.shape[-1]
            last = layer.reshape(tokens, 8, experts)[:, -1]
            rows = torch.bincount(
                last.topk(model.config.num_experts_per_tok, dim=-1).indices.reshape(-1), minlength=experts
            )
            found.append([tokens, int((rows > 0).sum()), round(float(rows.max() / rows.float().mean()), 3)])
    return found


MODES = {  # attention, CUDA graphs, asynchronous batching; None: as the engine decides
    "sdpa": ("paged|sdpa", None, None),
    "flash": ("flash_attention_2", False, False),
    "graphs": ("flash_attention_2", True, False),
    "async": ("flash_attention_2", True, True),
}


def measure(model, mode: str, streams, *, tiny: bool, out: list, model_name: str, note) -> None:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    attention, graphs, asynchronous = MODES[mode]
    model.set_attn_implementation(attention)
    chosen = ContinuousBatchingConfig(
        block_size=256,
        num_blocks=64 if tiny else 256,
        max_batch_tokens=2048,
        max_requests_per_batch=64,
        use_cuda_graph=graphs,
        use_async_batching=asynchronous,
    )
    made = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, eos_token_id=-1, pad_token_id=0, max_new_tokens=64
    )
    manager = model.init_continuous_batching(generation_config=made, continuous_batching_config=chosen)
    manager.batch_processor = manager._create_batch_processor()
    watch = Watch(manager)
    manager.start()
    vocab = model.config.vocab_size
    try:
        for seed, name in enumerate(streams):
            if seed == 0 or graphs:  # kernels are loaded, and graphs captured, in a run before
                stream(manager, watch, vocab, name, seed, turn=1)
            run = stream(manager, watch, vocab, name, seed)
            run |= {
                "model": model_name,
                "mode": mode,
                "resolved": [
                    str(manager.continuous_batching_config.use_cuda_graph),
                    manager.continuous_batching_config.use_async_batching,
                    manager.continuous_batching_config.max_blocks_per_request,
                ],
            }
            out.append(run)
            done = run["requests"]
            print(
                model_name,
                mode,
                name,
                len(done),
                "ttft",
                sum(r[1] - r[0] for r in done) / max(1, len(done)),
                "end",
                max((r[2] for r in done), default=0),
                "steps",
                len(run["steps"]),
                flush=True,
            )
            note()
        if torch.cuda.is_available() and mode != "async":
            from torch.profiler import ProfilerActivity, profile

            for count, keys in ((4, 500), (32, 700)):
                for number in range(count):
                    manager.add_request(
                        torch.randint(0, vocab, (keys,)).tolist(),
                        request_id=f"p{mode}{count}-{number}",
                        max_new_tokens=900,
                    )
                time.sleep(0.8)
                watch.steps.clear()
                with profile(activities=[ProfilerActivity.CUDA]) as seen:
                    time.sleep(0.25)
                steps = len(watch.steps)
                rows = [
                    [e.key[:160], e.count, round(e.self_device_time_total, 1)]
                    for e in seen.key_averages()
                    if e.self_device_time_total > 0
                ]
                out.append(
                    {
                        "model": model_name,
                        "mode": mode,
                        "profile": [count, keys, steps],
                        "kernels": sorted(rows, key=lambda r: -r[2]),
                        "shape": watch.steps[-1][4:] if steps else None,
                    }
                )
                note()
                for number in range(count):
                    manager.cancel_request(f"p{mode}{count}-{number}")
                time.sleep(0.3)
    finally:
        manager.stop(block=True, timeout=10)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--models", default="qwen3,olmoe,mixtral")
    parser.add_argument("--modes", default="sdpa,flash,graphs,async")
    parser.add_argument("--streams", default=",".join(STREAMS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=400.0, help="begin no further part after these")
    given = parser.parse_args()
    if torch.cuda.is_available():
        offer_flash_attention()
    from transformers import AutoModelForCausalLM

    begin, out = time.perf_counter(), []
    if torch.cuda.is_available():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]):  # the first one takes long
            torch.zeros(8, device="cuda").sum().item()

    def note() -> None:
        Path(given.out).write_text(json.dumps({"torch": torch.__version__, "runs": out}))

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in given.models.split(","):
        config = configs(given.tiny)[name]
        started = time.perf_counter()
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        print(
            name,
            "made in",
            round(time.perf_counter() - started, 1),
            "s",
            sum(p.numel() for p in model.parameters()) / 1e9,
            "B",
            flush=True,
        )
        try:
            out.append({"model": name, "routed": routed(model, config.vocab_size)})
        except Exception as error:
            print("routing:", repr(error), flush=True)
        for mode in given.modes.split(","):
            if time.perf_counter() - begin > given.seconds:
                break
            try:
                measure(model, mode, given.streams.split(","), tiny=given.tiny, out=out, model_name=name, note=note)
            except Exception as error:
                import traceback

                traceback.print_exc()
                print(name, mode, "failed:", repr(error), flush=True)
        del model
        if device == "cuda":
            torch.cuda.empty_cache()
    note()
    print("seconds", time.perf_counter() - begin)


if __name__ == "__main__":
    main()
