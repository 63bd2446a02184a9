"""Tensor, context and expert-tensor parallelism: work shared out, collectives counted, bytes by hand.

And the models of sharing links: which one answers, and all three on a whole step, with and without a slow rank.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from moesim import simulate
from moesim.engine import simulate_step
from moesim.kernels import Attention, Gemm, kernel_model
from moesim.network import build_fabric
from moesim.parallel import Mesh, TrafficSampler
from moesim.program import StepProgram, build_program
from moesim.program.collectives import GroupLinks, PeerCollective, Peers, RingHop
from moesim.program.loads import group_loads
from moesim.program.operations import Block, Kind
from moesim.program.scenario_fabric import dispatch_sharing, sharing_model
from moesim.program.stage import StagePlan, stage_blocks
from moesim.results import CATEGORIES, attribute
from moesim.results.spans import Part, Phase
from moesim.run import obtain_trace
from moesim.scenario import Scenario
from moesim.scenario.cluster import Cluster
from moesim.schedules import Pass
from moesim.seeding import stream

pytestmark = pytest.mark.usefixtures("few_tokens")

TOKENS, HIDDEN, BF16 = 2 * 2048, 512, 2  # of the small scenario's micro-batch


class Recorder:
    """A kernel model that notes FLOPs of GEMMs and pairs of queries and keys, and answers as the roofline does."""

    def __init__(self) -> None:
        self.model = kernel_model("h200", "roofline")
        self.gemms: Counter[str] = Counter()
        self.pairs: Counter[str] = Counter()

    def __getattr__(self, name):
        return getattr(self.model, name)

    def seconds(self, kernel):
        if isinstance(kernel, Gemm):
            self.gemms["gemm"] += kernel.m * kernel.k * kernel.n
        if isinstance(kernel, Attention):
            pairs = kernel.batch * kernel.heads * kernel.sequence**2 / (2 if kernel.causal else 1)
            self.pairs[kernel.direction] += pairs
        return self.model.seconds(kernel)


def dense_layer(scenario: Scenario) -> tuple[dict[Pass, Block], Recorder]:
    """One dense layer on the first rank group, and what it asked of its kernel model."""
    kernels, mesh = Recorder(), Mesh(scenario.parallelism, scenario.cluster)
    plan = StagePlan(layers=range(1), moe_layers=(), first=False, last=False)
    links = GroupLinks(build_fabric(scenario.cluster), mesh.rank_groups()[0])
    return stage_blocks(scenario, kernels, plan, None, links), kernels


def collectives(block: Block) -> list[tuple[str, PeerCollective]]:
    return [(op.label.name, op.transfers_M[0]) for op in block.operations if op.kind is Kind.TRANSFER]


@pytest.mark.parametrize("tensor", [2, 4])
def test_tensor_ranks_share_gemms_and_attention_and_exchange_tokens(small, tensor):
    alone, whole = dense_layer(small({"parallelism": {"data": 4}}))
    shared, part = dense_layer(small({"parallelism": {"data": 4 // tensor, "tensor": tensor}}))
    assert part.gemms["gemm"] * tensor == whole.gemms["gemm"]
    assert {key: value * tensor for key, value in part.pairs.items()} == whole.pairs
    assert not collectives(alone[Pass.FORWARD]) and not collectives(alone[Pass.BACKWARD])
    verbs = [
        Counter("gather" if "gather" in name else "scatter" for name, _ in collectives(shared[kind]))
        for kind in (Pass.FORWARD, Pass.BACKWARD)
    ]
    assert verbs == [{"gather": 2, "scatter": 2}, {"gather": 4, "scatter": 2}]
    each = (tensor - 1) / tensor * TOKENS * HIDDEN * BF16
    sent = [prepared.sent_bytes for kind in (Pass.FORWARD, Pass.BACKWARD) for _, prepared in collectives(shared[kind])]
    assert sent == [each] * 10


def test_a_split_backward_pass_keeps_all_operations_and_puts_off_the_second_gather(small):
    blocks, _ = dense_layer(small({"parallelism": {"data": 2, "tensor": 2}}))
    names = {kind: [op.label.name for op in blocks[kind].operations] for kind in blocks}
    assert Counter(names[Pass.BACKWARD]) == Counter(names[Pass.INPUT]) + Counter(names[Pass.WEIGHT])
    late = names[Pass.WEIGHT]
    gathered = late.index("qkv.gather.wgrad")
    assert late[gathered - 1 : gathered + 3] == ["fork", "qkv.gather.wgrad", "join", "qkv.wgrad"]
    assert [name for name in late if "scatter" in name] == []


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_heads_weight_gradient_is_not_put_off(small, tensor):
    scenario = small({"parallelism": {"data": 4 // tensor, "tensor": tensor}})
    links = GroupLinks(build_fabric(scenario.cluster), np.arange(tensor))
    plan = StagePlan(layers=range(1), moe_layers=(), first=False, last=True)
    blocks = stage_blocks(scenario, kernel_model("h200", "roofline"), plan, None, links)
    heads = [[op.phase for op in blocks[kind].operations if op.part is Part.HEAD] for kind in Pass]
    by_pass = dict(zip(Pass, heads, strict=True))
    assert not by_pass[Pass.WEIGHT]
    assert by_pass[Pass.INPUT] == by_pass[Pass.BACKWARD]
    assert Phase.WEIGHT_GRADIENT in by_pass[Pass.INPUT]


@pytest.mark.parametrize("context", [2, 4])
def test_a_ring_shares_attention_and_passes_keys_and_values_on(small, context):
    _, whole = dense_layer(small({"parallelism": {"data": 4}}))
    shared, part = dense_layer(small({"parallelism": {"data": 4 // context, "context": context}}))
    assert part.gemms["gemm"] * context == whole.gemms["gemm"]
    assert {key: value * context for key, value in part.pairs.items()} == pytest.approx(dict(whole.pairs))
    pair = TOKENS / context * 2 * 8 * 64 * BF16  # keys and values of one rank
    forward, backward = (
        sum(prepared.sent_bytes for _, prepared in collectives(shared[kind])) for kind in (Pass.FORWARD, Pass.BACKWARD)
    )
    assert forward == (context - 1) * pair
    assert backward == (context - 1) * pair + context * pair  # and the gradients, which go all the way around


def test_slices_of_experts_see_the_rows_of_all_their_ranks(small):
    scenario = small({"parallelism": {"data": 4, "expert": 2, "expert_tensor": 2}})
    sample = TrafficSampler(scenario, obtain_trace(scenario)).draw(stream(0, "test"))
    fabric, ranks_R = build_fabric(scenario.cluster), np.arange(4)
    loads = group_loads(scenario, fabric, [sample], group=0, stage=0, layers=[0], ranks_R=ranks_R)
    kept = sum(sample.arrays(group, 0).rows_BRE[0].sum() for group in (0, 1))
    assert loads.rows_MSR[0, 0].sum() == 2 * kept
    np.testing.assert_array_equal(loads.rows_MSR[:, :, ::2], loads.rows_MSR[:, :, 1::2])
    copies = sum(sample.arrays(group, 0).rank_copies_BRD[0].sum() for group in (0, 1))
    for transfer in (loads.gather_M[0], loads.scatter_M[0]):
        moved = sum(part.traffic.intra_node_bytes for part in transfer.parts)
        assert moved == pytest.approx(copies * HIDDEN * BF16)  # each copy once, to the one other slice


def test_folded_groups_compute_the_rows_of_each_of_their_expert_groups(small):
    scenario = small({"parallelism": {"data": 1, "tensor": 4, "expert": 2}})
    sample = TrafficSampler(scenario, obtain_trace(scenario)).draw(stream(0, "test"))
    fabric = build_fabric(scenario.cluster)
    loads = group_loads(scenario, fabric, [sample], group=0, stage=0, layers=[1], ranks_R=np.arange(4))
    rows = [sample.slot_rows_BDP(group, 1)[3].sum(axis=1) for group in (0, 1)]
    np.testing.assert_array_equal(loads.rows_MSR[3, 0], np.concatenate(rows))
    start_SR = np.array([[0.0, 0.0, 1.0, 1.0]])
    finish_SR = loads.dispatch_M[3].finish(start_SR)
    np.testing.assert_allclose(finish_SR, start_SR + loads.dispatch_M[3].alone_R, rtol=1e-12)
    assert loads.peers == (0, 0, 1, 1)


def test_peers_wait_for_each_other_alone():
    pairs = PeerCollective(Peers(2, 2), np.full(8, 0.5), sent_bytes=1.0)  # ranks 0 and 2, 1 and 3, ...
    start_SR = np.array([[0.0, 1.0, 2.0, 3.0, 9.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(pairs.finish(start_SR), [[2.5, 3.5, 2.5, 3.5, 9.5, 0.5, 9.5, 0.5]])
    ring = RingHop(Peers(4), np.full(4, 0.5), sent_bytes=1.0)
    np.testing.assert_allclose(ring.finish(np.array([[0.0, 0.0, 0.0, 4.0]])), [[4.5, 0.5, 4.5, 4.5]])
    assert Peers(2, 2).set_of_place(8) == (0, 1, 0, 1, 2, 3, 2, 3)


def test_collectives_are_seen_where_nothing_runs_beside_them(small):
    scenario = small({"parallelism": {"data": 2, "tensor": 2}, "model.experts": 0, "model.top_k": 0,
                      "model.shared_experts": 0, "model.expert_intermediate": 0, "model.dense_layers": 4,
                      "routing": {"kind": "uniform"}, "workload.global_batch": 4})  # fmt: skip
    program = build_program(
        scenario, fabric=build_fabric(scenario.cluster), kernels=kernel_model("h200", "roofline"), samples=[]
    )
    step = simulate_step(program)
    seconds: Counter[str] = Counter()
    for run in (run for task in program.groups[0].tasks for run in task.runs):
        for op in run.block.operations:
            if op.kind is Kind.TRANSFER:
                beside = op.label.name.endswith(".gather.wgrad") or (
                    run.backward and op.label.name.endswith(".scatter")
                )
                seconds["beside" if beside else "alone"] += float(op.transfers_M[0].alone_R[0, 0])
    tensor_R = attribute(step.tables[0])[CATEGORIES.index("tensor"), 0]
    assert seconds["beside"] > 0
    assert (tensor_R > seconds["alone"] * (1 - 1e-9)).all()
    assert (tensor_R < seconds["alone"] + seconds["beside"]).all()


LAYOUTS = [
    {"data": 2, "tensor": 2, "expert": 4},
    {"data": 1, "tensor": 4, "expert": 2},
    {"data": 2, "context": 2, "expert": 4},
    {"data": 1, "context": 2, "tensor": 2, "expert": 2, "expert_tensor": 2},
    {"data": 4, "expert": 1, "expert_tensor": 4},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attribution_and_critical_path_add_up_under_every_layout(small, layout):
    record = simulate(small({"parallelism": layout, "uncertainty": {"samples": 2}}))
    assert record.result["attribution_s"]["tensor"] > 0
    for parts_C in record.arrays["attribution_CW"].T:
        assert parts_C.sum() == pytest.approx(record.result["step_time_s"], rel=1e-9)
    path = record.result["critical_path"]
    assert sum(path["seconds"].values()) == pytest.approx(path["step_time_s"], rel=1e-9)
    # Expert groups of one rank group differ a little in their copies per token even where each spreads them evenly.
    uneven, even = (record.result[key]["imbalance_wait"] for key in ("attribution_s", "attribution_balanced_s"))
    assert even <= 0.05 * uneven + 1e-9


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "dualpipe"])
def test_a_scenario_with_everything_on_runs(small, schedule):
    layout = {"data": 1, "context": 2, "tensor": 2, "pipeline": 2, "expert": 2, "expert_tensor": 2,
              "schedule": {"kind": schedule}, "zero": {"dense": 1, "expert": 1}}  # fmt: skip
    scenario = small(
        {
            "cluster.nodes": 2, "parallelism": layout, "model.mtp_layers": 1, "dispatch.dtype": "fp8",
            "workload": {"sequence_length": 2048, "global_batch": 4, "recompute": "selective", "gradient_clipping": 1},
            "capacity": {"kind": "device", "factor": 1.0}, "uncertainty": {"samples": 1},
        }
    )  # fmt: skip
    result = simulate(scenario).result
    assert sum(result["attribution_s"].values()) == pytest.approx(result["step_time_s"], rel=1e-9)
    assert 0 < result["attribution_s"]["tensor"] < result["step_time_s"]


def test_latent_attention_gathers_its_compressed_states(small):
    mla = {"kind": "mla", "q_lora_rank": 128, "kv_lora_rank": 64, "rope_head_dim": 32}
    scenario = small({"model.attention": mla, "parallelism": {"data": 2, "tensor": 2}})
    shared, part = dense_layer(scenario)
    _, whole = dense_layer(small({"model.attention": mla, "parallelism": {"data": 4}}))
    assert part.gemms["gemm"] * 2 == whole.gemms["gemm"]  # down-projections too: of half of the tokens
    gathered = {name: prepared.sent_bytes for name, prepared in collectives(shared[Pass.FORWARD])}
    assert gathered["q_up.gather"] == TOKENS / 2 * 128 * BF16
    assert gathered["kv_up.gather"] == TOKENS / 2 * (64 + 32) * BF16
    assert "attention.ring" not in gathered


def test_tensor_ranks_reduce_what_they_hold_whole(small):
    scenario = small({"parallelism": {"data": 2, "tensor": 2, "expert": 4}})
    samples = [TrafficSampler(scenario, obtain_trace(scenario)).draw(stream(0, "test"))]
    kernels, fabric = kernel_model("h200", "roofline"), build_fabric(scenario.cluster)
    names = [r.name for r in build_program(scenario, fabric=fabric, kernels=kernels, samples=samples).reductions]
    assert sorted(names) == ["all_reduce.dense", "all_reduce.duplicated"]
    alone = small({"parallelism": {"data": 4, "expert": 4}})
    samples = [TrafficSampler(alone, obtain_trace(alone)).draw(stream(0, "test"))]
    names = [r.name for r in build_program(alone, fabric=fabric, kernels=kernels, samples=samples).reductions]
    assert names == ["all_reduce.dense"]


@pytest.mark.parametrize(
    "layout",
    [
        {"data": 2, "context": 2, "tensor": 2, "expert": 4, "expert_tensor": 2},
        {"data": 2, "tensor": 2, "pipeline": 2, "expert": 4, "zero": {"dense": 3, "expert": 3}},
    ],
)
def test_ranks_share_layers_also_where_groups_slow_each_other(small, layout):
    """On a blocking core samples are simulated one by one, but for collectives of equal shares, which are alike."""
    fabric = {"preset": "leaf_spine", "oversubscription": 4.0, "pod_nodes": 1}
    scenario = small(
        {
            "cluster": {"gpu": "h200", "nodes": 4, "gpus_per_node": 2, "fabric": fabric},
            "parallelism": layout,
            "uncertainty": {"samples": 2},
        }
    )
    record = simulate(scenario)
    for parts_C in record.arrays["attribution_CW"].T:
        assert parts_C.sum() == pytest.approx(record.result["step_time_s"], rel=1e-9)
    assert record.result["attribution_s"]["tensor"] > 0


def test_bytes_of_shared_layers_by_hand(small):
    """Dense layers on pairs of ranks: ten exchanges each, two at the embedding, three at the head, and the loss."""
    dense = {"model.experts": 0, "model.top_k": 0, "model.shared_experts": 0, "model.expert_intermediate": 0,
             "model.dense_layers": 4, "routing": {"kind": "uniform"}}  # fmt: skip
    result = simulate(small({**dense, "parallelism": {"data": 2, "tensor": 2}})).result
    exchange = 0.5 * TOKENS * HIDDEN * BF16
    loss = 3 * TOKENS * 4  # all-reduces of a float32 per token: a ring of two sends each value once
    each = (4 * 10 + 2 + 3) * exchange + loss
    micro_batches, ranks = 16 // (2 * 2), 4
    assert result["communication"]["tensor_bytes"] == pytest.approx(micro_batches * ranks * each)
    assert simulate(small()).result["communication"]["tensor_bytes"] == 0


def test_slices_of_experts_send_every_arrived_copy_once(small):
    layout = {"data": 4, "expert": 2, "expert_tensor": 2}
    changes = {"parallelism": layout, "dispatch.deduplicate": "per_expert", "workload.recompute": "none"}
    result = simulate(small({**changes, "capacity": {"kind": "none"}})).result
    rows = 16 * 2048 * 4 * 3  # sequences, tokens, selections, layers with experts
    assert result["communication"]["tensor_bytes"] == pytest.approx(rows * HIDDEN * BF16 * 4)  # out and back, twice


CROWDED = {"oversubscription": 4.0}
BLOCKING = {"preset": "leaf_spine", "pod_nodes": 1, "oversubscription": 4.0}


@pytest.mark.parametrize(
    ("fabric", "ranks", "model"),
    [
        ({}, 8, "ports"),
        (BLOCKING, 8, "fluid"),
        (BLOCKING, 4, "ports"),  # one node: NVLink alone
        (BLOCKING, 4096, "ports"),  # too many pairs; a run warns
        ({"nics_per_node": 2}, 8, "fluid"),
    ],
)
def test_fluid_answers_where_links_that_gpus_share_can_block(small, fabric, ranks, model) -> None:
    scenario = small({"cluster.nodes": 2, "cluster.fabric": fabric})
    ranks_R = np.arange(ranks) % 8
    assert sharing_model(scenario.network, build_fabric(scenario.cluster), ranks_R) == model
    named = small({"cluster.nodes": 2, "cluster.fabric": fabric, "network.model": "exact"})
    assert sharing_model(named.network, build_fabric(named.cluster), ranks_R) == "exact"


def test_the_domain_and_the_algorithm_decide_whether_links_above_are_used(small) -> None:
    """Trays of a rack need none of them; messages over NICs do, inside a node, too."""
    rack = Cluster.model_validate({"pools": [{"gpu": "gb200", "nodes": 36, "gpus_per_node": 4}], "fabric": CROWDED})
    one, network = np.arange(72), small().network
    assert build_fabric(rack).core_can_block
    for algorithm in ("direct", "low_latency"):
        assert dispatch_sharing(network, build_fabric(rack), one, algorithm) == "ports"
        assert dispatch_sharing(network, build_fabric(rack), one + 36, algorithm) == "fluid"
    nodes = build_fabric(small({"cluster.nodes": 2, "cluster.fabric": CROWDED}).cluster)
    found = [dispatch_sharing(network, nodes, np.arange(4), name) for name in ("direct", "low_latency")]
    assert found == ["ports", "fluid"]


def test_the_default_is_the_named_model_to_the_bit(small) -> None:
    """On two nodes whose core blocks: as `fluid`, not as `ports`, and without the warning that `ports` brings."""
    changes = {"cluster.nodes": 2, "parallelism": {"data": 8, "expert": 8}, "cluster.fabric": BLOCKING}
    default, fluid, ports = (
        simulate(small({**changes, **named})).result
        for named in ({}, {"network.model": "fluid"}, {"network.model": "ports"})
    )
    assert default["step_time_s"] == fluid["step_time_s"] != ports["step_time_s"]
    assert not any("network.model" in text for text in default["warnings"])
    assert any("network.model: ports" in text for text in ports["warnings"])


SLOW_RANK = 3


def program_of(scenario: Scenario) -> StepProgram:
    sample = TrafficSampler(scenario, obtain_trace(scenario)).draw(stream(0, "test", 0))
    kernels = kernel_model("h200", "roofline")
    return build_program(scenario, fabric=build_fabric(scenario.cluster), kernels=kernels, samples=[sample])


def with_straggler(program: StepProgram, factor: float) -> StepProgram:
    """The same step with kernels of one rank of each group that take `factor` times as long."""

    def slowed(block: Block, ranks: int) -> Block:
        factor_R = np.where(np.arange(ranks) == SLOW_RANK, factor, 1.0)
        operations = (
            operation
            if operation.seconds_MSR is None
            else replace(operation, seconds_MSR=operation.seconds_MSR * factor_R)
            for operation in block.operations
        )
        return Block(block.name, tuple(operations))

    groups = []
    for group in program.groups:
        blocks = {run.block for task in group.tasks for run in task.runs}
        slow = {block: slowed(block, len(group.ranks_R)) for block in blocks}
        tasks = tuple(
            replace(task, runs=tuple(run._replace(block=slow[run.block]) for run in task.runs)) for task in group.tasks
        )
        groups.append(replace(group, tasks=tasks))
    return replace(program, groups=tuple(groups))


@pytest.mark.parametrize("straggler", [1.0, 1.5])
@pytest.mark.parametrize("nodes", [1, 2])
def test_models_agree_on_whole_steps(small, nodes: int, straggler: float) -> None:
    """`ports` within 2 % of `exact`, `fluid` within 0.5 %, where the core does not block."""
    ranks = 4 * nodes
    seconds = {}
    for model in ("exact", "fluid", "ports"):
        scenario = small(
            {
                "cluster.nodes": nodes,
                "parallelism": {"data": ranks, "expert": ranks},
                "network.model": model,
                "workload.global_batch": 2 * ranks,
            }
        )
        seconds[model] = float(simulate_step(with_straggler(program_of(scenario), straggler)).step_S[0])
    assert seconds["ports"] == pytest.approx(seconds["exact"], rel=0.02)
    assert seconds["fluid"] == pytest.approx(seconds["exact"], rel=0.005)
