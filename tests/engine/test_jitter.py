"""Ranks that meet wait for the slowest: laws of the waiting, and what two H100s did."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.engine.executor import GroupExecutor
from moesim.engine.executor_steps import Labels
from moesim.engine.lateness import Among, Lateness, late
from moesim.kernels.jitter import NO_JITTER, Jitter, expected_most, spread_of, spread_of_most
from moesim.program.collectives import PeerCollective, Peers
from moesim.program.host import FREE_HOST
from moesim.program.operations import Block, Kind, Operation, Run
from moesim.program.step_program import FREE
from moesim.results.spans import Label, SpanRecorder, Stream
from moesim.run import simulate
from moesim.seeding import WIDEST
from moesim.validation.cases import is_held_out
from moesim.validation.comparison import load_table
from moesim.validation.prediction import predict

pytestmark = pytest.mark.usefixtures("few_tokens")

DATA = Path(__file__).parent.parent / "data"


class AllTogether:
    """A transfer that every rank of a group takes part in."""

    def __init__(self, ranks: int) -> None:
        self.alone_R = np.zeros((1, ranks))

    def finish(self, start_R: Any) -> Any:
        return np.broadcast_to(start_R.max(axis=1, keepdims=True), start_R.shape)


def lateness(jitter: Jitter, ranks: int) -> Lateness:
    return Lateness(jitter, clocks_4SR=np.zeros((4, 1, ranks)))


def waiting(ranks: int, *, segment: float, jitter: Jitter, segments: int = 1) -> float:
    """Seconds that equal ranks wait in segments of equal length."""
    group, transfer, now_SR = lateness(jitter, ranks), AllTogether(ranks), np.zeros((1, ranks))
    for _ in range(segments):
        now_SR = now_SR + segment
        now_SR = now_SR + group.at_transfer(transfer, now_SR)
        group.met_SR[:] = now_SR
    return float(group.total_SR.max())


def test_the_mean_of_the_largest_is_that_of_drawn_numbers() -> None:
    drawn_ND = np.clip(np.random.default_rng(0).normal(size=(40_000, 64)), -WIDEST, WIDEST)
    for ranks in (1, 2, 8, 64):
        most_N = drawn_ND[:, :ranks].max(axis=1)
        assert expected_most(ranks) == pytest.approx(most_N.mean(), abs=0.01)
        assert spread_of_most(ranks) == pytest.approx(most_N.std(), abs=0.01)
    assert expected_most(2) == pytest.approx(1 / math.sqrt(math.pi), abs=1e-3)
    assert expected_most(100_000) <= WIDEST


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("behind", [0.0, 0.5, 1.0, 3.0])
def test_the_last_of_unequal_ranks_comes_as_late_as_drawn_ones(ranks: int, behind: float) -> None:
    at_1R = np.where(np.arange(ranks) == 0, behind, 0.0)[None]
    drawn = at_1R + np.random.default_rng(1).normal(size=(100_000, ranks))
    exact = drawn.max(axis=1).mean() - behind
    found = float(late(AllTogether(ranks), at_1R, np.ones_like(at_1R)).max())
    assert found == pytest.approx(exact, abs=0.11)  # of a standard deviation


def test_only_ranks_of_a_set_wait_for_each_other() -> None:
    pairs = PeerCollective(Peers(2), np.zeros(4), sent_bytes=0.0)
    at_1R, spread_1R = np.array([[0.0, 0.0, 0.0, 100.0]]), np.ones((1, 4))
    late_R = late(pairs, at_1R, spread_1R)[0]
    assert late_R[0] == late_R[1] == pytest.approx(expected_most(2))
    assert late_R[2] == late_R[3] == pytest.approx(0.0, abs=1e-9)
    assert (late(pairs, at_1R, np.zeros((1, 4))) == 0).all()


def test_waiting_grows_with_ranks_and_relatively_falls_with_longer_segments() -> None:
    jitter = Jitter(constant=0.01, white=1e-5)
    by_ranks = [waiting(ranks, segment=0.01, jitter=jitter) for ranks in (1, 2, 8, 64, 512)]
    assert by_ranks[0] == 0.0 and all(np.diff(by_ranks) > 0)
    shares = [waiting(8, segment=s, jitter=jitter) / s for s in (1e-4, 1e-3, 1e-2, 1e-1)]
    assert all(np.diff(shares) < 0) and shares[-1] > 0.01 * expected_most(8)
    # As much work in more segments: chance is waited for more often, a slow chip as long.
    assert waiting(8, segment=1e-3, jitter=jitter, segments=10) > waiting(8, segment=1e-2, jitter=jitter)
    chips = Jitter(constant=0.01)
    ten = waiting(8, segment=1e-3, jitter=chips, segments=10)
    assert ten == pytest.approx(waiting(8, segment=1e-2, jitter=chips), rel=1e-6)


def test_a_slow_chip_is_waited_for_once_whatever_the_groups() -> None:
    """In one group, or by groups and then among groups: the slowest of all ranks sets the pace of all work."""
    chips, seconds = Jitter(constant=0.01), np.full((1, 8), 0.1)
    alone = lateness(chips, 8)
    among = alone.among_groups(seconds, Among(64, 8))
    group = lateness(chips, 8)
    inside = group.at_transfer(AllTogether(8), seconds)
    group.met_SR[:] = seconds
    outside = group.among_groups(seconds, Among(64, 8))
    assert np.allclose(inside + outside, among) and np.allclose(among, 0.01 * 0.1 * expected_most(64))
    assert (group.among_groups(seconds, Among(64, 8)) == 0).all(), "what is waited for is not waited for again"


def test_without_spread_or_with_one_gpu_nothing_changes(small, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"compute.profile": None, "uncertainty.samples": 1}
    one = {**measured, "cluster.gpus_per_node": 1, "parallelism": {"data": 1, "expert": 1}}
    for changes in (one, {**measured, "compute.profile": "roofline"}):
        on, off = (simulate(small({**changes, "cluster.jitter": value})).result for value in (True, False))
        assert on["attribution_s"] == off["attribution_s"] and on["waiting"] == off["waiting"]
    on, off = (simulate(small({**measured, "cluster.jitter": value})).result for value in (True, False))
    assert on["step_time_s"] > off["step_time_s"] and on["waiting"]["jitter_s"] > 0 == off["waiting"]["jitter_s"]
    monkeypatch.setattr("moesim.program.build._jitter", lambda *_: NO_JITTER)
    none = simulate(small(measured)).result
    assert none["attribution_s"] == off["attribution_s"]


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 8, "expert": 4},
        {"data": 8, "expert": 1},
        {"data": 4, "tensor": 2, "expert": 4},
        {"data": 4, "pipeline": 2, "expert": 4},
        {"data": 8, "expert": 1, "zero": {"dense": 3, "expert": 3}},
        {"data": 1, "expert": 1, "pipeline": 4},
    ],
)
def test_every_layout_waits_and_its_time_adds_up(small, mesh: dict[str, Any]) -> None:
    changes = {"compute.profile": None, "uncertainty.samples": 1, "cluster.gpus_per_node": 8, "parallelism": mesh}
    changes["model.layers"] = max(2, mesh.get("pipeline", 1))
    on, off = (simulate(small({**changes, "cluster.jitter": value})).result for value in (True, False))
    assert 1.002 < on["step_time_s"] / off["step_time_s"] < 1.1
    assert sum(on["attribution_s"].values()) == pytest.approx(on["step_time_s"], rel=1e-9)
    assert 1e-3 * on["step_time_s"] < on["waiting"]["jitter_s"] <= on["attribution_s"]["imbalance_wait"]


def test_a_walk_is_undone_as_often_as_changes_come() -> None:
    group, seconds, transfer = lateness(Jitter(host=0.1), 2), np.full((1, 2), 0.1), AllTogether(2)
    restore = group.saved()
    for _ in range(3):  # the clocks are the executor's to restore
        group.paced_SR = seconds
        group.at_transfer(transfer, seconds)
        assert (group._hosted_SR == seconds).all(), "hosted work of one walk, not of all"
        restore()
        assert (group._hosted_SR == 0).all() and (group.paced_SR == 0).all()


def test_what_others_add_to_a_transfer_is_no_work() -> None:
    """Ranks that go on together when a transfer slowed by others is done have done nothing since they met."""
    labels, seconds = Labels(), np.full((1, 2), 0.1)
    executor = GroupExecutor(
        samples=1, ranks=2, host=FREE_HOST, beside_R=(FREE,), labels=labels, jitter=Jitter(constant=0.01),
        recorder=SpanRecorder(rows=1, samples=1, ranks=2),
    )  # fmt: skip
    transfer = Operation(
        label=Label("dispatch", "dispatch_exposed", Stream.COMMUNICATION, 0), kind=Kind.TRANSFER,
        transfers_M=(PeerCollective(Peers(2), np.full(2, 0.1), sent_bytes=0.0),),
    )  # fmt: skip
    for chain, _, _, finish_SR in executor.execute_in_parts([Run(Block("forward", (transfer,)), 0, False)]):
        executor.delay(chain, finish_SR + seconds)
    assert executor.lateness is not None
    assert (executor.lateness.among_groups(executor.done_SR, Among(2, 2)) == 0).all()


def test_two_gpus_in_no_choice_are_as_far_apart_as_said() -> None:
    """Of another pair of H100s: captured graphs (chips alone), and eager operations (hosts), medians and chance."""
    spread = spread_of("h100")
    rows = json.loads(gzip.decompress((DATA / "spread_h100_kept_out.json.gz").read_bytes()))["rows"]
    logs = {row["work"]: np.log(np.array(row["seconds"])[:, 10:]) for row in rows if not row["meets"]}
    chips = abs(float(np.median(logs["graph"][0] - logs["graph"][1])))
    hosts = float(np.sqrt(np.mean((logs["eager"][0] - logs["eager"][1]) ** 2)))
    of_chips, of_hosts = math.sqrt(2) * spread.chip, math.sqrt(2) * spread.host
    print(f"chips {chips:.4f}, said {of_chips:.4f}; hosts {hosts:.3f}, said {of_hosts:.3f}")
    assert chips < 3 * of_chips
    assert 0.3 < hosts / of_hosts < 3


@pytest.mark.slow
def test_waiting_of_two_gpus_beside_what_is_said() -> None:
    """Even steps of two H100s, half of them in no choice: mean over ranks of what they waited in dispatches and
    combines longer than the rank that came last, as a share of the step; and what is said of the same step.
    """
    table, shares = load_table(DATA / "node_h100.json.gz"), []
    for row in table.rows:
        if row.case.tokens < 4096 or not row.case.name.endswith("uniform-2gpu") or "marks" not in row.measured:
            continue
        names, seconds = row.measured["marks"]["names"], np.array(row.measured["marks"]["seconds"])
        met = [index for index, name in enumerate(names) if name.split(".")[1] in ("dispatch", "combine")]
        if row.case.name.startswith("ep2"):
            waited = float(np.ptp(seconds[:, :, met], axis=0).mean(axis=0).sum() / 2 / row.measured["step"])
            predicted = predict(row.case, row.measured["rows"])
            said, jitter = (predicted[key] / row.measured["step"] for key in ("waiting", "jitter"))
            kept_out = is_held_out(row.case.name)
            note = ", in no choice" if kept_out else ""
            print(f"{row.case.name}: waited {waited:.2%}, said {said:.2%} (jitter {jitter:.2%}){note}")
            shares.append((waited, said, kept_out))
    waited, said = np.array([pair[:2] for pair in shares if pair[2]]).T
    assert len(waited) >= 3 and 1 / 4 < np.median(said) / np.median(waited) < 4
