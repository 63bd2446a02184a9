import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import UserError
from moesim.scenario.document import MAX_DEPTH, MAX_NODES, find, parse_yaml, plain_scalar


def parse(text):
    return parse_yaml(text, source="f.yaml")


def test_every_key_and_value_knows_its_place():
    root = parse("a: 1\nlist:\n  - x\n  - {k: v}\n")
    node, reached = find(root, ("list", 1, "k"))
    assert reached == ("list", 1, "k")
    assert (node.key_where, node.where) == ("f.yaml:4:6", "f.yaml:4:9")


def test_a_path_that_does_not_exist_ends_at_the_deepest_node_above_it():
    node, reached = find(parse("a: {b: 1}"), ("a", "c", "d"))
    assert reached == ("a",)
    assert node.plain == {"b": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e9", 1e9),
        ("2e12", 2e12),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("0x10", 16),
        ("0o17", 15),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("=", "="),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ('"8"', "8"),
        ("'true'", "true"),
        ("400 Gbps", "400 Gbps"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    parsed = parse(f"k: {text}").plain["k"]
    assert parsed == value
    assert type(parsed) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_float_is_read_exactly(value):
    assert plain_scalar(repr(value)) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", 'f.yaml:3:1: duplicate key "a"; it is already at f.yaml:1:1'),
        ("a: .nan", "f.yaml:1:4: .nan is not a finite number"),
        ("a: -.inf", "f.yaml:1:4: -.inf is not a finite number"),
        ("a: 1e999", "f.yaml:1:4: 1e999 is not a finite number"),
        ("a: " + "9" * 50, "f.yaml:1:4: a number of 50 digits"),
        ("a: !!python/object/apply:os.system [ls]", "f.yaml:1:4: tags such as"),
        ("a: !!python/name:os.system ''", "f.yaml:1:4: tags such as"),
        ("a: !!str 3", "f.yaml:1:4: tags such as"),
        ("a: *missing", 'f.yaml:1:4: alias "*missing" has no complete anchor'),
        ("a: &x [*x]", 'f.yaml:1:8: alias "*x" has no complete anchor'),
        ("? [1, 2]\n: 3", "f.yaml:1:3: a key must be plain text"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2:1: a second document"),
        ("a: [1, 2", ": not valid YAML"),
        ("a: b: c", "f.yaml:1:5: not valid YAML"),
        ("a:\n\t- 1", "f.yaml:2:1: not valid YAML"),
        ("a: \x01", "f.yaml"),
        ("a: " + "[" * 100 + "]" * 100, f"nested deeper than {MAX_DEPTH} levels"),
        ("a: " + "{b: " * 5000 + "1" + "}" * 5000, f"nested deeper than {MAX_DEPTH} levels"),
        ("[" * 100_000, "f.yaml:1:"),  # PyYAML may refuse it before its first event, in its own words
    ],
)
def test_what_is_outside_the_strict_subset_is_refused_in_one_line(text, message):
    with pytest.raises(UserError) as error:
        parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_aliases_are_expanded():
    assert parse("a: &x {k: [1, 2]}\nb: *x\n").plain == {"a": {"k": [1, 2]}, "b": {"k": [1, 2]}}


def test_an_alias_bomb_is_refused_before_it_is_expanded():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(UserError, match=f"more than {MAX_NODES:,} values"):
        parse("\n".join(lines))


def test_a_very_long_file_is_refused():
    with pytest.raises(UserError, match="characters; a scenario has at most"):
        parse("a: " + "x" * 9_000_000)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False, allow_infinity=False),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), children, max_size=4)
    ),
    max_leaves=20,
)


def flow(value):
    """`value` as YAML flow text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(child)}" for key, child in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


@settings(max_examples=50)
@given(json_like)
def test_any_plain_data_is_read_as_written(value):
    assert parse(f"k: {flow(value)}").plain == {"k": value}


@given(st.text(max_size=200))
def test_any_text_gives_data_or_one_located_line(text):
    try:
        parse(text).plain
    except UserError as error:
        assert str(error).startswith("f.yaml")
        assert "\n" not in str(error)
    else:
        assert parse(text).plain == parse(text).plain
