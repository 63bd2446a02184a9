"""The layer rule of the design, by reading every import: data flows one way, heavy libraries stay in their room."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path

import pytest

from moesim.scenario import gpu_names, model_names
from moesim.scenario.cluster import FABRICS, TRANSPORTS
from moesim.scenario.dispatch import DISPATCH
from moesim.scenario.routers import ROUTERS, STRESS
from moesim.scenario.software import RECIPES, SOFTWARE
from moesim.schedules import SCHEDULES

PACKAGE = Path(__file__).parent.parent / "moesim"

LAYER = {
    "units": 1, "errors": 1, "seeding": 1, "strict_json": 1, "processes": 1, "files": 1, "display": 1,
    "shipped": 1.5, "schedules": 1.5,
    "scenario": 2,
    "trace": 3, "flags": 3.5,
    "routing": 4, "parallel": 4,
    "kernels": 5, "network": 5,
    "recorded": 5.5,
    "results": 6,
    "program": 7,
    "engine": 7.5,
    "run": 8,
    "study": 8.5, "importing": 8.5, "serving": 8.5, "reliability": 8.5,
    "planner": 9, "report": 9, "sweeper": 9, "validation": 9, "whatif": 9,
    "api": 9.5,
    "cli": 10,
}  # fmt: skip
MAY_SHARE_A_LAYER = {"units", "errors", "seeding", "strict_json", "processes", "files", "display"}
# Library -> the only rooms that may import it, at any depth of a function.
EXCLUSIVE = {
    "torch": {"routing", "validation", "importing", "kernels/benchmarks"},
    "simpy": {"engine", "serving"},
    "plotly": {"report"},
    "optuna": {"planner"},
    "json": {"strict_json"},
}
NOT_FOR_HELP = ("torch", "numpy", "pydantic", "plotly", "networkx", "simpy", "numba", "optuna", "rich", "yaml")


@cache
def nodes(source: str) -> tuple[ast.AST, ...]:
    """Every part of a source."""
    return tuple(ast.walk(ast.parse(source)))


def imported_modules(source: str) -> Iterator[str]:
    """Dotted names of every import statement, also those inside functions; `from a import b` gives a.b."""
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room they come from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path: str) -> str:
    """`scenario` of scenario/model.py, `units` of units.py."""
    return path.split("/")[0].removesuffix(".py")


def violations(path: str, source: str) -> list[str]:
    """Broken rules of one file; `path` is relative to the package, with forward slashes."""
    room, found = room_of(path), []
    for name in imported_modules(source):
        parts = name.split(".")
        if parts[0] in EXCLUSIVE and not any(
            path.startswith((home + "/", home + ".py")) for home in EXCLUSIVE[parts[0]]
        ):
            found.append(f"{path} imports {parts[0]}")
        if parts[0] != "moesim" or len(parts) < 2 or parts[1] not in LAYER or parts[1] == room:
            continue
        same_allowed = {room, parts[1]} <= MAY_SHARE_A_LAYER
        if LAYER[parts[1]] > LAYER[room] or (LAYER[parts[1]] == LAYER[room] and not same_allowed):
            found.append(f"{path} (layer {LAYER[room]}) imports {name} (layer {LAYER[parts[1]]})")
    return found


def files() -> list[str]:
    """Every module of the package except its root, which belongs to no layer."""
    return sorted(
        p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem[0] != "_"
    )


def faults(rule: Callable[[str, str], object], *, without: Collection[str] = ()) -> dict[str, object]:
    """What the rule finds in modules, by their paths; not in those of `without`."""
    found = {path: rule(path, (PACKAGE / path).read_text()) for path in files() if path not in without}
    return {path: each for path, each in found.items() if each}


def test_no_two_modules_of_tests_have_one_name() -> None:
    """pytest imports them by their last name alone."""
    names = [path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def test_every_room_has_a_layer() -> None:
    assert {room_of(path) for path in files()} <= set(LAYER)


def test_imports_point_downwards_and_libraries_stay_home() -> None:
    assert not faults(violations)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("scenario/model.py", "from moesim.trace import RoutingTrace"),
        ("kernels/roofline.py", "def f():\n    import moesim.network.ports"),
        ("trace/store.py", "import torch.nn as nn"),
        ("kernels/roofline.py", "from torch import Tensor"),
        ("results/store.py", "from simpy import Environment"),
        ("cli/one_scenario.py", "def f():\n    import plotly.graph_objects as go"),
        ("results/store.py", "from moesim import run"),
        ("results/store.py", "import json"),
    ],
)
def test_the_rule_catches_a_breach(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/benchmarks/gemm.py", "import torch"),
        ("kernels/benchmarks.py", "import torch"),
        ("seeding.py", "from moesim.errors import UserError"),
        ("cli/one_scenario.py", "from moesim.run import simulate"),
        ("network/ports.py", "from moesim.network.fabric import Fabric"),
    ],
)
def test_the_rule_lets_good_imports_pass(path: str, source: str) -> None:
    assert violations(path, source) == []


def shared_memories(path: str, source: str) -> list[str]:
    """Dicts that a copy of frozen data would take over: fields that begin empty and that `replace` hands on."""
    found = []
    for node in nodes(source):
        if not isinstance(node, ast.ClassDef) or not any("frozen=True" in ast.unparse(d) for d in node.decorator_list):
            continue
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and ast.unparse(line.annotation).startswith("dict["):
                value = ast.unparse(line.value) if line.value else ""
                if "default_factory" in value and "init=False" not in value:
                    found.append(f"{path}: {node.name}.{ast.unparse(line.target)}")
    return found


def test_a_copy_of_frozen_data_remembers_nothing_of_the_original() -> None:
    """What is a mapping of data is declared as Mapping; a dict that fills up is a memory, and needs init=False."""
    assert not faults(shared_memories)


def test_the_rule_finds_a_memory_that_replace_hands_on() -> None:
    frozen = "@dataclass(frozen=True)\nclass A:\n    known: dict[int, int] = field({}default_factory=dict)"
    assert shared_memories("a.py", frozen.format(""))
    assert not shared_memories("a.py", frozen.format("init=False, "))


PARSED = re.compile(r"label\.name\.|[\"'] in (?:\w+\.)*label\.name")


def test_no_label_is_parsed() -> None:
    """Names of operations are for people; what a program asks of them are their phase, part and collective."""
    assert not faults(lambda _, source: PARSED.findall(source))


def written_names(source: str, names: Collection[str]) -> list[str]:
    """Those of `names` that stand in the source as text of their own."""
    texts = (node.value for node in nodes(source) if isinstance(node, ast.Constant))
    return [text for text in texts if isinstance(text, str) and text in names]


def test_no_module_asks_for_a_schedule_by_its_name() -> None:
    """What depends on the schedule is a fact in `moesim.schedules.table`, so that a new schedule states it."""
    own = [path for path in files() if room_of(path) == "schedules"]
    assert not faults(lambda _, source: written_names(source, SCHEDULES), without=own)


def test_the_rule_finds_the_name_of_a_schedule() -> None:
    assert written_names("if kind in ('gpipe', 'zb_h1'): pass", SCHEDULES) == ["gpipe", "zb_h1"]
    assert written_names("settle = {'dualpipe': 6}", SCHEDULES)
    assert not written_names("def f():\n    'under dualpipe two ranks hold each stage'", SCHEDULES)


def asked_names(source: str, names: Collection[str]) -> list[str]:
    """Those of `names` that the source compares a kind with, matches, or lists in a constant of the module."""
    tree = ast.parse(source)
    parts: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(re.search(r"\bkind$|_kind$", ast.unparse(side)) for side in sides):
                parts += sides
        elif isinstance(node, ast.MatchValue):
            parts.append(node)
    for line in tree.body:
        value = line.value if isinstance(line, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Dict):
            parts += [key for key in value.keys if key is not None]
        elif isinstance(value, ast.Tuple | ast.List | ast.Set):
            parts += value.elts
    texts = (n.value for part in parts for n in ast.walk(part) if isinstance(n, ast.Constant))
    return [text for text in texts if isinstance(text, str) and text in names]


FIRST_POOL = re.compile(r"cluster\.pools\[0\]")


def test_no_module_takes_the_first_pool_for_the_cluster() -> None:
    """Ranks ask for the pool that they are on; what is the same for all asks `Cluster.main_pool`, which says so."""
    assert not faults(lambda _, source: FIRST_POOL.findall(source))


KINDS = {*SOFTWARE, *RECIPES, *DISPATCH, *STRESS, *FABRICS, *TRANSPORTS, *gpu_names(), *model_names()}
# Number formats, collectives, tiers of links and cases of validation have such names, too.
SAME_WORDS = {
    "kernels/tables/rows.py": {"nvfp4"},
    "kernels/tabulated.py": {"nvfp4"},
    "network/collectives.py": {"hierarchical"},
    "network/fabric.py": {"custom"},
    "serving/decode_kernels.py": {"h100"},  # whose rows say which attention was measured
    "validation/cases.py": {"skewed"},
}


def compared_names(source: str, names: Collection[str]) -> list[str]:
    """Those of `names` that the source compares anything with, or matches."""
    parts: list[ast.AST] = []
    for node in nodes(source):
        if isinstance(node, ast.Compare):
            parts += [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts.append(node)
    texts = (n.value for part in parts for n in ast.walk(part) if isinstance(n, ast.Constant))
    return [text for text in texts if isinstance(text, str) and text in names]


def test_no_module_asks_for_a_kind_by_its_name() -> None:
    """GPUs, models, software, recipes, dispatch algorithms, fabrics and stress patterns are rows of tables."""
    names = KINDS - {"fused"}
    assert not faults(lambda path, source: compared_names(source, names - SAME_WORDS.get(path, set())))


def test_the_rule_finds_the_name_of_a_kind() -> None:
    for source in (
        "a = gpu == 'h100'",
        "a = software in ('megatron', 'other')",
        "match a:\n    case 'low_latency': pass",
    ):
        assert compared_names(source, KINDS)
    assert not compared_names("gpu = 'h100'", KINDS)


NAMES_OF_OTHERS = {
    "scenario/hf_config.py": ROUTERS,  # families of released models
    "report/topology_layout.py": {"switch"},  # of a network
    "report/topology.py": {"switch"},
    "validation/cases.py": {"uniform"},  # of routing that is drawn
}


def test_no_module_asks_for_a_router_by_its_name() -> None:
    """What depends on the router is a fact in `moesim.scenario.routers`, so that a new router states it."""
    others = {path: set(names) for path, names in NAMES_OF_OTHERS.items()}
    found = faults(
        lambda path, source: asked_names(source, set(ROUTERS) - others.get(path, set())),
        without=["scenario/routers.py"],
    )
    assert not found


def test_the_rule_finds_the_name_of_a_router() -> None:
    for source in (
        "a = shape.kind == 'deepseek_v3'",
        "a = router.kind not in ('hash', 'deepseek_v3')",
        "SIGMOIDS = ('deepseek_v3',)",
        "TOP_K = {'deepseek_v3': 8}",
        "match kind:\n    case 'deepseek_v3': pass",
    ):
        assert "deepseek_v3" in asked_names(source, ROUTERS)
    assert not asked_names("router = GroupedRouter(kind='deepseek_v3')", ROUTERS)


def loaded_after(statement: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_imports_nothing_heavy() -> None:
    """`moesim --help` stays instant because it loads no library but the standard one."""
    assert not loaded_after("from moesim.cli import main; main(['--help'])") & set(NOT_FOR_HELP)


def test_lists_load_no_library_of_arrays_or_plots() -> None:
    """`moesim scenarios` answers at once."""
    assert not loaded_after("import moesim.report.catalogue_view") & {"numpy", "plotly", "pydantic", "torch"}


def test_importing_the_package_loads_nothing_until_a_name_is_used() -> None:
    assert not {name for name in loaded_after("import moesim") if name.startswith("moesim.")}
    assert not loaded_after("import moesim") & set(NOT_FOR_HELP)


def test_reading_a_scenario_does_not_load_torch() -> None:
    rooms = ("scenario", "trace", "parallel", "kernels", "network", "results", "report.report")
    assert not loaded_after("import " + ", ".join(f"moesim.{room}" for room in rooms)) & {"torch", "simpy"}
