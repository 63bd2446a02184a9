"""Peak memory: by hand for a known case, by laws of sharding and schedules, and against what autograd really keeps."""

from dataclasses import replace

import numpy as np
import pytest

from moesim.parallel import TrafficSampler
from moesim.parallel.memory.parameters import local_parameters, stage_units, state_bytes
from moesim.parallel.memory.report import memory_report
from moesim.parallel.memory.rows import even_rows, routed_rows
from moesim.parallel.memory.saved import SavedTensors
from moesim.parallel.traffic import held_copies
from moesim.scenario import load_scenario_text, model_names, scenario_from_mapping
from moesim.scenario.catalogue import model_preset
from moesim.scenario.flops import parameters
from moesim.scenario.model import Model
from moesim.trace.synthetic import uniform_trace

ONE_NODE = """\
name: s
model: {preset: deepseek-moe-16b}
routing: {kind: uniform}
cluster: {gpu: h200, nodes: 1}
parallelism: {data: 8, expert: 8}
workload: {sequence_length: 4096, global_batch: 64}
memory: {reserved: 1 GB, allocator_overhead: 0.0}
"""
PIPELINE = (
    ONE_NODE.replace("nodes: 1", "nodes: 8").replace("expert: 8}", "expert: 8, pipeline: 8}").replace("64}", "128}")
)


def load(text=ONE_NODE, *overrides):
    return load_scenario_text(text, overrides=overrides)


def report(text=ONE_NODE, *overrides):
    scenario = load(text, *overrides)
    return memory_report(scenario, even_rows(scenario))


def test_deepseek_moe_16b_on_eight_ranks_by_hand():
    parts = report().parts[0]
    vocabulary, attention = 2 * 102400 * 2048, 28 * 4 * 2048**2
    shared, dense_ffn = 27 * 2 * 3 * 2048 * 1408, 3 * 2048 * 10944
    dense = vocabulary + attention + (2 * 28 + 1) * 2048 + 27 * 64 * 2048 + shared + dense_ffn
    experts = 27 * 8 * 3 * 2048 * 1408  # 64 experts on 8 ranks
    assert parts["weights.dense"] == parts["gradients.dense"] == 2 * dense
    assert parts["weights.experts"] == parts["gradients.experts"] == 2 * experts
    assert parts["optimizer.dense"] == 2 * 4 * dense
    assert parts["optimizer.experts"] == 2 * 4 * experts
    assert "master.dense" not in parts
    rows = 6 * 4096
    assert parts["activations.experts"] == 27 * rows * 3 * 1408 * 2  # W1 x, W3 x, their product
    assert parts["activations.permuted_rows"] == 27 * rows * (2048 * 2 + 8 + 4)
    assert parts["activations.shared_experts"] == 27 * 4096 * 3 * 2816 * 2
    assert parts["activations.dense_ffn"] == 4096 * (3 * 10944 * 2 + 2 * 2048 * 2 + 4)
    # Norm's input, mean square and output; q, k, v; output and its log-sum-exp.
    assert parts["activations.attention"] == 28 * 4096 * (2 * 2048 * 2 + 4 + 3 * 2048 * 2 + 2048 * 2 + 16 * 4)
    assert parts["activations.embedding_head"] == 4096 * (8 + 2 * 2048 * 2 + 4 + 102400 * 2)
    assert "dispatch_buffers" not in parts, "the logits are gone when the last layer is on its way back"
    assert parts["reserved"] == 1e9
    small = report(ONE_NODE, "model.vocab=8192").parts[0]
    assert small["dispatch_buffers"] == 2 * 4096 * 6 * 2048 * 2
    assert small["activations.embedding_head"] == 4096 * (8 + 2 * 2048 * 2 + 4)


def test_parts_add_up_to_the_peak():
    for overrides in ((), ("workload.recompute=full",), ("memory.allocator_overhead=0.3",)):
        for pipeline in (ONE_NODE, PIPELINE):
            result = report(pipeline, *overrides)
            for rank, parts in enumerate(result.parts):
                assert sum(parts.values()) == pytest.approx(result.peak_SP[:, rank].max(), rel=1e-12)
                assert min(parts.values()) > 0


