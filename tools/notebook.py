"""Run the notebook of the documentation, store what its cells give, and turn it into a page of the site.

The cells run in one namespace, one after the other, without Jupyter. An output is what a cell prints and the value of
its last expression: as a picture where that has `_repr_svg_`, as text otherwise.

    python tools/notebook.py           # runs docs/notebook/*.ipynb and stores the outputs in them
    python tools/notebook.py --check   # says which stored outputs are not given now; exit code 1
"""

import argparse
import ast
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from page_outputs import differs

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "docs/notebook"
SVG = "image/svg+xml"

Notebook = dict[str, Any]


def read(path: Path) -> Notebook:
    """A notebook of format 4."""
    found: Notebook = json.loads(path.read_text(encoding="utf-8"))
    assert found["nbformat"] == 4, f"{path}: not a notebook of format 4"
    return found


def outputs_of(source: str, names: dict[str, Any], *, number: int) -> list[dict[str, Any]]:
    """The outputs of a cell that runs in the namespace `names`, as a notebook stores them."""
    tree = ast.parse(source)
    last = tree.body[-1] if tree.body else None
    value = None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if isinstance(last, ast.Expr):
            exec(compile(ast.Module(tree.body[:-1], []), f"cell {number}", "exec"), names)
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        else:
            exec(compile(tree, f"cell {number}", "exec"), names)
    found: list[dict[str, Any]] = []
    if printed.getvalue():
        found.append({"name": "stdout", "output_type": "stream", "text": _lines(printed.getvalue())})
    if value is not None:
        data = {"text/plain": _lines(repr(value))}
        if hasattr(value, "_repr_svg_"):
            data = {SVG: _lines(value._repr_svg_()), "text/plain": ["a picture"]}
        found.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return found


def run(notebook: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """The outputs of all code cells, which run in an empty folder that is gone afterwards."""
    names: dict[str, Any] = {"__name__": "notebook"}
    found, before = [], Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for number, cell in enumerate(_code(notebook), start=1):
                found.append(outputs_of("".join(cell["source"]), names, number=number))
        finally:
            os.chdir(before)
    return found


def differences(notebook: Mapping[str, Any], outputs: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Where the stored outputs are not those that were given, a line each; numbers may differ by 5 %."""
    found = []
    for number, (cell, given) in enumerate(zip(_code(notebook), outputs, strict=True), start=1):
        shown, printed = _text(cell["outputs"]).splitlines(), _text(given).splitlines()
        difference = differs(shown, printed)
        if difference:
            found.append(f"cell {number} {difference}")
        if _pictures(cell["outputs"]) != _pictures(given):
            found.append(f"cell {number} shows another number of pictures")
    return found


def page(notebook: Mapping[str, Any], *, source: str) -> str:
    """The notebook as Markdown; `source` is the path of the file from the page."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            picture = output.get("data", {}).get(SVG)
            shown = _text([output]).rstrip("\n")
            parts.append("".join(picture) if picture else f"``` {{ .text .output }}\n{shown}\n```")
    head, *rest = parts
    note = f"This page is a notebook: [{Path(source).name}]({source}), with the outputs of its last run."
    return "\n\n".join([head, note, *rest]) + "\n"


def pages() -> dict[str, str]:
    """The page of every notebook by path inside the documentation."""
    return {
        f"notebook/{path.stem}.md": page(read(path), source=path.name) for path in sorted(NOTEBOOKS.glob("*.ipynb"))
    }


def write(path: Path, notebook: Notebook, outputs: Sequence[list[dict[str, Any]]]) -> None:
    """Store outputs in the file."""
    for number, (cell, given) in enumerate(zip(_code(notebook), outputs, strict=True), start=1):
        cell["outputs"], cell["execution_count"] = given, number
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _code(notebook: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _text(outputs: Sequence[Mapping[str, Any]]) -> str:
    return "".join("".join(output.get("text") or output["data"]["text/plain"]) + "\n" for output in outputs)


def _pictures(outputs: Sequence[Mapping[str, Any]]) -> int:
    return sum(SVG in output.get("data", {}) for output in outputs)


def main(argv: Sequence[str]) -> int:
    """Run and hold, or store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where an output differs")
    check = parser.parse_args(argv).check
    found = []
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = read(path)
        outputs = run(notebook)
        found += [f"{path.relative_to(ROOT)}: {line}" for line in differences(notebook, outputs)] if check else []
        if not check:
            write(path, notebook, outputs)
    print("\n".join(found) or "every output is that of the cells" if check else "stored")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
