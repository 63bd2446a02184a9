"""Parameters of every pipeline rank: what it holds, reduces and updates, the collectives on them, and their shards.

ZeRO 2 and 3 (arXiv 1910.02054, 2304.11277) shard gradients and parameters part by part of the model. A part is a layer
or an end of the model. Stage 2 and 3: when the backward pass has left a part, its gradients are reduced and scattered,
in every micro-batch, and added to the rank's shard - a whole copy to accumulate them in is what the stages save.
Stage 3: a part's weights are gathered before its forward and again before its backward pass, the next part's while this
one computes, and dropped behind it. DeepSpeed and fully sharded data parallelism do both so; with pipelines they refuse
the stages or keep whole gradients instead, here every micro-batch of every stage pays.

Dense parameters are gathered among data * context ranks, experts among the ranks with the same ones. Collectives follow
each other on a stream of their own, so that a rank that is behind holds the others up. Unless the scenario says
overlap.gradient_reduction: false they run beside the layers, and both slow each other (`moesim.kernels.measured`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.network import (
    Fabric,
    all_gather_seconds,
    all_reduce_seconds,
    crowded,
    prepare_dispatch,
    reduce_scatter_seconds,
)
from moesim.network.nccl import ring_bytes
from moesim.parallel import Mesh
from moesim.parallel.expert_map import MapOfLayer, copy_gradient_bytes_DD, layers_of_stages
from moesim.parallel.memory.parameters import Unit, expert_slice_parameters, gemm_weights, stage_units
from moesim.program.collectives import GroupLinks, Members, PeerCollective, Peers, Reduction
from moesim.program.operations import Operation, collective, wait
from moesim.program.sizes import Passes
from moesim.results.spans import CATEGORY_OF_PART, Collective, Label, Part, Phase, Stream
from moesim.scenario import Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.schedules import Schedule

GRADIENTS, PARAMETERS = 2, 3  # from which ZeRO stage on they are sharded


@dataclass(frozen=True)
class ShardedPart:
    """One part of a stage: its operations, what a rank holds of it, and its layer (-1 for an end of the model)."""

    passes: Passes
    unit: Unit
    layer: int


class ShardedStage:
    """The collectives of one stage's parts among the ranks of its rank group."""

    def __init__(self, scenario: Scenario, links: GroupLinks) -> None:
        mesh, zero = Mesh(scenario.parallelism, scenario.cluster), scenario.parallelism.zero
        ranks = len(links.ranks_R)
        dense = Peers(ranks // mesh.parallelism.tensor, mesh.parallelism.tensor)
        experts = Peers(ranks // mesh.expert_block, mesh.expert_block)
        self.links = links
        self.precision = scenario.workload.precision
        self.reduce_dtype = scenario.implementation.switches.reduce_dtype or self.precision.gradients
        self.beside = scenario.overlap.gradient_reduction is not False
        self.kinds = [
            (name, peers, stage)
            for name, peers, stage in (("dense", dense, zero.dense), ("expert", experts, zero.expert))
            if stage >= GRADIENTS and peers.size > 1
        ]

    def _collective(self, prepared: PeerCollective, name: str, layer: int, label: Label) -> Operation:
        members = prepared.peers.set_of_place(len(self.links.ranks_R))
        return collective(label._replace(name=f"{label.collective}.{name}", layer=layer, peers=members), prepared)

    def gather(self, part: ShardedPart, phase: Phase) -> list[Operation]:
        """The whole weights of a part, where they are sharded."""
        size = BYTES_PER_ELEMENT[self.precision.weights]
        return [
            self._collective(
                self.links.gather(peers, getattr(part.unit, name) * size),
                name,
                part.layer,
                _label(Part.PARAMETERS, phase, Collective.ALL_GATHER),
            )
            for name, peers, stage in self.kinds
            if stage >= PARAMETERS and getattr(part.unit, name)
        ]

    def scatter(self, part: ShardedPart) -> list[Operation]:
        """The sums of a part's gradients to their shards; where weight gradients are put off, behind those."""
        size = BYTES_PER_ELEMENT[self.reduce_dtype]
        return [
            self._collective(
                self.links.scatter(peers, getattr(part.unit, name) * size),
                name,
                part.layer,
                _label(Part.GRADIENTS, Phase.WEIGHT_GRADIENT, Collective.REDUCE_SCATTER),
            )
            for name, peers, _ in self.kinds
            if getattr(part.unit, name)
        ]

    def passes(self, parts: Sequence[ShardedPart]) -> Passes:
        """All parts with their collectives: forward in order, backward in the opposite order."""
        forward = self._in_order(parts, [part.passes[0] for part in parts], [[] for _ in parts], Phase.FORWARD)
        parts, kernels = parts[::-1], [part.passes[1] for part in parts[::-1]]
        backward = self._in_order(parts, kernels, [self.scatter(part) for part in parts], Phase.INPUT_GRADIENT)
        return forward, backward

    def _in_order(
        self,
        parts: Sequence[ShardedPart],
        kernels: Sequence[list[Operation]],
        scatters: Sequence[list[Operation]],
        phase: Phase,
    ) -> list[Operation]:
        gathers = [self.gather(part, phase) for part in parts]
        out: list[Operation] = []
        if not self.beside:
            for part, gathered, kernels_of_part, scattered in zip(parts, gathers, kernels, scatters, strict=True):
                out += [*gathered, *_waits(part, gathered), *kernels_of_part]
                out += [*scattered, *_waits(part, scattered, phase=Phase.WEIGHT_GRADIENT)]
            return out
        # Ahead of a part lie its predecessor's scatter and its successor's gather, which run beside it.
        for index, part in enumerate(parts):
            if index == 0:
                out += gathers[0]
            out += _waits(part, gathers[index])
            out += scatters[index - 1] if index else []
            out += gathers[index + 1] if index + 1 < len(parts) else []
            out += kernels[index]
        return [*out, *scatters[-1]] if scatters else out


def gathered_ahead(
    parts: Sequence[ShardedPart], gathers: Mapping[str, Callable[[float], PeerCollective]]
) -> list[Operation]:
    """A stage's first forward pass under ZeRO 1: each part's updated weights are gathered while the one ahead runs."""
    label = _label(Part.PARAMETERS, Phase.FORWARD, Collective.ALL_GATHER)
    made = [
        [
            collective(label._replace(name=f"{label.collective}.{name}", layer=part.layer), gather(held))
            for name, gather in gathers.items()
            if (held := getattr(part.unit, name))
        ]
        for part in parts
    ]
    out = list(made[0]) if made else []
    for index, part in enumerate(parts):
        out += _waits(part, made[index])
        out += made[index + 1] if index + 1 < len(parts) else []
        out += part.passes[0]
    return out


def _label(works: Part, phase: Phase, kind: Collective) -> Label:
    return Label("", CATEGORY_OF_PART[works], Stream.REDUCTION, -1, phase=phase, part=works, collective=kind)


def _waits(part: ShardedPart, collectives: Sequence[Operation], *, phase: Phase = Phase.NONE) -> list[Operation]:
    return [wait(layer=part.layer, phase=phase)] if collectives else []


Ranks = NDArray[np.int64]
EarlyGather = Callable[[float], PeerCollective]


@dataclass(frozen=True, kw_only=True)
class RankParameters:
    """Parameters of one rank, in elements.

    `reduced`: those whose gradients other ranks hold too; `updated`: those whose optimizer states it keeps; `gemms`:
    those that are cast where GEMMs are of few bits.
    """

    held: float
    reduced: float
    updated: float
    gemms: float


class ParameterGroups:
    """The parameters of every stage and the ranks that hold copies of them.

    Under a bidirectional schedule a stage sits on two pipeline ranks, which reduce its gradients together.
    """

    def __init__(self, scenario: Scenario, mesh: Mesh, schedule: Schedule, *, map_of: MapOfLayer | None = None) -> None:
        """`map_of`: what the slots of a layer with a router hold, where experts may have copies."""
        self.scenario, self.mesh, self.schedule, self.map_of = scenario, mesh, schedule, map_of

    def _holders(self, stage: int) -> list[int]:
        return [rank for rank, stages in enumerate(self.schedule.stages_of_rank) if stage in stages]

    def _dense_members(self, stage: int) -> Members:
        return _joined([self.mesh.dense_gradient_groups(rank) for rank in self._holders(stage)])

    def _expert_members(self, stage: int) -> Members:
        return _joined([self.mesh.expert_gradient_groups(rank) for rank in self._holders(stage)])

    def _local(self, stage: int) -> Unit:
        """What one rank holds of a stage: dense parameters, and its share of the routed experts.

        Beside what its earlier stages have already: two ends of the model on one rank share their table.
        """
        stages = self.schedule.stages_of_rank[self._holders(stage)[0]]
        units = stage_units(self.scenario, stage, held=[other for other in stages if other < stage])
        return Unit(*(sum(values) for values in zip(*units, strict=True))) if units else Unit(0.0, 0.0, 0.0)

    def of_rank(self, pipeline_rank: int) -> RankParameters:
        """Parameters of every rank at one place of the pipeline."""
        zero = self.scenario.parallelism.zero
        held = reduced = updated = gemms = 0.0
        for stage in self.schedule.stages_of_rank[pipeline_rank]:
            local = self._local(stage)
            gemms += sum(gemm_weights(self.scenario, stage))
            kinds = (
                (local.dense, zero.dense, len(self._dense_members(stage)[0])),
                (local.expert, zero.expert, len(self._expert_members(stage)[0])),
            )
            for count, sharding, copies in kinds:
                held += count
                reduced += count if copies > 1 else 0
                updated += count / copies if sharding else count
        return RankParameters(held=held, reduced=reduced, updated=updated, gemms=gemms)

    def reductions(self, fabric: Fabric) -> list[Reduction]:
        """Sums of gradients at the end of the step, stage by stage, and of the gradients' norm when it is clipped."""
        precision = self.scenario.workload.precision
        size = BYTES_PER_ELEMENT[self.scenario.implementation.switches.reduce_dtype or precision.gradients]
        beside = self.scenario.reduces_beside
        collectives = []
        for name, stage, count, sharding, members in self._kinds():
            if sharding >= GRADIENTS:
                continue  # reduced in every backward pass
            buckets = max(1, len(self.scenario.stage_layers[stage])) if beside else 0
            reduce = reduce_scatter_seconds if sharding else all_reduce_seconds
            kind = Collective.REDUCE_SCATTER if sharding else Collective.ALL_REDUCE
            call = reduce(crowded(fabric, members), members[0], count * size)
            sent = (1 if sharding else 2) * count * size * (1 - 1 / len(members[0]))
            reduction = Reduction(f"{kind}.{name}", members, call.seconds, "network", buckets, stage, kind)
            collectives.append(replace(reduction, sent_bytes=sent, rests_on=call.source, evidence=call.evidence))
        collectives += self._repeated(fabric, size)
        collectives += self._copies(fabric, size)
        world = np.arange(self.mesh.world_size)
        if self.scenario.workload.gradient_clipping is not None and len(world) > 1:
            call = all_reduce_seconds(fabric, world, BYTES_PER_ELEMENT["fp32"])
            norm = Reduction("all_reduce.norm", (world,), call.seconds, "network")
            collectives.append(replace(norm, rests_on=call.source, evidence=call.evidence))
        return collectives

    def _repeated(self, fabric: Fabric, size: float) -> list[Reduction]:
        """Sums over ranks that hold the same parameters but are no data-parallel ranks.

        Tensor ranks hold norms, routers and down-projections whole and make their gradients from tokens of their own;
        the last stage has a copy of the embedding where the head is tied to it or prediction layers read it.
        """
        model, mesh = self.scenario.model, self.mesh
        found: list[tuple[str, Members, float]] = []
        if self.scenario.parallelism.tensor > 1:
            for rank in range(self.schedule.num_ranks):
                whole = sum(self._local(stage).duplicated for stage in self.schedule.stages_of_rank[rank])
                found.append(("all_reduce.duplicated", tuple(mesh.tensor_groups(rank)), whole))
        first, last = self._holders(0)[0], self._holders(len(self.scenario.stage_layers) - 1)[0]
        if (model.tied_embeddings or model.mtp_layers) and first != last:
            pairs = zip(mesh.rank_groups(first), mesh.rank_groups(last), strict=True)
            members = tuple(np.array(pair) for group in pairs for pair in zip(*group, strict=True))
            found.append(("all_reduce.embedding", members, stage_units(self.scenario, 0)[0].dense))
        return [
            Reduction(name, members, call.seconds, "network", rests_on=call.source, evidence=call.evidence)
            for name, members, count in found
            if count
            for call in (all_reduce_seconds(crowded(fabric, members), members[0], count * size),)
        ]

    def _copies(self, fabric: Fabric, size: float) -> list[Reduction]:
        """Sums over ranks of an expert group that hold copies of the same experts, of each pipeline rank.

        Behind those over data-parallel ranks; of shards, where these keep shards.
        """
        found = []
        for rank, stages in enumerate(self.schedule.stages_of_rank if self.map_of else ()):
            assert self.map_of is not None
            members = tuple(self.mesh.expert_groups(rank))
            shards = len(self._expert_members(stages[0])[0]) if self.scenario.parallelism.zero.expert else 1
            expert_bytes = expert_slice_parameters(self.scenario) * size / shards
            bytes_DD = copy_gradient_bytes_DD(
                [self.map_of(layer) for layer in layers_of_stages(self.scenario, stages)],
                expert_bytes=expert_bytes,
                num_ranks=len(members[0]),
            )
            if bytes_DD.any():
                half = prepare_dispatch(
                    crowded(fabric, members), [bytes_DD / expert_bytes], token_bytes=expert_bytes, ranks=members[0]
                )
                reduction = Reduction("all_reduce.copies", members, 2 * float(half.alone_R.max()), "network")
                found.append(replace(reduction, rests_on=half.source, evidence=half.evidence))
        return found

    def early_gathers(self, fabric: Fabric, stage: int, *, ranks: int, samples: int) -> dict[str, EarlyGather]:
        """By kind of parameters: a gather of so many of a stage's updated weights, on `ranks` ranks of a rank group.

        All ranks begin a step together, so that none waits for another's share.
        """
        size = BYTES_PER_ELEMENT[self.scenario.workload.precision.weights]

        def gather_of(members: Members) -> EarlyGather:
            links, of = crowded(fabric, members), members[0]

            def gather(parameters: float) -> PeerCollective:
                call = all_gather_seconds(links, of, parameters * size)
                sent = ring_bytes("all_gather", parameters * size, ranks=len(of))
                seconds_R = np.full(ranks, call.seconds)
                return PeerCollective(
                    Peers(1), seconds_R, sent_bytes=sent, samples=samples, source=call.source, evidence=call.evidence
                )

            return gather

        return {
            name: gather_of(members)
            for name, of_stage, _, sharding, members in self._kinds()
            if of_stage == stage and sharding
        }

    def gathers(self, fabric: Fabric) -> list[Reduction]:
        """Gathers of updated weights where optimizer states are sharded and weights are not, behind the optimizer."""
        if self.scenario.gathers_beside:
            return []
        size = BYTES_PER_ELEMENT[self.scenario.workload.precision.weights]
        return [
            Reduction(
                f"all_gather.{name}",
                members,
                call.seconds,
                "network",
                collective=Collective.ALL_GATHER,
                part=Part.PARAMETERS,
                rests_on=call.source,
                evidence=call.evidence,
            )
            for name, _, count, sharding, members in self._kinds()
            if 0 < sharding < PARAMETERS
            for call in (all_gather_seconds(crowded(fabric, members), members[0], count * size),)
        ]

    def _kinds(self) -> list[tuple[str, int, float, int, Members]]:
        """(name, stage, parameters of one rank, ZeRO stage, members) of everything that more than one rank holds."""
        zero = self.scenario.parallelism.zero
        kinds = []
        for stage in range(self.schedule.num_stages):
            local = self._local(stage)
            kinds.append(("dense", stage, local.dense, zero.dense, self._dense_members(stage)))
            kinds.append(("expert", stage, local.expert, zero.expert, self._expert_members(stage)))
        return [kind for kind in kinds if kind[2] and len(kind[4][0]) > 1]


def _joined(groups_of_holder: Sequence[Sequence[Ranks]]) -> Members:
    """The groups of one place of the pipeline, each with those of equal index at the other places."""
    return tuple(np.concatenate(together) for together in zip(*groups_of_holder, strict=True))
