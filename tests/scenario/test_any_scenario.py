"""Whatever stands in a scenario, loading gives a scenario or one located line: never a traceback."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import UserError
from moesim.scenario import dump_scenario, load_scenario, load_scenario_text, scenario_from_mapping
from moesim.scenario.document import parse_yaml

FOLDER = Path(__file__).parents[2] / "scenarios"
GOOD = parse_yaml((FOLDER / "quickstart.yaml").read_text(encoding="utf-8"), source="good").plain
RESOLVED = parse_yaml(dump_scenario(load_scenario(FOLDER / "two-nodes-hierarchical.yaml")), source="good").plain


def paths_of(value, prefix=()):
    """Every path into nested dicts and lists, the root left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*prefix, key)
        yield from paths_of(child, (*prefix, key))


def changed(value, path, new):
    """A copy of `value` with `new` at `path`; None deletes a key."""
    if not path:
        return new
    if isinstance(value, list):
        return [changed(child, path[1:], new) if index == path[0] else child for index, child in enumerate(value)]
    copy = {key: changed(child, path[1:], new) if key == path[0] else child for key, child in value.items()}
    return {key: child for key, child in copy.items() if not (path == (key,) and new == "DELETE")}


strange = st.one_of(
    st.just("DELETE"),
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["uniform", "expert", "mla", "1e3", "h100", "3 GB", "custom", [], {}, [1], {"kind": "x"}, [[]], {"a": 1}]
    ),
    st.sampled_from([{"kind": []}, {"kind": None}, {"kind": 3}, {"kind": {}}, {"": 0}, [None], [{}]]),
)


@pytest.mark.parametrize("good", [GOOD, RESOLVED], ids=["short form", "resolved"])
@settings(max_examples=120)
@given(data=st.data())
def test_a_scenario_with_anything_anywhere_loads_or_is_refused_in_one_line(good, data):
    path = data.draw(st.sampled_from(sorted(paths_of(good), key=str)))
    broken = changed(good, path, data.draw(strange))
    if data.draw(st.booleans()):
        other = data.draw(st.sampled_from(sorted(paths_of(broken), key=str)))
        broken = changed(broken, other, data.draw(strange))
    try:
        scenario = scenario_from_mapping(broken)
    except UserError as error:
        assert str(error).startswith("scenario")
        assert "\n" not in str(error)
    else:
        assert load_scenario_text(dump_scenario(scenario)) == scenario


@settings(max_examples=80)
@given(data=st.data())
def test_any_override_is_applied_or_refused_by_name(data):
    path = data.draw(st.sampled_from(sorted(paths_of(GOOD), key=str)))
    tail = data.draw(st.sampled_from(["", ".x", ".0", ".kind"]))
    text = data.draw(
        st.sampled_from(["1", "0", "-1", "1e3", "null", "[]", "{}", "{kind: x}", "uniform", "x", "[1, 2]", "true"])
    )
    override = ".".join(map(str, path)) + tail + "=" + text
    try:
        scenario = load_scenario(FOLDER / "quickstart.yaml", [override])
    except UserError as error:
        assert "\n" not in str(error)
        assert str(error).startswith(("--set ", str(FOLDER)))
    else:
        assert load_scenario_text(dump_scenario(scenario)) == scenario
