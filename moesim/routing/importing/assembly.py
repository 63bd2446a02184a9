"""Layers, steps and counts of a recording put together, or refused where they do not fit each other.

Legend: L layers, T tokens, K selections, E experts.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.routing.importing.source import Array, Selections, Source, refuse

Layer = tuple[Array, Array | None]  # ids [T, K], and gates where the source has them
NUMBER = re.compile(r"\d+")


def of_counts(parts: list[NDArray[np.float64]], where: str, *, notes: tuple[str, ...] = ()) -> Source:
    """Counts [L, E] added up. Layers that counted nothing, the dense ones of a server's list, are left out."""
    if len({part.shape for part in parts}) > 1:
        raise UserError(f"{where}: counts of different numbers of layers or experts; import them apart")
    counts_LE = np.sum(parts, axis=0)
    routed = [layer for layer, counts_E in enumerate(counts_LE) if counts_E.any()]
    if not routed:
        raise UserError(f"{where}: all counts are zero; record while the model works")
    return Source(
        layers=tuple(routed),
        counts_LE=counts_LE[routed],
        num_experts=counts_LE.shape[1],
        notes=(*notes, *note_of_silent(routed, len(counts_LE))),
    )


def note_of_silent(routed: Iterable[int], num_layers: int) -> tuple[str, ...]:
    """The note about layers of which nothing was recorded; none where there are no such."""
    silent = sorted(set(range(num_layers)) - set(routed))
    return (f"nothing is routed in layers {listed(silent)} (dense?): left out",) if silent else ()


def of_steps(found: Mapping[int, Mapping[int, Layer]], where: str, *, notes: tuple[str, ...] = ()) -> Source:
    """Steps of layers of (ids, weights); every step must have the same layers, and these the same tokens."""
    layers = tuple(sorted(next(iter(found.values()))))
    steps = []
    for step, of_layer in sorted(found.items()):
        shapes = {ids.shape for ids, _ in of_layer.values()}
        if tuple(sorted(of_layer)) != layers or len(shapes) > 1:
            raise UserError(
                f"{where}: step {step} has layers {listed(of_layer)} of {len(shapes)} sizes, where all steps must "
                f"have layers {listed(layers)} of equal size; a recording may be incomplete"
            )
        weights = [w for layer in layers if (w := of_layer[layer][1]) is not None]
        steps.append(
            Selections(
                step=step,
                expert_ids_LTK=np.stack([of_layer[layer][0] for layer in layers]),
                weights_LTK=np.stack(weights).astype(np.float32) if len(weights) == len(layers) else None,
            )
        )
    return Source(layers=layers, steps=tuple(steps), notes=notes)


def listed(layers: Iterable[int]) -> str:
    """Numbers of layers in order, between commas."""
    return ", ".join(map(str, sorted(layers)))


def number_in(path: Path) -> int:
    """The last number in a file's name."""
    found = NUMBER.findall(path.stem)
    if not found:
        refuse(path, "has no number in its name", "keep the names that the recording gave")
    return int(found[-1])


def whole(value: object, where: str) -> int:
    """A whole number of a record. Raises UserError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"{where}: {value!r} is no whole number; the recording is damaged")
    return value


def note_of_unread(folder: Path, read: Iterable[Path], *, why: str) -> tuple[str, ...]:
    """The note about files that lie beside those that were read; none for a single file or where all were read."""
    if folder.is_file():
        return ()
    rest = sorted({file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")} - set(read))
    if not rest:
        return ()
    names = ", ".join(file.name for file in rest[:3]) + (" and others" if len(rest) > 3 else "")
    return (f"{names}: not read, {why}",)
