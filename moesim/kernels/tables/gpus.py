"""Which GPUs have tables, and which measured GPU stands for what the tables lack.

`h100` and `h200` are measured by this project: their tables only tell how far such rows can be compared.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TableGpu:
    """`folder` of the package's data; `base`: the measured GPU whose kernels are scaled where there is no table."""

    folder: str
    base: str


TABLE_GPUS = {
    "a100": TableGpu("a100_sxm", "h200"),
    "b200": TableGpu("b200_sxm", "h200"),
    "gb200": TableGpu("gb200", "h200"),
    "b300": TableGpu("b300_sxm", "h200"),
    "gb300": TableGpu("gb300", "h200"),
    "l40s": TableGpu("l40s", "h200"),
    "rtx-pro-6000": TableGpu("rtx_pro_6000_server", "h200"),
}
COMPARED = {"h100": TableGpu("h100_sxm", "h100"), "h200": TableGpu("h200_sxm", "h200")}
