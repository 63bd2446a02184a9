"""Passes of one rank group run by the executor of the simulation: whole, or cut into layers and ends of the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moesim.engine.executor import GroupExecutor
from moesim.engine.executor_steps import Labels
from moesim.program import StepProgram
from moesim.program.operations import Block, Operation, Run
from moesim.results.spans import Part, SpanRecorder
from moesim.scenario import Model, Scenario

TURNS = 2  # micro-batches that pass one behind the other
SETTLED = 4  # likewise where collectives of one reach into the next


class PassSeconds(NamedTuple):
    """Seconds of one micro-batch through a part: forward, backward, backward without and only with weights' gradients.

    `pair` is a forward pass overlapped with a backward pass. What the schedule does not have is 0.
    """

    forward: float
    backward: float
    gradient_of_input: float
    gradient_of_weights: float
    pair: float

    def __add__(self, other: "PassSeconds") -> "PassSeconds":  # type: ignore[override]
        return PassSeconds(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: float) -> "PassSeconds":
        """`count` such parts one behind the other."""
        return PassSeconds(*(count * seconds for seconds in self))


NOTHING = PassSeconds(0.0, 0.0, 0.0, 0.0, 0.0)


class PartSeconds(NamedTuple):
    """The parts of one rank group: a dense layer, a layer with experts, and the two ends of the model."""

    dense_layer: PassSeconds
    moe_layer: PassSeconds
    embedding: PassSeconds
    head: PassSeconds


def _is_embedding(operation: Operation) -> bool:
    return operation.part is Part.EMBEDDING


@dataclass(frozen=True, kw_only=True, eq=False)
class Passes:
    """The passes of programs with one rank group, by the names of their blocks; `pairs`: also those of two at once."""

    program: StepProgram
    blocks: Mapping[str, Block]
    pairs: bool

    @classmethod
    def of(cls, programs: Sequence[StepProgram], *, pairs: bool) -> "Passes":
        """Those of programs of the same step under different schedules."""
        tasks = [task for program in programs for task in program.groups[0].tasks]
        blocks = {run.block.name: run.block for task in tasks for run in task.runs}
        return cls(program=programs[0], blocks=blocks, pairs=pairs)

    def cut(self, chosen: Callable[[Operation], bool]) -> PassSeconds:
        """Seconds per micro-batch of every pass over the chosen operations, from the first start to the last end."""

        def block(name: str) -> Block:
            operations = self.blocks[name].operations if name in self.blocks else ()
            return Block(name, tuple(operation for operation in operations if chosen(operation)))

        forward, backward = block("forward"), block("backward")
        return PassSeconds(
            forward=self.seconds([[forward]] * TURNS) / TURNS,
            backward=self.seconds([[backward]] * TURNS) / TURNS,
            gradient_of_input=self.seconds([[block("backward.input")]] * TURNS) / TURNS,
            gradient_of_weights=self.seconds([[block("backward.weight")]] * TURNS) / TURNS,
            pair=self.seconds([[forward, backward]] * TURNS) / TURNS if self.pairs else 0.0,
        )

    def whole(self) -> tuple[float, float]:
        """Seconds of a forward pass, and of a forward and a backward pass, one micro-batch behind the other."""
        forward, backward = self.blocks["forward"], self.blocks["backward"]
        passes = [[forward], [backward]]
        settled = self.seconds(passes * SETTLED) - self.seconds(passes * TURNS)
        return self.seconds([[forward]] * TURNS) / TURNS, settled / (SETTLED - TURNS)

    def seconds(self, actions: Sequence[Sequence[Block]]) -> float:
        """Until the last rank has done all actions, one micro-batch of each kind of block behind the other."""
        if not any(block.operations for blocks in actions for block in blocks):
            return 0.0
        program, ranks = self.program, len(self.program.groups[0].ranks_R)
        executor = GroupExecutor(
            samples=1,
            ranks=ranks,
            host=program.host,
            beside_R=program.groups[0].beside_R,
            recorder=SpanRecorder(
                rows=2 * sum(len(block.operations) for blocks in actions for block in blocks), samples=1, ranks=ranks
            ),
            labels=Labels(),
        )
        for number, blocks in enumerate(actions):
            executor.execute([Run(block, number, block.name != "forward") for block in blocks])
        return float(max(np.max(executor.done_SR), np.max(executor.reduced_SR)))


def part_seconds(passes: Passes, model: Model) -> PartSeconds:
    """The parts of a short `model`, operation by operation as their labels say where they belong."""
    dense, moe = range(model.dense_layers), range(model.dense_layers, model.layers)
    return PartSeconds(
        dense_layer=passes.cut(lambda op: op.label.layer in dense).times(1 / max(1, len(dense))),
        moe_layer=passes.cut(lambda op: op.label.layer in moe).times(1 / max(1, len(moe))),
        embedding=passes.cut(_is_embedding),
        head=passes.cut(lambda op: not _is_embedding(op) and op.label.layer not in dense and op.label.layer not in moe),
    )


def with_sharding(cut: PartSeconds, scenario: Scenario, *, few: Passes, more: Passes, layers: int) -> PartSeconds:
    """The parts where ZeRO gathers and reduces layer by layer: collectives reach across layers and micro-batches.

    What a layer takes is the difference between passes over `layers` more of them (`more`, `few`), and the head is what
    is then left; the parts of backward passes and pairs keep the proportions of the parts cut apart (`cut`).
    """
    (few_forward, few_both), (forward, both) = few.whole(), more.whole()
    layer_forward, layer_both = (forward - few_forward) / layers, (both - few_both) / layers
    name = "moe_layer" if scenario.model.experts else "dense_layer"
    repeated = _stretched(getattr(cut, name), layer_forward, layer_both - layer_forward)
    found = cut._replace(**{name: repeated})
    num_layers = scenario.model.layers
    dense = scenario.model.dense_layers
    others = found.embedding + found.dense_layer.times(dense) + found.moe_layer.times(num_layers - dense)
    rest_forward = max(0.0, forward - others.forward)
    rest_backward = max(0.0, both - forward - others.backward)
    return found._replace(head=_stretched(cut.head, rest_forward, rest_backward))


def _stretched(part: PassSeconds, forward: float, backward: float) -> PassSeconds:
    """The part with other seconds of its two passes; their parts in proportion."""
    factor = backward / part.backward if part.backward else 0.0
    saved = part.forward + part.backward - part.pair
    return PassSeconds(
        forward=forward,
        backward=backward,
        gradient_of_input=factor * part.gradient_of_input,
        gradient_of_weights=factor * part.gradient_of_weights,
        pair=forward + backward - saved,
    )
