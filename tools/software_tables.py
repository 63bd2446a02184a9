"""The tables of docs/software.md that are made from the rows of softwares: what each is, and its settings.

python tools/software_tables.py            # prints them
python tools/software_tables.py --write    # puts them into the page, between its marks
"""

import argparse
from dataclasses import fields
from pathlib import Path

from moesim.scenario.software import SOFTWARE, Switches

PAGE = Path(__file__).parent.parent / "docs" / "software.md"
LISTED = [facts for facts in SOFTWARE.values() if facts.kernels == "switched"]


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def about() -> str:
    """One line a software: what it is, where its list is from, what it was checked against."""
    rows = [f"| `{each.name}` | {each.about} | {each.listed} | {each.checked} |" for each in LISTED]
    head = "| software | what it is | its list is from | what it was checked against |"
    return "\n".join([head, "|---|---|---|---|", *rows])


def settings() -> str:
    """One line a switch that is not the same everywhere."""

    def values(name: str) -> list[str]:
        return [_word(getattr(each.switches, name)) for each in LISTED]

    def row(name: str) -> str:
        return f"| `{name}` | " + " | ".join(values(name)) + " |"

    names = [field.name for field in fields(Switches) if len(set(values(field.name))) > 1]
    head = "| switch | " + " | ".join(f"`{each.name}`" for each in LISTED) + " |"
    return "\n".join([head, "|" + "---|" * (len(LISTED) + 1), *map(row, names)])


TABLES = {"softwares": about, "settings": settings}


def page(text: str) -> str:
    """The text of the page with its tables made anew."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        assert rest and end in rest, f"docs/software.md lacks the marks of {name}"
        text = before + begin + table() + "\n" + end + rest.partition(end)[2]
    return text


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        PAGE.write_text(page(PAGE.read_text()))
        return
    print(*(table() for table in TABLES.values()), sep="\n\n")


if __name__ == "__main__":
    main()
