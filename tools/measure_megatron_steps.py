"""Training steps of Megatron-Core without Transformer Engine, measured and traced on the GPUs: docs/software.md.

    torchrun --nproc-per-node N tools/measure_megatron_steps.py --out FOLDER [--seconds 100] [--only NAME...] [--list]

A case is a few layers of a published size (or a smaller one) by Megatron-Core's public API: GPTModel with its local
layer specification (its own linears, unfused attention, one GEMM an expert), DistributedDataParallel with fp32
gradients, the distributed optimizer, clipping, and forced balance, under which a router draws its logits. Cases with
`own` kernels put torch's fused attention and grouped GEMMs in the place of these two, which are then the only ones
that Megatron-Core has not brought: the nearest to Transformer Engine's that runs without it. N = 1 runs the cases of
one GPU, N = 2 those of two. The first case of a family is traced; cases marked blind are kept out of every
choice of the simulator. Needs torch, megatron-core and GPUs, and nothing of moesim.
"""

import argparse
import gc
import gzip
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch.profiler import ProfilerActivity, profile

EIGHT = {"hidden": 2048, "heads": 16, "kv_heads": 4, "ffn": 7168, "experts": 8, "top_k": 2, "vocab": 32000}
SIXTEEN = {
    "hidden": 2048,
    "heads": 16,
    "kv_heads": 16,
    "ffn": 2048,
    "experts": 16,
    "top_k": 4,
    "vocab": 50304,
    "shared": 2048,
}
WIDE = {"hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "experts": 4, "top_k": 2, "vocab": 32000}
MANY = {
    "hidden": 2048,
    "heads": 16,
    "kv_heads": 16,
    "ffn": 1408,
    "experts": 64,
    "top_k": 6,
    "vocab": 102400,
    "shared": 2816,
}
LATENT = {
    "hidden": 2048,
    "heads": 16,
    "kv_heads": 16,
    "ffn": 2048,
    "experts": 16,
    "top_k": 4,
    "vocab": 50304,
    "q_rank": 768,
    "kv_rank": 512,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its layers, and the sequences and tokens of one rank's micro-batch; `more`: keys of its config."""

    name: str
    sizes: dict[str, int]
    layers: int
    batch: int
    sequence: int
    ranks: int = 1
    expert: int = 1
    dispatcher: str = "alltoall"
    micro_batches: int = 1
    overlap: bool = False
    own: bool = False
    recompute: tuple[str, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)
    traced: bool = False
    blind: bool = False


CASES = (
    Case(name="many-own-a", sizes=MANY, layers=3, batch=4, sequence=2048, own=True, traced=True),
    Case(name="many-own-b", sizes=MANY, layers=2, batch=4, sequence=4096, own=True, blind=True),
    Case(name="sixteen-a", sizes=SIXTEEN, layers=4, batch=4, sequence=2048, traced=True),
    Case(name="eight-own-a", sizes=EIGHT, layers=3, batch=4, sequence=2048, own=True),
    Case(name="eight-own-b", sizes=EIGHT, layers=3, batch=2, sequence=8192, own=True, blind=True),
    Case(name="eight-own-c", sizes=EIGHT, layers=3, batch=2, sequence=2048, micro_batches=4, own=True, blind=True),
    Case(name="latent-own-a", sizes=LATENT, layers=4, batch=4, sequence=2048, own=True, traced=True),
    Case(name="latent-own-b", sizes=LATENT, layers=3, batch=2, sequence=4096, own=True, blind=True),
    Case(name="eight-a", sizes=EIGHT, layers=3, batch=2, sequence=2048),
    Case(name="eight-b", sizes=EIGHT, layers=3, batch=2, sequence=4096, blind=True),
    Case(name="sixteen-b", sizes=SIXTEEN, layers=3, batch=2, sequence=4096, blind=True),
    Case(
        name="sixteen-dropout",
        sizes=SIXTEEN,
        layers=3,
        batch=4,
        sequence=2048,
        more={"attention_dropout": 0.1},
        traced=True,
    ),
    Case(
        name="sixteen-core-attn", sizes=SIXTEEN, layers=4, batch=4, sequence=2048, recompute=("core_attn",), blind=True
    ),
    Case(name="sixteen-moe", sizes=SIXTEEN, layers=4, batch=4, sequence=2048, recompute=("moe",), traced=True),
    Case(
        name="sixteen-own-moe",
        sizes=SIXTEEN,
        layers=4,
        batch=4,
        sequence=2048,
        recompute=("moe", "shared_experts"),
        own=True,
        blind=True,
    ),
    Case(name="sixteen-allgather", sizes=SIXTEEN, layers=4, batch=4, sequence=2048, dispatcher="allgather", blind=True),
    Case(name="wide-a", sizes=WIDE, layers=1, batch=4, sequence=2048),
    Case(name="wide-b", sizes=WIDE, layers=2, batch=4, sequence=2048, blind=True),
    Case(name="many-a", sizes=MANY, layers=2, batch=8, sequence=2048),
    Case(name="many-b", sizes=MANY, layers=3, batch=4, sequence=2048, blind=True),
    Case(name="ep-many-own-a", sizes=MANY, layers=4, batch=4, sequence=2048, ranks=2, expert=2, own=True, traced=True),
    Case(name="ep-many-own-b", sizes=MANY, layers=3, batch=4, sequence=4096, ranks=2, expert=2, own=True, blind=True),
    Case(
        name="ep-many-own-allgather",
        sizes=MANY,
        layers=4,
        batch=4,
        sequence=2048,
        ranks=2,
        expert=2,
        dispatcher="allgather",
        own=True,
        traced=True,
    ),
    Case(
        name="ep-eight-own-allgather",
        sizes=EIGHT,
        layers=4,
        batch=4,
        sequence=2048,
        ranks=2,
        expert=2,
        dispatcher="allgather",
        own=True,
        blind=True,
    ),
    Case(name="ep-eight-own", sizes=EIGHT, layers=4, batch=4, sequence=2048, ranks=2, expert=2, own=True),
    Case(name="ep-sixteen", sizes=SIXTEEN, layers=4, batch=4, sequence=2048, ranks=2, expert=2, blind=True),
    Case(name="dp-eight-own", sizes=EIGHT, layers=3, batch=4, sequence=2048, ranks=2, own=True),
    Case(
        name="dp-eight-own-overlap",
        sizes=EIGHT,
        layers=3,
        batch=4,
        sequence=2048,
        ranks=2,
        overlap=True,
        own=True,
        blind=True,
    ),
)
STEPS_AHEAD = 3


def config_of(case: Case) -> TransformerConfig:
    """Megatron-LM's defaults for what is not said, but no dropout; fusions that need no other package."""
    size = case.sizes
    latent = (
        {
            "q_lora_rank": size["q_rank"],
            "kv_lora_rank": size["kv_rank"],
            "qk_head_dim": 128,
            "qk_pos_emb_head_dim": 64,
            "v_head_dim": 128,
            "rope_type": "rope",
            "qk_layernorm": True,
        }
        if "q_rank" in size
        else {}
    )
    kind = MLATransformerConfig if latent else TransformerConfig
    given = {
        "num_layers": case.layers,
        "hidden_size": size["hidden"],
        "num_attention_heads": size["heads"],
        "num_query_groups": size["kv_heads"],
        "kv_channels": 128,
        "ffn_hidden_size": size["ffn"],
        "num_moe_experts": size["experts"],
        "moe_ffn_hidden_size": size["ffn"],
        "moe_router_topk": size["top_k"],
        "moe_router_force_load_balancing": True,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": case.dispatcher,
        "moe_shared_expert_intermediate_size": size.get("shared"),
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        "expert_model_parallel_size": case.expert,
        "recompute_granularity": "selective" if case.recompute else None,
        "recompute_modules": list(case.recompute) or None,
        "finalize_model_grads_func": finalize_model_grads,
        "deallocate_pipeline_outputs": True,
    }
    return kind(**(given | latent | case.more))


class FusedAttention(MegatronModule):
    """Torch's fused attention in the place of DotProductAttention, with its layout in and out."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config=config)

    def forward(self, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> torch.Tensor:
        """[s, b, heads, d] to [s, b, heads * d]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


class GroupedExperts(MegatronModule):
    """Torch's grouped GEMMs in the place of one module an expert, with Megatron-Core's fused activation."""

    def __init__(self, num_local_experts: int, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config=config)
        h, f = config.hidden_size, config.moe_ffn_hidden_size
        shapes = {"weight1": (num_local_experts, h, 2 * f), "weight2": (num_local_experts, f, h)}
        for name, shape in shapes.items():
            weight = torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02))
            weight.allreduce = config.expert_model_parallel_size == 1
            self.register_parameter(name, weight)

    def forward(self, rows: Any, counts: Any, gates: Any, **_: Any) -> tuple[torch.Tensor, None]:
        """Rows in the order of experts, how many each has, and their gates."""
        ends = counts.cuda(non_blocking=True).cumsum(0).to(torch.int32)
        inner = weighted_bias_swiglu_impl(torch._grouped_mm(rows, self.weight1, ends), None, gates.unsqueeze(-1))
        return torch._grouped_mm(inner, self.weight2, ends), None


