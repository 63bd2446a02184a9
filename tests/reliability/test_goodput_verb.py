"""`moesim goodput` as its user sees it: answers, a page, CSV, and one line for every mistake."""

import json
from pathlib import Path

import numpy as np
import pytest

import moesim
from moesim.cli import main
from moesim.parallel.memory.parameters import local_parameters
from moesim.reliability import checkpoint_bytes, goodput_of_step
from moesim.reliability.answers import GOODPUT_DEFINITIONS
from moesim.reliability.job import Step, job_causes, job_of, speeds_of
from moesim.results.definitions import paths
from moesim.scenario import Scenario
from moesim.scenario.failures import FAILURE_RECORDS

STEP = Step(seconds=10.0, compute_s=6.0, degraded_s={})
OFTEN = {"failures.record": "none", "failures.causes": [{"name": "GPU", "per": "gpu", "every": "2 d"}]}


@pytest.fixture(autouse=True)
def _coarse_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked here holds for any interval; `test_job` asks for the best."""
    monkeypatch.setattr("moesim.reliability.answers.SEARCH_FAILURES", 200)


@pytest.fixture
def call(tmp_path: Path, monkeypatch, capsys):
    """`call(*flags)` runs the verb on a small scenario in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str) -> tuple[int, str, str]:
        small = ["uniform-dropless", "--set", "uncertainty.samples=1", "--set", "compute.profile=roofline"]
        small += ["--set", "failures.factor=300", "--set", "workload.global_batch=8"]
        code = main(["goodput", *small, "--days", "6", "--seeds", "3", *flags])
        return code, *capsys.readouterr()

    return run


def test_json_adds_up_and_repeats(call) -> None:
    first, again = call("--json"), call("--json")
    assert first == again
    assert first[0] == 0
    result = json.loads(first[1])
    assert sum(result["time_s"].values()) == pytest.approx(6 * 86400, abs=1)
    assert result["goodput"] == pytest.approx(result["time_s"]["useful"] / (6 * 86400))
    low, high = result["goodput_range"]
    assert low <= result["goodput"] <= high <= 1
    for account in ("lost", "detection", "restart", "repair"):
        by_cause = sum(row[f"{account}_s"] for row in result["causes"])
        assert by_cause == pytest.approx(result["time_s"][account], abs=1e-6)
    useful = result["usd_per_million_tokens_without_failures"] / result["usd_per_million_useful_tokens"]
    assert useful == pytest.approx(result["goodput"])  # without spares every hour is paid alike
    assert not list(Path().iterdir())
    rare = {"warnings.[]"}
    assert GOODPUT_DEFINITIONS.keys() - rare == paths(result) - rare


def test_python_gives_what_the_verb_prints(call) -> None:
    overrides = {"uncertainty.samples": 1, "compute.profile": "roofline", "failures.factor": 300}
    scenario = moesim.load_scenario("uniform-dropless", overrides | {"workload.global_batch": 8})
    found = moesim.goodput(scenario, days=4, seeds=2)
    assert found.result == json.loads(call("--json", "--days", "4", "--seeds", "2")[1]) and len(found.ledgers) == 2


def test_the_screen_and_the_page_show_the_answers(call) -> None:
    code, out, _ = call()
    assert code == 0
    assert "Young" in out and "software bug" in out and "arXiv 2407.21783" in out
    page = Path("runs/uniform-dropless/goodput.html").read_text()
    kept = json.loads(Path("runs/uniform-dropless/goodput.json").read_text())
    assert kept["schema_version"] == 1 and kept["kind"] == "goodput"
    for title in ("Goodput over time", "Lost time by cause", "Goodput by time between checkpoints", "best, simulated"):
        assert title in page
    assert call()[0] == 0  # the same page again is no mistake
    assert call("--days", "0.1", "--set", "failures.factor=0.001", "--out", "quiet.html")[0] == 0
    quiet = Path("quiet.html").read_text()
    assert "Goodput over time" in quiet and "Lost time by cause" not in quiet


