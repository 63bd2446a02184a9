"""Max-min fair sharing over time, as plain loops: numba compiles them where it is installed, else Python runs them.

Legend: F flows, P hops, X links, Q entries of the lists of flows per link.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]
Loop = TypeVar("Loop", bound=Callable[..., Any])

# A flow's mark: the number of the filling that last gave it a rate, or one of these.
WAITING, DONE = 2**31 - 2, 2**31 - 1
EARLY, LATE, LEAST = 0.2, 3.0, 0.03  # see drain: chosen for 0.5 % of makespan at the fewest fillings
STUCK = -1
WINDOWS_PER_LINK = 10_000  # a window is 3e-4 of `scale` or longer; a link is busy for no longer than `scale`
TIE = 1e-12  # a flow with this share of its bytes left has ended: round-off, not a model


def _compiled(loop: Loop) -> Loop:
    """The loop compiled by numba, or without numba interpreted: far slower, the same result."""
    try:
        import numba
    except ImportError:
        return loop
    machine_code: Any = numba.njit(cache=True)(loop)
    return cast(Loop, machine_code)


@_compiled
def fill(
    number: int,
    mark_F: IntArray,
    rate_F: FloatArray,
    path_FP: IntArray,
    spare_X: FloatArray,
    left_X: IntArray,
    first_X: NDArray[np.int64],
    length_X: IntArray,
    list_Q: IntArray,
    open_X: IntArray,
) -> None:
    """Rates of the active flows by progressive filling, written into `rate_F`; `number` counts the fillings.

    Repeatedly the link with the least spare capacity per flow left gives each of them that share. `spare_X` (capacity)
    and `left_X` (active flows) are used up. Flows that are done are taken out of the lists on the way.
    """
    num_open = 0
    for link in range(len(spare_X)):
        if left_X[link] > 0:
            open_X[num_open] = link
            num_open += 1
    level = 0.0
    while True:
        best, share, kept = -1, np.inf, 0
        for index in range(num_open):
            link = open_X[index]
            if left_X[link] > 0:
                open_X[kept] = link
                kept += 1
                if spare_X[link] < share * left_X[link]:
                    share = spare_X[link] / left_X[link]
                    best = link
        num_open = kept
        if best < 0:
            break
        level = max(level, share)  # levels only rise; what falls below is round-off
        position = first_X[best]
        end = position + length_X[best]
        while left_X[best] > 0 and position < end:
            flow = list_Q[position]
            if mark_F[flow] < number:
                mark_F[flow] = number
                rate_F[flow] = level
                for hop in range(path_FP.shape[1]):
                    link = path_FP[flow, hop]
                    if link >= 0:
                        left_X[link] -= 1
                        spare_X[link] -= level
            if mark_F[flow] == DONE:
                end -= 1
                list_Q[position] = list_Q[end]
            else:
                position += 1
        length_X[best] = end - first_X[best]


@_compiled
def shortest_rest(active: IntArray, rest_F: FloatArray, rate_F: FloatArray) -> float:
    """Seconds until the next active flow ends."""
    step = np.inf
    for flow in active:
        if rest_F[flow] < step * rate_F[flow]:  # a division only where it shortens the step
            step = rest_F[flow] / rate_F[flow]
    return step


@_compiled
def advance(
    now: float,
    step: float,
    active: IntArray,
    bytes_F: FloatArray,
    release_F: FloatArray,
    rest_F: FloatArray,
    rate_F: FloatArray,
    mark_F: IntArray,
    path_FP: IntArray,
    count_X: IntArray,
    unused_X: FloatArray,
    finish_F: FloatArray,
) -> tuple[int, float]:
    """Move the active flows on by a step; those left are packed to the front of `active`.

    Returns how many are left and the seconds that the slowest still needs. What flows that end leave unused of their
    links in this step is added to `unused_X`.
    """
    kept, to_go = 0, 0.0
    for flow in active:
        rest = rest_F[flow] - rate_F[flow] * step
        if rest > TIE * bytes_F[flow]:
            rest_F[flow] = rest
            active[kept] = flow
            kept += 1
            if rest > to_go * rate_F[flow]:
                to_go = rest / rate_F[flow]
            continue
        finish_F[flow] = max(now + rest_F[flow] / rate_F[flow], release_F[flow])
        mark_F[flow] = DONE
        for hop in range(path_FP.shape[1]):
            link = path_FP[flow, hop]
            if link >= 0:
                count_X[link] -= 1
                unused_X[link] -= min(rest, 0.0)
    return kept, to_go


@_compiled
def drain(
    bytes_F: FloatArray,
    release_F: FloatArray,
    path_FP: IntArray,
    capacity_X: FloatArray,
    first_X: NDArray[np.int64],
    list_Q: IntArray,
    window_share: float,
    scale: float,
    finish_F: FloatArray,
) -> int:
    """Run the flows, given in order of release, to their ends; fills `finish_F` and returns the number of fillings,
    or `STUCK` where more were needed than there can be.

    Between fillings rates are constant for a step. `window_share` = 0: a step ends with the next flow or release (the
    exact solution). Else it lasts at least window_share * the time since the first release, unless a release cuts it
    short: flows that end within it end at their own time, what they leave unused of their links is added to the
    capacity of the next step, and flows released in the first half of it start with it. `scale` (seconds, about the
    makespan) bounds windows from below at the start, where errors matter least, and less so towards the end, where
    windows shrink with the time that the slowest flow still needs.
    """
    num_flows, num_links = len(bytes_F), len(capacity_X)
    rest_F, rate_F = bytes_F.copy(), np.zeros(num_flows)
    mark_F, active = np.full(num_flows, WAITING, dtype=np.int32), np.zeros(num_flows, dtype=np.int32)
    count_X, open_X = np.zeros(num_links, dtype=np.int32), np.zeros(num_links, dtype=np.int32)
    length_X = (first_X[1:] - first_X[:-1]).astype(np.int32)
    unused_X = np.zeros(num_links)
    num_active = released = fillings = 0
    start = now = release_F[0]
    to_go = np.inf
    # Every filling ends a flow or waits for a release, or lasts a window, which is no less than a share of `scale`.
    most_fillings = 2 * num_flows + WINDOWS_PER_LINK * (num_links + 1) * (window_share > 0) + 2
    while num_active > 0 or released < num_flows:
        if fillings > most_fillings:
            return STUCK
        if num_active == 0:
            now, to_go = max(now, release_F[released]), np.inf
        window = window_share * max(min(max(now - start, EARLY * scale), LATE * to_go), LEAST * scale)
        while released < num_flows and release_F[released] <= now + window / 2:
            mark_F[released] = -1
            active[num_active] = released
            for hop in range(path_FP.shape[1]):
                if path_FP[released, hop] >= 0:
                    count_X[path_FP[released, hop]] += 1
            num_active += 1
            released += 1
        owing = window > 0 and unused_X.any()  # then the step must be the window that the debt is spread over
        spare_X = capacity_X + unused_X / window if owing else capacity_X.copy()
        unused_X[:] = 0.0
        fillings += 1
        fill(fillings, mark_F, rate_F, path_FP, spare_X, count_X.copy(), first_X, length_X, list_Q, open_X)
        step = window if owing else max(window, shortest_rest(active[:num_active], rest_F, rate_F))
        until = now + step
        if released < num_flows and release_F[released] < until:
            until = release_F[released]
            step = until - now
        num_active, to_go = advance(
            now, step, active[:num_active], bytes_F, release_F, rest_F, rate_F, mark_F, path_FP, count_X, unused_X,
            finish_F,
        )  # fmt: skip
        now = until
    return fillings


@_compiled
def join_links(path_FP: IntArray, num_links: int) -> IntArray:
    """The least link that each link is joined with by flows, directly or through other links; -1 for unused links."""
    root_X = np.full(num_links, -1, dtype=np.int32)
    for flow in range(len(path_FP)):
        joined = -1
        for hop in range(path_FP.shape[1]):
            link = path_FP[flow, hop]
            if link < 0:
                continue
            if root_X[link] < 0:
                root_X[link] = link
            while root_X[link] != link:
                root_X[link] = root_X[root_X[link]]
                link = root_X[link]
            if joined >= 0:
                root_X[max(link, joined)] = min(link, joined)
                joined = min(link, joined)
            else:
                joined = link
    for link in range(num_links):
        if root_X[link] >= 0:
            root_X[link] = root_X[root_X[link]]  # roots are least, so they are settled before what hangs on them
    return root_X


@_compiled
def list_flows(path_FP: IntArray, num_links: int, first_X: NDArray[np.int64], list_Q: IntArray) -> None:
    """For each link where its flows start in the list (`first_X`, [X + 1]), and the list of flows (`list_Q`)."""
    first_X[:] = 0
    for flow in range(len(path_FP)):
        for hop in range(path_FP.shape[1]):
            if path_FP[flow, hop] >= 0:
                first_X[path_FP[flow, hop] + 1] += 1
    for link in range(num_links):
        first_X[link + 1] += first_X[link]
    next_X = first_X.copy()
    for flow in range(len(path_FP)):
        for hop in range(path_FP.shape[1]):
            link = path_FP[flow, hop]
            if link >= 0:
                list_Q[next_X[link]] = flow
                next_X[link] += 1


@_compiled
def drain_components(
    bytes_F: FloatArray,
    release_F: FloatArray,
    path_FP: IntArray,
    capacity_X: FloatArray,
    first_flow_C: NDArray[np.int64],
    first_link_C: NDArray[np.int64],
    window_C: FloatArray,
    finish_F: FloatArray,
) -> bool:
    """`drain` for runs of flows that share no link; component c's flows and links end where the next one's begin.

    Returns whether all of them came to their ends.
    """
    for component in range(len(window_C)):
        start, end = first_flow_C[component], first_flow_C[component + 1]
        if start == end:
            continue
        own_path_FP = path_FP[start:end]
        own_capacity_X = capacity_X[first_link_C[component] : first_link_C[component + 1]]
        num_links = len(own_capacity_X)
        first_X = np.zeros(num_links + 1, dtype=np.int64)
        list_Q = np.empty(own_path_FP.size, dtype=np.int32)
        list_flows(own_path_FP, num_links, first_X, list_Q)
        scale = 0.0
        for link in range(num_links):
            load = 0.0
            for index in range(first_X[link], first_X[link + 1]):
                load += bytes_F[start + list_Q[index]]
            scale = max(scale, load / own_capacity_X[link])
        fillings = drain(
            bytes_F[start:end],
            release_F[start:end],
            own_path_FP,
            own_capacity_X,
            first_X,
            list_Q,
            window_C[component],
            scale,
            finish_F[start:end],
        )
        if fillings == STUCK:
            return False
    return True