@pytest.mark.parametrize("name", model_names())
def test_one_rank_holds_exactly_the_parameters_of_the_model(name):
    model = Model.model_validate(model_preset(name))
    count = parameters(model)
    routing = {"routing": {"kind": "uniform"}} if model.experts else {}
    workload = {"sequence_length": 4096, "global_batch": 1}
    data = {"name": "s", "model": {"preset": name}, "cluster": {"gpu": "h200", "nodes": 1}, "workload": workload}
    local = local_parameters(scenario_from_mapping(data | routing), [0])
    assert local.dense + local.expert == pytest.approx(count.total + count.mtp, rel=1e-12)


def test_stages_share_the_model_and_only_prediction_layers_copy_the_embedding():
    def total(model):
        scenario = load(PIPELINE, f"model.preset={model}", "parallelism.data=1", "parallelism.expert=1")
        stages = [local_parameters(scenario, [stage]) for stage in range(8)]
        return sum(stage.dense + stage.expert for stage in stages)

    for name, copies in (("deepseek-moe-16b", 0), ("deepseek-v3", 1)):
        count = parameters(Model.model_validate(model_preset(name)))
        assert total(name) == pytest.approx(count.total + count.mtp + copies * count.embedding, rel=1e-12)


@pytest.mark.parametrize(("kind", "first_stage"), [("optimizer", 1), ("master", 1), ("gradients", 2), ("weights", 3)])
@pytest.mark.parametrize(("part", "key", "holders"), [("dense", "dense", 16), ("experts", "expert", 2)])
def test_zero_divides_each_kind_of_state_by_its_own_holders(kind, first_stage, part, key, holders):
    text = ONE_NODE.replace("nodes: 1", "nodes: 2").replace("data: 8", "data: 16")
    sizes = []
    for stage in range(4):
        scenario = load(text, f"parallelism.zero.{key}={stage}", "workload.precision.master=fp32")
        sizes.append(state_bytes(scenario, [0], replicas=1)[f"{kind}.{part}"])
    assert sizes == pytest.approx([sizes[0] / (holders if stage >= first_stage else 1) for stage in range(4)])


@pytest.mark.parametrize("model", ["deepseek-moe-16b", "deepseek-v3"])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_the_parts_of_a_stage_add_up_to_what_a_rank_holds(model, schedule):
    virtual = 2 if schedule == "interleaved" else 1
    scenario = load(PIPELINE, f"model.preset={model}", f"parallelism.schedule={{kind: {schedule}, virtual: {virtual}}}")
    for stages in ([0], [3, 5], [7 * virtual], [0, 8 * virtual - 1]):
        units = [
            unit for stage in stages for unit in stage_units(scenario, stage, held=[s for s in stages if s < stage])
        ]
        whole = local_parameters(scenario, stages)
        assert sum(unit.dense for unit in units) == whole.dense
        assert sum(unit.expert for unit in units) == whole.expert
        assert max(unit.dense for unit in units) == whole.largest_dense
        assert all(unit.duplicated <= unit.dense for unit in units)


def test_tied_embeddings_are_held_once_on_a_rank_with_both_ends():
    tied = load(ONE_NODE, "model.tied_embeddings=true", "model.mtp_layers=1")
    untied = load(ONE_NODE, "model.mtp_layers=1")
    table = 102400 * 2048
    assert local_parameters(untied, [0]).dense - local_parameters(tied, [0]).dense == table
    ends = load(PIPELINE, "model.tied_embeddings=true", "model.mtp_layers=1")
    apart = sum(local_parameters(ends, [stage]).dense for stage in (0, 7))
    assert apart - local_parameters(ends, [0, 7]).dense == table  # the last stage has a copy of its own


def test_zero_2_and_3_keep_shards_and_the_largest_part_whole():
    text = ONE_NODE.replace("nodes: 1", "nodes: 2").replace("data: 8", "data: 16")
    states = [
        state_bytes(load(text, f"parallelism.zero={{dense: {z}, expert: {z}}}"), [0], replicas=1) for z in range(4)
    ]
    totals = [sum(parts.values()) for parts in states]
    assert totals == sorted(totals, reverse=True)
    local = local_parameters(load(text), [0])
    for kind, largest in (("dense", local.largest_dense), ("experts", local.largest_expert)):
        assert [parts[f"gathered.{kind}"] for parts in states] == [0, 0, 2 * largest, 2 * largest + 2 * 2 * largest]


