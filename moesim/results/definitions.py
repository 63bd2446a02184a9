"""What every number of result.json means: one definition each, from which the reference of the documentation is made.

A path is that of the key, its parts joined by dots: `*` stands for one key of any name, `[]` for the items of a list.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NO_UNIT = ""


@dataclass(frozen=True)
class Definition:
    """The unit of a number (empty: a text, or a number without one) and what it means."""

    unit: str
    text: str


CATEGORY_DEFINITIONS: Mapping[str, str] = {
    "attention": "Computing attention: its projections and scores, with the norms and sums around them.",
    "router": "Computing affinities, the choice of experts and their weights, and exchanging row counts.",
    "permute": "Moving rows into the order of experts and back.",
    "dispatch_exposed": "A rank's own part of the transfer of tokens to their experts, where no computation hides it.",
    "experts": "Computing the routed experts.",
    "shared_experts": "Computing the experts that every token passes, and dense networks beside the experts.",
    "combine_exposed": "A rank's own part of the transfer of results back to their tokens, where nothing hides it.",
    "dense_ffn": "Computing the feed-forward networks of dense layers.",
    "embedding_head": "Computing embedding, output head and loss, and what joins layers of multi-token prediction.",
    "imbalance_wait": "Standing in a dispatch, combine or other collective while slower ranks have not come to it yet.",
    "data_parallel": "Reducing gradients and gathering weights over data-parallel ranks, where nothing hides it.",
    "tensor": "Collectives inside layers, of tensor-, context- and expert-tensor-parallel ranks.",
    "pipeline": "Transfers of activations and gradients between pipeline stages, where a rank has nothing else to do.",
    "bubble": "Nothing to do: the pipeline fills or drains, or another stage is late.",
    "recompute": "Computing again in the backward pass what was not kept.",
    "optimizer": "Updating the parameters.",
    "host": "The GPU stands still until the host has launched its next kernel.",
    "other": "Whatever has no category of its own.",
}

_DENSE, _EXPERTS = "all but the routed experts", "the routed experts"
MEMORY_PARTS: Mapping[str, str] = {
    "weights.dense": f"Weights of {_DENSE}.",
    "weights.experts": f"Weights of {_EXPERTS}.",
    "gradients.dense": f"Gradients of {_DENSE}.",
    "gradients.experts": f"Gradients of {_EXPERTS}.",
    "cast_weights.dense": f"Copies for products of fp8 or fp4, beyond the weights themselves, of {_DENSE}.",
    "cast_weights.experts": f"Copies for products of fp8 or fp4, beyond the weights themselves, of {_EXPERTS}.",
    "master.dense": f"The fp32 copy of the weights of {_DENSE}.",
    "master.experts": f"The fp32 copy of the weights of {_EXPERTS}.",
    "optimizer.dense": f"Both moments of Adam for {_DENSE}.",
    "optimizer.experts": f"Both moments of Adam for {_EXPERTS}.",
    "gathered.dense": f"What ZeRO 2 and 3 gather for a moment: whole gradients, or weights, of {_DENSE}.",
    "gathered.experts": f"The same of {_EXPERTS}.",
    "activations.attention": "Kept for the backward pass by attention, norms and the residual stream.",
    "activations.router": "Kept by the router.",
    "activations.permuted_rows": "Kept copies of tokens in the order of experts.",
    "activations.experts": "Kept inside the routed experts, row by row as routed.",
    "activations.shared_experts": "Kept inside the shared experts.",
    "activations.dense_ffn": "Kept inside dense feed-forward networks.",
    "activations.embedding_head": "Kept by embedding and head, logits included.",
    "activations.one_layer": "All that one layer keeps, where the peak is in its backward pass (plain torch trainers).",
    "dispatch_buffers": "Copies sent and arrived in dispatch and combine, of the largest layer.",
    "repeated": "What the backward pass of one layer computes again.",
    "temporaries": "Gradients inside the largest layer.",
    "loss": "The loss in fp32 and its gradient, where the peak is there (plain torch trainers).",
    "reduction": "Flat copies of gradients that are being reduced, where the peak is there (plain torch trainers).",
    "allocator": "What the allocator holds beyond tensors: memory.allocator_overhead of all that comes and goes.",
    "workspace": "Scratch memory of the libraries of matrix products.",
    "reserved": "memory.reserved: context, communication buffers and what else is not there for tensors.",
}

ESTIMATE_SOURCES: Mapping[str, str] = {
    "measured": "Kernels of just these sizes that were measured on this GPU.",
    "interpolated": "Kernels between measured sizes.",
    "extrapolated": "Kernels beyond measured sizes.",
    "scaled": "Kernels measured on another GPU, scaled by ratios of peaks and bandwidths.",
    "roofline": "FLOPs over peak and bytes over bandwidth, with usual efficiencies.",
    "network": "Transfers: the model of the network with its calibrated shares and latencies.",
}


def _each(path: str, unit: str, texts: Mapping[str, str], before: str = "") -> dict[str, Definition]:
    return {f"{path}.{name}": Definition(unit, before + text) for name, text in texts.items()}


def _section(path: str, rows: Mapping[str, tuple[str, str]]) -> dict[str, Definition]:
    return {f"{path}.{name}": Definition(*row) for name, row in rows.items()}


_RUN = {
    "schema_version": Definition(NO_UNIT, "Version of this format."),
    "kind": Definition(NO_UNIT, "What was simulated: training."),
    "scenario_name": Definition(NO_UNIT, "Name of the scenario."),
    "world_size": Definition("ranks", "Ranks of the layout: data x context x tensor x pipeline."),
    "gpus": Definition("GPUs", "GPUs of the cluster; those without a rank are paid for all the same."),
    "samples": Definition(NO_UNIT, "Routing samples behind every mean: whole steps with other sequences of the trace."),
    "kernels": Definition(NO_UNIT, "Whose kernels were priced, and what they rest on."),
    "transfer_sources.[]": Definition(NO_UNIT, "What a kind of transfer or collective rests on, one text each."),
    "warnings.[]": Definition(NO_UNIT, "What to know before trusting the numbers, one text each."),
}

_TIME = {
    "step_time_s": Definition("s", "Duration of one optimizer step: mean over the samples."),
    "step_time_range_s.[]": Definition(
        "s",
        "Lower and upper end of the 90 % range of the step time: chance of routing and errors of kernels and transfers "
        "together, in squares of logs. Null where the part of the routing is not known.",
    ),
    "step_time_routing_range_s.[]": Definition(
        "s",
        "The part of the routing, from samples of resampled traces, around the mean: what tells two runs on one GPU "
        "apart. Null from one sample, a trace that is too small and a dense model.",
    ),
    "step_time_kernel_range_s.[]": Definition(
        "s", "The part of kernels and transfers: their known errors, one factor for each family and source."
    ),
    "step_time_errors.[].source": Definition(NO_UNIT, "What they rest on, as in `estimate_sources`, or `clock`."),
    "step_time_errors.[].family": Definition(NO_UNIT, "Kernels that share one error."),
    "step_time_errors.[].share": Definition("share", "Their seconds on the critical path / step time."),
    "step_time_errors.[].log_error": Definition(
        "log", "Log of the factor that nine of ten such predictions stay within, as measured."
    ),
    "step_time_errors.[].count": Definition("kernels", "On how many kernels that was measured."),
    "step_time_errors.[].how": Definition(NO_UNIT, "How it was measured."),
    "balanced_step_time_s": Definition(
        "s", "The same step with the same rows and copies spread evenly over experts and ranks: mean over the samples."
    ),
    "tokens_per_second": Definition(
        "tokens/s", "Tokens of a step / step time, all tokens counted, whatever is dropped."
    ),
    "tokens_per_second_per_gpu": Definition("tokens/s", "The same / all GPUs of the cluster."),
    "dropped_share": Definition("share", "Dropped rows / routed rows; a row is one token at one of its K experts."),
    "padded_share": Definition("share", "Padded rows / computed rows."),
}

_MFU = _section(
    "mfu",
    {
        "peak": (
            NO_UNIT,
            "The number format whose peak `causal` and `non_causal` divide by: that of the large products.",
        ),
        "causal": (
            "share",
            "Model FLOPs of a step / (ranks x dense peak x step time). Model FLOPs are three forward passes of every "
            "token with all K experts; of attention the causal half counts, of recomputation and padding nothing.",
        ),
        "non_causal": ("share", "The same with attention counted whole, as some publications do."),
        "causal_of_bf16_peak": ("share", "`causal` over the bf16 peak, so that runs in different formats compare."),
        "non_causal_of_bf16_peak": ("share", "`non_causal` over the bf16 peak."),
    },
)

_EFFECTIVE = _section(
    "effective",
    {
        "kept_share": ("share", "Computed rows without padding / (tokens x K): below 1 where rows are dropped."),
        "mfu_causal": ("share", "`mfu.causal` without the FLOPs of routed experts that were not spent."),
        "mfu_non_causal": ("share", "`mfu.non_causal`, likewise."),
        "usd_per_million_tokens": ("USD", "Price of a million tokens with all of their rows: the price / kept_share."),
    },
)

_PATH = {
    "critical_path.step_time_s": Definition("s", "Step time of the first sample, whose path this is."),
    "critical_path.last_rank": Definition("rank", "The rank that finished last, from which the path is walked back."),
    "critical_path.seconds_by_rank.*": Definition("s", "How long the path stays on a rank, by its number."),
}

_STAGES = _section(
    "stages",
    {
        "slowest_over_mean": ("ratio", "Seconds per micro-batch of the slowest pipeline rank / mean; 1 is even."),
        "pipeline_ranks.[].stages.[]": ("stage", "Stages of a pipeline rank."),
        "pipeline_ranks.[].layers.[]": ("layers", "Layers of each of them, those of multi-token prediction left out."),
        "pipeline_ranks.[].seconds_per_micro_batch": (
            "s",
            "Forward and backward pass of a micro-batch through all stages of the rank, without waiting.",
        ),
    },
)

_COMMUNICATION = _section(
    "communication",
    {
        "dispatch_bytes": (
            "B",
            "Bytes of dispatches in one step over all ranks, layers and passes; a copy to the own rank is none.",
        ),
        "combine_bytes": ("B", "The same of combines."),
        "intra_node_bytes": ("B", "Of both, what stays inside a node."),
        "inter_node_bytes": ("B", "Of both, what crosses nodes."),
        "copies_per_token": ("copies", "Copies of a token that leave its rank in one layer, mean."),
        "tensor_bytes": ("B", "Bytes of collectives inside layers, of tensor, context and expert-tensor parallelism."),
    },
)

_IMBALANCE = _section(
    "imbalance",
    {
        "expert": ("ratio", "Rows of the fullest expert / mean, by layer, micro-batch and expert group, averaged."),
        "rank_rows": ("ratio", "Rows of the fullest rank / mean, likewise."),
        "balancedness": (
            "ratio",
            "Mean of the ranks' rows / those of the fullest, likewise: what SGLang and EPLB report; 1 is even.",
        ),
        "rank_bytes": ("ratio", "Bytes that the busiest rank sends in dispatch / mean, likewise."),
        "rank_time": (
            "ratio",
            "Computing time of the busiest rank of the world in a step / mean, averaged over samples.",
        ),
        "uniform_floor": (
            "ratio",
            "What `expert` is by chance alone with a router that picks every expert equally often.",
        ),
        "uniform_floor_rank": ("ratio", "The same of `rank_rows`, under the router's group limit."),
        "window_tokens": ("tokens", "Tokens of one expert group's micro-batch: the window of the ratios above."),
        "whole_step_expert": (
            "ratio",
            "`expert` of the rows of the whole step and all samples: smaller, since chance evens out.",
        ),
        "whole_step_rank_rows": ("ratio", "`rank_rows`, likewise."),
        "cost_s": (
            "s",
            "Cost of imbalance: step time less that of the same step with equal loads, mean over the samples.",
        ),
    },
)

_PLACEMENT = _section(
    "placement",
    {
        "kind": (NO_UNIT, "Kind of the placement."),
        "split": (NO_UNIT, "How the rows of an expert split over its copies."),
        "experts": ("experts", "Experts of a layer."),
        "slots": ("slots", "Places for experts on the ranks of an expert group, in a layer: experts and copies."),
        "slots_per_rank": ("slots", "Those of one rank; of the one with most, where a list of slots is uneven."),
        "most_copies": ("slots", "Slots of the expert with most, of all layers."),
        "made_on": (
            NO_UNIT,
            "Part of the trace that it is made from: earlier (not the simulated part), same, or null for none.",
        ),
        "placing_sequences": ("sequences", "Sequences of the trace that it is made from."),
        "simulated_sequences": ("sequences", "Sequences of the trace that batches are drawn from."),
        "rank_rows_contiguous": (
            "ratio",
            "What `imbalance.rank_rows` were of the same rows with neighbouring experts on ranks and no copies; "
            "null where these do not spread evenly.",
        ),
        "rank_rows_by_speed": (
            "ratio",
            "Rows of the step / speed, of the rank where that is most, over all rows / all speeds; null without them.",
        ),
        "copy_gradient_bytes": ("B", "Bytes that ranks send each other to sum gradients of copies, in one step."),
        "searched.[].traffic": (
            "ratio",
            "Weight of traffic in a search that was simulated (`placement.measured`).",
        ),
        "searched.[].step_time_s": ("s", "Its step on the rows that experts are placed by; the shortest is taken."),
    },
) | _section(
    "placement.replacing",
    {
        "every": ("steps", "Training steps from one placing to the next; all of this is there with `placement.every`."),
        "mean_age": ("steps", "Since the experts were placed, in the mean: `step_time_s` of the run is such a step."),
        "moved_bytes": ("B", "Weights, master copies and moments of experts that ranks send each other, each time."),
        "moving_s": ("s", "How long that takes each time, with nothing beside it."),
        "moving_per_step_s": ("s", "The same / `every`."),
        "step_time_s": ("s", "Mean step with its share of moving, by the curve through `ages`."),
        "fresh_step_time_s": (
            "s",
            "The step with experts placed by the simulated router's own rows, by the curve.",
        ),
        "never_age": ("steps", "Since the first recorded step."),
        "never_step_time_s": (
            "s",
            "The step with experts placed at the first recorded step alone, by the curve.",
        ),
        "contiguous_step_time_s": ("s", "That with neighbouring experts; null where these do not spread evenly."),
        "best_every": ("steps", "The interval with the shortest mean step; null where placing once is no longer."),
        "best_step_time_s": ("s", "Mean step with that, its share of moving included."),
        "pays_from": ("steps", "The shortest interval that costs less than placing once; null where none does."),
        "ages.[].age": ("steps", "Since the experts were placed, in a simulated step."),
        "ages.[].step_time_s": ("s", "How long it takes."),
        "ages.[].mean_step_time_s": ("s", "The same on the curve: the nearest one that never falls as placements age."),
        "intervals.[].every": ("steps", "An interval."),
        "intervals.[].moved_bytes": ("B", "What is moved after it."),
        "intervals.[].moving_s": ("s", "How long that takes."),
        "intervals.[].step_time_s": (
            "s",
            "Mean step with it, its share of moving included.",
        ),
    },
)

_MEMORY = _section(
    "memory",
    {
        "peak_bytes": ("B", "Peak memory of the fullest rank in the fullest sample."),
        "peak_bytes_by_pipeline_rank.[]": ("B", "The same of each pipeline rank."),
        "capacity_bytes_by_pipeline_rank.[]": ("B", "Memory of the smallest GPU of each pipeline rank."),
        "fits_share": ("share", "Share of the samples in which every rank fits."),
        "fullest_pipeline_rank": ("rank", "The pipeline rank that comes closest to its capacity."),
    },
) | _each("memory.parts_bytes_by_pipeline_rank.[]", "B", MEMORY_PARTS)

_COST = _section(
    "cost",
    {
        "usd_per_step": ("USD", "Rent of all GPUs of the cluster for one step."),
        "usd_per_million_tokens": ("USD", "Rent of all GPUs for a million tokens."),
        "usd_total": ("USD", "Rent for workload.train_tokens; null without that."),
        "days": ("days", "How long workload.train_tokens take; null without that."),
        "price_source": (NO_UNIT, "Who says what a GPU costs: the scenario, or the catalogue's source."),
    },
)

_POOLS = _section(
    "pools.[]",
    {
        "name": (NO_UNIT, "Name of the pool."),
        "gpu": (NO_UNIT, "Its GPU."),
        "gpus": ("GPUs", "All of them."),
        "ranks": ("ranks", "Those with a rank."),
        "micro_batches": ("micro-batches", "What each data-parallel rank of the pool runs in a step."),
        "compute_s": ("s", "Computing time of a rank in a step, mean; null without ranks."),
        "slowest_speed": ("ratio", "Speed of its slowest rank over that of its kind (`cluster.speeds`)."),
        "peak_bytes": ("B", "Peak memory of its fullest rank; null without ranks."),
        "capacity_bytes": ("B", "Memory of one of its GPUs."),
        "fits_share": ("share", "Routing samples in which all of its ranks fit; null without ranks."),
        "usd_per_gpu_hour": ("USD/h", "Rent of one of its GPUs."),
        "usd_per_step": ("USD", "Rent of all of its GPUs for one step."),
        "price_source": (NO_UNIT, "Who says so."),
    },
)

_WAITING = _section(
    "waiting",
    {
        "jitter_s": (
            "s",
            "Of attribution_s.imbalance_wait, for ranks that are slower than others by chance: chips and hosts of one "
            "kind differ (cluster.jitter). At most so much, where other work hides a part.",
        ),
        "pairs.[].rank": ("rank", "Who waited."),
        "pairs.[].waits_for": ("rank", "For whom: the last to come to a transfer, or the sender of a p2p send."),
        "pairs.[].seconds": ("s", "How long in a step, hidden behind compute or not."),
        "waited_for.[].rank": ("rank", "A rank that others waited for."),
        "waited_for.[].seconds_of_others": ("s", "Seconds of all others together."),
    },
)

_SOFTWARE = _section(
    "software",
    {
        "name": (NO_UNIT, "The software whose kernels were priced."),
        "switches": (NO_UNIT, "Its switches that the scenario sets otherwise than it has them; empty: none."),
        "listed": (NO_UNIT, "How the list of its kernels was obtained."),
        "checked": (NO_UNIT, "Which of its steps were set beside measured ones."),
    },
)
_ROUTER = _section(
    "router",
    {
        "kind": (NO_UNIT, "Kind of the router whose choices were simulated."),
        "train_loss": (
            "nats per byte",
            "Its training loss at the end of the training; null where the trace knows none.",
        ),
        "validation_loss": (
            "nats per byte",
            "Its loss on held-out text, nothing dropped; null where the trace knows none.",
        ),
        "steps.[]": ("step", "Training steps at which its choices were recorded."),
        "imbalance_first": (
            "ratio",
            "Rows of the fullest expert / mean over all recorded tokens, at the first of these.",
        ),
        "imbalance_last": ("ratio", "The same at the last."),
        "rests_on": (NO_UNIT, "What its choices are: a router of the library, counts of whom, a draw, a recording."),
        "rests_on_how": (NO_UNIT, "How that was made: on which text, at which loss; or what it leaves out."),
        "model_default": (NO_UNIT, "Whether it is what the model gets where a scenario has no routing."),
        "sequences_rest_on": (
            NO_UNIT,
            "What cut the recording into sequences where it says nothing of them; null else.",
        ),
        "trace_hash": (NO_UNIT, "SHA-256 of the trace: the same routing has the same."),
        "trace_sequences": ("sequences", "Different sequences of the trace."),
        "batch_sequences": ("sequences", "Sequences of a batch, which are drawn from these."),
        "trace_coverage": ("ratio", "The first / the second: how far the trace carries a statement about the batch."),
        "reused_share": ("share", "Share of a batch's sequences that come twice in it."),
    },
)

_WHAT_IF = _section(
    "what_if.[]",
    {
        "name": (NO_UNIT, "The change: balanced_routing, double_bandwidth, no_overlap, no_group_limit."),
        "label": (NO_UNIT, "The same in words."),
        "step_time_s": ("s", "Step time with the change, simulated anew; null where it does not apply."),
        "difference_s": ("s", "The same less `step_time_s` of the run."),
        "usd_per_million_tokens": ("USD", "Price of a million tokens with the change."),
        "note": (NO_UNIT, "Why there is no answer; empty otherwise."),
    },
)

# Heading of a section of the reference, a sentence on all of it, and its definitions.
SECTIONS: Sequence[tuple[str, str, Mapping[str, Definition]]] = (
    ("The run", "What was simulated.", _RUN),
    ("Time and throughput", "The headline. Every mean is over the routing samples.", _TIME),
    ("MFU", "Model FLOPs utilisation.", _MFU),
    ("By the rows that were kept", "MFU and price count dropped rows as work; these do not.", _EFFECTIVE),
    (
        "Where the time goes",
        "Mean over ranks and samples. Every instant of a rank is in one category - computing wins over a transfer, "
        "that over a reduction, that over a p2p send, that over the host - so that they add up to the step time.",
        _each("attribution_s", "s", CATEGORY_DEFINITIONS),
    ),
    (
        "Where the time goes with equal loads",
        "The same of the step with the same rows spread evenly.",
        _each("attribution_balanced_s", "s", CATEGORY_DEFINITIONS),
    ),
    (
        "The critical path",
        "What the end of the step waited for, walked back from the rank that finished last, in the first sample. "
        "Waiting is not on it, since it is always where the work was, and transfers count whole.",
        _PATH | _each("critical_path.seconds", "s", CATEGORY_DEFINITIONS),
    ),
    ("Pipeline ranks", "How evenly the layers are split.", _STAGES),
    ("Communication", "Bytes of one step.", _COMMUNICATION),
    (
        "Imbalance",
        "The fullest over the mean: 1 is perfect. Taken over the rows of one micro-batch of one expert group in one "
        "layer, unless it says otherwise.",
        _IMBALANCE,
    ),
    ("Placement of experts", "Which rank holds which experts, and what that does to the load of ranks.", _PLACEMENT),
    ("Memory", "Peak of every pipeline rank, and its parts on its fullest rank, which add up to it.", _MEMORY),
    ("Cost", "Rent alone.", _COST),
    ("Pools", "What every pool of the cluster does and costs, a list.", _POOLS),
    (
        "Who waited for whom",
        "The pairs of ranks with most seconds, and the ranks that were waited for most, in the first sample; of rank "
        "groups that do the same one stands for all.",
        _WAITING,
    ),
    ("The router", "What the routing comes from.", _ROUTER),
    (
        "What the estimates rest on",
        "Share of the seconds of all operations, from the firmest source to the weakest; and whose kernels they are.",
        _each("estimate_sources", "share", ESTIMATE_SOURCES) | _SOFTWARE,
    ),
    ("What if", "Answers of `moesim run --what-if`, a list.", _WHAT_IF),
)
DEFINITIONS: Mapping[str, Definition] = {
    path: definition for _, _, section in SECTIONS for path, definition in section.items()
}


def definition(path: str) -> Definition | None:
    """What the number at the path of a result means; None where nobody has written it down."""
    return DEFINITIONS.get(path) or DEFINITIONS.get(f"{path}.[]") or DEFINITIONS.get(path.rpartition(".")[0] + ".*")


def paths(result: Any, path: str = "") -> set[str]:
    """The paths of all numbers and texts of a result; a null stands for what it could be, an empty list for nothing."""
    if isinstance(result, Mapping):
        below = [paths(value, f"{path}.{key}" if path else str(key)) for key, value in result.items()]
        return set().union(*below)
    if isinstance(result, list):
        return set().union(*(paths(item, f"{path}.[]") for item in result))
    return {path}
