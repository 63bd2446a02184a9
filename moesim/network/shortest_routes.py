"""Shortest routes found on the graph: for custom fabrics and around failed links.

Legend: F flows, P hops (padded with -1), Q routes of flows that are spread over several.
"""

from collections import deque
from typing import NamedTuple

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError

IntArray = NDArray[np.int32]
MOST_ROUTES = 64  # of one pair


class SplitRoutes(NamedTuple):
    """Links of every route, the flow that it belongs to, and its share of the flow's bytes."""

    path_QP: IntArray
    flow_Q: NDArray[np.int64]
    share_Q: NDArray[np.float64]


class ShortestRoutes:
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

    def all_routes(self, sources_F: NDArray[np.integer], targets_F: NDArray[np.integer]) -> SplitRoutes:
        """Every route of each flow with the fewest links; at each switch the bytes part evenly among the ways on.

        Raises UserError where no path exists, and where a pair has more than MOST_ROUTES.
        """
        walks: list[list[int]] = []
        flows: list[int] = []
        shares: list[float] = []
        for flow, (source, target) in enumerate(zip(sources_F.tolist(), targets_F.tolist(), strict=True)):
            distance = self._distance_to(target)
            self._walk(source, target)  # there is one
            open_ways: list[tuple[str, list[int], float]] = [(f"gpu{source}", [], 1.0)] if source != target else []
            found = 0
            while open_ways:
                here, walk, share = open_ways.pop()
                if here == f"gpu{target}":
                    found += 1
                    walks.append(walk)
                    flows.append(flow)
                    shares.append(share)
                    continue
                nearer = sorted(n for n in self._graph.successors(here) if distance.get(n, -1) == distance[here] - 1)
                if found + len(open_ways) + len(nearer) > MOST_ROUTES:
                    raise UserError(
                        f"cluster.fabric: more than {MOST_ROUTES} equal routes from gpu{source} to gpu{target}; write "
                        "parallel links as one with their bandwidths' sum"
                    )
                open_ways += [(n, [*walk, self._ids[here, n]], share / len(nearer)) for n in reversed(nearer)]
        width = max(map(len, walks), default=0)
        path_QP = np.full((len(walks), width), -1, dtype=np.int32)
        for number, walk in enumerate(walks):
            path_QP[number, : len(walk)] = walk
        return SplitRoutes(path_QP, np.array(flows, dtype=np.int64), np.array(shares))

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
