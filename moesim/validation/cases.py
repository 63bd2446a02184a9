"""The cases that are run for real, and the expert ids that both a run and its simulation use.

The standard cases: three shapes of expert layers, few layers deep, at several sizes and skews. Those of a whole node:
three further models, in the layouts that N ranks allow.

Legend: R ranks, B micro-batches, L MoE layers, T tokens of one rank and micro-batch, K selections, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.parallel import TrafficSample, TrafficSampler
from moesim.run import obtain_trace
from moesim.scenario import Scenario, scenario_from_mapping
from moesim.seeding import stream

Counts = list[list[float]]


@dataclass(frozen=True)
class Case:
    """One scenario to run and simulate; `name` is unique and `gpus` its world size."""

    name: str
    scenario: Scenario

    @property
    def gpus(self) -> int:
        """Ranks of the run."""
        return self.scenario.parallelism.world_size

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one rank."""
        return self.scenario.tokens_per_micro_batch

    def sample(self) -> TrafficSample | None:
        """The routing that both the real run and the simulation use: drawn once, from the scenario's seed; None where
        the model has no experts.
        """
        trace = obtain_trace(self.scenario)
        if trace is None:
            return None
        return TrafficSampler(self.scenario, trace).draw(stream(self.scenario.seed, "sample", 0))


MODELS: dict[str, dict[str, Any]] = {
    "fine64": {"preset": "deepseek-moe-16b", "layers": 6},
    "fine128": {"preset": "qwen3-30b-a3b", "layers": 5},
    "coarse8": {"preset": "mixtral-8x7b", "layers": 3},
}
# Popularity falls as a power of the expert's number, so that the first half of the experts, one of two ranks, is hot.
SKEWS = {"uniform": 0.0, "skewed": 0.5}
COARSE_SKEW = 1.0  # eight experts need a steeper fall for as uneven ranks
GPU_TOKENS = (1024, 4096, 16384)
SEQUENCE_LENGTH = 4096

CPU_MODEL: dict[str, Any] = {
    "layers": 2, "hidden": 256, "heads": 4, "kv_heads": 4, "head_dim": 64, "experts": 8, "top_k": 2,
    "shared_experts": 1, "expert_intermediate": 256, "vocab": 1024,
}  # fmt: skip
CPU_TOKENS = (512, 1024)


def popularity_counts(model: dict[str, Any], skew: float) -> Counts:
    """Popularity per MoE layer and expert: 1000 / (number + 1) ** skew."""
    shape = scenario_from_mapping(case_data("shape", model, 1, 64, {"kind": "uniform"}, "h200")).model
    row = [1000.0 / (expert + 1) ** skew for expert in range(shape.experts)]
    return [row] * shape.moe_layers


def case_data(
    name: str, model: dict[str, Any], gpus: int, tokens: int, routing: dict[str, Any], gpu: str
) -> dict[str, Any]:
    length = min(tokens, SEQUENCE_LENGTH)
    return {
        "schema_version": 1,
        "name": name,
        "model": model,
        "routing": routing,
        "cluster": {"gpu": gpu, "nodes": 1, "gpus_per_node": gpus},
        "parallelism": {"data": gpus, "expert": gpus},
        "workload": {
            "kind": "training",
            "sequence_length": length,
            "micro_batch": tokens // length,
            "global_batch": gpus * tokens // length,
            "precision": {"optimizer": "bf16"},
        },
        "dispatch": {"deduplicate": "per_expert"},
        "implementation": {"kind": "torch_eager"},
    }


def build_case(label: str, model: dict[str, Any], *, gpus: int, tokens: int, skew: str, gpu: str = "h200") -> Case:
    """One case of a model, its tokens per rank and its skew of expert popularity."""
    exponent = SKEWS[skew] * (COARSE_SKEW / SKEWS["skewed"] if label == "coarse8" else 1.0)
    routing: dict[str, Any] = {"kind": "uniform"}
    if exponent:
        routing = {"kind": "popularity", "counts": popularity_counts(model, exponent)}
    name = f"{label}-{tokens}-{skew}-{gpus}gpu"
    return Case(name, scenario_from_mapping(case_data(name, model, gpus, tokens, routing, gpu)))


