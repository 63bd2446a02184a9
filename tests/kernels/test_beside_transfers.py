"""Kernels and transfers at once: facts by family, fitted to all-to-alls of one session, held against all other rows."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from moesim.kernels import Beside, CalibratedModel
from moesim.kernels.estimate import BesideSend
from moesim.kernels.measured import contention_of, fit_beside, fit_send, sends_of
from moesim.kernels.profile import Profile
from moesim.kernels.report import beside_rows, beside_table
from moesim.strict_json import parse_json, unpacked

OTHERS = Path(__file__).parents[1] / "data" / "contention_h100.json.gz"
LEAST_BYTES = 32 << 20

Row = dict[str, Any]


def rows_of(facts: Beside, *, family: str = "gemm") -> list[Row]:
    """What would be measured if `facts` were the truth."""
    rows = []
    for alone in (2e-4, 1e-3, 4e-3):
        beside = facts.wait + facts.transfer * alone
        free = facts.wait / beside
        rows.append(
            {
                "family": "contention",
                "compute": {"family": family},
                "bytes": 1 << 26,
                "ranks": 2,
                "transfer_alone": alone,
                "transfer_beside": beside,
                "compute_alone": 1e-4,
                "compute_beside": 1e-4 / ((1.0 - free) / facts.compute + free),
            }
        )
    return rows


@pytest.mark.parametrize("facts", [Beside(1.4, 1.6, 5e-5), Beside(1.1, 2.7, 0.0), Beside(1.0, 1.0, 0.0)])
def test_facts_are_found_again(facts: Beside) -> None:
    assert fit_beside(rows_of(facts)) == pytest.approx(facts, abs=1e-9)


def test_only_all_to_alls_with_the_blocks_of_the_library_count() -> None:
    truth, other = Beside(1.4, 1.6, 5e-5), Beside(2.0, 3.0, 1e-4)
    rows = rows_of(truth) + [row | {"kind": "all_reduce"} for row in rows_of(other)]
    rows += [row | {"max_ctas": 4} for row in rows_of(other)] + [row | {"bytes": 1 << 20} for row in rows_of(other)]
    rows += [row | {"held_out": 1} for row in rows_of(other)]
    found = contention_of(Profile(name="mine", sessions=[], rows=rows))
    assert found.of("gemm") == pytest.approx(truth, abs=1e-9)
    assert found.beside_collective("gemm") == pytest.approx(other, abs=1e-9)
    assert found.of("attention") == found.of("gemm"), "a family that was not measured takes the middle of the others"


Facts = Callable[[str], Beside]


def errors(facts_of: Facts, rows: Sequence[Row]) -> tuple[list[float], list[float], list[float]]:
    """|log| of predicted over measured: transfers, kernels, and transfers if nothing slowed them."""
    transfers, kernels, ignored = [], [], []
    for row in rows:
        facts = facts_of(row["compute"]["family"])
        beside = facts.wait + facts.transfer * row["transfer_alone"]
        free = facts.wait / beside
        slower = 1.0 / ((1.0 - free) / facts.compute + free)
        transfers.append(abs(math.log(beside / row["transfer_beside"])))
        kernels.append(abs(math.log(slower * row["compute_alone"] / row["compute_beside"])))
        ignored.append(abs(math.log(row["transfer_alone"] / row["transfer_beside"])))
    return transfers, kernels, ignored


def large(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["bytes"] >= LEAST_BYTES]


def test_rows_in_no_fit_are_met(h100: CalibratedModel, h200: CalibratedModel) -> None:
    """Of an H100 on another day, of an H200, of other numbers of blocks, half of the collectives: medians in docs."""
    own = h100.contention
    others = parse_json(unpacked(OTHERS.read_bytes()))["rows"]
    mine = h100.profile.family("contention")
    held_out = [row for row in mine if row.get("held_out")]
    collectives = [row for row in held_out if row["kind"] not in ("all_to_all", "send_recv")]
    last = max(row["session"] for row in collectives)
    fourth = [row for row in others if row["session"] == "an H100, a fourth day"]
    sets: dict[str, tuple[Facts, list[Row]]] = {
        "another day": (own.of, [row for row in others if row["session"] == "an H100, another day"]),
        "a third day": (own.of, [row for row in held_out if row["kind"] == "all_to_all"]),
        "a fourth day": (own.of, [r for r in fourth if r["kind"] == "all_to_all"]),
        "collectives, a fourth day": (own.beside_collective, [r for r in fourth if r["kind"] != "all_to_all"]),
        "an H200": (own.of, h200.profile.family("contention")),
        "collectives, the other half": (own.beside_collective, [r for r in collectives if r["session"] == last]),
        "collectives, another day": (own.beside_collective, [r for r in collectives if r["session"] < last]),
        "fewer blocks": (own.of, [row for row in others if "max_ctas" in row]),
    }
    print()
    for name, (facts_of, rows) in sets.items():
        transfers, kernels, ignored = (float(np.median(found)) for found in errors(facts_of, large(rows)))
        print(f"{name:27} {len(large(rows)):4} rows: transfers {transfers:.1%}, kernels {kernels:.1%}", end=", ")
        print(f"transfers if nothing slowed them {ignored:.0%}")
        assert transfers < 0.20 and kernels < 0.15 and transfers < 0.5 * ignored
    dispatch, collective = (errors(facts, large(collectives)) for facts in (own.of, own.beside_collective))
    for of_dispatch, of_own in zip(dispatch[:2], collective[:2], strict=True):
        assert np.median(of_own) < 0.7 * np.median(of_dispatch), "collectives have facts of their own"


SENDS = Path(__file__).parents[1] / "data" / "fabric_h100.json.gz"


def test_messages_beside_kernels_are_later_by_a_share_of_the_kernel(h100: CalibratedModel) -> None:
    """Facts of their own, fitted to half of the profile's rows: the other half, and GEMMs of another day."""
    facts, sends, mine = h100.contention, sends_of(h100.profile), h100.profile.family("contention")
    other_day = [row for row in parse_json(unpacked(SENDS.read_bytes()))["beside"] if row["max_ctas"] == 0]
    print()
    for name, rows in (("held out", [row for row in mine if row.get("held_out")]), ("another day", other_day)):
        rows = large([row for row in rows if row["kind"] == "send_recv"])
        own, as_dispatch = [], []
        for row in rows:
            family, alone = row["compute"]["family"], row["transfer_alone"]
            later = float(sends[family].later(alone, kernel=row["compute_alone"]))
            own.append(abs(math.log((alone + later) / row["transfer_beside"])))
            of = facts.of(family)
            as_dispatch.append(abs(math.log((of.wait + of.transfer * alone) / row["transfer_beside"])))
        print(f"messages, {name:12} {len(rows):3} rows: {np.median(own):.1%}, worst {max(own):.0%}", end=", ")
        print(f"by the facts of all-to-alls {np.median(as_dispatch):.0%}")
        assert np.median(own) < 0.10 and np.median(own) < 0.5 * np.median(as_dispatch)


