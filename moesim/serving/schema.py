"""The sections of a serving scenario; model, routing, cluster, dispatch and compute are those of a training one."""

from typing import Annotated, Literal

from pydantic import Field

from moesim.scenario import Cluster, Compute, Dispatch, Model, Network, Routing, UniformRouting
from moesim.scenario.base import (
    Bandwidth,
    Bytes,
    CapacityFactor,
    Experts,
    FileName,
    Flag,
    Gpus,
    Latency,
    PositiveFloat,
    Section,
    Seed,
    Share,
    Text,
    Tokens,
)
from moesim.scenario.schema import RESERVED_BYTES

Rate = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=1e-6, le=1e7)]
Requests = Annotated[int, Field(strict=True, gt=0, le=10_000_000)]
PositiveShare = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1)]
Seconds = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1e6)]

# Why serving has no compute.host_factor: hosts are the software's there.
HOST_ELSEWHERE = "changes no step of serving, whose software states its host; set engine.host, or leave it out"


class FixedLength(Section):
    """All requests alike."""

    kind: Literal["fixed"] = Field(description="Every request has as many tokens.")
    tokens: Tokens = Field(description="Tokens of a request.")


class LogNormalLength(Section):
    """Lengths of a log-normal law, rounded to whole tokens, at least 1."""

    kind: Literal["log_normal"] = Field(description="Lengths follow a log-normal law.")
    mean: PositiveFloat = Field(description="Mean tokens of a request, before the cut at `most`.")
    variation: PositiveFloat = Field(default=1.0, description="Standard deviation over mean.")
    most: Tokens = Field(default=131_072, description="Longer requests are cut to so many tokens.")


Length = Annotated[FixedLength | LogNormalLength, Field(discriminator="kind")]


class Poisson(Section):
    """Requests that know nothing of each other."""

    kind: Literal["poisson"] = Field(description="Independent arrivals.")
    rate: Rate = Field(description="Requests per second, on all GPUs together.")
    input: Length = Field(description="Tokens of the prompts.")
    output: Length = Field(description="Tokens that are generated.")


class Gamma(Section):
    """Bursts: gaps between requests follow a Gamma law."""

    kind: Literal["gamma"] = Field(description="Arrivals in bursts.")
    rate: Rate = Field(description="Requests per second, on all GPUs together.")
    variation: PositiveFloat = Field(default=2.0, description="Standard deviation over mean of the gaps; 1: poisson.")
    input: Length = Field(description="Tokens of the prompts.")
    output: Length = Field(description="Tokens that are generated.")


class LogColumns(Section):
    """Columns of a log by the names that its first line gives them; absent: by those that publishers give."""

    time: Text | None = Field(default=None, description="Column of the time of arrival.")
    input: Text | None = Field(default=None, description="Column of the tokens of the prompt.")
    output: Text | None = Field(default=None, description="Column of the tokens that are generated.")


class TraceArrivals(Section):
    """Requests of a log: CSV with a time and two numbers of tokens in each line, as Azure and BurstGPT publish them."""

    kind: Literal["trace"] = Field(description="Arrivals and lengths of a CSV file.")
    file: Text = Field(description="The CSV file, relative to this one.")
    speed: PositiveFloat = Field(default=1.0, description="How many times as fast the requests come as in the file.")
    unit: Literal["s", "ms", "us"] = Field(
        default="s", description="Unit of times that are numbers, where the name of their column says none."
    )
    columns: LogColumns | None = Field(default=None, description="Columns that are called otherwise; absent: none are.")


Arrivals = Annotated[Poisson | Gamma | TraceArrivals, Field(discriminator="kind")]


class Slo(Section):
    """What a good answer is, and how many must be good."""

    ttft: Seconds | None = Field(default=None, description="Longest seconds to the first token; absent: any.")
    tpot: Seconds | None = Field(
        default=None, description="Longest mean seconds per token behind the first; absent: any."
    )
    share: Annotated[Share, Field(gt=0)] = Field(
        default=0.9, description="Share of the requests that must meet both; above 0."
    )


class Prefixes(Section):
    """Beginnings that prompts share: system prompts, tools, examples. They come on top of the prompts' own tokens."""

    number: Requests = Field(description="Different prefixes.")
    tokens: Tokens = Field(description="Tokens of a prefix, before those that the arrivals draw.")
    share: Share = Field(default=1.0, description="Share of the requests that begin with one.")
    skew: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=10)] = Field(
        default=1.0, description="Prefix number n is chosen as often as n to the power of -skew; 0: all alike."
    )


class Priorities(Section):
    """Classes of requests, the most urgent first. An urgent one overtakes those that came shortly before it."""

    shares: tuple[Share, ...] = Field(
        min_length=2,
        max_length=16,
        description="Shares of the requests by class, the most urgent first, 1 in all.",
    )
    patience: Seconds = Field(
        default=60.0,
        description="Seconds by which a request is put behind those of the next more urgent class.",
    )


