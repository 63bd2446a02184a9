"""What one model layer of one rank group has to compute and send, for all micro-batches and routing samples at once.

A rank group holds one expert-parallel group, or several where layouts are folded; with expert-tensor parallelism the
ranks with slices of the same experts then share their rows.

Legend: M micro-batches, S routing samples, Q = M*S, R ranks (D the same as destinations), P expert slots of a rank,
E ranks with slices of the same experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.network import Fabric, prepare_combine, prepare_dispatch
from moesim.parallel import ExpertPlacement, LayerTraffic, Mesh, token_bytes
from moesim.parallel.expert_map import ExpertMap
from moesim.parallel.traffic import copies_out, held_copies, stage_copies
from moesim.program.collectives import Peers, SideBySide, set_of_place
from moesim.program.operations import Transfer
from moesim.program.scenario_fabric import dispatch_sharing, sharing_model
from moesim.scenario import Scenario
from moesim.scenario.dispatch import DIRECT
from moesim.scenario.pools import fewest_sms

IntArray = NDArray[np.int64]

BYTES_AT_ONCE = 32e6  # of copies from rank to rank: layers whose transfers are prepared together


class RoutingSample(Protocol):
    """What is simulated of a routing sample: a drawn `TrafficSample`, or rows that a real run recorded."""

    @property
    def placement(self) -> ExpertPlacement:
        """The experts of every layer, or its slots, on the ranks of a group."""

    def map_of(self, model_layer: int) -> ExpertMap | None:
        """What the slots of a layer hold; None where every expert has one slot, the same in all layers."""

    def arrays(self, group: int, model_layer: int, *, stage: int = 0) -> LayerTraffic:
        """The traffic of one expert group (at place `stage` of the pipeline) and MoE layer over all micro-batches."""

    def same_traffic(self, group: int, other: int, *, stage: int = 0) -> bool:
        """Whether two expert groups are known to have the same traffic in every layer and micro-batch."""


@dataclass(frozen=True, kw_only=True)
class LayerLoads:
    """Loads of one MoE layer, or of several one behind the other along M, which are priced together.

    `slot_rows_MSRP`: rows that each expert slot computes. `copies_out_MSR`: copies of its own tokens that a rank writes
    into its send buffer (copies for itself included). `copies_in_MSR`: copies that reach a rank. The transfers of one
    micro-batch hold all samples. `counts` is the exchange of row counts that software which reads them back does first.
    `gather_M`, `scatter_M`: copies between ranks with slices of the same experts, whose rows and copies are then those
    of all of them. `peers`, `slice_peers`: the number of every rank's set (`moesim.program.collectives`), empty
    for one set.
    `spread_S`: the samples that are counterfactuals, whose ranks share the time of their kernels evenly.
    """

    slot_rows_MSRP: NDArray[Any]
    copies_out_MSR: NDArray[Any]
    copies_in_MSR: NDArray[Any]
    dispatch_M: tuple[Transfer, ...]
    combine_M: tuple[Transfer, ...]
    spread_S: tuple[bool, ...]
    counts: Transfer | None = None
    gather_M: tuple[Transfer, ...] = ()
    scatter_M: tuple[Transfer, ...] = ()
    peers: tuple[int, ...] = ()
    slice_peers: tuple[int, ...] = ()

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
    compiled: bool | None = None,
) -> LayerLoads:
    """The loads of some MoE layers (numbered among those) of rank group number `group`, samples stacked.

    `compiled`: whether compiled loops work the transfers out (see `moesim.network.ports.Ports`).
    """
    count = len(ranks_R) // scenario.parallelism.expert  # expert groups in it, which have consecutive numbers
    places = Mesh(scenario.parallelism, scenario.cluster).expert_groups()[:count]
    parts = [
        _expert_group(
            scenario,
            fabric,
            [_count(scenario, samples, group=group * count + index, stage=stage, layer=layer) for layer in layers],
            ranks_R[members],
            compiled=compiled,
        )
        for index, members in enumerate(places)
    ]
    loads = parts[0] if len(parts) == 1 else _side_by_side(parts, places)
    if scenario.parallelism.expert_tensor == 1:
        return loads
    return _shared_rows(scenario, fabric, loads, ranks_R, compiled=compiled)


def _side_by_side(parts: Sequence[LayerLoads], places: Sequence[IntArray]) -> LayerLoads:
    """The loads of several expert groups as those of one rank group."""

    def joined(name: str) -> NDArray[Any]:
        values = [getattr(part, name) for part in parts]
        shape = (*values[0].shape[:2], sum(map(len, places)), *values[0].shape[3:])
        whole = np.empty(shape, dtype=np.result_type(*values))
        for value, members in zip(values, places, strict=True):
            whole[:, :, members] = value
        return whole

    def together(transfers: Sequence[tuple[Transfer, ...]]) -> tuple[Transfer, ...]:
        return tuple(SideBySide(of_groups, places) for of_groups in zip(*transfers, strict=True))

    return LayerLoads(
        slot_rows_MSRP=joined("slot_rows_MSRP"),
        copies_out_MSR=joined("copies_out_MSR"),
        copies_in_MSR=joined("copies_in_MSR"),
        dispatch_M=together([part.dispatch_M for part in parts]),
        combine_M=together([part.combine_M for part in parts]),
        spread_S=parts[0].spread_S,
        peers=set_of_place(places, sum(map(len, places))),
    )


def _shared_rows(
    scenario: Scenario, fabric: Fabric, loads: LayerLoads, ranks_R: IntArray, *, compiled: bool | None
) -> LayerLoads:
    """The loads of ranks that each hold a slice of the experts of `expert_tensor` neighbours and see the rows of all.

    What arrived at one of them goes to the others, and the partial sums for it come back, as library calls with uneven
    shares: every copy once to every other slice.
    """
    slices = Peers(scenario.parallelism.expert_tensor)
    places = list(slices.places(len(ranks_R)))
    micro_batches, samples, ranks = loads.copies_in_MSR.shape
    copies_QR = loads.copies_in_MSR.reshape(-1, ranks)
    moved_M = loads.copies_in_MSR.sum(axis=2).mean(axis=1) * (slices.size - 1.0)
    gathers, scatters = [], []
    for members in places:
        others_EE = 1.0 - np.eye(slices.size)
        copies_QEE = copies_QR[:, members, None] * others_EE
        model = sharing_model(scenario.network, fabric, ranks_R[members])
        out, back = _both_ways(
            scenario, fabric, [copies_QEE], micro_batches,
            algorithm=DIRECT.name, ranks=ranks_R[members], model=model, compiled=compiled,
        )  # fmt: skip
        gathers.append(out)
        scatters.append(back)

    sizes = _token_bytes(scenario)

    def together(sets: Sequence[Sequence[Transfer]], size: float) -> tuple[Transfer, ...]:
        return tuple(
            SideBySide(parts, places, moved_bytes=float(moved * size))
            for parts, moved in zip(zip(*sets, strict=True), moved_M, strict=True)
        )

    def of_all(values_MSRx: NDArray[Any]) -> NDArray[Any]:
        split = values_MSRx.reshape(micro_batches, samples, -1, slices.size, *values_MSRx.shape[3:])
        return np.repeat(split.sum(axis=3), slices.size, axis=2)

    return replace(
        loads,
        slot_rows_MSRP=of_all(loads.slot_rows_MSRP),
        copies_in_MSR=of_all(loads.copies_in_MSR),
        gather_M=together(gathers, sizes[0]),
        scatter_M=together(scatters, sizes[1]),
        slice_peers=slices.set_of_place(ranks),
    )


def _expert_group(
    scenario: Scenario, fabric: Fabric, counted: Sequence["_Counted"], ranks_R: IntArray, *, compiled: bool | None
) -> LayerLoads:
    """The loads of one expert group, of several layers one behind the other."""
    dispatch_M: list[Transfer] = []
    combine_M: list[Transfer] = []
    at_once = max(1, int(BYTES_AT_ONCE / max(1, sum(stage.nbytes for stage in counted[0].stages_MSRR))))
    for first in range(0, len(counted) if scenario.parallelism.expert > 1 else 0, at_once):
        some = counted[first : first + at_once]
        stages_MSRR = [np.concatenate(stage) for stage in zip(*(layer.stages_MSRR for layer in some), strict=True)]
        own_MSR = np.concatenate([layer.own_MSR for layer in some])
        out, back = _transfers(scenario, fabric, stages_MSRR, own_MSR, ranks_R, compiled)
        dispatch_M += out
        combine_M += back
    slot_rows_MSRP = np.concatenate([layer.slot_rows_MSRP for layer in counted])
    return LayerLoads(
        slot_rows_MSRP=slot_rows_MSRP,
        copies_out_MSR=np.concatenate([layer.copies_out_MSR for layer in counted]),
        copies_in_MSR=np.concatenate([layer.copies_in_MSR for layer in counted]),
        dispatch_M=tuple(dispatch_M),
        combine_M=tuple(combine_M),
        spread_S=counted[0].spread_S,
        counts=_counts(scenario, fabric, slot_rows_MSRP[0], ranks_R),
    )


class _Counted(NamedTuple):
    """What one layer's traffic comes to: see LayerLoads, and copies from rank to rank per stage of the dispatch."""

    slot_rows_MSRP: NDArray[Any]
    copies_out_MSR: NDArray[Any]
    copies_in_MSR: NDArray[Any]
    own_MSR: NDArray[Any]
    stages_MSRR: list[NDArray[np.float64]]
    spread_S: tuple[bool, ...]


