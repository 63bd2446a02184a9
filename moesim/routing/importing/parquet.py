"""A routing trace as a parquet table: step, layer, sequence, position, experts, affinities, gates; a row a token."""

from pathlib import Path

import numpy as np

from moesim.errors import UserError
from moesim.trace import RoutingTrace


def write_parquet(trace: RoutingTrace, path: Path) -> int:
    """Write every recorded step; the file appears complete or not at all. Gives the number of rows.

    Lists have K entries, -1 for none. Raises UserError where pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet needs pyarrow; pip install 'moesim[import]'") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    rows = 0
    with parquet.ParquetWriter(partial, _schema()) as writer:
        for step in trace.steps:
            layers, sequences, length, top_k = step.expert_ids_LSTK.shape
            for layer in range(layers):
                count = sequences * length
                columns = {
                    "step": np.full(count, step.step),
                    "layer": np.full(count, layer),
                    "sequence": np.repeat(np.arange(sequences), length),
                    "position": np.tile(np.arange(length), sequences),
                    "experts": list(step.expert_ids_LSTK[layer].reshape(-1, top_k)),
                    "affinities": list(step.affinities_LSTK[layer].reshape(-1, top_k)),
                    "gates": list(step.gates_LSTK[layer].reshape(-1, top_k)),
                }
                writer.write_table(pyarrow.table(columns, schema=_schema()))
                rows += count
    partial.replace(path)
    return rows


def _schema() -> "object":
    import pyarrow

    whole, number = pyarrow.int32(), pyarrow.float32()
    return pyarrow.schema(
        [(name, whole) for name in ("step", "layer", "sequence", "position")]
        + [("experts", pyarrow.list_(pyarrow.int16())), ("affinities", pyarrow.list_(number))]
        + [("gates", pyarrow.list_(number))]
    )
