"""Shortest routes found on the graph: for custom fabrics and around failed links.

Legend: F flows, P hops (padded with -1).
"""

from collections import deque

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError

IntArray = NDArray[np.int32]


class Walks:
    """Routes with the fewest links; equal ones are spread over the pairs by (source + target), as ECMP spreads flows.

    Distances to a target are kept, so asking again is cheap.
    """

    def __init__(self, graph: "nx.DiGraph[str]", links: tuple[tuple[str, str], ...], num_ranks: int) -> None:
        self._graph = graph
        self._ids = {link: index for index, link in enumerate(links)}
        self._num_ranks = num_ranks
        self._distances: dict[int, dict[str, int]] = {}

    def routes(self, sources_F: NDArray[np.integer], targets_F: NDArray[np.integer]) -> IntArray:
        """Links of each flow in order of travel, int32 [F, P]. Raises UserError where no path exists."""
        walks = [self._walk(int(s), int(d)) for s, d in zip(sources_F, targets_F, strict=True)]
        width = max(map(len, walks), default=0)
        path_FP = np.full((len(walks), width), -1, dtype=np.int32)
        for flow, walk in enumerate(walks):
            path_FP[flow, : len(walk)] = walk
        return path_FP

    def _walk(self, source: int, target: int) -> list[int]:
        distance = self._distance_to(target)
        here, goal = f"gpu{source}", f"gpu{target}"
        if here not in distance:
            raise UserError(
                f"cluster.fabric: no path from {here} to {goal}; remove the failed links between them or add a link"
            )
        walk: list[int] = []
        while here != goal:
            nearer = sorted(n for n in self._graph.successors(here) if distance.get(n, -1) == distance[here] - 1)
            there = nearer[(source + target) % len(nearer)]
            walk.append(self._ids[here, there])
            here = there
        return walk

    def _distance_to(self, target: int) -> dict[str, int]:
        if target not in self._distances:
            goal = f"gpu{target}"
            distance = {goal: 0}
            queue = deque([goal])
            while queue:
                here = queue.popleft()
                for previous in self._graph.predecessors(here):
                    if previous not in distance:
                        distance[previous] = distance[here] + 1
                        queue.append(previous)
            self._distances[target] = distance
        return self._distances[target]