class Serving(Section):
    """The requests, and in which number formats they are answered."""

    kind: Literal["serving"] = Field(description="Requests that are answered, token by token.")
    arrivals: Arrivals = Field(description="When requests come and how long they are.")
    requests: Requests = Field(default=1_000, description="Requests that are simulated; of a trace the first so many.")
    weights: Literal["bf16", "fp8", "int4"] = Field(
        default="bf16", description="Number format that weights of experts and projections are stored in."
    )
    gemm: Literal["bf16", "fp8"] = Field(default="bf16", description="Number format of the GEMMs.")
    kv: Literal["bf16", "fp8"] = Field(default="bf16", description="Number format of stored keys and values.")
    slo: Slo = Field(default=Slo(), description="Limits of good answers; absent: all are good.")
    prefixes: Prefixes | None = Field(default=None, description="Beginnings that prompts share; absent: none.")
    priorities: Priorities | None = Field(default=None, description="Classes of requests; absent: all are alike.")


class Speculation(Section):
    """Tokens that are drafted and checked together with the next one."""

    draft: Literal["mtp", "lookup"] = Field(
        default="mtp",
        description="Who drafts: mtp, a layer of multi-token prediction, run once for each drafted token; lookup, "
        "matches in the prompt, at no cost.",
    )
    acceptance: tuple[Share, ...] = Field(
        min_length=1,
        max_length=16,
        description="For each drafted token in turn the probability that it is accepted when those before it were, "
        "independently of all else: [0.85, 0.7] drafts two and gives 1 + 0.85 + 0.85 x 0.7 tokens a step in the mean.",
    )


class Engine(Section):
    """How a rank forms its batches."""

    batching: Literal["continuous", "static", "by_length"] = Field(
        default="continuous",
        description="continuous: requests join and leave between steps; static: what waits is taken, up to running and "
        "the memory, and answered to its end; "
        "by_length: a static batch of requests of like length, as many as token_budget holds when all are padded to "
        "the longest.",
    )
    token_budget: Tokens = Field(default=8_192, description="Tokens that a rank computes in one step at most.")
    running: Annotated[int, Field(strict=True, gt=0, le=65_536)] = Field(
        default=256, description="Requests that a rank works on at a time at most."
    )
    chunked_prefill: Flag = Field(
        default=True, description="Whether a prompt may be cut to fit beside the tokens that are generated."
    )
    page: Annotated[int, Field(strict=True, gt=0, le=65_536)] = Field(
        default=64, description="Tokens of one page of keys and values."
    )
    host: Latency = Field(
        default=0.0,
        description="Seconds of the host in every step beside those of software; hidden where it hides its own.",
    )
    software: Literal[
        "fused",
        "fused_sync",
        "torch_graphs",
        "torch_compiled",
        "torch_eager",
        "transformers",
        "transformers_flash",
        "transformers_graphs",
        "transformers_async",
    ] = Field(
        default="fused",
        description="What runs a step: fused, an engine with fused kernels, CUDA graphs, and a host that schedules "
        "beside the GPU (fused_sync: while it waits); or plain torch, as CUDA "
        "graphs, compiled and as CUDA graphs, or launched kernel by kernel; or continuous batching of transformers on "
        "one GPU, with its attention, with FlashAttention, with CUDA graphs, and with the host beside the GPU.",
    )
    sampling: Literal["greedy", "drawn", "top_50"] = Field(
        default="greedy",
        description="How a token is chosen: the largest, a draw, or a draw among the 50 largest.",
    )
    preemption: Literal["recompute", "swap"] = Field(
        default="recompute",
        description="What becomes of the keys and values of a request that is preempted: computed again, or moved to "
        "host memory and back (while it has room).",
    )
    host_memory: Bytes = Field(default=64e9, description="Host memory of a GPU that keys and values may be moved to.")
    host_link: Bandwidth = Field(
        default=25e9, description="Bandwidth between a GPU and host memory, each way; PCIe 4 x16 moves about 25 GB/s."
    )
    prefix_cache: Flag = Field(
        default=True, description="Whether keys and values of shared prefixes are kept and found again."
    )
    balancing: Literal["least_loaded", "by_prefix"] = Field(
        default="least_loaded",
        description="Which data group a request goes to: that with the fewest; or one that knows its prefix, unless it "
        "has over twice as many and four more than the emptiest.",
    )
    speculation: Speculation | None = Field(default=None, description="Drafted tokens; absent: one token a step.")
    expert_placement: Literal["contiguous", "eplb"] = Field(
        default="contiguous",
        description="Which rank holds which experts: neighbours, or as DeepSeek's balancer places them by the rows of "
        "the whole routing trace.",
    )
    redundant_experts: Experts = Field(
        default=0,
        description="Copies of experts beside one of each, on all ranks together, placed by eplb: they take memory, "
        "and an expert's rows are split over its copies.",
    )
    two_batches: Flag = Field(
        default=False,
        description="Whether the requests of a step are halved so that one half is computed while dispatch and combine "
        "of the other are on their way.",
    )
    capacity_factor: CapacityFactor | None = Field(
        default=None,
        description="Rows that an expert takes in a step at most, as a multiple of their mean over experts (rounded "
        "up); the others are dropped. Absent: none.",
    )