def _count(scenario: Scenario, samples: Sequence[RoutingSample], *, group: int, stage: int, layer: int) -> _Counted:
    placement, deduplicate, tokens = samples[0].placement, scenario.dispatch.deduplicate, scenario.tokens_per_rank
    arrays_S = [sample.arrays(group, layer, stage=stage) for sample in samples]
    held_S = [held_copies(arrays, placement, deduplicate, tokens=tokens) for arrays in arrays_S]
    held_MSRD = np.stack(held_S, axis=1)
    stages_S = [stage_copies(arrays, placement, deduplicate, tokens=tokens) for arrays in arrays_S]
    return _Counted(
        slot_rows_MSRP=np.stack([arrays.slot_rows_BDP(placement) for arrays in arrays_S], axis=1),
        copies_out_MSR=np.stack([copies_out(held_BRD, deduplicate) for held_BRD in held_S], axis=1),
        copies_in_MSR=held_MSRD.sum(axis=2),
        own_MSR=np.einsum("msrr->msr", held_MSRD).copy(),
        stages_MSRR=[np.stack(stage, axis=1) for stage in zip(*stages_S, strict=True)],
        spread_S=tuple(arrays.is_even for arrays in arrays_S),
    )


def _counts(scenario: Scenario, fabric: Fabric, slot_rows_SRP: NDArray[Any], ranks_R: IntArray) -> Transfer | None:
    """One int64 per (rank, slot of the target), sent by everyone to everyone before the rows."""
    if not scenario.implementation.switches.counts or len(ranks_R) == 1:
        return None
    samples, ranks, slots = slot_rows_SRP.shape
    each_SRR = np.broadcast_to(1.0 - np.eye(ranks), (samples, ranks, ranks))
    return prepare_dispatch(
        fabric, [each_SRR], token_bytes=8.0 * slots, algorithm=DIRECT.name, ranks=ranks_R, synchronised=True
    )


