"""A short window of the spans of one rank group, ready to be drawn.

Legend: N spans, S samples, R ranks.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.results.spans import SpanTable, Stream


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """Spans of one layer and micro-batch in sample 0; times are seconds from the start of the step.

    A transfer is two pieces, waiting for its peers and its own part, as the attribution counts it.
    """

    layer: int
    names_N: tuple[str, ...]
    categories_N: tuple[str, ...]
    on_network_N: NDArray[np.bool_]
    start_NR: NDArray[np.float64]
    finish_NR: NDArray[np.float64]


def forward_of_one_layer(table: SpanTable) -> Window | None:
    """The forward pass of the first micro-batch in the middle one of the layers with a dispatch.

    Any layer will do in a dense model. None when no span belongs to a layer.
    """
    labels_N = [table.labels[index] for index in table.label_N]
    routed = sorted({label.layer for label in labels_N if label.layer >= 0 and label.category == "dispatch_exposed"})
    layers = routed or sorted({label.layer for label in labels_N if label.layer >= 0})
    if not layers:
        return None
    layer = layers[len(layers) // 2]
    first_pass = table.micro_batch_N == min(table.micro_batch_N[[label.layer == layer for label in labels_N]])
    rows = [row for row, label in enumerate(labels_N) if label.layer == layer and first_pass[row]]
    forward = rows[: next((i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1), len(rows))]
    return _pieces(table, forward, layer)


def _pieces(table: SpanTable, rows: list[int], layer: int) -> Window:
    names, categories, on_network, starts, finishes = [], [], [], [], []
    for row in rows:
        label = table.labels[table.label_N[row]]
        start_R, finish_R = table.start_NSR[row, 0], table.finish_NSR[row, 0]
        pieces = [(label.category, start_R, finish_R)]
        if label.stream is Stream.COMMUNICATION:
            arrived_R = finish_R - np.minimum(table.own_NSR[row, 0], finish_R - start_R)
            pieces = [("imbalance_wait", start_R, arrived_R), (label.category, arrived_R, finish_R)]
        for category, begin_R, end_R in pieces:
            names.append(label.name)
            categories.append(category)
            on_network.append(label.stream is Stream.COMMUNICATION)
            starts.append(begin_R)
            finishes.append(end_R)
    return Window(
        layer=layer,
        names_N=tuple(names),
        categories_N=tuple(categories),
        on_network_N=np.array(on_network),
        start_NR=np.array(starts),
        finish_NR=np.array(finishes),
    )
