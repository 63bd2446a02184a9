"""Training steps of transformers' dense models, measured and traced on the GPU at hand, for docs/imported-steps.md.

    python tools/measure_dense_steps.py --out FOLDER          # on a GPU: steps.json, CASE.trace.json.gz
    python tools/measure_dense_steps.py --record FOLDER       # without: writes tests/data/dense_steps.json.gz

Two sizes each of three programs: GPT-2 (dropout, a vocabulary of 50,257), Llama and OPT; bf16, SDPA, forward, loss,
backward, fused AdamW, eager. The first needs torch and transformers and nothing of moesim.
"""

import argparse
import gc
import gzip
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

DATA = Path(__file__).parent.parent / "tests" / "data" / "dense_steps.json.gz"


def gpt2(width: int, heads: int, layers: int, length: int) -> Any:
    """A configuration of GPT-2."""
    return transformers.GPT2Config(n_embd=width, n_head=heads, n_layer=layers, n_positions=length)


def llama(width: int, inner: int, heads: int, layers: int) -> Any:
    """A configuration of Llama with 8 heads of keys."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": 8}
    return transformers.LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=128256, max_position_embeddings=8192)


def opt(width: int, layers: int) -> Any:
    """A configuration of OPT."""
    sizes = {"hidden_size": width, "ffn_dim": 4 * width, "word_embed_proj_dim": width, "num_attention_heads": 32}
    return transformers.OPTConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=4096)


CASES = {  # configuration, sequences, tokens of each
    "gpt2-a": (gpt2(1600, 25, 12, 1024), 8, 1024),
    "gpt2-b": (gpt2(2048, 16, 8, 2048), 8, 2048),
    "llama-a": (llama(2048, 8192, 32, 8), 2, 4096),
    "llama-b": (llama(4096, 14336, 32, 4), 1, 8192),
    "opt-a": (opt(2048, 12), 4, 2048),
    "opt-b": (opt(4096, 4), 4, 4096),
}


def build(name: str, device: str) -> tuple[torch.nn.Module, Any]:
    """The module and a closure that gives the loss."""
    config, sequences, tokens = CASES[name]
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        ids = torch.randint(config.vocab_size, (sequences, tokens))
    model.train()
    return model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss


def measure(name: str, out: Path) -> float:
    """Seconds of a step in a row of them; writes the trace of one more."""
    model, loss_of = build(name, "cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):
        step()
    marks, begin = [torch.cuda.Event(enable_timing=True)], time.time()
    marks[0].record()
    while time.time() - begin < 4:
        step()
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
        if len(marks) > 3:
            marks[-3].synchronize()
    torch.cuda.synchronize()
    seconds = [first.elapsed_time(second) / 1e3 for first, second in pairwise(marks)]
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as profiler:
        step()
        torch.cuda.synchronize()
    plain = out / f"{name}.trace.json"
    profiler.export_chrome_trace(str(plain))
    (out / f"{name}.trace.json.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return statistics.median(seconds[len(seconds) // 2 :])


def record(folder: Path) -> None:
    """Keep every step as `moesim import-step` records it, and what was measured of it."""
    from moesim.importing.recording import record_step

    measured = json.loads((folder / "steps.json").read_text())
    steps = []
    for name in CASES:
        with torch.device("meta"):
            ops = record_step(*build(name, "meta"))
        steps.append({"name": name, "sustained_s": measured[name], "ops": [op.as_json() for op in ops]})
    DATA.write_bytes(gzip.compress(json.dumps({"steps": steps}).encode(), mtime=0))


def main() -> None:
    """Measure, or record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    if args.record:
        record(args.record)
        return
    found: dict[str, float] = {}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        found[name] = measure(name, args.out)
        print(f"{name}: {1e3 * found[name]:.1f} ms", flush=True)
        (args.out / "steps.json").write_text(json.dumps(found))
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
