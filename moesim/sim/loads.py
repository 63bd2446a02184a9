"""What one model layer of one rank group has to compute and send, for all micro-batches and routing samples at once.

Legend: M micro-batches, S routing samples, Q = M*S, R ranks (D the same as destinations), P expert slots of a rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.network import Fabric, prepare_combine, prepare_dispatch
from moesim.parallel import ExpertPlacement, TrafficArrays, token_bytes
from moesim.parallel.stages import held_copies, stage_copies
from moesim.scenario import Scenario
from moesim.sim.operations import Transfer

IntArray = NDArray[np.int64]


class RoutingSample(Protocol):
    """What is simulated of a routing sample: a drawn `TrafficSample`, or rows that a real run recorded."""

    @property
    def placement(self) -> ExpertPlacement:
        """The experts of every layer on the ranks of a group."""

    def arrays(self, group: int, model_layer: int, *, stage: int = 0) -> TrafficArrays:
        """The traffic of one expert group (at place `stage` of the pipeline) and MoE layer over all micro-batches."""


@dataclass(frozen=True, kw_only=True)
class LayerLoads:
    """Loads of one MoE layer.

    `slot_rows_MSRP`: rows that each expert slot computes. `copies_out_MSR`: copies of its own tokens that a rank writes
    into its send buffer (copies for itself included). `copies_in_MSR`: copies that reach a rank. The transfers of one
    micro-batch hold all samples. `counts` is the exchange of row counts that software which reads them back does first.
    """

    slot_rows_MSRP: NDArray[Any]
    copies_out_MSR: NDArray[Any]
    copies_in_MSR: NDArray[Any]
    dispatch_M: tuple[Transfer, ...]
    combine_M: tuple[Transfer, ...]
    counts: Transfer | None = None

    @property
    def rows_MSR(self) -> NDArray[Any]:
        """Rows that each rank computes."""
        return np.asarray(self.slot_rows_MSRP.sum(axis=-1))


def group_loads(
    scenario: Scenario,
    fabric: Fabric,
    samples: Sequence[RoutingSample],
    *,
    group: int,
    stage: int,
    layers: Sequence[int],
    ranks_R: IntArray,
) -> list[LayerLoads]:
    """The loads of some MoE layers (numbered among those) of one expert group, samples stacked."""
    placement = samples[0].placement
    return [
        _layer_loads(
            scenario, fabric, [sample.arrays(group, layer, stage=stage) for sample in samples], placement, ranks_R
        )
        for layer in layers
    ]


def _layer_loads(
    scenario: Scenario,
    fabric: Fabric,
    arrays_S: Sequence[TrafficArrays],
    placement: ExpertPlacement,
    ranks_R: IntArray,
) -> LayerLoads:
    deduplicate = scenario.dispatch.deduplicate
    slot_rows_MSRP = np.stack([arrays.slot_rows_BDP(placement) for arrays in arrays_S], axis=1)
    held_MSRD = np.stack([held_copies(arrays, placement, deduplicate) for arrays in arrays_S], axis=1)
    dispatch_M: tuple[Transfer, ...] = ()
    combine_M: tuple[Transfer, ...] = ()
    if scenario.parallelism.expert > 1:
        stages_S = [stage_copies(arrays, placement, deduplicate) for arrays in arrays_S]
        stages_MSRR = [np.stack(stage, axis=1) for stage in zip(*stages_S, strict=True)]
        own_MSR = np.einsum("msrr->msr", held_MSRD)
        dispatch_M, combine_M = _transfers(scenario, fabric, stages_MSRR, own_MSR, ranks_R)
    return LayerLoads(
        slot_rows_MSRP=slot_rows_MSRP,
        copies_out_MSR=held_MSRD.sum(axis=3),
        copies_in_MSR=held_MSRD.sum(axis=2),
        dispatch_M=dispatch_M,
        combine_M=combine_M,
        counts=_counts(scenario, fabric, slot_rows_MSRP[0], ranks_R),
    )


def _counts(scenario: Scenario, fabric: Fabric, slot_rows_SRP: NDArray[Any], ranks_R: IntArray) -> Transfer | None:
    """One int64 per (rank, slot of the target), sent by everyone to everyone before the rows."""
    if scenario.implementation.kind != "torch_eager" or len(ranks_R) == 1:
        return None
    samples, ranks, slots = slot_rows_SRP.shape
    each_SRR = np.broadcast_to(1.0 - np.eye(ranks), (samples, ranks, ranks))
    return prepare_dispatch(
        fabric, [each_SRR], token_bytes=8.0 * slots, algorithm="direct", ranks=ranks_R, synchronised=True
    )


def _transfers(
    scenario: Scenario,
    fabric: Fabric,
    stages_MSRR: Sequence[NDArray[np.float64]],
    own_MSR: NDArray[Any],
    ranks_R: IntArray,
) -> tuple[tuple[Transfer, ...], tuple[Transfer, ...]]:
    """Dispatch and combine of one layer and every micro-batch, prepared together; all samples in lockstep."""
    dispatch, hidden = scenario.dispatch, scenario.model.hidden
    micro_batches, _, ranks = own_MSR.shape
    stages_QRR = [stage_MSRR.reshape(-1, ranks, ranks) for stage_MSRR in stages_MSRR]
    # An implementation that reads counts back has exchanged them first: nobody sends before the last has come.
    common: dict[str, Any] = {
        "algorithm": dispatch.algorithm,
        "ranks": ranks_R,
        "own_copies_R": own_MSR.reshape(-1, ranks),
        "model": scenario.network.model,
        "synchronised": scenario.implementation.kind == "torch_eager",
    }
    out = prepare_dispatch(fabric, stages_QRR, token_bytes=token_bytes(hidden, dispatch.dtype), **common)
    back = prepare_combine(fabric, stages_QRR, token_bytes=token_bytes(hidden, dispatch.combine_dtype), **common)
    return out.parts(micro_batches), back.parts(micro_batches)