def test_tensor_ranks_split_what_megatron_splits():
    whole = load(ONE_NODE, "parallelism={data: 8}")
    split = load(ONE_NODE, "parallelism={data: 2, tensor: 4, expert: 8}")
    one, four = (state_bytes(scenario, [0], replicas=1)["weights.dense"] for scenario in (whole, split))
    kept_whole = 2 * ((2 * 28 + 1) * 2048 + 27 * 64 * 2048)  # norms and routers
    assert four == pytest.approx(kept_whole + (one - kept_whole) / 4)
    experts = load(ONE_NODE, "parallelism={data: 4, tensor: 2, expert: 4, expert_tensor: 2}")
    pair, plain = (state_bytes(s, [0], replicas=1)["weights.experts"] for s in (experts, whole))
    assert pair == pytest.approx(plain / 8)


def activations(result, rank):
    return sum(size for name, size in result.parts[rank].items() if name.startswith("activations"))


def test_ranks_hold_as_many_micro_batches_as_the_schedule_says():
    one = report(PIPELINE, "workload.global_batch=8")  # a single micro-batch
    plain, gpipe, split = (report(PIPELINE, f"parallelism.schedule.kind={kind}") for kind in ("1f1b", "gpipe", "zb_h1"))
    for rank in range(8):
        single = activations(one, rank)
        assert activations(plain, rank) == pytest.approx((8 - rank) * single)
        assert activations(gpipe, rank) == pytest.approx(16 * single)
        # Weight gradients are put off, but not that of the head: one micro-batch alone keeps its logits.
        heads = 4096 * (2 * 2048 * 2 + 4 + 102400 * 2) * (rank == 7)
        assert activations(split, rank) == pytest.approx(8 * single - 7 * heads)


def test_dualpipe_holds_two_stages_and_one_activation_more():
    stages = "parallelism.stages=[4, 4, 4, 4, 3, 3, 3, 3]"
    one = report(PIPELINE, "workload.global_batch=8", stages)
    both = report(PIPELINE, "parallelism.schedule.kind=dualpipe", stages)
    for rank in range(8):
        stages = (rank, 7 - rank)
        for part in ("weights.dense", "weights.experts"):
            assert both.parts[rank][part] == pytest.approx(sum(one.parts[stage].get(part, 0) for stage in stages))
    # p + 1 = 9 in the middle: five of the stage with four layers, four of that with three.
    assert activations(both, 3) == pytest.approx(5 * activations(one, 3) + 4 * activations(one, 4))


