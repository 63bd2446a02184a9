"""Closed forms are numpy's in these tests, also of large groups.

`tests/engine/test_compiled.py` holds the compiled loops to them, whose compilation takes longer than all tests here.
"""

from collections.abc import Iterator

import pytest

from moesim.network import ports


@pytest.fixture(autouse=True, scope="module")
def closed_forms_of_numpy() -> Iterator[None]:
    """Of every number of ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ports, "COMPILED_RANKS", 1 << 30)
        yield