def _transfers(
    scenario: Scenario,
    fabric: Fabric,
    stages_MSRR: Sequence[NDArray[np.float64]],
    own_MSR: NDArray[Any],
    ranks_R: IntArray,
    compiled: bool | None,
) -> tuple[tuple[Transfer, ...], tuple[Transfer, ...]]:
    """Dispatch and combine of every layer and micro-batch, prepared together; all samples in lockstep."""
    dispatch, (micro_batches, _, ranks) = scenario.dispatch, own_MSR.shape
    # An implementation that reads counts back has exchanged them first: nobody sends before the last has come.
    return _both_ways(
        scenario,
        fabric,
        [stage_MSRR.reshape(-1, ranks, ranks) for stage_MSRR in stages_MSRR],
        micro_batches,
        algorithm=dispatch.algorithm,
        ranks=ranks_R,
        own_copies_R=own_MSR.reshape(-1, ranks),
        model=dispatch_sharing(scenario.network, fabric, ranks_R, dispatch.algorithm),
        sms=dispatch.sms(fewest_sms(scenario.cluster, scenario.parallelism, ranks_R.tolist())),
        synchronised=scenario.implementation.switches.counts,
        compiled=compiled,
    )


def _token_bytes(scenario: Scenario) -> tuple[float, float]:
    """Of a token on its way to the experts, and on its way back."""
    width, dispatch = scenario.model.row_width, scenario.dispatch
    return token_bytes(width, dispatch.dtype), token_bytes(width, dispatch.combine_dtype)


def _both_ways(
    scenario: Scenario, fabric: Fabric, copies: Sequence[NDArray[np.float64]], micro_batches: int, **how: Any
) -> tuple[tuple[Transfer, ...], tuple[Transfer, ...]]:
    """There and back, by micro-batch."""
    there, back = _token_bytes(scenario)
    out = prepare_dispatch(fabric, copies, token_bytes=there, **how).parts(micro_batches)
    return out, prepare_combine(fabric, copies, token_bytes=back, **how).parts(micro_batches)
