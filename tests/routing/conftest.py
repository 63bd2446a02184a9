"""One thread: these tensors are too small to share, and the machine is shared."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from moe_cases import write_corpus


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of text."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
