"""The whole scenario: every section, and the checks that need more than one of them."""

from collections.abc import Mapping
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, WithJsonSchema

from moesim.scenario.base import (
    MOST_LAYERS,
    Bytes,
    DType,
    FileName,
    Flag,
    GemmFormat,
    Gpus,
    Layers,
    PositiveFloat,
    PositiveLayers,
    Samples,
    Section,
    Seed,
    Sequences,
    Share,
    Tokens,
    TrainTokens,
    one_of,
)
from moesim.scenario.cluster import Cluster, Compute, Dispatch, Network
from moesim.scenario.failures import Failures
from moesim.scenario.model import Model
from moesim.scenario.placement import Contiguous, Placement
from moesim.scenario.pools import micro_batches_of_pools
from moesim.scenario.routing import Capacity, NoCapacity, RouterShape, Routing, UniformRouting, resolve_router
from moesim.scenario.software import DEFAULT, RECIPES, Implementation, Recipe
from moesim.scenario.stages import stage_lengths
from moesim.schedules import PLAIN, SCHEDULES, ScheduleFacts

# Measured on two H200 (torch 2.11, CUDA 13): 0.74 GB for the context and the kernels of GEMMs and attention,
# 1.5 GB for the first NCCL communicator, 0.3 GB for each of three more, 0.47 GB for the first all-to-all; on two H100s
# 0.74, 0.89, 0.51 and 0.47 GB, which is as much.
RESERVED_BYTES = 3.6e9
# Measured likewise, as peak reserved / peak allocated - 1 of the activations of a 28-layer MoE whose rows differ by
# 10 to 30 % from layer to layer: 0.11 with PyTorch's allocator as it comes, 0.014 with expandable segments.
ALLOCATOR_OVERHEAD = 0.11
ZeroStage = Annotated[int, Field(ge=0, le=3, strict=True)]


class Zero(Section):
    """ZeRO stages of dense and expert parameters.

    1: optimizer states in shards, gradients reduced and weights gathered once a step. 2: gradients in shards as well,
    reduced behind every layer in every micro-batch. 3: weights in shards, too, gathered before every layer.
    """

    dense: ZeroStage = Field(
        default=0, description="ZeRO stage of attention, dense networks, embedding and head: 0 to 3."
    )
    expert: ZeroStage = Field(default=0, description="ZeRO stage of the routed experts: 0 to 3.")


ScheduleName = Annotated[str, one_of(SCHEDULES), WithJsonSchema({"enum": list(SCHEDULES), "type": "string"})]


class PipelineSchedule(Section):
    """In which order pipeline ranks work off micro-batches: one of the table `moesim.schedules.SCHEDULES`.

    Interleaved, rank r holds stages r, r + pipeline, and so on. Under dualpipe rank r holds stages r and
    pipeline - 1 - r, so that there are as many stages as ranks.
    """

    kind: ScheduleName = Field(default=PLAIN.name, description="In which order the pipeline works off micro-batches.")
    virtual: PositiveLayers = Field(
        default=1, description="Stages per rank of the interleaved schedules; 1 for all others."
    )

    @property
    def facts(self) -> ScheduleFacts:
        """The facts of the schedule."""
        return SCHEDULES[self.kind]


def list_or_word(value: object) -> str:
    """The form of a key that takes either."""
    return "<list>" if isinstance(value, list | tuple) else "<word>"


AnyBatchShare = Annotated[
    Annotated[Literal["even", "by_speed"], Tag("<word>")]
    | Annotated[tuple[Sequences, ...], Field(min_length=1, max_length=1_000), Tag("<list>")],
    Discriminator(list_or_word),
]


