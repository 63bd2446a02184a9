"""Two of NCCL's calls at once on two H100s, and small calls beside GEMMs: how far the rules of the engine are off.

tools/measure_pairs.py measured them; no constant is fitted to any. `pytest -s` prints what docs/limits.md says.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim import load_scenario, simulate
from moesim.engine.ports_in_use import PortsInUse
from moesim.kernels import load_profile
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


def test_small_calls_beside_gemms_wait_less_than_the_law_says() -> None:
    """Facts are those of 32 MiB and more: 1 GiB is met, and below 4 MiB they are a bound."""
    h100 = load_profile("h100").contention
    for least, most in ((1, MIB), (MIB, 4 * MIB), (8 * MIB, 9 * MIB), (2**30, 2**30 + 1)):
        for kinds, facts_of in (
            (("all_to_all",), h100.of),
            (("all_reduce", "all_gather", "reduce_scatter"), h100.beside_collective),
        ):
            rows = [row for row in FILE["beside"] if row["kind"] in kinds and least <= row["bytes"] < most]
            facts = facts_of("gemm")
            alone, beside = (np.array([row[f"transfer_{name}"] for row in rows]) for name in ("alone", "beside"))
            off = np.log((facts.wait + facts.transfer * alone) / beside)
            times = np.exp(np.median(off))
            print(f"{kinds[0]:12} {least / MIB:6.1f} MiB on, {len(rows)} rows: predicted {times:.2f} times as long")
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