def test_recomputation_keeps_less_the_more_it_repeats():
    sizes = [
        activations(report(PIPELINE, f"workload.recompute={word}"), 0)
        for word in ("none", "[rms_norm]", "[rms_norm, swiglu]", "full")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
    full = report(PIPELINE, "workload.recompute=full").parts[3]
    assert full["activations.attention"] == 5 * 4 * 4096 * 2048 * 2  # five micro-batches, the inputs of four layers
    assert full["repeated"] > 0


def test_fp8_gemms_keep_one_byte_and_a_scale_per_block():
    """Inputs of SwiGLU stay in bf16, but where a software stores them as narrow, too."""
    narrow = 1 + 4 / 128
    for kind, expected in (("fused", (2 * 2 + narrow) / 6), ("deepseek", narrow / 2)):
        plain, quantised = (
            report(ONE_NODE, f"workload.precision.gemm={dtype}", f"implementation={{kind: {kind}}}").parts[0]
            for dtype in ("bf16", "fp8")
        )
        ratio = quantised["activations.experts"] / plain["activations.experts"]
        assert ratio == pytest.approx(expected), kind


def small(*overrides):
    overrides = ("workload.sequence_length=64", *overrides)
    scenario = load(ONE_NODE, *overrides)
    trace = uniform_trace(scenario.router_shape(), num_layers=2, num_sequences=64, sequence_length=64, seed=1)
    sampler = TrafficSampler(scenario, trace)
    samples = [sampler.draw(np.random.default_rng(n)) for n in range(3)]
    return scenario, samples


@pytest.mark.parametrize("deduplicate", ["per_expert", "per_rank"])
def test_rows_are_those_of_the_routing_samples(deduplicate):
    scenario, samples = small(f"dispatch.deduplicate={deduplicate}", "parallelism.expert=4", "uncertainty.bank=3")
    rows = routed_rows(scenario, samples)
    assert rows.rows_SLBW.shape == (3, 27, 3, 8)
    for number, sample in enumerate(samples):
        for group in (0, 1):
            for layer in (0, 13, 26):
                ranks = slice(4 * group, 4 * group + 4)
                traffic = sample.arrays(group, layer)
                slots_BDP = traffic.slot_rows_BDP(sample.placement)
                assert (rows.rows_SLBW[number, layer, :, ranks] == slots_BDP.sum(axis=2)).all()
                held = held_copies(traffic, sample.placement, deduplicate)[1]
                assert (rows.copies_out_SLBW[number, layer, 1, ranks] == held.sum(axis=1)).all()
                assert (rows.copies_in_SLBW[number, layer, 1, ranks] == held.sum(axis=0)).all()
    even = even_rows(scenario)
    assert rows.rows_SLBW.sum(axis=3).mean() == even.rows_SLBW.sum(axis=3).mean()
    assert (rows.copies_out_SLBW <= even.copies_out_SLBW.max()).all()


def test_the_same_rows_on_one_rank_can_run_out_of_memory():
    scenario = load()
    rows = even_rows(scenario)
    plain = memory_report(scenario, rows)
    hot_SLBW = np.concatenate([rows.rows_SLBW] * 4)
    hot_SLBW[3] *= 0.1
    hot_SLBW[3, ..., 5] += 0.9 * rows.rows_SLBW[0].sum(axis=-1)  # one sample sends nearly all to rank 5
    copies = np.concatenate([rows.copies_in_SLBW] * 4)
    hot_rows = replace(rows, rows_SLBW=hot_SLBW, copies_in_SLBW=copies, copies_out_SLBW=copies)
    hot = memory_report(scenario, hot_rows)
    assert hot_SLBW[3].sum() == pytest.approx(rows.rows_SLBW.sum())
    assert hot.peak_bytes > plain.peak_bytes + 5 * plain.parts[0]["activations.experts"]
    between = (hot.peak_bytes + plain.peak_bytes) / 2
    tight = load(ONE_NODE, f"memory.reserved={1e9 + plain.capacity_P[0] - between} B")
    assert memory_report(tight, rows).fits_share == 1.0
    assert memory_report(tight, hot_rows).fits_share == 0.75
    assert hot.largest_part[0] == "activations.experts"


def test_micro_batches_beyond_the_drawn_ones_hold_the_same_rows_again():
    few, _ = small("parallelism={data: 8, expert: 8, pipeline: 4}", "cluster.nodes=4", "workload.global_batch=64")
    rows = even_rows(few)
    twice_SLBW = np.concatenate([rows.rows_SLBW, 2 * rows.rows_SLBW], axis=2)
    result = memory_report(few, replace(rows, rows_SLBW=twice_SLBW))
    single = memory_report(few, rows).parts
    # Of the four micro-batches that the first rank holds two are large, of the three of the second likewise.
    for rank, ratio in enumerate((6 / 4, 5 / 3, 3 / 2, 2)):
        part = "activations.experts"
        assert result.parts[rank][part] == pytest.approx(ratio * single[rank][part])


def test_memory_counts_the_smallest_gpu_of_a_stage():
    pools = "cluster.pools=[{name: a, gpu: h200, nodes: 1}, {name: b, gpu: h100, nodes: 1}]"
    result = report(ONE_NODE, pools, "parallelism={data: 8, expert: 8, pipeline: 2}")
    assert result.gpus == ("h200", "h100")
    assert result.capacity_P[0] > result.capacity_P[1]


EAGER = """\
name: s
model: {{layers: {layers}, hidden: 64, heads: 4, kv_heads: {kv_heads}, head_dim: 16, attention: {{kind: {kind}}},
  dense_layers: {dense}, dense_intermediate: 160, experts: 8, top_k: 2, shared_experts: 1, expert_intermediate: 48,
  vocab: 96}}
routing: {{kind: uniform}}
cluster: {{gpu: h100, nodes: 1}}
workload: {{sequence_length: 32, global_batch: 2, micro_batch: 2}}
implementation: {{kind: torch_eager}}
"""


def autograd_bytes(scenario):
    """Bytes of the distinct tensors that autograd keeps of one forward pass, parameters left out."""
    import torch

    from moesim.routing.sharded_model import ExpertGroup, build_sharded_model

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    model = build_sharded_model(scenario.model, scenario.router_shape(), group=ExpertGroup(), device=cpu, seed=0)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from being used again
        return tensor

    tokens = torch.arange(64).view(2, 32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
    assert loss.item() > 0
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("kind", "kv_heads"), [("mha", 4), ("gqa", 2)])
def test_eager_layers_keep_what_autograd_keeps(kind, kv_heads):
    def scenario(layers, dense):
        return load_scenario_text(EAGER.format(kind=kind, kv_heads=kv_heads, layers=layers, dense=dense))

    base, moe, both = (autograd_bytes(scenario(*sizes)) for sizes in ((2, 1), (3, 1), (3, 2)))
    tokens, hidden, rows = 64, 64, 128
    saved = SavedTensors(scenario(3, 1), activation_bytes=4.0)  # float32 on a CPU
    expected = {
        is_moe: sum(s.bytes * (tokens if s.unit == "token" else rows) for s in saved.layer(moe=is_moe))
        for is_moe in (True, False)
    }
    # A CPU keeps the normed rows of both norms beside what the fused kernel of a GPU keeps; tables of the rotary
    # embedding (a sequence each) and ends of experts are too small to be listed.
    extra = 2 * tokens * hidden * 4 + 4 * 32 * 8 * 4
    assert moe - base == expected[True] + extra + 8 * 4
    assert both - base == expected[False] + extra


def megatron(*overrides):
    return report(ONE_NODE, "implementation={kind: megatron_local}", "memory.check=warn", *overrides).parts[0]


def test_the_loss_of_megatron_keeps_logits_once_in_fp32_and_passes_them_in_bf16():
    own = "implementation={kind: megatron_local, attention: fused, optimizer: fused}"
    parts = megatron("workload.sequence_length=1024", "model.layers=2", own)
    logits = 1024 * 102400 * 4
    assert parts["loss"] == logits / 2
    assert parts["activations.embedding_head"] == logits + 1024 * (8 + 2 * 2048 * 2 + 4)


def test_an_optimizer_of_lists_of_tensors_makes_the_roots_of_all_second_moments_at_once():
    few = ("workload.sequence_length=128", "model.layers=2", "parallelism.expert=1")
    each = megatron(*few)
    states = {kind: each[f"{kind}.dense"] + each[f"{kind}.experts"] for kind in ("optimizer", "weights")}
    assert each["temporaries"] == states["optimizer"] / 2
    assert "activations.attention" not in each  # nothing is kept any more
    fused = megatron(*few, "implementation={kind: megatron_local, optimizer: fused}")
    assert fused["optimizer.dense"] == each["optimizer.dense"]
    assert sum(fused.values()) < sum(each.values())


def test_scores_of_unfused_attention_are_held_four_times_and_a_half_in_fp32_on_their_way_back():
    long = ("workload.sequence_length=16384", "model.layers=2", "workload.global_batch=8", "model.vocab=1000")
    parts = megatron(*long)
    scores = 16 * 16384**2
    kept = (4 + 2) * scores  # softmax, and its copy in bf16
    assert parts["temporaries"] == pytest.approx((18 - 2) * scores - kept, rel=0.01)
    assert parts["workspace"] == 2 * 2**25 + 2 * scores
    assert parts["activations.attention"] > 2 * kept


def test_values_that_are_a_view_keep_the_joined_gemm_alive():
    def kept(*overrides):
        return megatron("workload.sequence_length=4096", "model.layers=28", *overrides)["activations.attention"]

    own = "implementation={{kind: megatron_local, attention: fused, repeat_keys: false, qkv: {}}}"
    turned = 28 * 4096 * 2 * 16 * 128 * 2  # queries and keys, beside what they were turned from
    assert kept(own.format("joined")) - kept(own.format("separate")) == turned
