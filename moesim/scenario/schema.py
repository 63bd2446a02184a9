"""The whole scenario: every section, and the checks that need more than one of them."""

from typing import Annotated, Literal

from pydantic import Field

from moesim.scenario.base import Count, DType, PositiveFloat, PositiveInt, Section
from moesim.scenario.cluster import Cluster, Contiguous, Dispatch, Network, Placement
from moesim.scenario.model import Model
from moesim.scenario.routing import Capacity, NoCapacity, RouterShape, Routing, UniformRouting, resolve_router


class Zero(Section):
    """ZeRO stages of dense and expert parameters."""

    dense: Annotated[int, Field(ge=0, le=3, strict=True)] = 0
    expert: Annotated[int, Field(ge=0, le=3, strict=True)] = 0


class Parallelism(Section):
    """World size = data * context * tensor * pipeline; ranks in the order tensor, context, data, pipeline (slowest).

    Expert groups are `expert` consecutive ranks of one pipeline stage.
    """

    data: PositiveInt = 1
    context: PositiveInt = 1
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    expert: PositiveInt = 1
    expert_tensor: PositiveInt = 1
    zero: Zero = Zero()

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.data * self.context * self.tensor * self.pipeline

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.data * self.context * self.tensor


class Precision(Section):
    """Number formats: `master` is the master copy of weights (none when the optimizer updates them in place)."""

    gemm: DType = "bf16"
    weights: DType = "bf16"
    gradients: DType = "bf16"
    master: Literal["none", "fp32"] = "none"
    optimizer: DType = "fp32"


class Training(Section):
    """One optimizer step of `global_batch` sequences, in micro-batches of `micro_batch` sequences per rank."""

    kind: Literal["training"] = "training"
    sequence_length: PositiveInt
    micro_batch: PositiveInt = 1
    global_batch: PositiveInt
    train_tokens: PositiveFloat | None = None
    precision: Precision = Precision()


class Implementation(Section):
    """Which software is simulated; its kernels and host behaviour are listed in `moesim.sim.kernels`."""

    kind: Literal["fused", "torch_eager"] = "fused"


class Uncertainty(Section):
    """Routing samples behind every headline number and its 90 % range."""

    samples: PositiveInt = 8


class Compute(Section):
    """Where kernel durations come from: a profile (name or path), or the roofline of the GPU's datasheet."""

    profile: str | None = None


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
    network: Network = Network()
    compute: Compute = Compute()
    uncertainty: Uncertainty = Uncertainty()
    seed: Count = 0

    def router_shape(self) -> RouterShape:
        """The router with its aliases resolved; `kind` is "trace" when a recorded trace brings its own."""
        return resolve_router(self.routing, model=self.model, num_devices=self.parallelism.expert)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that each rank runs in one step: global_batch / (data * micro_batch)."""
        return self.workload.global_batch // (self.parallelism.data * self.workload.micro_batch)

    @property
    def tokens_per_micro_batch(self) -> int:
        """Tokens of one micro-batch of one data-parallel rank."""
        return self.workload.micro_batch * self.workload.sequence_length

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self.workload.global_batch * self.workload.sequence_length

    @property
    def idle_gpus(self) -> int:
        """GPUs of the cluster without a rank; they are paid for all the same."""
        return self.cluster.num_gpus - self.parallelism.world_size
