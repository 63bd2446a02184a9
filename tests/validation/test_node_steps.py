"""Steps of two H100s in layouts that were not measured before: FSDP2, tensor ranks, ZeRO 1, a hot rank, three models.

`tests/data/node_h100.json.gz` is the table of one call of tools/measure_node.py. Half of its steps are in no choice.
"""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from moesim.validation.cases import is_held_out
from moesim.validation.comparison import Row, Table, load_table, print_table, recompute

TABLE = Path(__file__).parent.parent / "data" / "node_h100.json.gz"
FROM_TOKENS = 4096  # below, the host sets the pace


@pytest.fixture(scope="module")
def kept_out() -> tuple[Row, ...]:
    table = load_table(TABLE)
    return recompute(Table(table.device, tuple(row for row in table.rows if is_held_out(row.case.name)))).rows


def test_tables_with_dense_models_are_shown() -> None:
    table, written = load_table(TABLE), io.StringIO()
    dense = [row for row in table.rows if row.case.scenario.model.experts == 0]
    for rows in (dense, table.rows):
        print_table(Table(table.device, tuple(rows)), console=Console(width=200, file=written))
    assert all(row.case.name in written.getvalue() for row in table.rows)


@pytest.mark.slow
def test_steps_in_no_choice(kept_out: tuple[Row, ...]) -> None:
    for layout in ("ep2", "replicas", "zero1", "fsdp2", "tensor2"):
        rows = [row for row in kept_out if row.case.name.startswith(layout)]
        print(layout, [f"{row.case.name}: {row.error:+.1%}" for row in rows])
        assert rows
    large = [abs(row.error) for row in kept_out if row.case.tokens >= FROM_TOKENS]
    print(f"{len(large)} steps from {FROM_TOKENS} tokens on: {np.median(large):.1%} median, worst {max(large):.1%}")
    assert np.median(large) < 0.05
