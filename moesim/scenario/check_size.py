"""The check of how much work a scenario is: single keys are bounded by the schema, their products here.

What is refused would take gigabytes of memory, or hours in which nothing is heard, before the first number.
"""

from collections.abc import Iterator
from typing import NamedTuple

from moesim.scenario.base import MOST_GPUS
from moesim.scenario.check_software import Report
from moesim.scenario.routing import PopularityRouting, TrainRouting
from moesim.scenario.schema import Scenario

LEAST_TOKENS, THIN_LAYERS = 2**18, 2  # of a synthetic trace, about
MOST_TOKENS = 2**26  # of a step on one rank group
MOST_ROWS = 2**27  # a trace holds 12 bytes for each, and as many again while it is drawn
MOST_COUNTS = 2**28  # of 8 bytes
MOST_PAIRS = {"ports": 2**24, "fluid": 2**22, "exact": 2**14}  # flows of one transfer
MOST_RUNS = 10**7  # the largest published trainings have a million; a million takes ten seconds a sample
MOST_SAMPLED_RUNS = 10**8
MOST_PARAMETERS = 10**9  # of the thin model; sixteen bytes each in training


class _Size(NamedTuple):
    number: int
    most: int
    key: str
    what: str
    remedy: str


def check_gpus(scenario: Scenario, report: Report) -> None:
    """Raises UserError for a cluster whose fabric cannot be built in seconds."""
    _check(_Size(scenario.cluster.num_gpus, MOST_GPUS, "cluster", "GPUs", "name fewer nodes"), report)


def check_size(scenario: Scenario, report: Report) -> None:
    """Raises UserError for a scenario that is too much work, naming the key that makes it so."""
    for size in (*_step_sizes(scenario), *(_routing_sizes(scenario) if scenario.model.experts else ())):
        _check(size, report)


def _check(size: _Size, report: Report) -> None:
    if size.number > size.most:
        raise report.user(size.key, f"{size.number:,} {size.what}; at most {size.most:,} are simulated: {size.remedy}")


def _step_sizes(scenario: Scenario) -> Iterator[_Size]:
    mesh = scenario.parallelism
    layers = scenario.model.layers + scenario.model.mtp_layers
    runs = layers * scenario.num_micro_batches * mesh.stage_ranks
    what = f"passes through a layer ({layers} layers, {scenario.num_micro_batches:,} micro-batches, all ranks)"
    yield _Size(runs, MOST_RUNS, "workload.global_batch", what, "lower it, or raise workload.micro_batch")
    sampled = runs * (scenario.uncertainty.samples if scenario.model.experts else 1)
    yield _Size(sampled, MOST_SAMPLED_RUNS, "uncertainty.samples", "passes through a layer in all samples", "lower it")


def _routing_sizes(scenario: Scenario) -> Iterator[_Size]:
    model, mesh, work, routing = scenario.model, scenario.parallelism, scenario.workload, scenario.routing
    layers = THIN_LAYERS
    if isinstance(routing, TrainRouting):
        layers = routing.thin.layers
    elif isinstance(routing, PopularityRouting) and isinstance(routing.counts[0], tuple):
        layers = len(routing.counts)
    asked = routing.tokens or 0 if isinstance(routing, TrainRouting) else 0
    window = mesh.expert * work.micro_batch * work.sequence_length
    yield _Size(window, MOST_TOKENS, "workload.micro_batch", "tokens of an expert group's micro-batch", "lower it")
    tokens = max(window, LEAST_TOKENS, asked)
    rows = tokens * model.top_k * layers
    yield _Size(rows, MOST_ROWS, "routing", "rows (tokens * top_k * layers) of a trace", "lower model.top_k or layers")
    ranks = mesh.expert
    columns = ranks * (scenario.slots_per_rank + 2)
    pieces = -(-tokens // work.sequence_length) * mesh.tensor * mesh.context * 2
    counts = pieces * columns * layers
    yield _Size(counts, MOST_COUNTS, "model.experts", "counts (parts of sequences * experts * layers)", "lower it")
    groups = mesh.stage_ranks // ranks
    counts = min(scenario.num_micro_batches, scenario.uncertainty.bank) * groups * ranks * columns * layers
    counts *= scenario.uncertainty.samples
    what = "counts (samples * micro-batches * ranks * experts * layers)"
    yield _Size(counts, MOST_COUNTS, "uncertainty.samples", what, "lower it, or uncertainty.bank")
    model_of_sharing = scenario.network.model or "ports"  # what is left of the larger groups when it is absent
    most = MOST_PAIRS[model_of_sharing]
    what = f"pairs of ranks in an expert group under network.model: {model_of_sharing}"
    yield _Size(ranks * ranks, most, "parallelism.expert", what, "lower it, or use network.model: ports")
    if isinstance(routing, TrainRouting):
        thin = routing.thin
        weights = thin.layers * (model.experts * (3 * thin.expert_intermediate + 1) + 8 * thin.hidden) * thin.hidden
        what = "parameters of the thin model"
        yield _Size(weights, MOST_PARAMETERS, "routing.thin.hidden", what, "lower it, or thin.expert_intermediate")
