"""The whole scenario: every section, and the checks that need more than one of them."""

from itertools import accumulate
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from moesim.scenario.base import Bytes, Count, DType, Flag, PositiveFloat, PositiveInt, Section, Share
from moesim.scenario.cluster import Cluster, Contiguous, Dispatch, Network, Placement
from moesim.scenario.model import Model
from moesim.scenario.routing import Capacity, NoCapacity, RouterShape, Routing, UniformRouting, resolve_router

# Measured on two H200 (torch 2.11, CUDA 13): 0.74 GB for the context and the kernels of matrix products and attention,
# 1.5 GB for the first NCCL communicator, 0.3 GB for each of three more, 0.47 GB for the first all-to-all.
RESERVED_BYTES = 3.6e9
# Measured likewise, as peak reserved / peak allocated - 1 of the activations of a 28-layer MoE whose rows differ by
# 10 to 30 % from layer to layer: 0.11 with PyTorch's allocator as it comes, 0.014 with expandable segments.
ALLOCATOR_OVERHEAD = 0.11


class Zero(Section):
    """ZeRO stages of dense and expert parameters.

    1: optimizer states in shards, gradients reduced and weights gathered once a step. 2: gradients in shards as well,
    reduced behind every layer in every micro-batch. 3: weights in shards, too, gathered before every layer.
    """

    dense: Annotated[int, Field(ge=0, le=3, strict=True)] = 0
    expert: Annotated[int, Field(ge=0, le=3, strict=True)] = 0


class PipelineSchedule(Section):
    """In which order pipeline ranks work off micro-batches; see `moesim.parallel.schedules_orders`.

    `virtual` is the number of stages per rank of the interleaved kind: rank r holds stages r, r + pipeline, and so on.
    Under dualpipe rank r holds stages r and pipeline - 1 - r, so that there are as many stages as ranks.
    """

    kind: Literal["gpipe", "1f1b", "interleaved", "zb_h1", "dualpipe"] = "1f1b"
    virtual: PositiveInt = 1


class Parallelism(Section):
    """World size = data * context * tensor * pipeline; ranks in the order tensor, context, data, pipeline (slowest).

    Layers with experts order the ranks of a stage anew (parallel folding): `expert_tensor` ranks with slices of the
    same experts are neighbours, an expert group is `expert` ranks at that stride. `stages` is the number of layers of
    each stage of the pipeline, first stage first; absent means as even as possible, the first stages one layer longer.
    The embedding is on the first stage, the head and the layers of multi-token prediction on the last, beside its
    layers.
    """

    data: PositiveInt = 1
    context: PositiveInt = 1
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    expert: PositiveInt = 1
    expert_tensor: PositiveInt = 1
    zero: Zero = Zero()
    schedule: PipelineSchedule = PipelineSchedule()
    stages: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None

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
    """Number formats: `master` is the master copy of weights (none when the optimizer updates them in place).

    `gemm` is that of all matrix products and attention; with fp8 head, router gate and attention stay in bf16.
    Activations between kernels are bf16 whatever it is.
    """

    gemm: DType = "bf16"
    weights: DType = "bf16"
    gradients: DType = "bf16"
    master: Literal["none", "fp32"] = "none"
    optimizer: DType = "fp32"


Recomputable = Literal["rms_norm", "swiglu", "mla_up_projection"]
SELECTIVE: frozenset[str] = frozenset({"rms_norm", "swiglu", "mla_up_projection"})


def _recompute_form(value: object) -> str:
    return "<list>" if isinstance(value, list | tuple) else "<word>"


# The tags in angle brackets never show: they only keep pydantic from reporting both forms for one mistake.
AnyRecompute = Annotated[
    Annotated[Literal["none", "selective", "full"], Tag("<word>")]
    | Annotated[tuple[Recomputable, ...], Field(min_length=1), Tag("<list>")],
    Discriminator(_recompute_form),
]


