"""One simulated step in a process of its own: CPU seconds per phase, peak memory, and where the time goes, as JSON.

python tests/benchmarks/measure_step.py SCENARIO [KEY=VALUE ...]   (routing is taken as uniform within its limits)
"""

import cProfile
import json
import pstats
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from moesim.engine import simulate_step
from moesim.kernels import kernel_model
from moesim.network import build_fabric
from moesim.parallel import TrafficSampler
from moesim.program import build_program
from moesim.results import CATEGORIES
from moesim.results.span_sums import GroupSums
from moesim.run import obtain_trace
from moesim.scenario import load_scenario
from moesim.seeding import stream

PROFILED = 14  # functions listed


def main(path: str, changes: list[str]) -> dict[str, Any]:
    """Load the trace, time everything from there to the attribution, then run the step again under the profiler."""
    scenario = load_scenario(path, changes)
    trace = obtain_trace(scenario)
    assert trace is not None
    profiler = cProfile.Profile()
    seconds: dict[str, float] = {}

    def timed(phase: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        seconds[phase] = time.process_time() - start
        return result

    def build() -> Any:
        sample = TrafficSampler(scenario, trace).draw(stream(scenario.seed, "sample", 0))
        return build_program(
            scenario,
            fabric=build_fabric(scenario.cluster),
            kernels=kernel_model(scenario.cluster.pools[0].spec, scenario.compute.profile),
            samples=[sample],
            merge=True,
        )

    program = timed("build", build)
    tables = timed("simulate", lambda: simulate_step(program).tables)
    sums = timed("attribute", lambda: [GroupSums.of(table, compiled=True, with_waits=False) for table in tables])
    parts_CSR = np.concatenate([each.attribution_CSR for each in sums], axis=2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rank_spans = sum(table.start_NSR.size for table in tables)
    tables = ()
    again = timed("simulate again, profiled", lambda: profiler.runcall(simulate_step, program))
    rows = [
        (f"{name[0].rsplit('/', 1)[-1]}:{name[2]}", calls, own)
        for name, (_, calls, own, _, _) in pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
    ]
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "step_s": float(again.step_S[0]),
        "rank_spans": rank_spans,
        "parts_s": dict(zip(CATEGORIES, parts_CSR.mean(axis=(1, 2)).tolist(), strict=True)),
        "profile": sorted(rows, key=lambda row: -row[2])[:PROFILED],
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2:])))
