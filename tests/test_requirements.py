"""The versions that the tests passed with are those that pyproject.toml allows, from its lower bounds on."""

import importlib
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def pinned(which: str) -> dict[str, Version]:
    lines = (ROOT / f"requirements/tested-{which}.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pins}


def direct() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["dev"])]


@pytest.mark.parametrize("which", ["lowest", "newest"])
def test_every_dependency_was_tested_in_an_allowed_version(which: str) -> None:
    versions = pinned(which)
    for need in direct():
        assert need.specifier.contains(versions[canonicalize_name(need.name)]), need


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    versions = pinned("lowest")
    for need in direct():
        (bound,) = [each.version for each in need.specifier if each.operator == ">="]
        assert versions[canonicalize_name(need.name)].release[:2] == (*Version(bound).release, 0)[:2], need


def test_a_default_run_sees_no_package_that_dev_does_not_bring(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--extras"):
        pytest.skip("--extras shows them")
    for name in ("aiconfigurator_core", "mkdocs", "transformers"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
    importlib.import_module("pyarrow")