def standard_cases(device: str, gpus: int) -> Iterator[Case]:
    """The cases of `moesim validate` on `gpus` ranks of a device. Raises UserError for other devices."""
    if device == "cpu":
        for tokens in CPU_TOKENS:
            for skew in SKEWS:
                yield build_case("cpu", CPU_MODEL, gpus=gpus, tokens=tokens, skew=skew)
        return
    if device != "cuda":
        raise UserError(f"--device {device} is not known; use cuda or cpu")
    for label, model in MODELS.items():
        for tokens in GPU_TOKENS:
            for skew in SKEWS:
                if tokens == min(GPU_TOKENS) and skew != "uniform":
                    continue  # the host limits these: skew would not show
                yield build_case(label, model, gpus=gpus, tokens=tokens, skew=skew)


def scenario_case(scenario: Scenario, gpus: int) -> Case:
    """A scenario of the user's own. Raises UserError where the software or the number of GPUs does not fit it."""
    ranks = scenario.parallelism.world_size
    if ranks != gpus:
        raise UserError(
            f"{scenario.name} uses {ranks} ranks, but --gpus is {gpus}; set parallelism.data and expert to {gpus}"
        )
    check_runnable(scenario)
    return Case(scenario.name, scenario)


def check_runnable(scenario: Scenario) -> None:
    """Raise UserError for what the measured software does not do."""
    from moesim.routing.sharded_model import unsupported

    mesh, switches = scenario.parallelism, scenario.implementation.switches
    complaints = {
        "implementation.kind must be torch_eager: that is the software that is run": (
            not scenario.implementation.software.runs_here
        ),
        "pipelines, context and expert_tensor ranks are not run; set them to 1": (
            mesh.world_size != mesh.data * mesh.tensor or mesh.expert_tensor != 1
        ),
        "tensor ranks are run of models without experts; set model.experts: 0, or tensor to 1": (
            mesh.tensor > 1 and scenario.model.experts > 0
        ),
        "tensor ranks are run without ZeRO, sequence parallelism and torch's loss; set parallelism.zero to "
        "{dense: 0, expert: 0} and implementation.sequence_parallel: false, loss: parallel": (
            mesh.tensor > 1
            and (mesh.zero.dense + mesh.zero.expert > 0 or switches.sequence_parallel or switches.loss != "parallel")
        ),
        "ZeRO 1, and 3 without expert ranks, are run; set parallelism.zero to {dense: 0, expert: 0}": (
            mesh.zero.dense == 2 or mesh.zero.dense != mesh.zero.expert or (mesh.zero.dense == 3 and mesh.expert > 1)
        ),
        "the software that is run drops nothing; set capacity to {kind: none}": scenario.capacity.kind != "none",
        "one row per (token, expert) is sent; set dispatch.deduplicate to per_expert": (
            scenario.dispatch.deduplicate != "per_expert"
        ),
        "optimizer states are bf16; set workload.precision.optimizer to bf16": (
            scenario.workload.precision.optimizer != "bf16"
        ),
    }
    found = [text for text, wrong in complaints.items() if wrong]
    reason = unsupported(scenario.model)
    if found or reason:
        raise UserError(f"{scenario.name}: {found[0] if found else reason}")


def with_profile(case: Case, profile: str | None) -> Case:
    """The case with `compute.profile` set, where one is given."""
    if profile is None:
        return case
    compute = case.scenario.compute.model_copy(update={"profile": profile})
    return replace(case, scenario=case.scenario.model_copy(update={"compute": compute}))


EXPERTS: dict[str, dict[str, Any]] = {
    "wide64": {
        "layers": 4, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "experts": 64, "top_k": 4,
        "shared_experts": 1, "expert_intermediate": 1536, "vocab": 65536, "attention": {"kind": "gqa"},
    },
    "narrow96": {
        "layers": 10, "hidden": 1536, "heads": 24, "kv_heads": 24, "head_dim": 64, "experts": 96, "top_k": 6,
        "shared_experts": 0, "expert_intermediate": 1024, "vocab": 50304,
    },
    "square32": {
        "layers": 5, "hidden": 2880, "heads": 64, "kv_heads": 8, "head_dim": 64, "experts": 32, "top_k": 4,
        "shared_experts": 0, "expert_intermediate": 2880, "vocab": 98304, "attention": {"kind": "gqa"},
    },
}  # fmt: skip
DENSE: dict[str, dict[str, Any]] = {
    "dense4096": {
        "layers": 6, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "dense_intermediate": 14336,
        "vocab": 131072, "attention": {"kind": "gqa"},
    },
    "dense2560": {
        "layers": 12, "hidden": 2560, "heads": 32, "kv_heads": 32, "head_dim": 80, "dense_intermediate": 10240,
        "vocab": 50432,
    },
    "dense5120": {
        "layers": 4, "hidden": 5120, "heads": 40, "kv_heads": 8, "head_dim": 128, "dense_intermediate": 20480,
        "vocab": 98304, "attention": {"kind": "gqa"},
    },
}  # fmt: skip
NODE_SKEWS = ("uniform", "skewed", "hot")
SLOPE, HOT = 0.6, 3.0  # of popularity over the number of an expert; of the first rank's experts over the others'
TOKENS = (1024, 4096, 8192)


