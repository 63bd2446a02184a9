"""Hooks of mkdocs: the pages of the reference and of the notebook, which are made and not written.

Pages of docs/ that the navigation does not name stand at its end under "More".
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import notebook
import reference


def on_config(config: Any) -> Any:
    """Name in the navigation what it forgot."""
    named = set(_named(config["nav"]))
    folder = Path(config["docs_dir"])
    others = sorted(page.name for page in folder.glob("*.md") if page.name not in named)
    if others:
        config["nav"].append({"More": others})
    return config


def _named(node: Any) -> list[str]:
    if isinstance(node, str):
        return [node]
    children = node.values() if isinstance(node, dict) else node
    return [name for child in children for name in _named(child)]


def on_files(files: Any, config: Any) -> Any:
    """Add what is made."""
    from mkdocs.structure.files import File

    for path, text in (reference.pages() | notebook.pages()).items():
        files.append(File.generated(config, path, content=text))
    return files
