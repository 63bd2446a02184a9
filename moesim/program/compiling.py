"""Whether a step pays for compiled loops: loading numba and its cached code takes about a second."""

from moesim.parallel import Mesh
from moesim.scenario import Scenario

COMPILED_RANKS = 32  # groups from here on use compiled loops in any case
LOADING_SECONDS = 1.0
# What numpy takes for one transfer and the kernels around it: per call, and per pair of ranks and routing sample.
SECONDS_PER_TRANSFER = 0.4e-3
SECONDS_PER_PAIR = 0.4e-6


def pays_for_compiled_loops(scenario: Scenario, *, samples: int) -> bool:
    """Whether numpy alone would take longer over the step; decided by its size, so that every run computes the same."""
    ranks = Mesh(scenario.parallelism, scenario.cluster).group_size
    groups = scenario.parallelism.stage_ranks // ranks
    transfers = 4 * scenario.num_micro_batches * scenario.model.layers * groups
    seconds = transfers * (SECONDS_PER_TRANSFER + samples * ranks**2 * SECONDS_PER_PAIR)
    return ranks >= COMPILED_RANKS or seconds > LOADING_SECONDS
