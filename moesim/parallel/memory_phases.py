"""Which parts of a rank's memory exist at the same moment, where gradients are made anew in every step.

A plain torch trainer drops its gradients after each optimizer step, so that the first micro-batch of the next one runs
without them and its backward pass makes them while it gives up activations:

    loss         kept activations, and the loss in fp32 on the way back: its gradient and that of the logits
    last layer   the head's gradients, kept activations without the logits, and what the last layer's backward needs
    first layer  gradients of all but the embedding, what the first layer keeps, and what its backward needs
    later        all gradients, and the activations of a later micro-batch with the loss or a layer's temporaries
    reduction    all gradients, and one flat copy of each group that is reduced, all of which are alive at the end
    optimizer    all gradients

A software whose gradients have buffers that stay has them at every moment:

    loss             kept activations, and a copy of the logits in their format, or of their gradient
    last networks    kept activations without the logits, and what the experts' backward pass needs
    last attention   without what the layer has kept behind its attention, and what attention needs
    optimizer        nothing of these, and what the optimizer makes of all its states at once

Between the last layer and the first both terms are linear in the layer, so that the larger end bounds the rest.
Legend: S routing samples, W ranks of one pipeline stage.
"""

from collections.abc import Mapping
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
class Sizes:
    """What the phases are made of, in bytes, each a number or [S, W].

    first_SW, later_SW: the most that is kept up to the first backward pass, and after it (0 where none follows).
    layer_SW: what one layer keeps. temporaries: by part, what the backward pass of a layer needs. loss: what the loss
    adds to its kept logits, which are `logits`. head_gradient, embedding_gradient: those of the two tables. flat:
    copies for reductions.
    """

    first_SW: Array
    later_SW: Array
    layer_SW: Array
    temporaries: Mapping[str, Array | float]
    loss: float
    logits: float
    head_gradient: float
    embedding_gradient: float
    flat: float


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldSizes:
    """What the phases of a software with buffers of gradients are made of, in bytes, each a number or [S, W].

    live_SW: the most that is kept. ended: what one layer keeps behind its attention, by part. moe, attention:
    temporaries of a layer's backward pass by part. loss, logits: as in `Sizes`. states: what the optimizer makes.
    """

    live_SW: Array
    ended: Mapping[str, Array | float]
    moe: Mapping[str, Array | float]
    attention: Mapping[str, Array | float]
    loss: float
    logits: float
    states: float


def held_phases(sizes: HeldSizes) -> list[Phase]:
    """The moments at which memory can be at its peak where gradients have buffers that stay."""
    live: dict[str, Any] = {"live": "all", "live_SW": sizes.live_SW, "gradients": True}
    behind = {"logits": -sizes.logits}
    ended = {f"ended.{part}": -np.asarray(size) for part, size in sizes.ended.items()}
    return [
        Phase(name="loss", parts={"loss": sizes.loss}, **live),
        Phase(name="last networks", parts={**sizes.moe, **behind}, **live),
        Phase(name="last attention", parts={**sizes.attention, **behind, **ended}, **live),
        Phase(name="optimizer", parts={"temporaries": sizes.states}, gradients=True),
    ]


def eager_phases(sizes: Sizes) -> list[Phase]:
    """The moments at which memory can be at its peak, in the order of the step."""
    small: dict[str, Array | float] = {"gradients.head": sizes.head_gradient, "logits": -sizes.logits}
    behind: dict[str, Array | float] = {"gradients.embedding": -sizes.embedding_gradient}
    phases = [
        Phase(name="loss", live="first", live_SW=sizes.first_SW, parts={"loss": sizes.loss}),
        Phase(name="last layer", live="first", live_SW=sizes.first_SW, parts={**sizes.temporaries, **small}),
        Phase(
            name="first layer",
            live="layer",
            live_SW=sizes.layer_SW,
            gradients=True,
            parts={**sizes.temporaries, **behind},
        ),
        Phase(name="reduction", gradients=True, parts={"reduction": sizes.flat}),
        Phase(name="optimizer", gradients=True),
    ]
    if sizes.later_SW.any():
        later = {"live": "later", "live_SW": sizes.later_SW, "gradients": True}
        phases += [
            Phase(name="later loss", parts={"loss": sizes.loss}, **later),  # type: ignore[arg-type]
            Phase(name="later layer", parts={**sizes.temporaries, "logits": -sizes.logits}, **later),  # type: ignore[arg-type]
        ]
    return phases
