"""Points of a scenario that is simulated in a fraction of a second."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from moesim.study import Point

UNIFORM = {"routing": {"kind": "uniform"}, "model.layers": 2, "workload.global_batch": 8, "uncertainty.samples": 1}


@pytest.fixture
def points(small) -> Callable[..., list[Point]]:
    """`points([{key: value}, ...])`: a point for each mapping of changes to the small scenario."""

    def build(changes: Sequence[dict[str, Any]]) -> list[Point]:
        return [
            Point.of(small({**UNIFORM, **change}), number=number, values=change)
            for number, change in enumerate(changes)
        ]

    return build
