"""Files of tensors, arrays, parquet and counters, read as data: nothing in them is ever executed."""

import io
import pickle
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError

Array = NDArray[Any]


def refuse(path: Path, what: str, remedy: str) -> NoReturn:
    """Raise the one line about a file that cannot be imported."""
    raise UserError(f"{path}: {what}; {remedy}")


def load_tensors(path: Path) -> Any:
    """What `torch.save` wrote, tensors as numpy arrays. Raises UserError for anything but plain data."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unusual pickle is read all the same, or refused below
            value = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        refuse(path, f"no file of plain tensors ({reason})", "save the routing again with torch.save")
    return _as_numpy(value)


def _as_numpy(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, dict):
        return {key: _as_numpy(item) for key, item in value.items()}
    return [_as_numpy(item) for item in value] if isinstance(value, list | tuple) else value


def load_arrays(path: Path) -> dict[str, Any]:
    """Arrays of a `.npy` or `.npz` file by name; objects in it are refused."""
    try:
        with path.open("rb") as file:
            value = np.load(file, allow_pickle=False)
            if isinstance(value, np.ndarray):
                return {"the array": value}
            return {name: value[name] for name in value.files}
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        refuse(path, f"no file of arrays ({str(error).splitlines()[0][:100]})", "save it again with numpy.save")


def load_parquet(path: Path, *, columns: Sequence[str] | None = None) -> dict[str, Any]:
    """Columns of a parquet file by name (those of `columns` that it has): lists become arrays [rows, length]."""
    names = load_parquet_names(path)
    from pyarrow import ArrowException, parquet

    wanted = sorted(names) if columns is None else [name for name in columns if name in names]
    try:
        table = parquet.read_table(path, columns=wanted)
        return {name: _as_rows(table[name], f"{path}: column {name}") for name in wanted}
    except (ArrowException, OSError) as error:
        refuse(path, f"no parquet file ({str(error).splitlines()[0][:100]})", "fetch it again")


def _as_rows(column: Any, where: str) -> Any:
    """A column of numbers [rows], or of lists of one length [rows, length]."""
    import pyarrow
    import pyarrow.compute

    if column.null_count:
        raise UserError(f"{where} has empty rows; record the routing again")
    if not pyarrow.types.is_list(column.type) and not pyarrow.types.is_large_list(column.type):
        return column.to_numpy()
    lengths = {int(n) for chunk in column.chunks for n in pyarrow.compute.unique(chunk.value_lengths()).to_pylist()}
    values = pyarrow.chunked_array([chunk.flatten() for chunk in column.chunks], type=column.type.value_type)
    if len(lengths) != 1 or values.null_count:
        raise UserError(f"{where} has rows with lists of different lengths, or none; record the routing again")
    return values.to_numpy().reshape(-1, *lengths)


def load_parquet_names(path: Path) -> set[str]:
    """Names of the columns of a parquet file, without its rows."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow; pip install 'moesim[import]'") from None
    try:
        return set(parquet.read_schema(path).names)
    except (ArrowException, OSError) as error:
        refuse(path, f"no parquet file ({str(error).splitlines()[0][:100]})", "fetch it again")


def load_safetensors(path: Path) -> dict[str, Any]:
    """Arrays of a safetensors file by name."""
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError:
        raise UserError(f"{path}: this file needs safetensors; pip install 'moesim[import]'") from None
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        refuse(path, f"no file of tensors ({str(error).splitlines()[0][:100]})", "fetch it again")


def _scalar(dtype: np.dtype[Any], data: bytes) -> Any:
    """A numpy number from its bytes, as numpy's own function makes it."""
    if dtype.hasobject:
        raise pickle.UnpicklingError("it holds a number of Python objects")
    return np.frombuffer(data, dtype=dtype, count=1)[0]


# All that a pickle of counters needs; anything else in it is refused before it is looked up.
_HARMLESS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "Counter"): Counter,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}


class _CounterPickle(pickle.Unpickler):
    """Knows counters and numpy's whole numbers, and no other name."""

    def find_class(self, module: str, name: str) -> Any:
        """One of the harmless ones. Raises UnpicklingError for any other name, without importing it."""
        if (module, name) in _HARMLESS:
            return _HARMLESS[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_counters(path: Path) -> list[dict[int, float]]:
    """Counters of experts, one a layer. Raises UserError for a pickle of anything else; none of it is run."""
    try:
        value = _CounterPickle(io.BytesIO(path.read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, ValueError, TypeError, OSError) as error:
        refuse(path, f"no pickle of counters ({str(error)[:100]})", "export the counts as JSON or CSV")
    counters = value if isinstance(value, list) else [value]
    if not counters or not all(isinstance(each, dict) and each for each in counters):
        refuse(path, "no list of counters", "export the counts as JSON or CSV")
    try:
        return [{int(expert): float(count) for expert, count in each.items()} for each in counters]
    except (TypeError, ValueError):
        refuse(path, "counters of something other than experts", "export the counts as JSON or CSV")
