"""The cases that are run for real, and the simulation of one, cut into the parts that a real run measures.

The standard cases: three shapes of expert layers, few layers deep, at several sizes and skews. Those of a whole node:
three further models, in the layouts that N ranks allow. Both the run and its simulation use the same expert ids.

Legend: N spans in issue order, R ranks, B micro-batches, L MoE layers, T tokens of one rank and micro-batch, K
selections, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.engine import simulate_step, step_kernels
from moesim.errors import UserError
from moesim.parallel import ExpertPlacement, LayerTraffic, Mesh, TrafficSample, TrafficSampler, place_experts
from moesim.parallel.traffic import sum_columns
from moesim.program import build_program
from moesim.program.scenario_fabric import scenario_fabric, scenario_kernels
from moesim.results.spans import Label, Part, Phase, SpanTable, Stream
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


@dataclass(frozen=True, eq=False)
class RecordedRows:
    """A routing sample made of what a real run recorded: rows per expert of every rank, micro-batch and MoE layer.

    `rows_RBLE`: rows that each rank sent to each expert. It stands where `build_program` takes a `TrafficSample`; only
    one copy per (token, expert) can be derived from rows.
    """

    scenario: Scenario
    rows_RBLE: NDArray[np.int64]

    @cached_property
    def placement(self) -> ExpertPlacement:
        """The experts of every layer on the ranks of a group."""
        return place_experts(
            self.scenario.placement,
            num_experts=self.scenario.model.experts,
            num_ranks=self.scenario.parallelism.expert,
        )

    def map_of(self, model_layer: int) -> None:
        """Every expert has one slot, the same in all layers."""

    def same_traffic(self, group: int, other: int, *, stage: int = 0) -> bool:
        """Recorded rows are each rank's own."""
        return group == other

    def arrays(self, group: int, model_layer: int, *, stage: int = 0) -> LayerTraffic:
        """The traffic of one expert group and MoE layer over all micro-batches."""
        mesh = Mesh(self.scenario.parallelism, self.scenario.cluster)
        ranks_R = mesh.expert_groups()[group]
        layout = mesh.layout(ranks_R)
        rows_BRE = self.rows_RBLE[ranks_R, :, model_layer].transpose(1, 0, 2)
        to_ranks_BRD = sum_columns(rows_BRE, self.placement.rank_of_expert_E, layout.num_ranks)
        routed_B = rows_BRE.sum(axis=(1, 2))
        return LayerTraffic.of(
            rows_BRE=rows_BRE,
            rank_copies_BRD=to_ranks_BRD,
            node_copies_BRJ=sum_columns(to_ranks_BRD, layout.node_of_rank_R, layout.num_nodes),
            routed_rows_B=routed_B,
            dropped_rows_B=np.zeros_like(routed_B),
            padded_rows_B=np.zeros_like(routed_B),
            layout=layout,
        )


BACKWARD = (Phase.INPUT_GRADIENT, Phase.WEIGHT_GRADIENT, Phase.RECOMPUTE)
LAYER_PARTS = {
    Part.ROUTER: "router",
    Part.PERMUTE: "permute",
    Part.ROW_COUNTS: "dispatch",
    Part.DISPATCH: "dispatch",
    Part.EXPERTS: "experts",
    Part.COMBINE: "combine",
    Part.SHARED_EXPERTS: "shared",
}


def predict(case: Case, rows_RBLE: ArrayLike) -> dict[str, Any]:
    """Step seconds, seconds of its parts (mean over ranks), of the parts of all MoE layers together, of waiting in
    transfers, and what meetings are later for jitter.

    `rows_RBLE`: the rows that each rank sent to each expert in the real run, by micro-batch and MoE layer.
    """
    scenario = case.scenario
    samples = [RecordedRows(scenario, np.asarray(rows_RBLE, dtype=np.int64))] if scenario.model.experts else []
    kernels = scenario_kernels(scenario)
    fabric = scenario_fabric(scenario, kernels)
    kernels = step_kernels(scenario, fabric=fabric, kernels=kernels, samples=samples)
    program = build_program(scenario, fabric=fabric, kernels=kernels, samples=samples)
    outcome = simulate_step(program)
    tables = [_cut(table) for table in outcome.tables]
    weights = [len(table.ranks_R) for table in outcome.tables]
    return {
        "step": float(outcome.step_S[0]),
        "parts": _mean([parts for parts, _ in tables], weights),
        "layer_parts": _mean([layers for _, layers in tables], weights),
        "waiting": float(np.average([_waiting(table) for table in outcome.tables], weights=weights)),
        "jitter": float(np.mean([late_SR.mean() for late_SR in outcome.late_gSR])) if outcome.late_gSR else 0.0,
    }


def _cut(table: SpanTable) -> tuple[dict[str, float], dict[str, float]]:
    """Every span with the idle time before it belongs to its part; of spans that overlap, by what each ends later."""
    parts = dict.fromkeys(("forward", "backward", "reduction", "optimizer"), 0.0)
    layers: dict[str, float] = {}
    finish_NR = table.finish_NSR[:, 0]
    elapsed_N = np.diff(np.maximum.accumulate(finish_NR, axis=0), axis=0, prepend=0.0).mean(axis=1)
    for row, seconds in _with_stalls(table, elapsed_N):
        label = table.labels[row]
        parts[_part_of_step(label)] += seconds
        part = LAYER_PARTS.get(label.part)
        if part is not None and label.layer >= 0:
            key = f"{'backward' if label.phase in BACKWARD else 'forward'}.{part}"
            layers[key] = layers.get(key, 0.0) + seconds
    return parts, layers


def _waiting(table: SpanTable) -> float:
    """Seconds that a rank stands in transfers before its own part begins, in the mean."""
    rows_N = table.rows(Stream.COMMUNICATION)
    wait_NR = (table.finish_NSR[rows_N] - table.start_NSR[rows_N] - table.own_NSR[rows_N])[:, 0]
    return float(wait_NR.sum(axis=0).mean())


def _with_stalls(table: SpanTable, elapsed_N: NDArray[np.float64]) -> list[tuple[int, float]]:
    """(label, seconds) of every operation, a stall for the host counted to the operation that waited."""
    found, stalled = [], 0.0
    for label, seconds in zip(table.label_N.tolist(), elapsed_N.tolist(), strict=True):
        if table.labels[label].part is Part.STALL:
            stalled += seconds
        else:
            found.append((label, seconds + stalled))
            stalled = 0.0
    return found


def _part_of_step(label: Label) -> str:
    if label.phase is Phase.OPTIMIZER:
        return "optimizer"
    if label.phase in BACKWARD:
        return "backward"
    return "reduction" if label.part is Part.GRADIENTS else "forward"


def _mean(rows: list[dict[str, float]], weights: list[int]) -> dict[str, float]:
    return {key: float(np.average([row[key] for row in rows], weights=weights)) for key in rows[0]}
