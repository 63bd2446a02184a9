"""A routing trace as a parquet table and back: step, layer, sequence, position, experts, affinities, gates; a row a
token.

Legend: L layers, N tokens of all sequences, K selections.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from moesim.errors import UserError
from moesim.routing.importing.assembly import Layer, of_steps
from moesim.routing.importing.source import Source, field_of, table_of
from moesim.routing.importing.tensors import load_parquet
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


def read_table(path: Path) -> Source:
    """The parquet table of `moesim trace export`, or any with its columns layer and experts; the others may lack.

    Rows may stand in any order where step, sequence and position say theirs. Affinities are not read.
    """
    columns = load_parquet(path, columns=("step", "layer", "sequence", "position", "experts", "gates"))
    ids_RK = table_of(field_of(columns, "experts", str(path)), f"{path}: column experts", axes=2)
    rows = len(ids_RK)
    none = np.zeros(rows, dtype=np.int64)
    step_R, layer_R, sequence_R, position_R = (
        table_of(columns.get(name, none), f"{path}: column {name}", axes=1)
        for name in ("step", "layer", "sequence", "position")
    )
    field_of(columns, "layer", str(path))
    order_R = np.lexsort((position_R, sequence_R, layer_R, step_R))
    found: dict[int, dict[int, Layer]] = {}
    for step, layer in sorted({*zip(step_R.tolist(), layer_R.tolist(), strict=True)}):
        here_N = order_R[(step_R[order_R] == step) & (layer_R[order_R] == layer)]
        gates_NK = columns["gates"][here_N] if "gates" in columns else None
        found.setdefault(step, {})[layer] = ids_RK[here_N], gates_NK
    lengths = np.unique(np.unique(sequence_R, return_counts=True)[1]) if "sequence" in columns else none[:0]
    source = of_steps(found, str(path))
    per_layer = len({(step, layer) for step in found for layer in found[step]})
    alike = len(lengths) == 1 and int(lengths[0]) % per_layer == 0
    return replace(source, sequence_length=int(lengths[0]) // per_layer if alike else None)


def _schema() -> "object":
    import pyarrow

    whole, number = pyarrow.int32(), pyarrow.float32()
    return pyarrow.schema(
        [(name, whole) for name in ("step", "layer", "sequence", "position")]
        + [("experts", pyarrow.list_(pyarrow.int16())), ("affinities", pyarrow.list_(number))]
        + [("gates", pyarrow.list_(number))]
    )
