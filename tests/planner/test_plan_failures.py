"""A plan with failures ranks by what they leave, and says so."""

import math

import pytest
from plan_cases import build_plan

from moesim.errors import UserError
from moesim.planner.outcome import outcome_of
from moesim.planner.planning import make_plan
from moesim.planner.simulations import Folder
from moesim.report.plan_view import print_plan

pytestmark = pytest.mark.slow

OFTEN = {"record": "none", "causes": [{"name": "GPU", "per": "gpu", "every": "3 d"}]}


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> tuple[dict, dict]:
    """The same plan without failures and with."""
    few = {"choices.gpus": [4, 8], "choices.recompute": ["none"], "search": {"simulate": 3, "check": 0}}
    few |= {"sensitivity": {"candidates": 0, "bandwidth": []}}
    made = []
    for number, more in enumerate(({}, {"failures": OFTEN})):
        folder = Folder(tmp_path_factory.mktemp("plan") / str(number), build_plan(few | more), workers=1)
        made.append(make_plan(folder))
    return made[0], made[1]


def test_failures_make_every_layout_dearer_and_later(plans) -> None:
    without, failing = plans
    assert not without["failures"] and failing["failures"]
    assert all(outcome["goodput"] == 1 for outcome in without["outcomes"].values())
    for outcome in failing["outcomes"].values():
        assert 0 < outcome["goodput"] < 1
        rate = outcome["values"]["gpus"] / 3  # failures a day
        assert outcome["days_with_failures"] == pytest.approx(outcome["days"] * (1 - math.exp(-rate)))
        assert outcome["usd_per_million_tokens"] == pytest.approx(outcome["usd"] / 1e5)
        same = [other for other in without["outcomes"].values() if other["name"] == outcome["name"]]
        for other in same:
            assert other["days"] / outcome["days"] == pytest.approx(outcome["goodput"])
            assert other["usd"] / outcome["usd"] == pytest.approx(outcome["goodput"])


def test_the_ranking_is_by_cost_with_failures_and_shows_it(plans, capsys) -> None:
    failing = plans[1]
    costs = [failing["outcomes"][point]["usd"] for point in failing["ranking"]]
    assert costs == sorted(costs)
    print_plan(failing, width=200)
    shown = capsys.readouterr().out
    assert "goodput" in shown and "days with failures" in shown
    print_plan(plans[0], width=200)
    assert "goodput" not in capsys.readouterr().out


def test_the_screen_foresees_what_is_simulated(small) -> None:
    scenario = small({"failures": OFTEN | {"detection": "5 min"}, "workload.train_tokens": 1e12})
    screened, simulated = outcome_of(scenario, 2.0, screen=True), outcome_of(scenario, 2.0)
    assert screened.goodput == pytest.approx(simulated.goodput, rel=0.02)


def test_spares_are_paid(small) -> None:
    spares = small({"failures": OFTEN | {"spares": 1, "repair": "1 min"}})
    none = small({"failures": OFTEN})
    assert outcome_of(spares, 2.0, screen=True).usd == pytest.approx(2 * outcome_of(none, 2.0, screen=True).usd)


def test_slow_parts_are_refused() -> None:
    with pytest.raises(UserError, match="slow and jitter"):
        build_plan({"failures": {"jitter": 0.1}})
