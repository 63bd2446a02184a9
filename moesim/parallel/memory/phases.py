"""Which parts of a rank's memory exist at the same moment.

A plain torch trainer drops its gradients after each optimizer step, so that the first micro-batch of the next one runs
without them and its backward pass makes them while it gives up activations:

    loss         kept activations, and the loss in fp32 on the way back: its gradient and that of the logits
    last layer   the head's gradients, kept activations without the logits, and what the last layer's backward needs,
                 moment by moment (`temporaries`), with the gradients of its own large weights as they are made
    first layer  gradients of all but the embedding, what the first layer keeps, and what its backward needs, without
                 the gradients of its large weights that are still to be made
    later        all gradients, and the activations of a later micro-batch with the loss or a layer's temporaries
    reduction    all gradients, and one flat copy of each group that is reduced, all of which are alive at the end
    optimizer    all gradients, and what the optimizer makes of all its states at once

Between the last layer and the first both terms are linear in the layer, so that the larger end bounds the rest.
A software whose gradients have buffers that stay has them at every moment:

    loss         kept activations, and a copy of the logits in their format, or of their gradient
    last layer   kept activations without the logits, and what its backward pass needs, moment by moment
    optimizer    nothing of these, and what the optimizer makes of all its states at once

Legend: S routing samples, W ranks of one pipeline stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Phase:
    """One moment of the step: bytes by part beside what is always held, each a number or [S, W].

    live: which activations its parts do not name, of the walk up to the first backward pass, of that after it, or of
    one layer. gradients: whether all of them exist.
    """

    name: str
    live: str = ""
    live_SW: Array | float = 0.0
    gradients: bool = False
    parts: Mapping[str, Array | float] = field(default_factory=dict)

    @property
    def moving_SW(self) -> Array | float:
        """Bytes of all that moves."""
        total: Array | float = self.live_SW
        for size in self.parts.values():
            total = total + size
        return total


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerMoment:
    """One moment of the backward pass of a layer of one kind, in bytes.

    parts: what it needs beside what the layer has kept. ended: what the layer no longer keeps then, by part. made,
    whole: gradients of its large weights that exist by then, and when it is done, in the states of `kind`.
    """

    name: str
    parts: Mapping[str, Array | float]
    ended: Mapping[str, Array | float] = field(default_factory=dict)
    made: float = 0.0
    whole: float = 0.0
    kind: str = "experts"

    @property
    def ends(self) -> dict[str, Array]:
        """What has ended, as parts of a phase."""
        return {f"ended.{part}": -np.asarray(size) for part, size in self.ended.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Sizes:
    """What the phases are made of, in bytes, each a number or [S, W].

    first_SW, later_SW: the most that is kept up to the first backward pass, and after it (0 where none follows).
    layer_SW: what one layer keeps. moments: of the backward pass of a layer. loss: what the loss adds to its kept
    logits, which are `logits`. head_gradient, embedding_gradient: those of the two tables. flat: copies for
    reductions. states: what the optimizer makes.
    """

    first_SW: Array
    later_SW: Array
    layer_SW: Array
    moments: Sequence[LayerMoment]
    loss: float
    logits: float
    head_gradient: float
    embedding_gradient: float
    flat: float
    states: float


def held_phases(sizes: Sizes) -> list[Phase]:
    """The moments at which memory can be at its peak where gradients have buffers that stay."""
    live: dict[str, Any] = {"live": "all", "live_SW": sizes.first_SW, "gradients": True}
    behind = {"logits": -sizes.logits}
    return [
        Phase(name="loss", parts={"loss": sizes.loss}, **live),
        *(
            Phase(name=f"last {each.name}", parts={**each.parts, **behind, **each.ends}, **live)
            for each in sizes.moments
        ),
        Phase(name="optimizer", parts={"temporaries": sizes.states}, gradients=True),
    ]


def eager_phases(sizes: Sizes) -> list[Phase]:
    """The moments at which memory can be at its peak where gradients are made anew, in the order of the step."""
    small: dict[str, Array | float] = {"gradients.head": sizes.head_gradient, "logits": -sizes.logits}
    behind: dict[str, Array | float] = {"gradients.embedding": -sizes.embedding_gradient}
    first: dict[str, Any] = {"live": "first", "live_SW": sizes.first_SW}
    later: dict[str, Any] = {"live": "later", "live_SW": sizes.later_SW, "gradients": True}
    layer: dict[str, Any] = {"live": "layer", "live_SW": sizes.layer_SW, "gradients": True}
    phases = [Phase(name="loss", parts={"loss": sizes.loss}, **first)]
    for each in sizes.moments:
        made, missing = ({f"made.{each.kind}": size} for size in (each.made, each.made - each.whole))
        phases += [
            Phase(name=f"last {each.name}", parts={**each.parts, **small, **made, **each.ends}, **first),
            Phase(name=f"first {each.name}", parts={**each.parts, **behind, **missing, **each.ends}, **layer),
        ]
    phases += [
        Phase(name="reduction", gradients=True, parts={"reduction": sizes.flat}),
        Phase(name="optimizer", gradients=True, parts={"temporaries": sizes.states}),
    ]
    if sizes.later_SW.any():
        logits = {"logits": -sizes.logits}
        phases.append(Phase(name="later loss", parts={"loss": sizes.loss}, **later))
        phases += [
            Phase(name=f"later {each.name}", parts={**each.parts, **logits, **each.ends}, **later)
            for each in sizes.moments
        ]
    return phases