class Parallelism(Section):
    """World size = data * context * tensor * pipeline; ranks in the order tensor, context, data, pipeline (slowest).

    Layers with experts order the ranks of a stage anew (parallel folding): `expert_tensor` ranks with slices of the
    same experts are neighbours, an expert group is `expert` ranks at that stride. The embedding is on the first stage,
    the head and the layers of multi-token prediction on the last, beside its layers.
    """

    data: Gpus = Field(default=1, description="Data-parallel ranks, each with its own sequences.")
    context: Gpus = Field(default=1, description="Ranks that share the tokens of a sequence, in a ring.")
    tensor: Gpus = Field(default=1, description="Ranks that share each matrix of attention and dense networks.")
    pipeline: Gpus = Field(default=1, description="Ranks that share the layers.")
    expert: Gpus = Field(
        default=1, description="Ranks that share the experts of a layer, within data * context * tensor."
    )
    expert_tensor: Gpus = Field(default=1, description="Ranks that share each matrix of an expert.")
    zero: Zero = Field(default=Zero(), description="What data-parallel ranks keep in shards; absent: nothing.")
    schedule: PipelineSchedule = Field(
        default=PipelineSchedule(), description="Order of the pipeline's work; 1f1b if absent."
    )
    stages: Annotated[tuple[Layers, ...], Field(min_length=1, max_length=MOST_LAYERS)] | None = Field(
        default=None,
        description="Layers of each pipeline stage, first stage first; absent: so that ranks take about equally long, "
        "embedding, head and prediction layers counted.",
    )

    across_pools: Literal["pipeline", "data", "expert"] | None = Field(
        default=None,
        description="The axis whose ranks are on different pools. pipeline: whole stages in the order of the pools; "
        "data: every stage has data-parallel ranks of every pool; expert: every expert group has ranks of every pool. "
        "Absent: GPUs in the order of the pools run the ranks in theirs.",
    )
    batch_share: AnyBatchShare = Field(
        default="even",
        description="Micro-batches of data-parallel ranks on different pools. even: equally many; by_speed: in "
        "proportion to the estimated speed of their GPUs; a list: so many for each rank of each pool.",
    )

    @property
    def num_stages(self) -> int:
        """Stages that the layers are cut into: pipeline * virtual."""
        return self.pipeline * self.schedule.virtual

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.data * self.context * self.tensor * self.pipeline

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.data * self.context * self.tensor


class Precision(Section):
    """Number formats. Activations between kernels are bf16 whatever they are."""

    gemm: GemmFormat = Field(
        default="bf16",
        description="Number format of GEMMs; fp8 and fp4 leave head, router gate and attention in bf16.",
    )
    recipe: Literal["per_tensor", "blockwise", "mxfp8", "nvfp4"] | None = Field(
        default=None,
        description="How GEMMs of fp8 or fp4 are scaled: per_tensor, blockwise (as DeepSeek-V3), mxfp8 (fp8 of "
        "Blackwell) or nvfp4 (fp4 of Blackwell); absent: blockwise for fp8, nvfp4 for fp4.",
    )
    weights: DType = Field(default="bf16", description="Number format of the weights.")
    gradients: DType = Field(default="bf16", description="Number format of the gradients, in memory and when reduced.")
    master: Literal["none", "fp32"] = Field(
        default="none", description="Master copy of the weights; none: the optimizer updates them in place."
    )
    optimizer: DType = Field(default="fp32", description="Number format of the optimizer's two moments.")

    @property
    def scaling(self) -> Recipe | None:
        """The facts of the recipe; None for GEMMs of two bytes and more."""
        return RECIPES[self.recipe or DEFAULT[self.gemm]] if self.gemm in DEFAULT else None

    @property
    def kernels(self) -> str:
        """What kernel models call the format of the GEMMs."""
        return self.scaling.kernels if self.scaling else self.gemm

    @property
    def wide(self) -> str:
        """Format of what such GEMMs leave out."""
        return "bf16" if self.scaling else self.gemm


Recomputable = Literal[
    "rms_norm", "swiglu", "mla_up_projection", "core_attention", "dense_ffn", "shared_experts", "moe"
]
# Parts that not every model has: the key of the model that is 0 without them.
PART_NEEDS: Mapping[Recomputable, str] = MappingProxyType(
    {"dense_ffn": "dense_layers", "shared_experts": "shared_experts", "moe": "experts"}
)
SELECTIVE: frozenset[str] = frozenset({"rms_norm", "swiglu", "mla_up_projection"})


# The tags in angle brackets never show: they only keep pydantic from reporting both forms for one mistake.
AnyRecompute = Annotated[
    Annotated[Literal["none", "selective", "full"], Tag("<word>")]
    | Annotated[tuple[Recomputable, ...], Field(min_length=1), Tag("<list>")],
    Discriminator(list_or_word),
]