def test_csv_has_the_numbers_of_the_json(call) -> None:
    short = ("--days", "4", "--seeds", "2")
    head, row = (line.split(",") for line in call("--csv", *short)[1].splitlines())
    result = json.loads(call("--json", *short)[1])
    assert float(row[head.index("time_s.useful")]) == result["time_s"]["useful"]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--days", "0"], 1, "more than 0"),
        (["--seeds", "0"], 1, "--seeds"),
        (["--set", "failures.recrd=none"], 1, "record"),
        (["--set", "failures.record=llama4"], 1, "llama3_h100"),
        (["--set", "failures.detection=10"], 1, "unit"),
        (["--set", "failures.spares=2"], 1, "repair"),
        (["--set", "failures.restart=300"], 1, "30 min"),
        (["--set", "failures={causes: [{name: a, every: 3 d}, {name: a, every: 4 d}]}"], 1, "listed twice"),
        (["--set", "failures.checkpoint.interval=0"], 1, "interval"),
        (["--set", "failures.checkpoint.interval=often"], 1, "interval"),
        (["--set", "failures={spares: 0, repair: 1 d, without_spare: shrink}"], 1, "wait"),
        (["--set", "failures={slow: [{part: node_links, factor: 0.5, node: 7}]}"], 1, "failures.slow.0.node"),
        (["--set", "failures={slow: [{part: rank, factor: 0.5, every: 1 h}]}"], 1, "needs lasts"),
        (["--set", "failures={slow: [{part: rank, factor: 0.5, every: 2 s, lasts: 1 s}]}"], 1, "at most 100,000"),
        (["--set", "failures={checkpoint: {asynchronous: true, interval: 1, write_per_node: 100 MB/s}}"], 1, "steps"),
        (["--set", "failures={causes: [{name: all, per: gpu, every: 5 min}]}"], 2, "no time for work"),
    ],
)
def test_a_mistake_is_one_line(call, flags: list[str], code: int, words: str) -> None:
    answer = call(*flags)
    assert answer[:2] == (code, "")
    assert answer[2].count("\n") == 1 and words in answer[2]


def test_the_published_record_gives_its_counts_back() -> None:
    llama3 = FAILURE_RECORDS["llama3_h100"]
    assert sum(cause.count for cause in llama3.causes) == 419
    nodes = llama3.gpus // llama3.gpus_per_node
    parts = {
        "gpu": llama3.gpus,
        "nic": llama3.gpus,
        "node": nodes,
        "job": 1,
    }
    expected = sum(llama3.per_hour(cause) * parts[cause.per] for cause in llama3.causes)
    assert expected * 24 * llama3.days == pytest.approx(419)
    assert all(record.source for record in FAILURE_RECORDS.values())


def test_causes_of_the_scenario_replace_and_add(small) -> None:
    own = [{"name": "NIC", "per": "nic", "every": "10 d"}, {"name": "power", "per": "job", "every": "30 d"}]
    causes = {cause.name: cause for cause in job_causes(small({"failures.causes": own}))}
    assert causes["NIC"].per_second == pytest.approx(4 / (10 * 86400))
    assert causes["power"].per_second == pytest.approx(1 / (30 * 86400))
    assert len(causes) == len(FAILURE_RECORDS["llama3_h100"].causes) + 1
    doubled = {cause.name: cause for cause in job_causes(small({"failures.causes": own, "failures.factor": 2.0}))}
    assert doubled["SSD"].per_second == pytest.approx(2 * causes["SSD"].per_second)
    assert doubled["NIC"] == causes["NIC"]


def test_a_checkpoint_holds_every_parameter_once(small) -> None:
    """What the ranks of one expert group hold between them, dense parameters counted once."""
    scenario = small()
    one_rank = local_parameters(scenario, [0])
    count = one_rank.dense + one_rank.expert * scenario.parallelism.expert
    assert checkpoint_bytes(scenario) == pytest.approx(count * (2 + 2 * 4))
    kept = small({"workload.precision": {"master": "fp32", "optimizer": "bf16"}})
    assert checkpoint_bytes(kept) == pytest.approx(count * (2 + 4 + 2 * 2))


