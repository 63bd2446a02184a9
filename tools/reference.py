"""The reference pages of the documentation, made of what the program itself holds.

Keys of scenarios and plans come from their JSON Schema, those of a study from the tables that its reader checks them
by, verbs and flags from the parser of the command line, the numbers of a result from `moesim/results/definitions.yaml`,
and the Python interface from signatures and docstrings.

    python tools/reference.py FOLDER   # writes the pages there; the site makes them by itself (tools/site_pages.py)
"""

import argparse
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from reference_keys import KeyPage, cell, table  # noqa: E402

import moesim  # noqa: E402
from moesim.cli import build  # noqa: E402
from moesim.planner.plan import plan_json_schema  # noqa: E402
from moesim.planner.serving_plan import serving_plan_json_schema  # noqa: E402
from moesim.reliability.answers import GOODPUT_DEFINITIONS as GOODPUT  # noqa: E402
from moesim.results.definitions import NUMBERS, SECTIONS  # noqa: E402
from moesim.scenario import json_schema  # noqa: E402
from moesim.serving.loading import serving_json_schema  # noqa: E402
from moesim.sweeper.reader import AXIS_KEYS  # noqa: E402
from moesim.sweeper.study import PLOT_KEYS, STUDY_KEYS  # noqa: E402


def pages() -> dict[str, str]:
    """Markdown by path inside the documentation."""
    scenario = json_schema(units=True)
    return {
        "reference/index.md": _index(),
        "reference/commands.md": commands(),
        "reference/scenario.md": KeyPage(scenario).text(SCENARIO_HEAD),
        "reference/study.md": study(),
        "reference/plan.md": plan(scenario),
        "reference/serving.md": serving(scenario),
        "reference/serving-plan.md": serving_plan(scenario),
        "reference/metrics.md": metrics(),
        "reference/api.md": api(),
    }


SCENARIO_HEAD = """# Keys of a scenario

Every key that a scenario may have, in the order of the sections. `moesim schema` prints the same as JSON Schema, with
which an editor completes and checks a file. A section that is left out has its defaults; a key that is not listed is
refused with the nearest that is. Quantities are texts with their unit (`400 Gbps`, `141 GB`, `3.3 us`); other numbers
are in the unit given here.
`--set section.key=value` sets any of them on the command line.
"""


def _index() -> str:
    return """# Reference

Made of the program itself when the site is built.

- [The command line](commands.md): every verb and flag.
- Keys of [a scenario](scenario.md), [a study](study.md) and [a plan](plan.md); for serving, of
  [a scenario](serving.md) and [a plan](serving-plan.md).
- [The numbers of a result](metrics.md): what each means, and its unit.
- [The Python interface](api.md).
"""


def commands() -> str:
    """Every verb with its arguments and flags."""
    parser, verbs = build()
    lines = ["# The command line", "", f"{parser.description}", ""]
    lines += table(
        ("verb", "what it does"),
        [(f"[`moesim {name}`](#{_anchor(name)})", verb.description) for name, verb in verbs.items()],
    )
    lines += [
        "",
        "Exit codes: 0 done, 1 a mistake in the input (one line: what, where, remedy), 2 infeasible, 130 interrupted.",
    ]
    for name, verb in verbs.items():
        lines += ["", f"## moesim {name} {{ #{_anchor(name)} }}", "", str(verb.description), ""]
        usage = verb.format_usage().removeprefix("usage: ")
        lines += [
            "```",
            *textwrap.wrap(" ".join(usage.split()), 98, subsequent_indent="    ", break_on_hyphens=False),
            "```",
            "",
        ]
        rows = [_argument(action) for action in verb._actions if action.dest != "help"]
        lines += table(("argument", "default", "what it does"), rows) if rows else ["No flags."]
    return "\n".join(lines) + "\n"


def _anchor(verb: str) -> str:
    return "verb-" + verb.replace(" ", "-")


def _argument(action: argparse.Action) -> tuple[str, str, str]:
    value = action.metavar if isinstance(action.metavar, str) else "|".join(map(str, action.choices or ()))
    if action.option_strings:
        name = ", ".join(
            f"`{flag} {value}`".replace(" `", "`") if value else f"`{flag}`" for flag in action.option_strings
        )
    else:
        name = f"`{value or action.dest}`"
    plain = isinstance(action.default, str | int | float) and not isinstance(action.default, bool)
    default = f"`{action.default}`" if plain and action.default != argparse.SUPPRESS else ""
    choices = f" One of {', '.join(f'`{choice}`' for choice in action.choices)}." if action.choices else ""
    help_text = (
        (action.help or "") % {"default": action.default, "prog": "moesim"}
        if "%(" in (action.help or "")
        else action.help or ""
    )
    return name, default, cell(help_text.replace("%%", "%")) + choices


