"""ZeRO 2 and 3 (arXiv 1910.02054, 2304.11277): gradients and parameters in shards, part by part of the model.

A part is a layer or an end of the model. Stage 2 and 3: when the backward pass has left a part, its gradients are
reduced and scattered, in every micro-batch, and added to the rank's shard - a whole copy to accumulate them in is what
the stages save. Stage 3: a part's weights are gathered before its forward and again before its backward pass, the next
part's while this one computes, and dropped behind it. DeepSpeed and fully sharded data parallelism do both so;
with pipelines they refuse the stages or keep whole gradients instead, here every micro-batch of every stage pays.

Dense parameters are gathered among data * context ranks, experts among the ranks with the same ones. Collectives follow
each other on a stream of their own, so that a rank that is behind holds the others up. Unless the scenario says
overlap.gradient_reduction: false they run beside the layers, and both slow each other (`moesim.kernels.measured`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moesim.parallel import Mesh
from moesim.parallel.memory_parameters import Unit
from moesim.program.group_collectives import GroupLinks, PeerCollective, Peers
from moesim.program.operations import Operation, collective, wait
from moesim.program.sizes import Passes
from moesim.results.spans import CATEGORY_OF_PART, Collective, Label, Part, Phase, Stream
from moesim.scenario import Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT

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
