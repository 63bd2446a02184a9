"""Puts the folder `scenarios/` into the wheel, as moesim/shipped/scenarios; pyproject.toml says all else.

An editable install needs no copy: `moesim.shipped` finds the folder of the repository.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SCENARIOS = Path("scenarios")


class BuildWithScenarios(build_py):
    """Copies scenarios, studies, plans and their schema beside the modules."""

    def run(self) -> None:
        """Build the modules, then copy."""
        super().run()
        if not self.editable_mode:
            for source, target in self._copies():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Every file that is built."""
        return [*super().get_outputs(include_bytecode), *(target for _, target in self._copies())]

    def get_source_files(self) -> list[str]:
        """Every file that a source distribution needs."""
        return [*super().get_source_files(), *(source for source, _ in self._copies())]

    def _copies(self) -> list[tuple[str, str]]:
        below = Path(self.build_lib) / "moesim/shipped"
        files = sorted([*SCENARIOS.rglob("*.yaml"), *SCENARIOS.glob("*.json")])
        return [(str(file), str(below / file)) for file in files]


setup(cmdclass={"build_py": BuildWithScenarios})
