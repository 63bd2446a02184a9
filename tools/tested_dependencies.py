"""Run the tests with the lowest or the newest versions that pyproject.toml allows, and write down those that passed.

python tools/tested_dependencies.py lowest|newest [PYTEST ARGUMENT...]      (needs uv: https://docs.astral.sh/uv)

A fresh environment gets the direct dependencies at their lower bounds (or everything at its newest release); when all
tests have passed in it, its versions become requirements/tested-lowest.txt (or tested-newest.txt). To work with them:

pip install -e '.[dev]' -c requirements/tested-newest.txt
"""

import argparse
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESOLUTION = {"lowest": "lowest-direct", "newest": "highest"}
PINNED_BY_TORCH = ("nvidia-", "cuda-", "triton")  # which of them there are depends on the build of torch


def main() -> int:
    """Exit code of the tests; the file is written when it is 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=RESOLUTION)
    args, pytest_arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "venv/bin/python"
        uv("venv", "--python", sys.executable, str(python.parents[1]))
        uv("pip", "install", "--python", str(python), "--resolution", RESOLUTION[args.which], "-e", f"{ROOT}[dev]")
        tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(pytest_arguments or ["-n", "auto"])]
        tests.append("--deselect=tests/test_requirements.py")  # judges the files that are written here
        code = subprocess.run(tests, cwd=ROOT, check=False).returncode
        if code == 0:
            frozen = uv("pip", "freeze", "--python", str(python), "--exclude-editable").splitlines()
            write(ROOT / f"requirements/tested-{args.which}.txt", frozen)
    return code


def write(path: Path, frozen: list[str]) -> None:
    """Write `frozen`, lines of NAME==VERSION, as constraints; the local part of a version (+cpu) is dropped."""
    pins = [line.partition("+")[0] for line in frozen if not line.startswith(PINNED_BY_TORCH)]
    machine = f"{platform.system()} {platform.machine()}"
    head = [
        f"# All tests passed with these, on Python {platform.python_version()}, {machine}.",
        f"# Made by: python tools/tested_dependencies.py {path.stem.rpartition('-')[2]}",
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([*head, *pins]) + "\n", encoding="utf-8")


def uv(*arguments: str) -> str:
    """What uv prints on standard output; its complaints go to the terminal."""
    return subprocess.run(["uv", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
