"""Steps of the smallest model that has both kinds of layers, unless a test says otherwise."""

from collections.abc import Callable
from typing import Any

import pytest

from moesim.scenario import Scenario


@pytest.fixture
def small(small: Callable[..., Scenario]) -> Callable[..., Scenario]:
    """The scenario of all rooms with two layers."""

    def build(changes: dict[str, Any] | None = None) -> Scenario:
        return small({"model.layers": 2, **(changes or {})})

    return build
