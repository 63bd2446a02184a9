"""What is not finite is no result: a run with such a number is named and leaves nothing behind."""

from dataclasses import replace

import numpy as np
import pytest

from moesim.errors import UserError
from moesim.results.store import write_run
from moesim.run import simulate


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_not_written(small, tmp_path, number: float) -> None:
    record = simulate(small())
    wrong = [
        (replace(record, result=record.result | {"cost": {"usd_per_step": number}}), "cost.usd_per_step is "),
        (
            replace(record, arrays={**record.arrays, "step_time_S": np.array([1.0, number])}),
            "step_time_S of arrays.npz has numbers that are not finite",
        ),
    ]
    for changed, text in wrong:
        with pytest.raises(UserError, match="no result") as error:
            write_run(changed, tmp_path / "out")
        assert text in str(error.value)
        assert not (tmp_path / "out").exists()
