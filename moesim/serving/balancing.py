"""Which batch a request that arrives is given to."""

from collections.abc import Callable, Mapping, Sequence

from moesim.serving.batch import Batch, Job

SLACK = 2.0  # times the requests of the emptiest batch, and
SLACK_REQUESTS = 4  # so many more, may a batch have that a request goes to for its prefix


def least_loaded(batches: Sequence[Batch], job: Job) -> int:
    """The batch with the fewest requests, the first of them."""
    del job
    return min(range(len(batches)), key=lambda each: (batches[each].load, each))


def by_prefix(batches: Sequence[Batch], job: Job) -> int:
    """The batch with the fewest requests of those that know the prefix, unless it has many more than the emptiest."""
    emptiest = least_loaded(batches, job)
    known = [number for number, batch in enumerate(batches) if batch.knows(job.prefix)]
    if not known:
        return emptiest
    chosen = min(known, key=lambda each: (batches[each].load, each))
    most = SLACK * batches[emptiest].load + SLACK_REQUESTS
    return chosen if batches[chosen].load <= most else emptiest


BALANCING: Mapping[str, Callable[[Sequence[Batch], Job], int]] = {"least_loaded": least_loaded, "by_prefix": by_prefix}
