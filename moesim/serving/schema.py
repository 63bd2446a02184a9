"""The sections of a serving scenario; model, routing, cluster, dispatch and compute are those of a training one."""

from typing import Annotated, Literal

from pydantic import Field

from moesim.scenario import Cluster, Compute, Dispatch, Model, Network, Routing, UniformRouting
from moesim.scenario.base import (
    Bytes,
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
Seconds = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1e6)]


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


class TraceArrivals(Section):
    """Requests of a log: CSV with a time and two numbers of tokens in each line, as Azure and BurstGPT publish them."""

    kind: Literal["trace"] = Field(description="Arrivals and lengths of a CSV file.")
    file: Text = Field(description="The CSV file, relative to this one.")
    speed: PositiveFloat = Field(default=1.0, description="How many times as fast the requests come as in the file.")


Arrivals = Annotated[Poisson | Gamma | TraceArrivals, Field(discriminator="kind")]


class Slo(Section):
    """What a good answer is, and how many must be good."""

    ttft: Seconds | None = Field(default=None, description="Longest seconds to the first token; absent: any.")
    tpot: Seconds | None = Field(
        default=None, description="Longest mean seconds per token behind the first; absent: any."
    )
    share: Share = Field(default=0.9, description="Share of the requests that must meet both.")


class Serving(Section):
    """The requests, and in which number formats they are answered."""

    kind: Literal["serving"] = Field(description="Requests that are answered, token by token.")
    arrivals: Arrivals = Field(description="When requests come and how long they are.")
    requests: Requests = Field(default=1_000, description="Requests that are simulated; of a trace the first so many.")
    weights: Literal["bf16", "fp8", "int4"] = Field(
        default="bf16", description="Number format that weights of experts and projections are stored in."
    )
    gemm: Literal["bf16", "fp8"] = Field(default="bf16", description="Number format of the products.")
    kv: Literal["bf16", "fp8"] = Field(default="bf16", description="Number format of stored keys and values.")
    slo: Slo = Field(default=Slo(), description="Limits of good answers; absent: all are good.")


class Engine(Section):
    """How a rank forms its batches."""

    batching: Literal["continuous", "static"] = Field(
        default="continuous",
        description="continuous: requests join and leave between steps; static: a batch is answered to its end.",
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
    host: Latency = Field(default=0.0, description="Seconds of the host in every step that nothing hides.")


class ServingParallelism(Section):
    """Groups of `tensor` ranks hold the attention of one batch each; `data` of them serve side by side."""

    data: Gpus = Field(default=1, description="Groups of ranks with batches of their own.")
    tensor: Gpus = Field(default=1, description="Ranks that share the heads and dense matrices of one batch.")
    expert: Gpus = Field(
        default=1,
        description="Ranks that the experts are spread over: 1 (each data group holds all) or all ranks, which then "
        "take their steps together.",
    )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.data * self.tensor


class ServingMemory(Section):
    """Memory of a GPU that neither weights nor keys and values can use."""

    reserved: Bytes = Field(
        default=RESERVED_BYTES, description="Memory of each GPU for the driver's context, libraries and communicators."
    )
    share: Share = Field(default=0.9, description="Share of what weights and activations leave that pages may take.")


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
    cluster: Cluster = Field(description="The GPUs and the links between them.")
    parallelism: ServingParallelism = Field(default=ServingParallelism(), description="How ranks share the work.")
    workload: Serving = Field(description="The requests and what they are answered in.")
    engine: Engine = Field(default=Engine(), description="How batches are formed.")
    memory: ServingMemory = Field(default=ServingMemory(), description="Memory that is not there for pages.")
    dispatch: Dispatch = Field(default=Dispatch(), description="How tokens travel to experts on other ranks and back.")
    network: Network = Field(default=Network(), description="Model of the network; ports if absent.")
    compute: Compute = Field(default=Compute(), description="Source of kernel durations.")
    seed: Seed = Field(default=0, description="Seed of all random draws.")