class ServingParallelism(Section):
    """Groups of `tensor` ranks hold the attention of one batch each; `data` of them serve side by side."""

    data: Gpus = Field(default=1, description="Groups of ranks with batches of their own.")
    tensor: Gpus = Field(default=1, description="Ranks that share the heads and dense matrices of one batch.")
    pipeline: Gpus = Field(
        default=1,
        description="Stages that the layers are cut into; every data group then works on as many batches in turn.",
    )
    expert: Gpus = Field(
        default=1,
        description="Ranks that the experts are spread over: 1 (each data group holds all) or all ranks of a stage, "
        "which then take their steps together.",
    )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.data * self.tensor * self.pipeline

    @property
    def stage_size(self) -> int:
        """Ranks of a stage."""
        return self.data * self.tensor


class PrefillPool(Section):
    """Instances that compute prompts alone; the deployment's own parallelism and engine then are those that decode."""

    replicas: Gpus = Field(default=1, description="Prefill instances, each with all weights.")
    parallelism: ServingParallelism = Field(
        default=ServingParallelism(), description="How the ranks of a prefill instance share the work."
    )
    token_budget: Tokens = Field(default=8_192, description="Tokens that a rank computes in one prefill step at most.")
    redundant_experts: Experts = Field(
        default=0, description="Copies of experts on a prefill instance, as engine.redundant_experts."
    )
    dispatch: Dispatch | None = Field(
        default=None,
        description="How tokens of prompts travel to experts: engines take kernels for many tokens here, as "
        "hierarchical, where decoding takes those of low latency. Absent: as dispatch.",
    )
    two_batches: Flag | None = Field(
        default=None, description="As engine.two_batches, on prefill instances; absent: as there."
    )
    transfer: Literal["by_layer", "at_end"] = Field(
        default="by_layer",
        description="When keys and values are sent to the decode instance: those of a layer as soon as it is computed, "
        "beside the layers behind it, or all at the end of the prompt.",
    )
    nic_share: PositiveShare = Field(
        default=1.0, description="Share of a GPU's bandwidth to other instances that sending keys and values gets."
    )


class Fleet(Section):
    """Instances of a deployment side by side, each request given to the least loaded one."""

    replicas: Gpus = Field(
        default=1, description="Instances with `parallelism` and all weights; with prefill those that decode."
    )
    prefill: PrefillPool | None = Field(
        default=None, description="Instances of their own for prompts (prefill/decode disaggregation); absent: none."
    )


class ServingMemory(Section):
    """Memory of a GPU that neither weights nor keys and values can use."""

    reserved: Bytes = Field(
        default=RESERVED_BYTES, description="Memory of each GPU for the driver's context, libraries and communicators."
    )
    share: PositiveShare = Field(
        default=0.9, description="Share of what weights and activations leave that pages may take."
    )


class ServingScenario(Section):
    """One deployment under one load: the only input of `moesim.serving.serve`."""

    schema_version: Annotated[int, Field(ge=1, le=1, strict=True)] = Field(
        default=1, description="Version of this format."
    )
    name: FileName = Field(description="Name of the scenario.")
    model: Model = Field(description="The language model: a preset, a config.json, or its architecture.")
    routing: Routing = Field(
        default=UniformRouting(kind="uniform"), description="How tokens choose experts; uniform where absent."
    )
    decode_routing: Routing | None = Field(
        default=None,
        description="How generated tokens choose experts, where that was recorded apart; absent: as routing.",
    )
    cluster: Cluster = Field(description="The GPUs and the links between them.")
    parallelism: ServingParallelism = Field(default=ServingParallelism(), description="How ranks share the work.")
    fleet: Fleet = Field(default=Fleet(), description="Instances side by side, and those for prompts alone.")
    workload: Serving = Field(description="The requests and what they are answered in.")
    engine: Engine = Field(default=Engine(), description="How batches are formed.")
    memory: ServingMemory = Field(default=ServingMemory(), description="Memory that is not there for pages.")
    dispatch: Dispatch = Field(default=Dispatch(), description="How tokens travel to experts on other ranks and back.")
    network: Network = Field(default=Network(), description="Model of the network; ports if absent.")
    compute: Compute = Field(default=Compute(), description="Source of kernel durations.")
    seed: Seed = Field(default=0, description="Seed of all random draws.")
