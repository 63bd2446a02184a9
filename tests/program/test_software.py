"""A software is an entry of one table, and every switch of one changes its kernels.

A new entry runs, and changes what its facts say; a switch does in a known direction and, where it can be counted, by
known bytes.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from moesim.errors import UserError
from moesim.kernels.estimate import Estimate
from moesim.kernels.families import Kernel, MemoryBound
from moesim.kernels.roofline import Roofline
from moesim.network import build_fabric
from moesim.parallel.memory.parameters import local_parameters
from moesim.parallel.memory.saved import SavedTensors
from moesim.program import StepProgram, build_program
from moesim.program.software import KERNEL_LISTS
from moesim.results import RunRecord
from moesim.run import draw_samples, obtain_trace, simulate
from moesim.scenario import Implementation, Scenario, gpu_spec, require_supported
from moesim.scenario.software import FUSED, SOFTWARE, Switches

pytestmark = pytest.mark.usefixtures("few_tokens")


@cache
def simulated(scenario: Scenario) -> RunRecord:
    """Several tests ask for the same run."""
    return simulate(scenario)


def test_a_software_with_one_other_fact_is_added_in_one_place(small, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = replace(FUSED, name="exact_head", switches=replace(FUSED.switches, loss="fp32"))
    with pytest.raises(UserError, match="fused"):
        small({"implementation.kind": exact.name})
    monkeypatch.setitem(SOFTWARE, exact.name, exact)
    large = {"model.vocab": 65_536}  # the step's peak is in the loss
    plain, other = (simulated(small({**large, "implementation.kind": name})).result for name in ("fused", exact.name))
    assert other["step_time_s"] > plain["step_time_s"]
    assert other["memory"]["peak_bytes"] > plain["memory"]["peak_bytes"]


@pytest.mark.parametrize(
    ("fact", "changes"),
    [
        ("shards_gradients", {"parallelism": {"data": 4, "expert": 2, "zero": {"dense": 2, "expert": 2}}}),
        ("shares_layers", {"parallelism": {"data": 2, "tensor": 2, "expert": 2}}),
        ("recomputes_parts", {"workload.recompute": ["rms_norm"]}),
        ("overlaps", {"overlap": {"gradient_reduction": True}}),
    ],
)
def test_what_a_software_cannot_do_is_refused_by_name(
    small, monkeypatch: pytest.MonkeyPatch, fact: str, changes
) -> None:
    changes = {"workload.recompute": "none", **changes}
    lacking = replace(FUSED, name="lacking", **{fact: False})
    monkeypatch.setitem(SOFTWARE, lacking.name, lacking)
    require_supported(small(changes))
    with pytest.raises(UserError, match="lacking"):
        require_supported(small({**changes, "implementation.kind": lacking.name}))


def test_every_software_has_a_list_of_kernels() -> None:
    assert {facts.kernels for facts in SOFTWARE.values()} == set(KERNEL_LISTS)
    assert all(name == facts.name for name, facts in SOFTWARE.items())


def test_a_software_is_named_by_a_word_or_by_its_kind(small) -> None:
    for name in SOFTWARE:
        assert small({"implementation": name}) == small({"implementation": {"kind": name}})


BF16, FP32 = 2, 4
TOKENS, HIDDEN, HEADS, KV, HEAD, VOCAB = 4096, 512, 8, 4, 64, 1000
EXPERTS, TOP_K, WIDTH, LAYERS, MICRO_BATCHES = 16, 4, 256, 2, 3
ONE_RANK: dict[str, Any] = {
    "model": {
        "layers": LAYERS, "hidden": HIDDEN, "heads": HEADS, "kv_heads": KV, "head_dim": HEAD,
        "attention": {"kind": "gqa"},
        "experts": EXPERTS, "top_k": TOP_K, "expert_intermediate": WIDTH, "vocab": VOCAB,
    },
    "routing": {"kind": "uniform"},
    "parallelism": {"data": 1, "expert": 1},
    "workload": {"sequence_length": 2048, "micro_batch": 2, "global_batch": 2 * MICRO_BATCHES},
    "dispatch": {"deduplicate": "per_expert"},
    "uncertainty": {"samples": 1},
}  # fmt: skip


class Counting(Roofline):
    """Takes a second for each byte of a memory-bound kernel, or for each FLOP of the others."""

    def __init__(self, *, flops: bool = False) -> None:
        super().__init__(gpu_spec("h200"))
        self.flops = flops

    def seconds(self, kernel: Kernel) -> Estimate:
        """Bytes or FLOPs."""
        memory = isinstance(kernel, MemoryBound)
        if memory == self.flops:
            return Estimate(0.0, "roofline")
        amount = kernel.flops if self.flops else kernel.moved_bytes
        return Estimate(np.asarray(amount, dtype=np.float64), "roofline")


def program(case: Scenario, kernels: Any) -> StepProgram:
    plain, _ = draw_samples(case, obtain_trace(case)) if case.model.experts else ([], None)
    return build_program(case, fabric=build_fabric(case.cluster), kernels=kernels, samples=plain)


def counted(case: Scenario, *, flops: bool = False) -> float:
    """Bytes (or FLOPs) of all kernels of the step on the first rank."""
    found = program(case, Counting(flops=flops)).groups[0]
    blocks = [run.block for task in found.tasks for run in task.runs] + [found.optimizer]
    kernels = [operation for block in blocks for operation in block.operations if operation.seconds_MSR is not None]
    return sum(float(np.mean(operation.seconds_MSR)) for operation in kernels)


@pytest.fixture
def one_rank(small) -> Callable[..., Scenario]:
    """A step on one rank with these switches of the bound."""

    def build(*, base: str = "fused", changes: Any = None, **switches: Any) -> Scenario:
        return small({**ONE_RANK, "implementation": {"kind": base, **switches}, **(changes or {})})

    return build


PASSES = MICRO_BATCHES * LAYERS
TURNED = float(TOKENS * (HEADS + KV) * HEAD)
LOGITS = float(MICRO_BATCHES * TOKENS * VOCAB)
ROWS = float(TOKENS * TOP_K)
NORMS = float(MICRO_BATCHES * TOKENS * HIDDEN * (2 * LAYERS + 1))
SUMS = 2.0 * LAYERS * MICRO_BATCHES * 2 * 3 * BF16 * TOKENS * HIDDEN  # of two branches a layer, forward and backward
ROUTED = PASSES * 3.0 * BF16 * TOKENS * HIDDEN  # the router's gradient, added to that of the rows
SCORES = float(PASSES * 2 * HEADS * 2048 * 2048)
# What a setting moves beyond the bound, from the kernels that its software launches.
BYTES: dict[tuple[str, Any], float] = {
    ("norm", "kernel"): NORMS * (4 + 6 - 8 - 8) + SUMS + ROUTED,
    ("norm", "unfused"): NORMS * (36 + 92 - 8 - 8) + SUMS + ROUTED,
    ("rotary", "cached"): PASSES * TURNED * (20 + 34 - 8),
    ("rotary", "remade"): PASSES * TURNED * (26 + 30 - 8),
    ("rotary", "complex"): PASSES * TURNED * (20 + 20 - 8),
    ("attention", "unfused"): SCORES * (4 + 4 + 6 + 4),
    ("attention", "fp32"): SCORES * (6 + 5 + 8 + 6 + 6 + 12 + 12 + 8 + 5 + 6),
    ("activation", "compiled"): PASSES * ROWS * WIDTH * (6 + 1.3 * 10 + 6 - 16),
    ("expert_gemms", "each"): PASSES * ROWS * HIDDEN * 2 * 4,
    ("layout_copies", "single"): PASSES * 4.0 * TOKENS * HEAD * (HEADS + HEADS + 2 * KV),
    ("router_dtype", "fp32"): PASSES * 2 * 6.0 * HIDDEN * (TOKENS + EXPERTS),
    ("gather_backward", "index_add"): PASSES * (HIDDEN * (2.0 * TOKENS + 6 * ROWS - 2 * (TOKENS + ROWS)) + 8 * ROWS),
    ("gather_backward", "index_put"): PASSES * HIDDEN * (2.0 * TOKENS + 8 * ROWS - 2 * (TOKENS + ROWS)),
    ("combine", "index_add"): PASSES * (HIDDEN * (2.0 * TOKENS + 6 * ROWS - 2 * (TOKENS + ROWS)) + 8 * ROWS),
    ("loss", "parallel"): LOGITS * (32 + 11 - 6),
    ("loss_chunks", 8): MICRO_BATCHES * 7 * 3.0 * BF16 * VOCAB * HIDDEN,
    ("repeat_keys", True): PASSES * 2 * TOKENS * HEAD * (4.0 * HEADS + 2 * (HEADS + KV)),
    ("qkv", "separate"): PASSES * 2 * 3.0 * BF16 * TOKENS * HIDDEN,
}  # fmt: skip


@pytest.mark.parametrize(("switch", "setting"), list(BYTES))
def test_a_setting_moves_the_bytes_of_its_kernels(one_rank, switch: str, setting: Any) -> None:
    more = counted(one_rank(**{switch: setting})) - counted(one_rank())
    assert more == pytest.approx(BYTES[switch, setting], rel=1e-9, abs=20 * PASSES * 4096)


def parameters(case: Scenario) -> float:
    local = local_parameters(case, [0])
    return local.dense + local.expert


def test_gradients_and_weights_move_the_bytes_of_the_parameters(one_rank) -> None:
    formats = {"workload.precision": {"gradients": "fp32", "master": "fp32", "optimizer": "fp32"}}
    formats |= {"workload.gradient_clipping": 1.0}
    plain = counted(one_rank(changes=formats))
    p = parameters(one_rank())
    expected = {
        ("accumulation", "buffer"): MICRO_BATCHES * 1.23 * (2 + 4 + 4),
        ("accumulation", "autograd"): (MICRO_BATCHES - 1) * 3 * 4,
        ("gradient_norm", "kernel"): 4,
        ("gradient_norm", "foreach"): 4 + 8,
        ("gradient_norm", "loop"): 4 + 16,
        ("zeroed_gradients", True): 4,
        ("weight_copy", True): 4,
        ("optimizer", "foreach"): (4 * 4 + 2 * 4 + 14 * 4) - (4 + 4 * 4 + 8 + 2) + (4 + 2),
        ("optimizer", "loop"): (4 * 4 + 2 * 4 + 14 * 4) - (4 + 4 * 4 + 8 + 2) + (4 + 2),
    }
    for (switch, setting), bytes_each in expected.items():
        found = counted(one_rank(changes=formats, **{switch: setting})) - plain
        assert found == pytest.approx(p * bytes_each, rel=1e-9), (switch, setting)


def test_unfused_attention_computes_the_pairs_that_a_mask_takes_away(one_rank) -> None:
    fused, unfused = (counted(one_rank(attention=way), flops=True) for way in ("fused", "unfused"))
    pairs = PASSES * 2 * HEADS * 2048.0**2
    # Twice the causal pairs forward; backward four GEMMs over all of them against five over half.
    assert unfused - fused == pytest.approx(pairs * 2 * HEAD * ((2 - 1) + (4 - 2.5)), rel=1e-9)
    gemms = ("qkv", "ffn_inputs", "expert_inputs")
    for switch in gemms:
        assert counted(one_rank(**{switch: "separate"}), flops=True) == pytest.approx(fused, rel=1e-12)


SLOWER: dict[str, dict[str, Any]] = {  # settings that launch more, or move more, than the bound's
    "dropout": {"dropout": True},
    "fused qkv": {"qkv": "separate"},
    "unfused rotary": {"rotary": "unfused"},
    "router": {"router": "unfused"},
    "sort": {"permute": "sort"},
    "mask": {"permute": "mask"},
    "sentinels": {"permute": "sentinels"},
    "index_put": {"gather_backward": "index_put"},
    "sum": {"combine": "sum"},
    "gates": {"combine": "index_add", "gates": "fp32"},
    "activation": {"activation": "unfused"},
    "experts": {"expert_inputs": "separate"},
    "loss": {"loss": "fp32"},
    "embedding": {"embedding": "torch"},
    "latent": {"layout_copies": "double"},
    "optimizer": {"optimizer": "fused"},
    "host": {"host": "launches"},
}


@pytest.mark.parametrize("switches", SLOWER.values(), ids=SLOWER)
def test_less_fused_settings_take_longer(one_rank, switches: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"compute.profile": "h200"}
    if "layout_copies" in switches:
        mla = {"kind": "mla", "q_lora_rank": 128, "kv_lora_rank": 64, "rope_head_dim": 32}
        changes |= {"model.attention": mla, "model.kv_heads": HEADS}
    if switches.get("embedding"):
        changes |= {"model.vocab": 50_000}
    plain, other = (simulated(one_rank(changes=changes, **ways)).result["step_time_s"] for ways in ({}, switches))
    assert other > plain


def test_graphs_and_a_free_host_launch_at_no_cost(small) -> None:
    changes = {"dispatch": {"deduplicate": "per_expert"}, "compute.profile": "h200", "workload.micro_batch": 1}
    ways: tuple[dict[str, Any], ...] = (
        {"host": "launches", "counts": False},
        {"host": "launches", "counts": False, "cuda_graphs": "attention"},
        {"host": "launches", "counts": False, "cuda_graphs": "step"},
        {"host": "free", "counts": False},
    )
    base = {"kind": "megatron", "permute": "fused"}
    steps = [simulated(small({**changes, "implementation": {**base, **way}})).result["step_time_s"] for way in ways]
    assert steps[0] > steps[1] > steps[2] == steps[3]


def test_ranks_share_tokens_or_sum_them(small) -> None:
    dense = {
        "model": {"layers": 2, "hidden": 512, "heads": 8, "kv_heads": 8, "head_dim": 64, "dense_intermediate": 1024,
                  "vocab": 1000},
        "parallelism": {"data": 1, "tensor": 4, "expert": 1},
        "compute.profile": "h200",
    }  # fmt: skip
    cases = [
        small({**dense, "routing": {"kind": "uniform"}, "implementation": {"sequence_parallel": way}})
        for way in (True, False)
    ]
    shared, whole = (counted(case) for case in cases)
    assert whole > shared  # norms and their sums on every rank
    flops = [counted(case, flops=True) for case in cases]
    assert flops[0] == flops[1]
    kept = [sum(saved.bytes * case.tokens_per_rank for saved in SavedTensors(case).kept(moe=False)) for case in cases]
    assert kept[1] > kept[0]


def test_gradients_are_reduced_in_a_format_of_their_own(small) -> None:
    seconds = [
        simulated(small({"implementation": {"reduce_dtype": dtype}})).result["step_time_s"]
        for dtype in ("bf16", "fp32")
    ]
    assert seconds[0] < seconds[1]
    assert seconds[0] == simulated(small({})).result["step_time_s"]


def test_memory_follows(one_rank) -> None:
    def kept(**ways: Any) -> float:
        saved = SavedTensors(one_rank(**ways))
        of_units = {"token": 1.0, "row": float(TOP_K), "copy": float(TOP_K)}
        return sum(each.bytes * of_units[each.unit] for each in [*saved.kept(moe=True), *saved.head()])

    plain = kept()
    assert kept(loss="fp32") - plain == 2 * VOCAB
    assert kept(loss="fp32", loss_chunks=8) - plain == VOCAB * (4 / 8 - 2)
    assert kept(norm="unfused") - plain == 3 * 4 * HIDDEN  # two norms of the layer, one of the head
    assert kept(attention="unfused") - plain == HEADS * (2 * 2048 - 4)
    assert kept(attention="unfused", dropout=True) - kept(attention="unfused") == HEADS * 3 * 2048
    assert kept(repeat_keys=True) - plain == 2 * 2 * (HEADS - KV) * HEAD
    assert kept(gates="fp32") > kept(gates="bf16") > plain


def test_every_switch_is_a_key_and_says_what_it_is(one_rank) -> None:
    keys = set(Implementation.model_fields) - {"kind", "file"}
    assert keys == {field.name for field in fields(Switches)}
    assert all(field.description for field in Implementation.model_fields.values())
    tried = {name for name, _ in BYTES} | {name for ways in SLOWER.values() for name in ways}
    tried |= {"zeroed_gradients", "accumulation", "gradient_norm", "weight_copy", "optimizer", "cuda_graphs", "counts"}
    tried |= {"sequence_parallel", "reduce_dtype", "flat_gradients", "fresh_gradients"}  # (these two by torch_eager)
    assert tried >= keys - {"ffn_inputs"}


def test_settings_of_a_software_are_words_of_their_switch() -> None:
    allowed = {
        name: [word for part in (hint, *get_args(hint)) for word in get_args(part) or (part,)]
        for name, hint in get_type_hints(Switches).items()
    }
    for software in SOFTWARE.values():
        for field in fields(Switches):
            value = getattr(software.switches, field.name)
            words = allowed[field.name]
            assert value in words or value is None or isinstance(value, bool | int), (software.name, field.name)


def test_any_software_is_another_with_its_switches(small) -> None:
    """No kernel hangs on a name: the plain trainer's switches give its step under the name of another."""
    eager = SOFTWARE["torch_eager"]
    own = {field.name: getattr(eager.switches, field.name) for field in fields(Switches)}
    given = {name: value for name, value in own.items() if value is not None}
    changes = {"compute.profile": "h200", "workload.precision": {"optimizer": "fp32"}}
    ways = ("torch_eager", {"kind": "torchtitan", **given, "reduce_dtype": "bf16"})
    first, second = (
        simulated(small({**changes, "implementation": way, "overlap.gradient_reduction": None})).result for way in ways
    )
    assert first["attribution_s"]["attention"] == second["attribution_s"]["attention"]
    assert first["attribution_s"]["experts"] == second["attribution_s"]["experts"]


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("fp8", {"implementation": "torchtitan", "workload.precision": {"gemm": "fp8"}}),
        ("expert", {"implementation": "transformers"}),
        ("attention", {"implementation.attention": "unfused", "parallelism": {"data": 1, "context": 4, "expert": 4}}),
        ("sequence_parallel", {"implementation.sequence_parallel": False, "parallelism": {"data": 2, "tensor": 2}}),
        ("cuda_graphs", {"implementation": {"cuda_graphs": "step"}}),
        ("cuda_graphs", {"implementation": {"kind": "megatron", "cuda_graphs": "step"}}),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_honoured_is_refused_in_one_line(small, message: str, changes: Any) -> None:
    with pytest.raises(UserError, match=message) as refused:
        require_supported(small(changes))
    assert "\n" not in str(refused.value)


def test_a_wrong_setting_names_those_there_are(small) -> None:
    with pytest.raises(UserError, match=r"rotary.*fused"):
        small({"implementation": {"kind": "megatron", "rotary": "fussed"}})
    with pytest.raises(UserError, match="rotary"):
        small({"implementation": {"kind": "megatron", "rotory": "fused"}})
