"""A plan over few small layouts that is made in seconds."""

import pytest
from plan_cases import build_plan


@pytest.fixture
def small_plan():
    """A function: small_plan({"goal.usd": 100}) -> Plan."""
    return build_plan
