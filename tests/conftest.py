"""A small scenario that every room can simulate in a fraction of a second."""

import gc
import resource
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from packaging.requirements import Requirement

from moesim.scenario import Scenario, scenario_from_mapping

# A shell that starts the tests in the background, or under nohup, has them ignore these; some tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# How long examples take says how busy the machine is; it is no fault of what they show.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def beyond_dev() -> set[str]:
    """Packages of extras that `pip install '.[dev]'` does not bring, as modules."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    extras = {
        name: {Requirement(each).name for each in lines} for name, lines in project["optional-dependencies"].items()
    }
    there = extras["dev"] | {Requirement(each).name for each in project["dependencies"]}
    return {name.replace("-", "_") for name in set().union(*extras.values()) - there}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--extras", action="store_true", help="run tests that need packages of other extras than dev, too")


def pytest_configure(config: pytest.Config) -> None:
    """Tests pass where nothing but dev is installed: without `--extras` they see no other package of an extra."""
    if not config.getoption("--extras"):
        sys.modules.update(dict.fromkeys(beyond_dev()))  # type: ignore[arg-type]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests go to one worker, which then makes what they share once; another --dist is as asked for."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.getoption("dist") == "load" else None


def pytest_collection_finish() -> None:
    """Thousands of tests stay until the end: no later collection of garbage looks through them again."""
    gc.collect()
    gc.freeze()


# What makes and checks the shipped data and pages are scripts, not a package.
sys.path.append(str(Path(__file__).parents[1] / "tools"))

SMALL: dict[str, Any] = {
    "schema_version": 1,
    "name": "small",
    "model": {
        "layers": 4,
        "hidden": 512,
        "heads": 8,
        "kv_heads": 8,
        "head_dim": 64,
        "dense_layers": 1,
        "dense_intermediate": 1024,
        "experts": 16,
        "top_k": 4,
        "shared_experts": 1,
        "expert_intermediate": 256,
        "vocab": 1000,
    },
    "routing": {"kind": "popularity", "counts": [8, 1, 1, 1, 4, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1]},
    "cluster": {"gpu": "h200", "nodes": 1, "gpus_per_node": 4, "price_per_gpu_hour": 2.0},
    "parallelism": {"data": 4, "expert": 4},
    "workload": {"sequence_length": 2048, "micro_batch": 2, "global_batch": 16, "train_tokens": 1e9},
    "compute": {"profile": "roofline"},
    "uncertainty": {"samples": 3},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with dotted keys replaced; a whole section may be given as a mapping."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for dotted, value in changes.items():
        section = result
        *path, last = dotted.split(".")
        for key in path:
            section = section.setdefault(key, {})
        section[last] = deepcopy(value)  # a later key may change it
    return result


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """`with full_disk(100):` no file grows beyond 100 bytes; the errors are those of a disk without room."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        writes_none = sys.dont_write_bytecode
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        sys.dont_write_bytecode = True  # Python keeps the half of a module's code that it could write
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            sys.dont_write_bytecode = writes_none

    return limited


@pytest.fixture
def small():
    """A function: small(**{"parallelism.expert": 2}) -> Scenario."""

    def build(changes: dict[str, Any] | None = None) -> Scenario:
        return scenario_from_mapping(merged(SMALL, changes or {}))

    return build


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routing that is drawn has no more tokens than a step asks for, however few: for laws that hold of any number.
    What a uniform router's imbalance would be is drawn for few, too.

    In this process; others draw as many as users get.
    """
    from moesim.program import drawn_routing  # with all below it, which tests of single modules do not wait for
    from moesim.results import metrics

    _, most = drawn_routing.SYNTHETIC_TOKENS
    monkeypatch.setattr(drawn_routing, "SYNTHETIC_TOKENS", (1, most))
    monkeypatch.setattr(metrics, "uniform_floor", partial(metrics.uniform_floor, rows=1))


@pytest.fixture(scope="module")
def few_draws() -> Iterator[None]:
    """Steps of serving are priced by two draws of few tokens: for laws that hold of any number, in a whole module."""
    from moesim.serving import experts

    with pytest.MonkeyPatch.context() as patch:
        for name, few in (("SAMPLES", 2), ("MOST_DRAWN", 2_048), ("RECORDED", 4_096)):
            patch.setattr(experts, name, few)
        experts._drawn_alike.cache_clear()
        yield
    experts._drawn_alike.cache_clear()


@pytest.fixture
def is_alive() -> Callable[[int], bool]:
    """`is_alive(pid)`: the process runs; one that has ended and was not waited for is dead."""

    def alive(pid: int) -> bool:
        try:
            return "zombie" not in Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or while it was read
            return False

    return alive
