"""What every number of `moesim goodput` means, as `moesim.results.definitions` says it of a run.

The format is versioned by `schema_version`: it grows when a number changes its meaning or its name, not when one is
added.
"""

from collections.abc import Mapping

from moesim.results.definitions import NO_UNIT, Definition

_ACCOUNTS = {
    "useful": "Work that was kept, as long as it takes at full size and speed.",
    "slowed": "What kept work took longer because parts were slow or nodes missing.",
    "checkpoint": "The job stood for checkpoints.",
    "lost": "Work thrown away by failures, and, in `nodes rejoin`, by a planned restart.",
    "detection": "From failures until they were found.",
    "restart": "Starting again and reading checkpoints.",
    "repair": "Waiting for a node, where no spare was left.",
}
_CAUSE = {
    "cause": (NO_UNIT, "What stopped the job."),
    "failures": ("failures", "Mean number in the days."),
    "mean_time_between_s": ("s", "Mean time between failures of all parts that fail so; null for a planned restart."),
    **{f"{name}_s": ("s", f"`time_s.{name}`, the part of this cause.") for name in list(_ACCOUNTS)[3:]},
    "all_s": ("s", "The four together."),
}
_CHECKPOINT = {
    "bytes": ("B", "Size: weights, master copy and both moments of every parameter once, or as the scenario says."),
    "asynchronous": (NO_UNIT, "Whether the job goes on while storage writes."),
    "write_s": ("s", "Until it is written and can be read."),
    "blocking_s": ("s", "How long the job stands for it."),
    "read_s": ("s", "Reading it when the job starts again."),
    "interval_steps": ("steps", "Work between two of them, as simulated."),
    "interval_s": ("s", "The same at full speed."),
    "checkpoints": ("checkpoints", "Mean number in the days."),
    "best_steps": ("steps", "The interval with the most kept work, by simulation; null without failures."),
    "best_s": ("s", "The same at full speed."),
    "young_s": ("s", "The best interval by Young's formula; null without failures or where checkpoints cost nothing."),
    "daly_s": ("s", "The same by Daly's formula of higher order."),
    "searched.[].steps": ("steps", "An interval that was simulated in the search."),
    "searched.[].interval_s": ("s", "The same at full speed."),
    "searched.[].goodput": ("share", "Its goodput, with the same failures for all of them."),
}

GOODPUT_DEFINITIONS: Mapping[str, Definition] = {
    "schema_version": Definition(NO_UNIT, "Version of this format."),
    "kind": Definition(NO_UNIT, "What it is: goodput."),
    "name": Definition(NO_UNIT, "Name of the scenario."),
    "gpus": Definition("GPUs", "GPUs of the cluster."),
    "days": Definition("days", "Days that were simulated."),
    "seeds": Definition("draws", "Draws of failures behind every mean."),
    "step_time_s": Definition("s", "The step without failures, as `moesim run` gives it."),
    "goodput": Definition("share", "Kept work / all time: `time_s.useful` over the days, mean over the draws."),
    "goodput_range.[]": Definition("share", "5th and 95th percentile over the draws; null for one."),
    "tokens_per_day": Definition("tokens/day", "Useful ones: of kept work."),
    "usd_per_million_useful_tokens": Definition("USD", "Rent of the cluster and its spares / useful tokens."),
    "usd_per_million_tokens_without_failures": Definition("USD", "The price by the step alone."),
    "usd_total": Definition("USD", "Rent for workload.train_tokens of kept work; null without that."),
    "days_total": Definition("days", "How long these take; null without them."),
    **{f"time_s.{name}": Definition("s", text + " Mean over the draws.") for name, text in _ACCOUNTS.items()},
    "failures": Definition("failures", "Mean number in the days."),
    "mean_time_between_failures_s": Definition("s", "Of all causes together; null without failures."),
    "days_with_failures": Definition("days", "Days on which at least one came."),
    **{f"causes.[].{name}": Definition(*row) for name, row in _CAUSE.items()},
    **{f"checkpoint.{name}": Definition(*row) for name, row in _CHECKPOINT.items()},
    "rests_on.[]": Definition(NO_UNIT, "Where the rates come from, and which defaults are assumed, one text each."),
    "warnings.[]": Definition(NO_UNIT, "What to know before trusting the numbers."),
}
