"""Combinations: every one is a scenario or has a reason, and none is there twice."""

from collections import defaultdict

import pytest
from plan_cases import SCREEN

from moesim.planner.outcome import STAGES, Rejections
from moesim.planner.search import EvaluationPool, Evaluator, enumerate_space
from moesim.planner.space import Discarded, Space
from moesim.scenario import check_scenario, dump_scenario, load_scenario_text, require_supported
from moesim.study import scenario_id

pytestmark = pytest.mark.usefixtures("few_tokens")


def _sorted_out(space):
    kept, reasons = {}, {}
    for layout in space.layouts():
        try:
            kept[layout] = space.scenario(layout)
        except Discarded as why:
            reasons[layout] = why
    return kept, reasons


def test_every_combination_is_a_sound_scenario_or_has_a_reason(small_plan):
    space = Space.of(small_plan({"choices.tensor": [1, 3], "choices.expert": [1, 3, 4]}))
    kept, reasons = _sorted_out(space)
    assert len(kept) + len(reasons) == space.size
    assert {why.stage for why in reasons.values()} <= set(STAGES)
    for layout, scenario in kept.items():
        check_scenario(scenario)
        require_supported(scenario)
        assert scenario.parallelism.world_size == scenario.cluster.num_gpus == layout.gpus
        assert scenario.idle_gpus == 0


def test_no_layout_is_there_twice(small_plan):
    zero = [{"dense": 0, "expert": 0}, {"dense": 1, "expert": 1}, {"dense": 1, "expert": 0}]
    kept, _ = _sorted_out(Space.of(small_plan({"choices.zero": zero})))
    assert len({scenario_id(scenario.model_copy(update={"name": "x"})) for scenario in kept.values()}) == len(kept)
    assert len({scenario.name for scenario in kept.values()}) == len(kept)
    stages_of = defaultdict(set)  # where there are copies of both, all three shard something else
    for layout, scenario in kept.items():
        mesh = scenario.parallelism
        if mesh.data * mesh.context > 1 < mesh.stage_ranks // (mesh.expert * mesh.expert_tensor):
            stages_of[layout._replace(zero=0)].add(layout.zero)
    assert stages_of and all(stages == {0, 1, 2} for stages in stages_of.values())


def test_without_a_pipeline_only_schedules_that_pair_micro_batches_on_one_rank_are_others(small_plan):
    schedules = [
        {"kind": "1f1b"},
        {"kind": "zb_h1"},
        {"kind": "combined_1f1b"},
        {"kind": "combined_1f1b", "virtual": 2},
    ]
    kept, reasons = _sorted_out(Space.of(small_plan({"choices.pipeline": [1], "choices.schedule": schedules})))
    assert {scenario.parallelism.schedule.kind for scenario in kept.values()} == {"1f1b", "combined_1f1b"}
    assert {scenario.parallelism.schedule.virtual for scenario in kept.values()} == {1}
    assert any("all schedules are alike" in str(why) for why in reasons.values())


def test_a_layout_survives_its_file(small_plan):
    kept, _ = _sorted_out(Space.of(small_plan()))
    for scenario in list(kept.values())[::20]:
        assert load_scenario_text(dump_scenario(scenario)) == scenario


def test_groups_that_leave_their_node_fall_out_when_they_may_not(small_plan):
    wide = {"choices.expert": [1, 8], "choices.gpus": [8]}
    free, _ = _sorted_out(Space.of(small_plan(wide)))
    inside = Space.of(small_plan(wide | {"constraints.expert_in_node": True}))
    bound, reasons = _sorted_out(inside)
    assert {layout.expert for layout in free} == {1, 8}
    assert {layout.expert for layout in bound} == {1}
    assert "places" in {why.stage for why in reasons.values()}
    layout = next(iter(bound))
    inside._check_places(layout._replace(expert=2))
    with pytest.raises(Discarded, match="group of 3 on nodes of"):  # the second one would be on two
        inside._check_places(layout._replace(expert=3))


def test_listed_data_sizes_must_fill_the_gpus(small_plan):
    kept, _ = _sorted_out(Space.of(small_plan({"choices.data": [2]})))
    assert kept
    assert {scenario.parallelism.data for scenario in kept.values()} == {2}


def test_rejections_count_every_combination_once(small_plan):
    plan = small_plan({"goal.days": 0.5, "goal.usd": 60})
    evaluator = Evaluator(Space.of(plan), SCREEN)
    enumerate_space(EvaluationPool(evaluator))
    enumerate_space(EvaluationPool(evaluator))  # a second look changes nothing
    counted = evaluator.rejections.as_json()
    assert counted["looked_at"] == evaluator.space.size
    assert counted["kept"] + sum(entry["count"] for entry in counted["discarded"]) == counted["looked_at"]
    assert counted["kept"] == len(evaluator.candidates) > 0
    by_stage = {entry["stage"] for entry in counted["discarded"]}
    assert {"offer", "sizes", "same", "budget"} <= by_stage


def test_the_dense_baseline_has_no_expert_parallelism(small_plan):
    dense = {
        "layers": 2,
        "hidden": 256,
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 64,
        "dense_intermediate": 512,
        "vocab": 100,
    }
    plan = small_plan({"baseline": {"model": dense, "source": "a test"}})
    kept, _ = _sorted_out(Space.of_baseline(plan))
    assert kept
    assert all(scenario.parallelism.expert == 1 and scenario.model.experts == 0 for scenario in kept.values())


def test_where_none_is_left_the_last_constraint_and_the_nearest_miss_are_named():
    rejections = Rejections()
    rejections.discard("sizes", "a", "b")
    rejections.discard("memory", "h100", "needs 93 GB of 80 GB", 93 / 80)
    rejections.discard("memory", "h100", "needs 99 GB of 80 GB", 99 / 80)
    assert rejections.binding == "memory"
    assert rejections.why_empty() == "memory: needs 93 GB of 80 GB"
    rejections.keep()
    assert rejections.binding is None


def test_bandwidths_are_told_as_networks_are_sold(small_plan):
    nics = [{"preset": "rail_optimised", "nic": nic} for nic in ("200 Gbps", "50 GB/s")]
    space = Space.of(small_plan({"choices.fabric": nics}))
    told = {space.values(layout)["cluster.fabric"]["nic"] for layout in _sorted_out(space)[0]}
    assert told == {"200 Gbps", "400 Gbps"}


def test_choices_that_contradict_the_checks_are_counted_by_key(small_plan):
    _, reasons = _sorted_out(Space.of(small_plan({"choices.micro_batch": [3]})))
    assert "workload.global_batch" in {why.reason for why in reasons.values()}
    with pytest.raises(Discarded, match=r"workload\.global_batch: 32 sequences do not split"):
        raise next(why for why in reasons.values() if why.stage == "refused")
