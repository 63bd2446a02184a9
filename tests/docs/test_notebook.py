"""The notebook of the documentation: its cells run, and give what is stored in it."""

from pathlib import Path

import notebook
import pytest

(PATH,) = notebook.NOTEBOOKS.glob("*.ipynb")


@pytest.mark.slow  # nine simulations; .ci/run runs the cells, too
def test_the_cells_give_the_stored_outputs() -> None:
    """All of them, in one namespace, from a folder that holds nothing; numbers within 5 %."""
    found = notebook.read(PATH)
    outputs = notebook.run(found)
    assert notebook.differences(found, outputs) == []
    assert all(outputs), "a cell that shows nothing"
    assert any(notebook.SVG in output.get("data", {}) for cell in outputs for output in cell)


def test_every_cell_has_an_identifier_and_was_run() -> None:
    """As readers of notebooks ask for (nbformat 4.5)."""
    found = notebook.read(PATH)
    assert found["nbformat_minor"] >= 5
    assert len({cell["id"] for cell in found["cells"]}) == len(found["cells"])
    counts = [cell["execution_count"] for cell in found["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_a_stale_output_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = {"cell_type": "code", "metadata": {}, "source": ["x = 2\n", "print(x)\n", "x + 1"], "outputs": []}
    small = {"cells": [{"cell_type": "markdown", "metadata": {}, "source": ["# Two"]}, code], "nbformat": 4}
    monkeypatch.chdir(tmp_path)
    outputs = notebook.run(small)
    assert list(tmp_path.iterdir()) == [] and Path.cwd() == tmp_path
    assert "shows 0 lines" in notebook.differences(small, outputs)[0]
    notebook.write(tmp_path / "small.ipynb", small, outputs)
    again = notebook.read(tmp_path / "small.ipynb")
    assert notebook.differences(again, notebook.run(again)) == []
    page = notebook.page(again, source="small.ipynb")
    assert page.startswith("# Two\n") and "x + 1\n```" in page and "output }\n2\n```" in page
    again["cells"][1]["source"][0] = "x = 3\n"
    assert "cell 1" in notebook.differences(again, notebook.run(again))[0]
