"""Checks of number formats and of how products of few bits are scaled."""

from collections.abc import Iterator
from typing import Protocol, get_args

from moesim.errors import ConflictError
from moesim.scenario.base import GemmFormat
from moesim.scenario.catalogue import GpuSpec
from moesim.scenario.recipes import RECIPES
from moesim.scenario.schema import Precision

KEY = "workload.precision"


class _Report(Protocol):
    def user(self, key: str, message: str) -> ConflictError: ...


def check_recipe(precision: Precision, report: _Report) -> None:
    """A recipe belongs to the format of the products."""
    if precision.recipe is None:
        return
    meant = RECIPES[precision.recipe].gemm
    if precision.gemm != meant:
        known = [recipe.name for recipe in RECIPES.values() if recipe.gemm == precision.gemm]
        remedy = f"use {' or '.join(known)}, or gemm: {meant}" if known else f"set precision.gemm: {meant}, or drop it"
        what = f"{precision.recipe} is for products of {meant}, but precision.gemm is {precision.gemm}"
        raise report.user(f"{KEY}.recipe", f"{what}; {remedy}")


def check_formats(precision: Precision, spec: GpuSpec, report: _Report) -> None:
    """The GPU has units for the products and their recipe."""
    if precision.gemm not in spec.peak_flops:
        formats = ", ".join(name for name in spec.peak_flops if name in get_args(GemmFormat))
        raise report.user(f"{KEY}.gemm", f"{spec.name} has no {precision.gemm}; it has {formats}")
    recipe = precision.scaling
    if recipe is not None and recipe.peak not in spec.peak_flops:
        others = " or ".join(_recipes_of(precision.gemm, spec))
        raise report.user(f"{KEY}.recipe", f"{spec.name} has no {recipe.name}; use {others}")


def _recipes_of(gemm: str, spec: GpuSpec) -> Iterator[str]:
    return (recipe.name for recipe in RECIPES.values() if recipe.gemm == gemm and recipe.peak in spec.peak_flops)
