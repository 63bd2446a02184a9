"""Which layers a pipeline stage holds: as the scenario lists them, or so that ranks take equally long.

Every layer goes to the rank that would be done first with it, the earliest of equal ones, and there to the shortest of
its stages; the later ones may be half a layer longer, since the earlier ones hold more activations. Embedding, head and
prediction layers count, where they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from moesim.scenario.part_seconds import part_seconds
from moesim.scenario.pools import DIGITS, speeds_of_stages

if TYPE_CHECKING:
    from moesim.scenario.schema import Parallelism, Scenario

Lengths = tuple[int, ...]

LATER = 0.5  # layers by which the last stage of the model may be longer than the first, where one rank holds both
ALIKE = 0.05  # layers: ranks that differ by less are alike, so that an embedding moves no layer


def stages_of_ranks(mesh: "Parallelism") -> tuple[tuple[int, ...], ...]:
    """The stages of every pipeline rank; where the schedule goes both ways, two ranks hold each."""
    return mesh.schedule.facts.stages(mesh.pipeline, mesh.schedule.virtual)


def stage_lengths(scenario: "Scenario") -> Lengths:
    """The number of layers of every stage, first stage first."""
    mesh, model = scenario.parallelism, scenario.model
    if mesh.stages is not None:
        return mesh.stages
    if mesh.num_stages == 1:
        return (model.layers,)
    rank_of_stage = {
        stage: rank for rank, stages in reversed(list(enumerate(stages_of_ranks(mesh)))) for stage in stages
    }
    parts = part_seconds(scenario)
    layer = parts.moe_layer or parts.dense_layer
    last = parts.head + model.mtp_layers * parts.prediction
    return even_lengths(
        ModelEnds(
            layers=model.layers,
            rank_of_stage=tuple(rank_of_stage[stage] for stage in range(mesh.num_stages)),
            num_short=model.dense_layers if model.experts and model.dense_at is None else 0,
            short_at=model.dense_at or (),
            short=round(parts.dense_layer / layer, DIGITS),
            first=round(parts.embedding / layer, DIGITS),
            last=round(last / layer, DIGITS),
            speed_of_rank=speeds_of_stages(scenario),
        )
    )


@dataclass(frozen=True, kw_only=True)
class ModelEnds:
    """What is to be split, in times of one layer: the first `num_short` layers or those of `short_at` take `short`, all
    others 1. `first` and `last` are what the ends of the model take beside their layers. `speed_of_rank`: of each
    pipeline rank against the fastest, empty where all are alike.
    """

    layers: int
    rank_of_stage: tuple[int, ...]
    num_short: int = 0
    short_at: Lengths = ()
    short: float = 1.0
    first: float = 0.0
    last: float = 0.0
    speed_of_rank: tuple[float, ...] = ()

    def seconds_on(self, rank: int, seconds: float) -> float:
        """What takes so long on the fastest rank, on this one."""
        return seconds / self.speed_of_rank[rank] if self.speed_of_rank else seconds

    def shorts(self, lengths: Lengths) -> Lengths:
        """How many of the short layers each stage holds."""
        if self.short_at:
            ends = list(accumulate(lengths))
            return tuple(
                sum(end - length <= layer < end for layer in self.short_at)
                for end, length in zip(ends, lengths, strict=True)
            )
        counts, left = [], self.num_short
        for length in lengths:
            counts.append(min(length, left))
            left -= counts[-1]
        return tuple(counts)

    def of_stages(self, lengths: Lengths, shorts: Lengths) -> list[float]:
        """What each stage takes, if it holds so many layers and so many short ones among them."""
        seconds = [length + (self.short - 1) * n for length, n in zip(lengths, shorts, strict=True)]
        seconds[0] += self.first
        seconds[-1] += self.last
        return seconds

    def of_ranks(self, lengths: Lengths, shorts: Lengths | None = None) -> list[float]:
        """The same for each rank."""
        of_rank = [0.0] * (max(self.rank_of_stage) + 1)
        seconds = self.of_stages(lengths, self.shorts(lengths) if shorts is None else shorts)
        for rank, value in zip(self.rank_of_stage, seconds, strict=True):
            of_rank[rank] += self.seconds_on(rank, value)
        return of_rank

    def slowest(self, lengths: Lengths) -> float:
        """What the slowest rank takes."""
        return max(self.of_ranks(lengths))


@lru_cache(maxsize=1024)
def even_lengths(ends: ModelEnds) -> Lengths:
    """Lengths of stages with which the slowest rank takes about as little time as can be.

    >>> even_lengths(ModelEnds(layers=9, rank_of_stage=(0, 1, 2), last=1.6))
    (4, 3, 2)
    """
    found: list[Lengths] = []
    shorts: Lengths = (0,) * len(ends.rank_of_stage)
    while len(found) <= len(shorts):  # which stages hold the short layers is known once the lengths are
        lengths = _filled(ends, shorts)
        if lengths in found:
            break
        found.append(lengths)
        shorts = ends.shorts(lengths)
    count, more = divmod(ends.layers, len(shorts))
    found.append(tuple(count + (stage < more) for stage in range(len(shorts))))
    tried = [_improved(ends, lengths) for lengths in dict.fromkeys(found)]
    return min(tried, key=lambda lengths: round(ends.slowest(lengths) / ALIKE))


def _filled(ends: ModelEnds, shorts: Lengths) -> Lengths:
    """Layers given out one by one, where it is assumed which stages hold the short ones."""
    lengths = [0] * len(shorts)
    seconds = ends.of_stages(tuple(lengths), shorts)
    of_rank = ends.of_ranks(tuple(lengths), shorts)
    lag = LATER / max(1, len(lengths) - 1)

    def urgency(stage: int) -> tuple[float, ...]:
        rank = ends.rank_of_stage[stage]
        return round(of_rank[rank] / (2 * ALIKE)), rank, seconds[stage] - lag * stage

    for _ in range(ends.layers):
        stage = min(range(len(lengths)), key=urgency)
        lengths[stage] += 1
        seconds[stage] += 1
        of_rank[ends.rank_of_stage[stage]] += ends.seconds_on(ends.rank_of_stage[stage], 1)
    return tuple(lengths)


def _improved(ends: ModelEnds, lengths: Lengths) -> Lengths:
    """The split after moving single layers off the slowest rank for as long as that helps."""
    while True:
        better = min(_moves(ends, lengths), key=ends.slowest, default=lengths)
        if ends.slowest(better) > ends.slowest(lengths) - ALIKE:
            return lengths
        lengths = better


def _moves(ends: ModelEnds, lengths: Lengths) -> Iterator[Lengths]:
    """Splits with one layer less in a stage of the slowest rank, and one more in any other."""
    of_rank = ends.of_ranks(lengths)
    slowest = of_rank.index(max(of_rank))
    for source, rank in enumerate(ends.rank_of_stage):
        if rank != slowest or not lengths[source]:
            continue
        for target in range(len(lengths)):
            moved = list(lengths)
            moved[source] -= 1
            moved[target] += 1
            yield tuple(moved)
