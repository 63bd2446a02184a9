"""A plan over few small layouts that is made in seconds."""

from collections.abc import Iterator

import pytest
from plan_cases import build_plan

from moesim.planner import search


@pytest.fixture(scope="module", autouse=True)
def few_screened_tokens() -> Iterator[None]:
    """Layouts are screened on the routing of few tokens: in this process, where plans of few layouts are screened."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "TOKENS", 16_384)
        yield


@pytest.fixture
def small_plan():
    """A function: small_plan({"goal.usd": 100}) -> Plan."""
    return build_plan