@pytest.mark.parametrize("truth", [BesideSend(1.3, 0.5, 2.0), BesideSend(1.0, 1.0, 3.0)])
def test_facts_of_messages_are_found_again(truth: BesideSend) -> None:
    rows = []
    for alone in (1e-4, 1e-3, 4e-3):
        for kernel in (1e-4, 5e-4, 3e-3):
            beside = alone + float(truth.later(alone, kernel=kernel))
            assert alone < beside < alone + min(truth.share * kernel, truth.most * alone)
            rows.append({"compute_alone": kernel, "transfer_alone": alone, "transfer_beside": beside, "bytes": 1 << 26})
    assert fit_send([row | {"compute_beside": truth.compute * row["compute_alone"]} for row in rows]) == pytest.approx(
        truth, rel=1e-6
    )


def test_a_gpu_of_the_same_chip_has_its_collectives(h100: CalibratedModel, h200: CalibratedModel) -> None:
    own, other = h100.contention, h200.contention
    assert other.collectives == own.collectives and other.by_family != own.by_family


def test_the_report_has_a_row_for_each_kind_of_transfer(
    h100: CalibratedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = beside_rows(h100)
    assert {kind for kind, *_ in rows} >= {"all_to_all", "all_reduce", "send_recv"}
    assert all(transfer < alone for _, _, transfer, _, alone in rows), "facts say more than none"
    Console(width=96).print(beside_table(rows, title="at once"))
    printed = capsys.readouterr().out
    assert all(kind in printed for kind, *_ in rows) and "no factor was fitted to" in printed
