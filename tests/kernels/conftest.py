"""The shipped model once per test session."""

import pytest

from moesim.kernels import CalibratedModel, load_profile


@pytest.fixture(scope="session")
def h200() -> CalibratedModel:
    """The model of the shipped H200 profile."""
    model = load_profile("h200")
    assert isinstance(model, CalibratedModel)
    return model


@pytest.fixture(scope="session")
def h100() -> CalibratedModel:
    """The model of the shipped H100 profile."""
    model = load_profile("h100")
    assert isinstance(model, CalibratedModel)
    return model