class Training(Section):
    """One optimizer step of `global_batch` sequences, in micro-batches of `micro_batch` sequences per rank.

    `recompute` says which activations the backward pass computes again instead of keeping them:
    `none`; a list of what is cheap to make again - `rms_norm` (outputs of norms), `swiglu` (the product of the two
    halves in any feed-forward network), `mla_up_projection` (queries, keys and values of latent attention from their
    compressed form); `selective`, all of these; `full`, everything but the input of each layer, so that its forward
    pass, dispatch and combine included, runs twice. DeepSeek-V3 trained with [rms_norm, mla_up_projection].

    `gradient_clipping` is the largest allowed norm of all gradients together: a global sum before the optimizer.
    """

    kind: Literal["training"] = "training"
    sequence_length: PositiveInt
    micro_batch: PositiveInt = 1
    global_batch: PositiveInt
    train_tokens: PositiveFloat | None = None
    precision: Precision = Precision()
    recompute: AnyRecompute = "none"
    gradient_clipping: PositiveFloat | None = None

    @property
    def recomputed_parts(self) -> frozenset[str]:
        """Which parts of a layer are computed again one by one; empty for `none` and for `full`."""
        if isinstance(self.recompute, tuple):
            return frozenset(self.recompute)
        return SELECTIVE if self.recompute == "selective" else frozenset()


class Overlap(Section):
    """What runs beside what. Absent means what the implementation does by itself.

    `shared_experts`: beside dispatch and combine. `micro_batches`: in a pair of the dualpipe schedule, dispatch and
    combine of one micro-batch beside the compute of the other. `gradient_reduction`: beside the last backward passes;
    under ZeRO 2 and 3 reductions and gathers lie beside the neighbouring layers unless it is false.
    """

    shared_experts: Flag | None = None
    micro_batches: Flag | None = None
    gradient_reduction: Flag | None = None


class Implementation(Section):
    """Which software is simulated; `moesim.sim.fused` and `moesim.sim.torch_eager` list its kernels."""

    kind: Literal["fused", "torch_eager"] = "fused"


class Uncertainty(Section):
    """Routing samples behind every headline number and its 90 % range.

    Each sample draws the sequences of `bank` micro-batches (all, where there are fewer); further ones use them in turn.
    """

    samples: PositiveInt = 8
    bank: PositiveInt = 8


class Compute(Section):
    """Where kernel durations come from: a profile (name or path), `roofline`, or by default the best for the GPU."""

    profile: str | None = None


class Memory(Section):
    """GPU memory that tensors cannot use.

    `reserved`: per GPU, for the driver's context, libraries and communicators. `allocator_overhead`: what fragmentation
    takes, as a share of the memory for activations, buffers and temporaries, which come and go in changing sizes.
    """

    reserved: Bytes = RESERVED_BYTES
    allocator_overhead: Share = ALLOCATOR_OVERHEAD


class Scenario(Section):
    """One simulation, fully described: the only input of `moesim.run.simulate`."""

    schema_version: Annotated[int, Field(ge=1, le=1, strict=True)] = 1
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    model: Model
    routing: Routing = UniformRouting(kind="uniform")  # only a dense model may leave it out
    capacity: Capacity = NoCapacity()
    placement: Placement = Contiguous()
    cluster: Cluster
    parallelism: Parallelism = Parallelism()
    workload: Training
    dispatch: Dispatch = Dispatch()
    implementation: Implementation = Implementation()
    overlap: Overlap = Overlap()
    memory: Memory = Memory()
    network: Network = Network()
    compute: Compute = Compute()
    uncertainty: Uncertainty = Uncertainty()
    seed: Count = 0

    def router_shape(self) -> RouterShape:
        """The router with its aliases resolved; `kind` is "trace" when a recorded trace brings its own."""
        return resolve_router(self.routing, model=self.model, num_devices=self.parallelism.expert)

    def with_bandwidth(self, factor: float) -> "Scenario":
        """The scenario with `factor` times the bandwidth on every link; latencies stay."""
        fabric = self.cluster.fabric
        faster = fabric.model_copy(update={"bandwidth_factor": factor * fabric.bandwidth_factor})
        return self.model_copy(update={"cluster": self.cluster.model_copy(update={"fabric": faster})})

    @property
    def stage_layers(self) -> tuple[range, ...]:
        """The layers of every stage, numbered from 0 through the model."""
        layers, stages = self.model.layers, self.parallelism.num_stages
        lengths = self.parallelism.stages
        if lengths is None:
            lengths = tuple(layers // stages + (stage < layers % stages) for stage in range(stages))
        ends = tuple(accumulate(lengths))
        return tuple(range(end - length, end) for end, length in zip(ends, lengths, strict=True))

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that each rank runs in one step: global_batch / (data * micro_batch)."""
        return self.workload.global_batch // (self.parallelism.data * self.workload.micro_batch)

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