class Training(Section):
    """One optimizer step of `global_batch` sequences, in micro-batches of `micro_batch` sequences per rank.

    `recompute` says which activations the backward pass computes again instead of keeping them:
    `none`; a list of what is cheap to make again - `rms_norm` (outputs of norms), `swiglu` (the product of the two
    halves in any feed-forward network), `mla_up_projection` (queries, keys and values of latent attention from their
    compressed form) -, and of parts that keep their input alone: `core_attention` (scores, softmax and values),
    `dense_ffn`, `shared_experts`, `moe` (all behind the norm of a layer with experts, dispatch and combine included);
    `selective`, the first three; `full`, everything but the input of each layer, so that its forward pass runs twice.
    DeepSeek-V3 trained with [rms_norm, mla_up_projection].

    """

    kind: Literal["training"] = Field(default="training", description="One optimizer step of training.")
    sequence_length: Tokens = Field(description="Tokens of one sequence.")
    micro_batch: Sequences = Field(default=1, description="Sequences that a data-parallel rank computes at a time.")
    global_batch: Sequences = Field(description="Sequences of one optimizer step on all ranks together.")
    train_tokens: TrainTokens | None = Field(
        default=None, description="Tokens of the whole training, to give its price and days; absent: neither is given."
    )
    precision: Precision = Field(default=Precision(), description="Number formats; bf16 with fp32 moments if absent.")
    recompute: AnyRecompute = Field(default="none", description="Activations that the backward pass computes again.")
    gradient_clipping: PositiveFloat | None = Field(
        default=None,
        description="Largest norm of all gradients together, a global sum before the optimizer; absent: no limit.",
    )

    @property
    def recomputed_parts(self) -> frozenset[str]:
        """Which parts of a layer are computed again one by one; empty for `none` and for `full`."""
        if isinstance(self.recompute, tuple):
            return frozenset(self.recompute)
        return SELECTIVE if self.recompute == "selective" else frozenset()


class Overlap(Section):
    """What runs beside what. Absent means what the implementation does by itself."""

    shared_experts: Flag | None = Field(
        default=None,
        description="Whether shared experts run beside dispatch and combine; absent: as the implementation does.",
    )
    micro_batches: Flag | None = Field(
        default=None,
        description="Whether, in a pair of the dualpipe or combined_1f1b schedule, dispatch and combine of one "
        "micro-batch run beside the compute of the other; absent: as the implementation does.",
    )
    gradient_reduction: Flag | None = Field(
        default=None,
        description="Whether gradients are reduced beside the last backward passes, and under ZeRO 2 and 3 gathered "
        "and reduced beside the neighbouring layers; absent: as the implementation does.",
    )
    parameter_gather: Flag = Field(
        default=False,
        description="Whether, under ZeRO 1, updated weights are gathered layer by layer beside the first forward pass "
        "instead of behind the optimizer.",
    )
    weight_gradients: Flag = Field(
        default=False,
        description="Whether the experts' gradients of weights are put off beside the exchange that brings the "
        "gradients of tokens back.",
    )


class Uncertainty(Section):
    """Routing samples behind every headline number and the routing's part of its 90 % range."""

    samples: Samples = Field(default=8, description="Routing samples; 1: the range is of kernels alone.")
    bank: Samples = Field(
        default=8, description="Micro-batches whose sequences a sample draws; further ones use them in turn."
    )


class Memory(Section):
    """GPU memory that tensors cannot use."""

    reserved: Bytes = Field(
        default=RESERVED_BYTES, description="Memory of each GPU for the driver's context, libraries and communicators."
    )
    allocator_overhead: Share = Field(
        default=ALLOCATOR_OVERHEAD,
        description="What fragmentation takes, as a share of the memory for activations, buffers and temporaries.",
    )
    check: Literal["refuse", "warn"] = Field(
        default="refuse",
        description="Whether a layout that does not fit is refused, or simulated all the same with a warning.",
    )


