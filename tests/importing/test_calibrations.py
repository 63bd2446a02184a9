"""Corrections of a trace at one size, applied to steps of other sizes that were measured on an H100."""

from dataclasses import replace

import numpy as np
import pytest
from calibration_table import Pair, calibrations, library_pairs, pairs

from moesim.importing.calibration import Calibration, Correction


@pytest.fixture(scope="module")
def moe() -> list[Pair]:
    return list(pairs("hf_steps.json.gz"))


@pytest.fixture(scope="module")
def dense() -> list[Pair]:
    return list(pairs("dense_steps.json.gz"))


def after(found: list[Pair]) -> np.ndarray:
    return np.abs([pair.errors[1] for pair in found])


def test_where_the_price_list_is_right_corrections_do_little_harm(moe: list[Pair]) -> None:
    for blind, worst in ((True, 0.035), (False, 0.08)):
        found = after([pair for pair in moe if pair.blind is blind])
        assert len(found) >= 7 and np.median(found) < 0.021 and found.max() < worst
    assert 3 * sum(pair.blind for pair in moe) > len(moe), "at least a third was kept out of every choice"


def test_where_it_is_less_so_they_put_it_right(dense: list[Pair]) -> None:
    assert len(dense) == 6 and after(dense).max() < 0.05
    plain = np.abs([pair.errors[0] for pair in dense])
    assert np.median(after(dense)) < np.median(plain) and after(dense).max() < plain.max() < 0.06


def test_no_step_is_corrected_by_its_own_trace(moe: list[Pair], dense: list[Pair]) -> None:
    assert all(pair.trace != pair.step for pair in (*moe, *dense))


def test_every_trace_was_of_an_h100_and_kept_its_times() -> None:
    for found in calibrations().values():
        assert found.gpu == "h100" and found.unexplained_s < 1e-4 * found.times.span_s
        assert found.times.span_s == pytest.approx(found.times.busy_s + found.times.gaps_s + found.times.late_s)


@pytest.mark.slow
def test_other_sizes_on_one_gpu_and_on_two_corrected_by_the_first() -> None:
    found = list(library_pairs())
    assert {pair.trace.split("-")[0] for pair in found} >= {"qwen3", "titan", "ddp", "fsdp"}
    for blind in (True, False):
        errors = np.abs([pair.errors[1] for pair in found if pair.blind is blind])
        assert len(errors) >= 13 and np.median(errors) < 0.018 and errors.max() < 0.055


def test_kernels_whose_tensors_stay_in_the_cache_say_nothing_of_larger_ones() -> None:
    """A fast small kernel leaves its family as it is; a large one corrects it, and the small one, too."""

    def of(*runs: tuple[str, float, float]) -> Calibration:
        made = [
            Correction(kind=kind, family="memory", number=1, measured_s=took, predicted_s=predicted, spread=0.0)
            for kind, took, predicted in runs
        ]
        return replace(next(iter(calibrations().values())), corrections=tuple(made))

    small, large = ("small", 5e-6, 10e-6), ("large", 90e-6, 100e-6)
    assert of(small).factor(kind="small", family="memory") == of(small).factor(kind="other", family="memory") == 1.0
    for kind in ("small", "large", "other"):
        assert of(small, large).factor(kind=kind, family="memory") == pytest.approx(0.9)
