"""Groups of ranks: sizes, strides, partitions, the nodes they lie on, and the pieces of sequences they hold."""

import numpy as np
import pytest

from moesim.parallel import Mesh
from moesim.parallel.mesh import pieces_of_ranks
from moesim.scenario import Cluster, Parallelism, Pool


def mesh(*, nodes: int = 4, gpus: int = 8, **sizes: int) -> Mesh:
    return Mesh(Parallelism(**sizes), Cluster(pools=(Pool(gpu="h800", nodes=nodes, gpus_per_node=gpus),)))


def test_groups_of_a_mesh_written_out() -> None:
    m = mesh(tensor=2, context=2, data=2, pipeline=2, expert=4)
    assert [g.tolist() for g in m.tensor_groups(1)] == [[8, 9], [10, 11], [12, 13], [14, 15]]
    assert [g.tolist() for g in m.context_groups()] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert [g.tolist() for g in m.dense_gradient_groups()] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [g.tolist() for g in m.expert_groups(1)] == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert [g.tolist() for g in m.expert_gradient_groups()] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert m.rank(stage=1, index=3) == 11


def test_expert_tensor_parallel_ranks_sit_inside_an_expert_block() -> None:
    m = mesh(data=8, expert=2, expert_tensor=2)
    assert [g.tolist() for g in m.expert_groups()] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert [g.tolist() for g in m.expert_gradient_groups()] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert m.num_expert_groups == 4


@pytest.mark.parametrize("kind", ["tensor", "context", "dense_gradient", "expert", "expert_gradient"])
@pytest.mark.parametrize("stage", [0, 1])
def test_every_kind_of_group_partitions_its_stage(kind: str, stage: int) -> None:
    m = mesh(tensor=2, context=2, data=4, pipeline=2, expert=4, expert_tensor=2)
    groups = getattr(m, f"{kind}_groups")(stage)
    assert sorted(np.concatenate(groups).tolist()) == list(range(16 * stage, 16 * (stage + 1)))
    sizes = {"tensor": 2, "context": 2, "dense_gradient": 8, "expert": 4, "expert_gradient": 2}
    assert {len(group) for group in groups} == {sizes[kind]}


def test_ranks_fill_nodes_one_after_the_other_through_the_pools() -> None:
    pools = (Pool(name="a", gpu="h800", nodes=1, gpus_per_node=2), Pool(name="b", gpu="h200", nodes=2, gpus_per_node=4))
    m = Mesh(Parallelism(data=8), Cluster(pools=pools))
    assert m.node_of_rank_W.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert m.local_rank_W.tolist() == [0, 1, 0, 1, 2, 3, 0, 1]


def test_relays_are_on_the_same_rail() -> None:
    m = mesh(nodes=2, gpus=4, data=8, expert=8)
    layout = m.layout(m.expert_groups()[0])
    assert layout.relay_RJ[:, 0].tolist() == [0, 1, 2, 3] * 2
    assert layout.relay_RJ[:, 1].tolist() == [4, 5, 6, 7] * 2


def test_relays_of_a_group_that_covers_a_node_in_part() -> None:
    m = mesh(nodes=3, gpus=4, data=12, expert=6)
    first, second = (m.layout(group) for group in m.expert_groups())
    assert first.node_of_rank_R.tolist() == [0, 0, 0, 0, 1, 1]
    assert first.relay_RJ[:, 1].tolist() == [4, 5, 4, 5, 4, 5]  # rails 2 and 3 take the two ranks in turn
    assert second.node_of_rank_R.tolist() == [0, 0, 1, 1, 1, 1]
    assert second.local_rank_R.tolist() == [2, 3, 0, 1, 2, 3]
    assert second.relay_RJ[:, 0].tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("sizes", "size"),
    [
        ({"data": 16, "expert": 4}, 4),
        ({"data": 4, "tensor": 4, "expert": 2}, 4),
        ({"data": 2, "context": 2, "tensor": 4, "expert": 4, "expert_tensor": 2}, 8),
        ({"data": 16, "expert": 4, "zero": {"dense": 2}}, 16),
    ],
)
def test_a_rank_group_is_the_least_closed_under_all_layouts(sizes: dict[str, int], size: int) -> None:
    m = mesh(pipeline=2, **sizes)
    groups = [set(group.tolist()) for group in m.rank_groups(1)]
    assert {len(group) for group in groups} == {size}
    for kind in ("tensor", "context", "expert"):
        for members in getattr(m, f"{kind}_groups")(1):
            assert sum(set(members.tolist()) <= group for group in groups) == 1


@pytest.mark.parametrize("context", [1, 2, 3, 4])
@pytest.mark.parametrize("tensor", [1, 2, 3, 4])
def test_every_piece_is_held_once_and_in_token_order(context: int, tensor: int) -> None:
    pieces_RV = pieces_of_ranks(context=context, tensor=tensor)
    assert pieces_RV.shape == (context * tensor, 1 if context == 1 else 2)
    assert sorted(pieces_RV.reshape(-1).tolist()) == list(range(pieces_RV.size))
    held_CT = pieces_RV.reshape(context, -1)  # a context rank's tokens, tensor rank after tensor rank
    assert (np.diff(held_CT, axis=1) > 0).all()


@pytest.mark.parametrize("context", [2, 4, 8])
def test_context_ranks_have_equal_shares_of_causal_attention(context: int) -> None:
    """The keys that the queries of a piece see grow with its place: the sums over ranks' pieces are the same."""
    sums_C = pieces_of_ranks(context=context, tensor=2).reshape(context, -1).sum(axis=1)
    assert len(set(sums_C.tolist())) == 1
