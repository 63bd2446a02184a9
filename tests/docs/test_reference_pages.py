"""The reference of the documentation: it has every key, verb, flag, metric and public name, each with what it means."""

import argparse
import inspect
import re
from collections.abc import Iterator, Mapping

import pytest
import reference
from reference_keys import KeyPage, cell

import moesim
from moesim.cli import build
from moesim.kernels.estimate import SOURCES
from moesim.planner.plan import plan_json_schema
from moesim.planner.serving_plan import serving_plan_json_schema
from moesim.results import CATEGORIES
from moesim.results.definitions import (
    DEFINITIONS,
    LISTS,
    NUMBERS,
    definition,
    paths,
)
from moesim.run import simulate
from moesim.scenario import json_schema
from moesim.serving.loading import serving_json_schema
from moesim.sweeper.reader import AXIS_KEYS
from moesim.sweeper.study import PLOT_KEYS, PLOT_KINDS, STUDY_KEYS
from moesim.whatif import what_if

DENSE = {
    "model": {
        "layers": 2, "hidden": 256, "heads": 4, "kv_heads": 4, "head_dim": 64, "dense_layers": 2,
        "dense_intermediate": 512, "vocab": 1000,
    },
    "routing": {"kind": "uniform"}, "parallelism": {"data": 4},
}  # fmt: skip
RECOMPUTED = {
    "implementation": {"kind": "torch_eager"}, "capacity": {"kind": "expert", "factor": 1.0},
    "workload": {"sequence_length": 2048, "micro_batch": 2, "global_batch": 16, "train_tokens": 1e9},
}  # fmt: skip
PIPELINE = {"parallelism": {"data": 2, "expert": 2, "pipeline": 2, "zero": {"dense": 1, "expert": 1}}}


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return reference.pages()


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """The rows of the table below a heading by the text of their first cell."""
    section = page[page.index(heading) :].split("\n", 1)[1]
    section = re.split(r"^#+ ", section, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    cells = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in lines]
    return {first.strip("`"): rest for first, *rest in cells}


def sections(schema: Mapping[str, object], *, but: Mapping[str, str] = {}) -> Iterator[tuple[str, Mapping[str, dict]]]:
    """(anchor, keys) of the schema itself and of every definition in it."""
    yield "#sections", schema["properties"]  # type: ignore[misc]
    for name, found in schema["$defs"].items():  # type: ignore[attr-defined]
        if found.get("properties") and name not in but:
            yield "#" + re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower(), found["properties"]


def check_keys(page: str, schema: Mapping[str, object], **but: Mapping[str, str]) -> int:
    """Every key of the schema stands in its section, with its description and its words to choose from."""
    count = 0
    for anchor, keys in sections(schema, **but):
        shown = {path.rpartition(".")[2]: rest for path, rest in rows(page, f"{{ {anchor} }}").items()}
        assert set(shown) == set(keys), anchor
        for key, value in keys.items():
            kinds, _, default, text = shown[key]
            assert text == cell(value["description"])
            assert kinds and default
            for word in value.get("enum", ()):
                assert word is None or f"`{word}`" in kinds
            count += 1
    return count


def test_every_key_of_a_scenario_is_described(pages: dict[str, str]) -> None:
    assert check_keys(pages["reference/scenario.md"], json_schema(units=True)) > 200


def test_every_key_of_a_plan_is_described_there_or_as_a_scenarios(pages: dict[str, str]) -> None:
    schema, scenario = plan_json_schema(), json_schema()
    described = KeyPage(scenario).titles
    assert check_keys(pages["reference/plan.md"], schema, but=described) > 50
    assert check_keys(pages["reference/serving.md"], serving_json_schema(), but=described) > 25
    assert check_keys(pages["reference/serving-plan.md"], serving_plan_json_schema(), but=described) > 25
    for name in described.keys() & schema["$defs"].keys():
        assert schema["$defs"][name]["properties"].keys() <= scenario["$defs"][name]["properties"].keys(), name


def test_every_key_of_a_study_is_described(pages: dict[str, str]) -> None:
    page = pages["reference/study.md"]
    for heading, prefix, keys in (
        ("## The study", "", STUDY_KEYS),
        ("## An axis", "axes.", AXIS_KEYS),
        ("## The plot", "plot.", PLOT_KEYS),
    ):
        assert rows(page, heading) == {prefix + key: [cell(text)] for key, text in keys.items()}
    assert all(kind in PLOT_KEYS["kind"] for kind in PLOT_KINDS)
    assert all(f"`{name}`" in page for name in NUMBERS)


def test_units_are_those_of_numbers(pages: dict[str, str]) -> None:
    shown = rows(pages["reference/scenario.md"], "{ #training }")
    assert shown["workload.sequence_length"][1] == "tokens"
    assert shown["workload.global_batch"][1] == "sequences"
    assert rows(pages["reference/scenario.md"], "{ #pool }")["cluster.pools[].price_per_gpu_hour"][1] == "USD/h"


def test_every_verb_and_flag_is_described(pages: dict[str, str]) -> None:
    page = pages["reference/commands.md"]
    for name, verb in build()[1].items():
        shown = " ".join(rows(page, f"{{ #verb-{name.replace(' ', '-')} }}"))
        for action in verb._actions:
            if not isinstance(action, argparse._HelpAction):
                assert all(flag in shown for flag in action.option_strings), (name, action.option_strings)
                assert action.help, f"{name}: {action.dest} says nothing"


@pytest.mark.parametrize("changes", [{}, DENSE, RECOMPUTED, PIPELINE], ids=["small", "dense", "eager", "pipeline"])
def test_every_number_of_a_result_is_defined_and_shown(small, pages: dict[str, str], changes: dict) -> None:
    """One that is missing belongs into moesim/results/definitions.yaml."""
    result = what_if(simulate(small(changes))).result
    page = pages["reference/metrics.md"]
    found = paths(result)
    assert len(found) > 100
    for path in found:
        assert definition(path) is not None, f"{path} has no definition in moesim/results/definitions.yaml"
        shown = next(at for at in (path, f"{path}.[]", path.rpartition(".")[0] + ".*") if at in DEFINITIONS)
        assert f"| `{shown.replace('.[]', '[]')}` |" in page


def test_definitions_are_of_what_results_can_have(small) -> None:
    """Nothing is defined that no result has, but for parts and sources that other scenarios show."""
    record = what_if(simulate(small()))
    assert set(LISTS["categories"]) == set(CATEGORIES)
    assert set(SOURCES) < set(LISTS["sources"])
    rare = {
        *(f"memory.parts_bytes_by_pipeline_rank.[].{part}" for part in LISTS["memory_parts"]),
        *(f"estimate_sources.{source}" for source in LISTS["sources"]),
        "critical_path.seconds_by_rank.*",
        "warnings.[]",
        *(
            path for path in DEFINITIONS if path.startswith(("placement.replacing.", "placement.searched."))
        ),  # by tests/results/test_replacing.py
    }
    assert DEFINITIONS.keys() - rare <= paths(record.result)
    for found in DEFINITIONS.values():
        assert found.text.endswith(".")
    assert {name for name in NUMBERS if definition(name) is None} == set()


def test_every_public_name_is_described(pages: dict[str, str]) -> None:
    page = pages["reference/api.md"]
    for name in moesim.__all__:
        section = page[page.index(f"## {name} {{") :]
        first = (inspect.getdoc(getattr(moesim, name)) or "").split("\n")[0]
        assert first and cell(first) in section