def study() -> str:
    """The keys of a study, an axis and a plot, and the numbers that a picture may show."""
    lines = [
        "# Keys of a study",
        "",
        "A study simulates a scenario along axes over any of its keys: `moesim sweep STUDY`. For editors, "
        "`moesim schema study` prints its JSON Schema.",
        "",
    ]
    example = (ROOT / "scenarios/studies/capacity.yaml").read_text(encoding="utf-8")
    for title, prefix, keys in (
        ("The study", "", STUDY_KEYS),
        ("An axis", "axes.", AXIS_KEYS),
        ("The plot", "plot.", PLOT_KEYS),
    ):
        lines += [
            f"## {title}",
            "",
            *table(("key", "what it says"), [(f"`{prefix}{key}`", cell(text)) for key, text in keys.items()]),
            "",
        ]
    lines += ["## Numbers for tables and pictures", "", "Each is [defined](metrics.md) with the others.", ""]
    lines += [
        ", ".join(f"`{name}`" for name in NUMBERS),
        "",
        "## An example",
        "",
        "```yaml",
        example.rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def plan(scenario: dict[str, Any]) -> str:
    """The keys of a plan; what a scenario has too is linked."""
    head = """# Keys of a plan

What `moesim plan` takes: a goal, what may be rented, and what may be chosen. Sections that a scenario has too are
[described there](scenario.md); `choices` has lists where a scenario has one value. `moesim schema plan` is for editors.
"""
    schema = plan_json_schema(units=True)
    return KeyPage(schema, elsewhere=KeyPage(scenario).titles, page="scenario.md").text(head)


def serving(scenario: dict[str, Any]) -> str:
    """The keys of a serving scenario; what a training one has too is linked."""
    head = """# Keys of a serving scenario

What `moesim serve` takes. Sections that a training scenario has too are [described there](scenario.md).
`moesim schema serving` is for editors.
"""
    schema = serving_json_schema(units=True)
    return KeyPage(schema, elsewhere=KeyPage(scenario).titles, page="scenario.md").text(head)


def serving_plan(scenario: dict[str, Any]) -> str:
    """The keys of a plan of serving; what a training scenario has too is linked."""
    head = """# Keys of a plan of serving

What `moesim plan` takes with `goal: {serve: ...}`. Sections that a training scenario has too are
[described there](scenario.md). `moesim schema plan` is for editors.
"""
    schema = serving_plan_json_schema(units=True)
    return KeyPage(schema, elsewhere=KeyPage(scenario).titles, page="scenario.md").text(head)


def metrics() -> str:
    """Every number of a result, by section."""
    lines = ["# Numbers of a result", "", METRICS_HEAD, ""]
    for title, sentence, section in SECTIONS:
        rows = [(f"`{_shown_path(path)}`", cell(found.unit), cell(found.text)) for path, found in section.items()]
        lines += [f"## {title}", "", sentence, "", *table(("key", "unit", "what it is"), rows), ""]
    rows = [(f"`{_shown_path(path)}`", cell(found.unit), cell(found.text)) for path, found in GOODPUT.items()]
    lines += ["## Days with failures", "", GOODPUT_HEAD, "", *table(("key", "unit", "what it is"), rows), ""]
    lines += ["## Arrays", "", ARRAYS_HEAD, "", "```", *_arrays(), "```", ""]
    return "\n".join(lines)


METRICS_HEAD = """`result.json` of a run's folder, `moesim run --json`, `moesim.simulate(...).result` in Python and the
columns of `--csv` hold the same numbers under the same names. A `[]` stands for the items of a list. Names end in their
unit where they have one."""
GOODPUT_HEAD = """`moesim goodput --json`, the `.json` beside its page and `moesim.goodput(...).result` in Python.
`schema_version` grows when a number changes its meaning or name."""
ARRAYS_HEAD = "`arrays.npz` of a run's folder, and `arrays` of a `RunRecord` in Python; the last letters are the axes."


def _shown_path(path: str) -> str:
    return path.replace(".[]", "[]")


def _arrays() -> list[str]:
    text = inspect.getdoc(moesim.RunRecord) or ""
    listed = text[text.index("`arrays`:\n") :].split("\n")[1:]
    legend = inspect.getdoc(sys.modules[moesim.RunRecord.__module__]) or ""
    rows = textwrap.dedent("\n".join(line for line in listed if line.startswith("  "))).split("\n")
    return [*rows, "", *legend[legend.index("Legend:") :].split("\n")]


def api() -> str:
    """Signature and docstring of every public name; classes with their public attributes."""
    lines = [
        "# The Python interface",
        "",
        "All that `import moesim` offers. [In Python](../python.md) shows it at work.",
        "",
    ]
    names = sorted(moesim.__all__, key=lambda name: (not name[0].islower(), name))
    lines += table(
        ("name", "what it is"),
        [(f"[`{name}`](#{name.lower()})", cell(_first_line(getattr(moesim, name)))) for name in names],
    )
    for name in names:
        found = getattr(moesim, name)
        lines += ["", f"## {name} {{ #{name.lower()} }}", ""]
        lines += (
            _class(found)
            if inspect.isclass(found)
            else [*_signature(name, found), "", *prose(inspect.getdoc(found) or "")]
        )
    return "\n".join(lines) + "\n"


def _first_line(found: Any) -> str:
    return (inspect.getdoc(found) or "").split("\n\n")[0].replace("\n", " ")


def _signature(name: str, found: Any) -> list[str]:
    text = str(inspect.signature(found, eval_str=False))
    text = re.sub(r"(?:[a-z_]+\.)+([A-Z])", r"\1", text)
    one_line = f"{name}{text}"
    if len(one_line) <= 98:
        return ["```python", one_line, "```"]
    arguments, _, returned = text[1:].rpartition(") -> ")
    split = re.split(r", (?=[\w*]+(?::|,|$))", arguments)
    return ["```python", f"{name}(", *(f"    {argument}," for argument in split), f") -> {returned}", "```"]


def _class(found: type) -> list[str]:
    rows = [(f"`{name}`", f"`{kind}`" if kind else "", cell(text)) for name, kind, text in _public(found)]
    shown = table(("attribute", "type", "what it is"), rows) if rows else []
    return [*prose(inspect.getdoc(found) or ""), *shown]


def _public(found: type) -> Iterable[tuple[str, str, str]]:
    """(name, type, first line of its docstring) of fields, then of properties and methods that the class defines."""
    sections = getattr(found, "__pydantic_fields__", {})
    if dataclasses.is_dataclass(found):
        yield from ((field.name, _short(str(field.type)), "") for field in dataclasses.fields(found))
    yield from ((name, "", section.description or "") for name, section in sections.items())
    for name, member in vars(found).items():
        function = getattr(member, "fget", None) or getattr(member, "func", None) or getattr(member, "__func__", member)
        if name.startswith("_") or name in sections or not inspect.isfunction(function) or not function.__doc__:
            continue
        is_value = function is not member and not isinstance(member, classmethod | staticmethod)
        signature = inspect.signature(function)
        returned = signature.return_annotation
        kind = "" if returned is inspect.Signature.empty else _short(inspect.formatannotation(returned))
        yield name if is_value else f"{name}()", kind, _first_line(function)


def _short(kind: str) -> str:
    """A type without the modules of its names."""
    return (
        re.sub(r"<class '([^']*)'>", r"\1", re.sub(r"(?:[A-Za-z_]+\.)+([A-Za-z])", r"\1", kind))
        .replace("|", "or")
        .strip("'")
    )


def prose(text: str) -> list[str]:
    """A docstring as Markdown: what is indented, and what follows `>>>`, is code."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        rows = paragraph.split("\n")
        code = [row for row in rows if row.startswith("  ")]
        if rows[0].startswith(">>>"):
            lines += ["```pycon", *rows, "```", ""]
        elif code:
            first = next(number for number, row in enumerate(rows) if row.startswith("  "))
            last = max(number for number, row in enumerate(rows) if row.startswith("  ")) + 1
            block = textwrap.dedent("\n".join(rows[first:last])).split("\n")
            lines += [*map(cell, rows[:first]), "", "```", *block, "```", "", *map(cell, rows[last:]), ""]
        else:
            lines += [*map(cell, rows), ""]
    return lines


def main(argv: Sequence[str]) -> int:
    """Write the pages into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    for name, text in pages().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