def speeds_at(scenario: Scenario, *, days: float = 20, seed: int = 0) -> tuple[tuple[float, float], ...]:
    return speeds_of(scenario, STEP, horizon_s=days * 86400, rng=np.random.default_rng(seed))


def test_what_flaps_is_slow_for_its_share_of_the_time(small) -> None:
    flapping = {"part": "rank", "factor": 0.5, "every": "55 min", "lasts": "5 min", "start": "1 d"}
    scenario = small(OFTEN | {"failures.slow": [flapping]})
    speeds = speeds_at(scenario)
    assert speeds[0] == (0.0, 1.0) and speeds[1][0] > 86_400 and {factor for _, factor in speeds} == {1.0, 1.6}
    starts = np.array([start for start, _ in speeds] + [20 * 86_400])
    slow = np.diff(starts)[np.array([factor for _, factor in speeds]) > 1].sum()
    assert slow / (19 * 86_400) == pytest.approx(5 / 60, rel=0.15)  # about 456 times
    assert speeds == speeds_at(scenario) != speeds_at(scenario, seed=1)
    without, found = (goodput_of_step(each, STEP, days=20, seeds=2).result for each in (small(OFTEN), scenario))
    assert found["goodput"] < without["goodput"]
    slowed = found["time_s"]["slowed"] / (found["time_s"]["useful"] + found["time_s"]["slowed"])
    assert slowed == pytest.approx((19 / 20) * (5 / 60) * 0.6 / 1.6, rel=0.2)


def test_slow_parts_slow_the_step_while_they_last(small) -> None:
    slow = [{"part": "rank", "factor": 0.5, "start": "1 h", "lasts": "2 h"}, {"part": "rank", "factor": 0.8}]
    speeds = speeds_at(small({"failures.slow": slow}))
    assert [start for start, _ in speeds] == [0.0, 3600.0, 10_800.0]
    assert [factor for _, factor in speeds] == pytest.approx([1 + 0.6 * 0.25, 1.6, 1 + 0.6 * 0.25])
    jitter = speeds_at(small({"failures.jitter": 0.1}))
    assert jitter[0][1] == pytest.approx(1 + 0.1 * 0.6 * (1 + 1 / 2 + 1 / 3 + 1 / 4))


def test_slow_parts_never_raise_goodput(small) -> None:
    even = goodput_of_step(small(OFTEN), STEP, days=20, seeds=3).result["goodput"]
    slow = small(OFTEN | {"failures.slow": [{"part": "rank", "factor": 0.7, "start": "2 d"}]})
    assert goodput_of_step(slow, STEP, days=20, seeds=3).result["goodput"] < even


def test_a_scenario_with_failures_comes_back_from_its_text(small) -> None:
    from moesim.scenario import dump_scenario, load_scenario_text

    for interval in ("best", "30 min", 7):
        scenario = small(OFTEN | {"failures.checkpoint": {"interval": interval, "write_total": "2 TB/s"}})
        assert load_scenario_text(dump_scenario(scenario)) == scenario


def test_an_answer_says_what_it_assumes(small) -> None:
    by_default = goodput_of_step(small(OFTEN), STEP, days=2, seeds=1).result["rests_on"]
    assert [text.split(" assumed")[0] for text in by_default[-3:]] == ["detection", "restart", "write_per_node"]
    told = {"failures.detection": "5 min", "failures.restart": "2 min"}
    told |= {"failures.checkpoint": {"write_per_node": "5 GB/s"}}
    found = goodput_of_step(small(OFTEN | told), STEP, days=2, seeds=1).result["rests_on"]
    assert not any("assumed" in text for text in found)
    quoted = goodput_of_step(small({"failures.record": "rsc1_a100"}), STEP, days=2, seeds=1).result["rests_on"]
    assert "an assumption" in quoted[0] and "2410.21680" in quoted[0]


def test_an_interval_is_whole_steps(small) -> None:
    scenario = small(OFTEN | {"failures.checkpoint": {"interval": "61 s"}})
    assert goodput_of_step(scenario, STEP, days=2, seeds=1).job.interval_steps == 6
    assert job_of(scenario, STEP, days=2, interval_steps=6).interval_s == 60.0
