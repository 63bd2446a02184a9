"""Rank groups that do the same at the same times, of which one is simulated for all.

Data-parallel copies of a dense model do, and those of an MoE model that drew the same routing: their programs are
equal, the fabric treats them alike, and every collective meets them in the same way. Where groups share links that they
can fill together no group is the equal of another.

Legend: R ranks of a group.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.network import Fabric, group_shape
from moesim.parallel import Mesh
from moesim.program.collectives import Reduction
from moesim.program.loads import RoutingSample


def equal_group_numbers(
    mesh: Mesh,
    fabric: Fabric,
    samples: Sequence[RoutingSample],
    collectives: Sequence[Reduction],
    *,
    stages: int,
    facts_of: Callable[[NDArray[np.int64]], bytes],
) -> list[list[int]]:
    """The numbers of groups that are alike on every one of `stages` pipeline ranks, the first of each list standing for
    all; lists in the order of their first number.

    `facts_of`: equal for groups whose GPUs are alike one by one.
    """
    groups_of_stage = [mesh.rank_groups(stage) for stage in range(stages)]
    count = len(groups_of_stage[0])
    alone = [[number] for number in range(count)]
    if count == 1 or len(fabric.common_links_X):
        return alone
    alike: list[list[int]] = []
    for number in range(count):
        same = (
            equal_groups for equal_groups in alike if _same_rows(mesh, samples, equal_groups[0], number, stages=stages)
        )
        found = next(same, None)
        if found is None:
            alike.append([number])
        else:
            found.append(number)
    if len(alike) == count:
        return alone
    by_shape: dict[tuple[int, tuple[bytes, ...]], list[int]] = {}
    for index, equal_groups in enumerate(alike):
        for number in equal_groups:
            shapes = tuple(group_shape(fabric, groups[number]) + facts_of(groups[number]) for groups in groups_of_stage)
            by_shape.setdefault((index, shapes), []).append(number)
    classes = sorted(by_shape.values())
    return classes if _met_equal(mesh, collectives, classes, stages=stages) else alone


def _same_rows(mesh: Mesh, samples: Sequence[RoutingSample], first: int, other: int, *, stages: int) -> bool:
    """Whether two rank groups send and compute the same rows in every sample."""
    count = mesh.group_size // mesh.parallelism.expert  # expert groups of each
    return all(
        sample.same_traffic(first * count + index, other * count + index, stage=stage)
        for sample in samples
        for stage in range(stages)
        for index in range(count)
    )


def _met_equal(mesh: Mesh, collectives: Sequence[Reduction], classes: Sequence[Sequence[int]], *, stages: int) -> bool:
    """Whether in every collective the ranks at one place of equal groups meet ranks at the same places, so wait for
    the same.

    A rank's place: its pipeline rank, its group's class, and its index in the group.
    """
    place_of_rank: dict[int, tuple[int, int, int]] = {}
    ranks_of_place: defaultdict[tuple[int, int, int], int] = defaultdict(int)
    class_of_number = {number: index for index, equal_groups in enumerate(classes) for number in equal_groups}
    for stage in range(stages):
        for number, ranks_R in enumerate(mesh.rank_groups(stage)):
            for index, rank in enumerate(ranks_R.tolist()):
                place = (stage, class_of_number[number], index)
                place_of_rank[rank] = place
                ranks_of_place[place] += 1
    for collective in collectives:
        met: defaultdict[tuple[int, int, int], list[frozenset[tuple[int, int, int]]]] = defaultdict(list)
        for members in collective.members:
            places = [place_of_rank[rank] for rank in members.tolist()]
            whom = frozenset(places)
            for place in places:
                met[place].append(whom)
        for place, sets in met.items():
            if len(sets) != ranks_of_place[place] or len(set(sets)) != 1:
                return False
    return True
