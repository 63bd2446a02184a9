"""What laws of serving need of routing."""

from collections.abc import Iterator

import pytest

from moesim.serving import experts


@pytest.fixture(scope="module")
def few_draws() -> Iterator[None]:
    """Steps are priced by two draws of few tokens: for laws that hold of any number, in this module alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "SAMPLES", 2)
        patch.setattr(experts, "MOST_DRAWN", 2_048)
        patch.setattr(experts, "RECORDED", 4_096)
        experts._drawn_alike.cache_clear()
        yield
    experts._drawn_alike.cache_clear()
