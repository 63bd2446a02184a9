"""The package's tables: of which GPUs, and how they are read.

Parquet files lie at systems/data/<gpu>/<family>/<framework>/<version>/<table>.parquet. `h100` and `h200` are measured
by this project: their tables only tell how far such rows can be compared.
"""

import re
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError

PACKAGE = "aiconfigurator-core"
LICENCE = "Apache-2.0"
_REMEDY = "pip install 'moesim[tables]'"


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


@dataclass(frozen=True)
class Table:
    """Columns of one file, and where they come from: framework, its version and the table's name."""

    columns: dict[str, NDArray[Any]]
    framework: str
    version: str
    name: str

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    @property
    def source(self) -> str:
        """`trtllm 1.3.0rc20 gemm_perf`."""
        return f"{self.framework} {self.version} {self.name}"


@dataclass(frozen=True)
class Package:
    """The folder `systems` of the package, installed or unpacked, and its version."""

    systems: Path
    version: str

    @staticmethod
    def found(folder: Path | None) -> "Package":
        """The installed package, or the one unpacked at `folder`. Raises UserError where there is none."""
        if folder is None:
            spec = util.find_spec("aiconfigurator_core")
            if spec is None or spec.origin is None:
                raise UserError(f"--from-tables needs the package {PACKAGE}: {_REMEDY}, or name an unpacked folder")
            return Package(Path(spec.origin).parent / "systems", metadata.version(PACKAGE))
        inside = folder / "aiconfigurator_core"
        systems = (inside if inside.exists() else folder) / "systems"
        if not (systems / "data").is_dir():
            raise UserError(f"{folder}: no systems/data in it; name the unpacked package {PACKAGE}, or {_REMEDY}")
        versions = [path.name.split("-")[1] for path in folder.glob("aiconfigurator_core-*.dist-info")]
        return Package(systems, versions[0].removesuffix(".dist") if versions else "of an unknown version")

    def tables(self, gpu_folder: str, family: str, name: str) -> list[Table]:
        """The table of every framework, each in its newest version; none where no framework has it."""
        found: dict[str, Path] = {}
        for path in sorted((self.systems / "data" / gpu_folder / family).glob(f"*/*/{name}.parquet"), key=_newness):
            found[path.parts[-3]] = path
        return [_read(path) for _, path in sorted(found.items())]

    def table(
        self, gpu_folder: str, family: str, name: str, *, framework: str, version: str | None = None
    ) -> Table | None:
        """That of one framework; `version`: not the newest."""
        if version is not None:
            path = self.systems / "data" / gpu_folder / family / framework / version / f"{name}.parquet"
            return _read(path) if path.is_file() else None
        return next((table for table in self.tables(gpu_folder, family, name) if table.framework == framework), None)


def _newness(path: Path) -> tuple[Any, ...]:
    """Numbers of a version, a release candidate before its release."""
    version = path.parts[-2]
    numbers = [int(part) for part in re.findall(r"\d+", version)]
    return (path.parts[-3], numbers[:3], "rc" not in version, numbers[3:])


def _read(path: Path) -> Table:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"--from-tables reads parquet files with pyarrow: {_REMEDY}") from None
    read = parquet.read_table(path)
    columns = {name: np.asarray(read.column(name).to_numpy(zero_copy_only=False)) for name in read.column_names}
    return Table(columns, framework=path.parts[-3], version=path.parts[-2], name=path.stem)