class Scenario(Section):
    """One simulation, fully described: the only input of `moesim.run.simulate`."""

    schema_version: Annotated[int, Field(ge=1, le=1, strict=True)] = Field(
        default=1, description="Version of this format."
    )
    name: FileName = Field(description="Name of the scenario and of the folder of its run.")
    model: Model = Field(description="The language model: a preset, a config.json, or its architecture.")
    routing: Routing = Field(
        default=UniformRouting(kind="uniform"),
        description="How tokens choose experts; absent: as model.routing says.",
    )
    capacity: Capacity = Field(
        default=NoCapacity(), description="Limit on the rows of an expert or a rank; absent: none."
    )
    placement: Placement = Field(
        default=Contiguous(), description="Which rank holds which experts; absent: neighbouring experts on each rank."
    )
    cluster: Cluster = Field(description="The GPUs and the links between them.")
    parallelism: Parallelism = Field(default=Parallelism(), description="How ranks share the work; absent: one rank.")
    workload: Training = Field(description="What one step trains on, and in which number formats.")
    dispatch: Dispatch = Field(default=Dispatch(), description="How tokens travel to experts on other ranks and back.")
    implementation: Implementation = Field(
        default=Implementation(), description="The software that is simulated: its name, or a mapping with its kind."
    )
    overlap: Overlap = Field(
        default=Overlap(), description="What runs beside what; absent: as the implementation does."
    )
    memory: Memory = Field(
        default=Memory(), description="GPU memory that is not there for tensors; absent: as measured on H200."
    )
    network: Network = Field(
        default=Network(), description="Model of the network: how transfers share the links; ports if absent."
    )
    compute: Compute = Field(
        default=Compute(), description="Source of kernel durations; absent: the best that there is for the GPU."
    )
    uncertainty: Uncertainty = Field(
        default=Uncertainty(), description="Routing samples behind each number and its range."
    )
    failures: Failures | None = Field(
        default=None,
        description="What stops the job and how it goes on, for `moesim goodput`; a step knows nothing of it. "
        "Absent: published rates, synchronous checkpoints.",
    )
    seed: Seed = Field(
        default=0, description="Seed of all random draws; the same seed gives the same result to the bit."
    )

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, without what was worked out from fields that the copy may have otherwise."""
        copied = super().model_copy(update=update, deep=deep)
        vars(copied).pop("stage_layers", None)
        return copied

    @property
    def shared_beside(self) -> bool:
        """Whether shared experts run beside dispatch and combine, as said or as the software does by itself."""
        said = self.overlap.shared_experts
        return self.implementation.software.shared_beside if said is None else said

    @property
    def reduces_beside(self) -> bool:
        """Whether gradients are reduced beside the last backward pass, as said or as the software does by itself."""
        said = self.overlap.gradient_reduction
        return self.implementation.software.reduces_beside if said is None else said

    @property
    def gathers_beside(self) -> bool:
        """Whether updated weights are gathered beside the first forward pass: under ZeRO 1, where it is said."""
        zero = self.parallelism.zero
        return self.overlap.parameter_gather and max(zero.dense, zero.expert) == 1

    def router_shape(self) -> RouterShape:
        """The router with its aliases resolved; `kind` is "trace" when a recorded trace brings its own."""
        return resolve_router(self.routing, model=self.model, num_devices=self.parallelism.expert)

    @property
    def slots_per_rank(self) -> int:
        """Experts of each layer that a rank holds, copies included; of the rank with most."""
        if self.model.experts == 0:
            return 0
        return max(
            self.placement.slots_of_ranks(num_experts=self.model.experts, num_ranks=self.parallelism.expert), default=0
        )

    def with_bandwidth(self, factor: float) -> "Scenario":
        """The scenario with `factor` times the bandwidth on every link; latencies stay."""
        fabric = self.cluster.fabric
        faster = fabric.model_copy(update={"bandwidth_factor": factor * fabric.bandwidth_factor})
        return self.model_copy(update={"cluster": self.cluster.model_copy(update={"fabric": faster})})

    def with_stages_listed(self) -> "Scenario":
        """The scenario with its split into stages written out: changes to it then move no layer."""
        if self.parallelism.num_stages == 1:
            return self
        listed = self.parallelism.model_copy(update={"stages": stage_lengths(self)})
        return self.model_copy(update={"parallelism": listed})

    @cached_property
    def stage_layers(self) -> tuple[range, ...]:
        """The layers of every stage, numbered from 0 through the model; see `moesim.scenario.stages`.

        Asked for thousands of times in one run, so it is worked out once; `model_copy` leaves it behind.
        """
        lengths = stage_lengths(self)
        ends = tuple(accumulate(lengths))
        return tuple(range(end - length, end) for end, length in zip(ends, lengths, strict=True))

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that each rank runs in one step: global_batch / (data * micro_batch), the most of all."""
        if self.parallelism.batch_share == "even":
            return self.workload.global_batch // (self.parallelism.data * self.workload.micro_batch)
        return max(self.micro_batches_of_pools)

    @property
    def micro_batches_of_pools(self) -> tuple[int, ...]:
        """The same of the ranks of every pool, where pools share the batch by speed or as listed."""
        return micro_batches_of_pools(self)

    @property
    def num_drawn_micro_batches(self) -> int:
        """Micro-batches with sequences of their own; micro-batch m holds those of m mod this number."""
        return min(self.num_micro_batches, self.uncertainty.bank)

    @property
    def tokens_per_micro_batch(self) -> int:
        """Tokens of one micro-batch of one data-parallel rank."""
        return self.workload.micro_batch * self.workload.sequence_length

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of one micro-batch on one rank: context and tensor ranks share those of a data-parallel rank."""
        return self.tokens_per_micro_batch // (self.parallelism.context * self.parallelism.tensor)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self.workload.global_batch * self.workload.sequence_length

    @property
    def idle_gpus(self) -> int:
        """GPUs of the cluster without a rank; they are paid for all the same."""
        return self.cluster.num_gpus - self.parallelism.world_size
