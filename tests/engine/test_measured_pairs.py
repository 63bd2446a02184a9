"""Two of NCCL's calls at once on two H100s, and small calls beside GEMMs: how far the rules of the engine are off.

tools/measure_pairs.py measured them; one constant is fitted to half of the collectives beside GEMMs. `pytest -s`
prints what docs/limits.md says.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moesim import load_scenario, simulate
from moesim.engine.ports_in_use import PortsInUse
from moesim.kernels import Beside, load_profile, wait_of
from moesim.strict_json import parse_json, unpacked

FILE: Any = parse_json(unpacked((Path(__file__).parents[1] / "data" / "pairs_h100.json.gz").read_bytes()))
PAIRS: list[dict[str, Any]] = FILE["pairs"]
MIB = 2**20


@pytest.mark.parametrize("held", ["free", "16", "4"])
def test_two_calls_at_once_take_no_longer_than_one_behind_the_other(held: str) -> None:
    """What goes first in a step is not slowed there; measured, it waits in part for what shares its port.

    Both together pass the port within what they take one behind the other, as the engine has it, so that what goes
    first can be later by no more than what comes second has waited.
    """
    rows = [row for row in PAIRS if row["held_to"] == held]
    alone, together = (np.array([row[name] for row in rows]) for name in ("alone", "together"))
    slowed = together[:, 0] / alone[:, 0] - 1
    both = together.max(axis=1) / alone.sum(axis=1)
    later, most = np.quantile(slowed, [0.5, 0.9])
    print(
        f"held to {held:4} {len(rows)} pairs: first later by {later:.0%}, at the 90th percentile {most:.0%}", end="; "
    )
    print(f"both in {np.median(both):.2f} of the sum, at the 90th percentile {np.quantile(both, 0.9):.2f}")
    assert len(rows) == 144  # twice, on two starts of a machine
    assert np.median(both) < 0.95 and np.quantile(both, 0.9) < 1.06
    assert (together[:, 0] - alone[:, 0] <= 1.3 * alone[:, 1] + 50e-6).all()
    assert np.median(slowed) < {"free": 0.5, "16": 0.35, "4": 0.12}[held]


COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")


def beside_gemms(rows: list[dict[str, Any]], facts: Beside, *, bounded: bool) -> NDArray[np.float64]:
    """Logs of predicted over measured seconds; alone as calls of a kind and size are in the middle."""
    sizes = [(row["kind"], row["bytes"]) for row in rows]
    times = {size: [row["transfer_alone"] for row in rows if (row["kind"], row["bytes"]) == size] for size in sizes}
    usual = {size: float(np.median(found)) for size, found in times.items()}
    alone = np.array([usual[size] for size in sizes])
    wait = np.array([wait_of(facts.wait, alone=usual[size]) for size in sizes]) if bounded else facts.wait
    wait = np.minimum(wait, [row["compute_alone"] for row in rows])
    return np.asarray(np.log((wait + facts.transfer * alone) / [row["transfer_beside"] for row in rows]))


def rows_beside(*kinds: str, least: int, most: int, session: int | None = None) -> list[dict[str, Any]]:
    of_size = [row for row in FILE["beside"] if row["kind"] in kinds and least <= row["bytes"] < most]
    return [row for row in of_size if session in (None, row["session"])]


def test_short_collectives_beside_gemms_wait_for_a_multiple_of_their_own_time() -> None:
    """The multiple was chosen on one start of the machine and is shown on the other; 1 GiB is in no choice."""
    facts = load_profile("h100").contention.beside_collective("gemm")
    for session in (0, 1):
        rows = rows_beside(*COLLECTIVES, least=1, most=9 * MIB, session=session)
        bounded, free = (beside_gemms(rows, facts, bounded=each) for each in (True, False))
        errors = [float(np.median(np.abs(off))) for off in (bounded, free)]
        print(f"start {session}, {len(rows)} rows: {errors[0]:.2f} off, with a wait for all alike {errors[1]:.2f}")
        assert errors[0] < 0.35 < 0.55 < errors[1] and abs(np.median(bounded)) < 0.25
    assert (
        np.median(np.abs(beside_gemms(rows_beside(*COLLECTIVES, least=2**30, most=2**31), facts, bounded=True))) < 0.15
    )


def test_short_all_to_alls_beside_gemms_wait_less_than_the_law_says() -> None:
    """Facts are those of 32 MiB and more: 1 GiB is met, and below 4 MiB they are a bound."""
    facts = load_profile("h100").contention.of("gemm")
    for least, most in ((1, MIB), (MIB, 4 * MIB), (8 * MIB, 9 * MIB), (2**30, 2**30 + 1)):
        off = beside_gemms(rows_beside("all_to_all", least=least, most=most), facts, bounded=False)
        print(f"{least / MIB:6.1f} MiB on, {len(off)} rows: predicted {np.exp(np.median(off)):.2f} times as long")
        assert np.median(off) > -0.15
        if least >= 2**30:
            assert np.median(np.abs(off)) < 0.15


BESIDE = {"overlap.gradient_reduction": True}
STEPS: dict[str, dict[str, Any]] = {
    "deepseek-v3-2048xh800": {}, "qwen3-235b-256xh100": {}, "mixtral-8x22b-tp-folding": {},
    "qwen3-30b-zero3-32xh100": {}, "two-nodes-data-parallel": BESIDE, "two-nodes-hierarchical": BESIDE,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_what_goes_first_could_be_later_by_a_small_part_of_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By no more in all than what comes second has waited for it, on the rank where that is most: docs/limits.md."""
    waited: dict[int, list[np.ndarray]] = {}
    through, let_through, collective = PortsInUse.through, PortsInUse.let_through, PortsInUse.collective

    def and_keep(self, begin_SR, work_SR, shares_KR):
        self.asked_SR = np.broadcast_to(work_SR, begin_SR.shape)
        return through(self, begin_SR, work_SR, shares_KR)

    def count(self, begin_SR, end_SR, work_SR) -> None:
        waited.setdefault(id(self), []).append(np.clip(end_SR - begin_SR - work_SR, 0, None)[0])

    def and_count(self, begin_SR, end_SR, shares_KR) -> None:
        let_through(self, begin_SR, end_SR, shares_KR)
        count(self, begin_SR, end_SR, self.asked_SR)

    def collective_and_count(self, prepared, begin_SR, own_SR):
        end_SR = collective(self, prepared, begin_SR, own_SR)
        count(self, begin_SR, end_SR, own_SR)
        return end_SR

    monkeypatch.setattr(PortsInUse, "through", and_keep)
    monkeypatch.setattr(PortsInUse, "let_through", and_count)
    monkeypatch.setattr(PortsInUse, "collective", collective_and_count)
    scenario = load_scenario(name, {"uncertainty.samples": 1, "uncertainty.bank": 1, **STEPS[name]})
    step = simulate(scenario).result["step_time_s"]
    most = max((np.sum(rows, axis=0).max() for rows in waited.values()), default=0.0)
    print(f"{name}: what came second waited {most / step:.2%} of the step on the worst rank")
    assert waited and most < 0.03 * step
