"""Layers of other kinds: patterns of dense ones, windows, experts of two matrices and of another width."""

import pytest

from moesim.errors import UserError
from moesim.scenario import Model, scenario_from_mapping
from moesim.scenario.catalogue import model_preset
from moesim.scenario.check import require_supported
from moesim.scenario.flops import attention_score_flops, forward_flops_per_token, keys_per_query, parameters

QWEN = model_preset("qwen3-30b-a3b")


def model(**changes):
    return Model.model_validate(QWEN | changes)


def scenario(**changes):
    return scenario_from_mapping(
        {
            "name": "s",
            "model": {"preset": "qwen3-30b-a3b", "layers": 6} | changes,
            "routing": {"kind": "uniform"},
            "cluster": {"gpu": "h200", "nodes": 1},
            "parallelism": {"data": 8, "expert": 8},
            "workload": {"sequence_length": 4096, "global_batch": 8, "recompute": "full"},
            "implementation": {"kind": "fused"},
            "uncertainty": {"samples": 1},
        }
    )


def test_where_dense_layers_stand_changes_no_count():
    first = model(dense_layers=3, dense_intermediate=6144)
    spread = model(dense_layers=3, dense_at=(5, 20, 47), dense_intermediate=6144)
    assert parameters(first) == parameters(spread)
    assert [n for n in range(48) if spread.is_dense(n)] == [5, 20, 47]
    for index, layer in enumerate(spread.moe_layer_numbers):
        assert spread.moe_number(layer) == index
    assert first.moe_layer_numbers == tuple(range(3, 48))


def test_dense_layers_may_be_given_by_their_numbers_alone():
    assert scenario(dense_at=[1, 4], dense_intermediate=6144).model.dense_layers == 2
    with pytest.raises(UserError, match=r"model.dense_at: there is no layer 6; name some of 0 to 5"):
        scenario(dense_at=[6], dense_intermediate=6144)


@pytest.mark.parametrize("chunked", [False, True])
def test_local_layers_see_fewer_keys_in_proportion(chunked):
    full = model()
    for layers in ((), (0,), tuple(range(0, 48, 2)), tuple(range(48))):
        some = model(local={"window": 1024, "chunked": chunked, "layers": layers})
        near = keys_per_query(some, sequence_length=8192, causal=True, local=True).total
        far = keys_per_query(full, sequence_length=8192, causal=True).total
        mean = (len(layers) * near + (48 - len(layers)) * far) / 48
        flops = attention_score_flops(some, sequence_length=8192, causal=True)
        assert flops == pytest.approx(2 * mean * some.heads * 2 * some.head_dim, rel=1e-12)


def test_a_chunk_sees_the_mean_of_its_causal_triangle():
    keys = keys_per_query(
        model(local={"window": 100, "chunked": True, "layers": [0]}), sequence_length=250, causal=True, local=True
    )
    counted = sum(query % 100 + 1 for query in range(250)) / 250
    assert keys.total == pytest.approx(counted)


def test_an_indexer_leaves_as_many_keys_as_a_window_and_scores_all():
    mla = model_preset("deepseek-v3")
    sparse = mla["attention"] | {"indexer": {"heads": 64, "head_dim": 128, "top_k": 2048}}
    with_indexer, without = Model.model_validate(mla | {"attention": sparse}), Model.model_validate(mla)
    length = 32768
    found = attention_score_flops(with_indexer, sequence_length=length, causal=True)
    keys = sum(min(query + 1, 2048) for query in range(length)) / length
    attended = 2 * keys * without.heads * (128 + 64 + 128)
    assert found == pytest.approx(attended + 64 * 128 * (length + 1), rel=1e-9)
    assert parameters(with_indexer).total > parameters(without).total


def test_two_matrices_are_two_thirds_and_a_latent_width_has_its_projections():
    gated, plain = parameters(model()), parameters(model(gated=False))
    assert 3 * plain.routed_experts == 2 * gated.routed_experts
    latent = parameters(model(expert_hidden=512))
    assert latent.routed_experts * 2048 == gated.routed_experts * 512
    assert latent.latent == 48 * 2 * 2048 * 512
    assert latent.activated == latent.total - latent.inactive_experts
    flops = forward_flops_per_token(model(expert_hidden=512), sequence_length=8, causal=True)
    assert flops["latent"] == 2 * latent.latent


def test_a_dense_network_beside_the_experts_is_a_shared_expert_of_its_width():
    beside = parameters(model(shared_experts=1, shared_intermediate=7168))
    assert beside.shared_experts == 48 * 3 * 2048 * 7168
    gate = parameters(model(shared_experts=1, shared_intermediate=7168, shared_gate=True))
    assert gate.shared_experts - beside.shared_experts == 48 * 2048


@pytest.mark.parametrize(
    "change", [{"local": {"window": 64, "layers": [0]}}, {"gated": False}, {"expert_hidden": 512}, {"dense_at": [2]}]
)
def test_the_eager_trainer_refuses_what_it_does_not_have(change):
    eager = scenario(dense_intermediate=6144, **change).model_dump(mode="json")
    eager["implementation"] = {"kind": "torch_eager"}
    with pytest.raises(UserError, match=f"model.{next(iter(change))}: (networks of )?torch_eager (has none|are gated)"):
        require_supported(scenario_from_mapping(eager))


def test_a_step_with_an_indexer_is_refused_by_name():
    mla = model_preset("deepseek-v3")
    sparse = mla["attention"] | {"indexer": {"heads": 64, "head_dim": 128, "top_k": 2048}}
    with pytest.raises(UserError, match=r"model.attention.indexer: sparse attention with an indexer \(DSA\)"):
        require_supported(scenario(**mla | {"preset": None, "attention": sparse, "layers": 6}))