def layer_spec(case: Case) -> Any:
    """Megatron-Core's local layer, with own kernels where the case has them."""
    spec = get_gpt_layer_local_spec(
        num_experts=case.sizes["experts"],
        moe_grouped_gemm=False,
        multi_latent_attention="q_rank" in case.sizes,
        qk_layernorm="q_rank" in case.sizes,
        normalization="RMSNorm",
    )
    if case.own:
        spec.submodules.self_attention.submodules.core_attention = FusedAttention
        layer = spec.submodules.mlp
        moe = replace(layer.keywords["submodules"], experts=GroupedExperts)
        spec.submodules.mlp = partial(layer.func, **(layer.keywords | {"submodules": moe}))
    return spec


class Trainer:
    """Model, wrapper and optimizer of one case, and its step."""

    def __init__(self, case: Case) -> None:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(expert_model_parallel_size=case.expert)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        torch.manual_seed(1 + dist.get_rank())
        self.case, self.config = case, config_of(case)
        model = GPTModel(
            self.config,
            layer_spec(case),
            vocab_size=case.sizes["vocab"],
            max_sequence_length=case.sequence,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
        )
        self.parameters = sum(p.numel() for p in model.parameters())
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=case.overlap,
            overlap_param_gather=False,
            use_distributed_optimizer=True,
        )
        self.model = DistributedDataParallel(self.config, ddp, Float16Module(self.config, model.cuda()))
        options = OptimizerConfig(
            optimizer="adam", lr=1e-5, weight_decay=0.1, bf16=True, use_distributed_optimizer=True, clip_grad=1.0
        )
        self.optimizer = get_megatron_optimizer(options, [self.model])
        self.config.grad_scale_func = self.optimizer.scale_loss
        shape = (case.batch, case.sequence)
        self.tokens = torch.randint(case.sizes["vocab"], shape, device="cuda")
        self.positions = torch.arange(case.sequence, device="cuda").expand(shape).contiguous()
        self.run = get_forward_backward_func()

    def forward(self, data: Iterator[None], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        """The loss of each token, and what makes one number of them, as Megatron-LM's pretrain_gpt.py."""
        del data
        losses = model(self.tokens, self.positions, None, labels=self.tokens)
        return losses, partial(_mean, count=self.tokens.numel())

    def step(self) -> None:
        """Forward and backward of all micro-batches, reductions, the optimizer."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.run(
            forward_step_func=self.forward,
            data_iterator=None,
            model=[self.model],
            num_microbatches=self.case.micro_batches,
            seq_length=self.case.sequence,
            micro_batch_size=self.case.batch,
            forward_only=False,
        )
        self.optimizer.step()


def _mean(losses: torch.Tensor, *, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = losses.float().sum() / count
    return loss, {"loss": loss.detach()}


def measured(trainer: Trainer, seconds: float) -> dict[str, Any]:
    """The median step behind warm ones, each waited for; the peak of the tensors."""
    for _ in range(STEPS_AHEAD):
        trainer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times, begin = [time.perf_counter()], time.perf_counter()
    while len(times) < 7 or (time.perf_counter() - begin < seconds and len(times) < 40):
        trainer.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter())
    steps = [b - a for a, b in pairwise(times)]
    half = steps[len(steps) // 2 :]
    return {
        "step_s": statistics.median(half),
        "spread_s": statistics.pstdev(half),
        "steps": len(steps),
        "parameters": trainer.parameters,
        "memory": torch.cuda.max_memory_allocated(),
    }


def traced(trainer: Trainer, path: Path) -> None:
    """One step by torch's profiler, with shapes, as a Chrome trace."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as profiler:
        trainer.step()
        torch.cuda.synchronize()
    raw = path.with_suffix("")
    profiler.export_chrome_trace(str(raw))
    path.write_bytes(gzip.compress(raw.read_bytes(), 6))
    raw.unlink()


def freed() -> None:
    """What a case has left in caches and hooks: everything above 1 MB but masks; kernels compiled for its sizes."""
    torch.compiler.reset()  # else those of the next are compiled for any size, and slower
    gc.collect()
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.is_cuda and thing.dtype != torch.bool:
            storage = thing.untyped_storage()
            if storage.nbytes() > 1 << 20:
                storage.resize_(0)
    torch.cuda.empty_cache()


def main() -> None:
    """Every case of this number of ranks, one file of all that is known so far after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--half", type=int, help="0 or 1: every other case, on the GPU of this number")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    cases = [case for case in CASES if case.ranks == ranks and (not given.only or case.name in given.only)]
    if given.half is not None:
        cases, rank = cases[given.half :: 2], given.half
    if given.list:
        print(*cases, sep="\n")
        return
    begin = time.perf_counter()
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")
    given.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in cases:
        late = torch.tensor([time.perf_counter() - begin > given.seconds], device="cuda")
        dist.broadcast(late, 0)
        if late.item():
            break
        start, row = time.perf_counter(), {"case": asdict(case)}
        try:
            trainer = Trainer(case)
            row |= measured(trainer, 1.0)
            if case.traced and dist.get_rank() == 0:
                traced(trainer, given.out / f"{case.name}.trace.json.gz")
            elif case.traced:  # the other ranks of a traced step
                trainer.step()
        except Exception as error:  # every other case still runs
            row["error"] = f"{type(error).__name__}: {error}"
            if dist.get_rank() == 0:
                traceback.print_exc()
        trainer = None
        freed()
        rows.append(row)
        if dist.get_rank() == 0:
            took = f"({time.perf_counter() - start:.0f} s)"
            print(
                case.name, f"{row['step_s'] * 1e3:.1f} ms" if "step_s" in row else row["error"][:200], took, flush=True
            )
            machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
            (given.out / f"steps-{ranks}-{given.half or 0}.json").write_text(
                json.dumps({"machine": machine, "steps": rows})
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