def node_cases(gpus: int) -> Iterator[Case]:
    """Expert parallelism over 2, 4 and 8 ranks, as far as `gpus` go, the largest over all of them in every skew and
    size; replicas, ZeRO 1 and FSDP2 over all ranks; tensor ranks of three dense models.
    """
    for label, model in EXPERTS.items():
        for ranks in (size for size in (2, 4, 8) if size <= gpus):
            for tokens in TOKENS:
                for skew in NODE_SKEWS:
                    if (ranks == gpus or tokens == 4096) and (tokens > 1024 or skew == NODE_SKEWS[0]):
                        yield _case(f"ep{ranks}", label, model, gpus, tokens, skew, {"expert": ranks})
        yield _case("replicas", label, model, gpus, 4096, NODE_SKEWS[0], {})
        yield _case("zero1", label, model, gpus, 4096, NODE_SKEWS[0], {"zero": {"dense": 1, "expert": 1}})
        for tokens in (2048, 8192):
            yield _case("fsdp2", label, model, gpus, tokens, NODE_SKEWS[0], {"zero": {"dense": 3, "expert": 3}})
    for label, model in DENSE.items():
        for tokens in (2048, 8192):
            yield _case("fsdp2", label, model, gpus, tokens, None, {"zero": {"dense": 3, "expert": 3}})
            for ranks in (size for size in (2, 4, 8) if size <= gpus):
                yield _case(f"tensor{ranks}", label, model, gpus, tokens, None, {"tensor": ranks})


def is_held_out(name: str) -> bool:
    """Whether a case is kept out of every choice: every other one by the sum of its letters."""
    return sum(name.encode()) % 2 == 1


def _case(
    layout: str, label: str, model: dict[str, Any], gpus: int, tokens: int, skew: str | None, mesh: dict[str, Any]
) -> Case:
    tensor = mesh.get("tensor", 1)
    name = "-".join(str(part) for part in (layout, label, tokens, skew, f"{gpus}gpu") if part)
    routing: dict[str, Any] = {"kind": "uniform"}
    if skew == "skewed":
        routing = {"kind": "popularity", "counts": popularity_counts(model, SLOPE)}
    elif skew == "hot":
        share = model["experts"] // mesh["expert"]
        row = [HOT if expert < share else 1.0 for expert in range(model["experts"])]
        routing = {"kind": "popularity", "counts": [row] * model["layers"]}
    data = case_data(name, model, gpus, tokens, routing, "h100")
    length = min(tokens, SEQUENCE_LENGTH)
    data["parallelism"] = {"data": gpus // tensor, **mesh}
    data["workload"]["global_batch"] = gpus // tensor * tokens // length
    if tensor > 1:
        data["implementation"] |= {"sequence_parallel": False, "loss": "parallel"}
    if skew is None:
        del data["routing"]
    return Case(name, scenario_from_mapping(data))


Ids = NDArray[np.int16]


def forced_ids(sample: TrafficSample, *, rank: int) -> list[list[Ids]]:
    """Ids [T, K] of one rank for every micro-batch and MoE layer: `ids[micro_batch][layer]`."""
    sampler, scenario = sample.sampler, sample.sampler.scenario
    group, index = divmod(rank, scenario.parallelism.expert)
    pieces_BU = sample.pieces_BRU(group)[:, index]
    new_of_old_LE = [np.argsort(relabelling.expert_from_E) for relabelling in sampler.relabellings]
    ids_BL = []
    for pieces_U in pieces_BU:
        layers = []
        for layer in range(scenario.model.moe_layers):
            old_TK = sampler.expert_ids_STK(layer % sampler.trace.num_layers)[pieces_U].reshape(
                -1, scenario.model.top_k
            )
            layers.append(new_of_old_LE[layer][old_TK].astype(np.int16))
        ids_BL.append(layers)
    return ids_BL
