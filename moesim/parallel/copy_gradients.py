"""What copies of an expert owe each other: their gradients are summed, so that all take the same step.

Ranks that hold copies of an expert all-reduce its gradient among themselves, in the form of NCCL's library calls: every
rank sends each other one its part (reduce-scatter), then the sum of its own part to each of them (all-gather). Copies
on one rank are summed there. Data-parallel ranks with the same slots have reduced theirs before.
Legend: D ranks of an expert group, E experts.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.expert_map import ExpertMap
from moesim.scenario import Scenario

FloatArray = NDArray[np.float64]
MapOfLayer = Callable[[int], ExpertMap | None]


def copy_gradient_bytes_DD(maps: Iterable[ExpertMap | None], *, expert_bytes: float, num_ranks: int) -> FloatArray:
    """Bytes from rank to rank in each of the two halves, of all layers together, zero on the diagonal.

    With C ranks that hold an expert every ordered pair of them moves `expert_bytes` / C in each half.
    """
    bytes_DD = np.zeros((num_ranks, num_ranks))
    for held in maps:
        if held is None:
            continue
        holders_E = held.holds_DE.sum(axis=0)
        share_E = np.where(holders_E > 1, expert_bytes / holders_E, 0.0)
        holds_DE = held.holds_DE.astype(np.float64)
        bytes_DD += (holds_DE * share_E) @ holds_DE.T
    np.fill_diagonal(bytes_DD, 0.0)
    return bytes_DD


def layers_of_stages(scenario: Scenario, stages: Sequence[int]) -> list[int]:
    """The layers with a router of some stages, numbered among those; prediction layers lie on the last stage."""
    model = scenario.model
    layers = [layer for stage in stages for layer in scenario.stage_layers[stage] if not model.is_dense(layer)]
    if scenario.parallelism.num_stages - 1 in stages:
        layers += range(model.layers, model.layers + model.mtp_layers)
    return [model.moe_number(layer) for layer in layers]
