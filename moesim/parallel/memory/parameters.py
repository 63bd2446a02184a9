"""Weights, gradients and optimizer states of one rank, in bytes.

With n local parameters that g ranks hold, and ZeRO stage z (arXiv 1910.02054):

    weights    n * bytes(weights)      / g if z >= 3       gradients  n * bytes(gradients)  / g if z >= 2
    master     n * 4, if there is one  / g if z >= 1       optimizer  2 n * bytes(optimizer) / g if z >= 1
    gathered   z >= 2: the full gradients of the largest part (a layer, an end of the model); z = 3: also the weights
               of two parts, one in use and the next on its way

Dense parameters are held by data * context ranks, routed experts by data * context * tensor / (expert *
expert_tensor); twice as many under a bidirectional schedule, where two pipeline ranks hold each stage.
Tensor parallelism splits the GEMMs of attention and feed-forward networks, the shared experts, embedding and head
(arXiv 1909.08053, 2205.05198); norms, routers and the down-projections of latent attention stay whole on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moesim.parallel.mesh import Mesh
from moesim.scenario import Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.flops import (
    attention_layer_parameters,
    expert_parameters,
    ffn_parameters,
    latent_parameters,
    router_parameters,
    shared_parameters,
)
from moesim.scenario.model import Mla


class Unit(NamedTuple):
    """Parameters of one part of the model on one rank, in elements: dense ones, slices of experts.

    `duplicated`: those among the dense that every tensor rank holds whole.
    """

    dense: float
    duplicated: float
    expert: float


@dataclass(frozen=True, kw_only=True)
class LocalParameters:
    """Parameters on one rank, in elements; `largest` are those of its largest part."""

    dense: float
    duplicated: float
    expert: float
    largest_dense: float
    largest_expert: float


def _attention(scenario: Scenario) -> Unit:
    """One attention layer, both norms of the layer included."""
    model = scenario.model
    whole, norms = 0, 2 * model.hidden
    if isinstance(model.attention, Mla):
        mla = model.attention
        whole = model.hidden * (mla.kv_lora_rank + mla.rope_head_dim + (mla.q_lora_rank or 0))
        norms += mla.kv_lora_rank + (mla.q_lora_rank or 0)
    shared = (attention_layer_parameters(model) - whole) / scenario.parallelism.tensor
    return Unit(norms + whole + shared, norms + whole, 0.0)


def _layer(scenario: Scenario, *, moe: bool) -> Unit:
    model, mesh, attention = scenario.model, scenario.parallelism, _attention(scenario)
    if not moe:
        dense = ffn_parameters(model, model.dense_intermediate) / mesh.tensor
        return attention._replace(dense=attention.dense + dense)
    router = router_parameters(model) + latent_parameters(model)
    return Unit(
        attention.dense + router + shared_parameters(model) / mesh.tensor,
        attention.duplicated + router,
        scenario.slots_per_rank * expert_parameters(model) / mesh.expert_tensor,
    )


def expert_slice_parameters(scenario: Scenario) -> float:
    """Elements of one expert on one rank."""
    return expert_parameters(scenario.model) / scenario.parallelism.expert_tensor


def table_parameters(scenario: Scenario) -> float:
    """Elements of the embedding, or of the head, on one rank."""
    return scenario.model.vocab * scenario.model.hidden / scenario.parallelism.tensor


def stage_units(scenario: Scenario, stage: int, *, held: Sequence[int] = ()) -> list[Unit]:
    """What a rank holds of one stage, part by part in the order of the forward pass.

    The embedding (first stage), the layers, the head and the prediction layers (last stage); prediction layers read
    the embedding as well, of which the last stage then has a copy. `held`: other stages on the same rank; it holds a
    table that both need once.
    """
    model, hidden = scenario.model, scenario.model.hidden
    table = table_parameters(scenario)
    has_embedding = 0 in (stage, *held)
    units = [Unit(table, 0.0, 0.0)] if stage == 0 else []
    units += [_layer(scenario, moe=not model.is_dense(layer)) for layer in scenario.stage_layers[stage]]
    if stage < scenario.parallelism.num_stages - 1:
        return units
    head = 0.0 if model.tied_embeddings and has_embedding else table
    units.append(Unit(hidden + head, hidden, 0.0))
    copy = 0.0 if model.tied_embeddings or has_embedding else table
    for number in range(model.mtp_layers):
        layer = _layer(scenario, moe=True)
        join = 2 * hidden**2 / scenario.parallelism.tensor + 3 * hidden
        dense = layer.dense + join + copy * (number == 0)
        units.append(Unit(dense, layer.duplicated + 3 * hidden, layer.expert))
    return units


def gemm_weights(scenario: Scenario, stage: int) -> tuple[float, float]:
    """Dense and expert weights of a rank that GEMMs of few bits read: those of a stage's layers, no tables, norms or
    routers.
    """
    layers = [not scenario.model.is_dense(layer) for layer in scenario.stage_layers[stage]]
    if stage == scenario.parallelism.num_stages - 1:
        layers += [True] * scenario.model.mtp_layers
    units = [_layer(scenario, moe=moe) for moe in layers]
    return sum(unit.dense - unit.duplicated for unit in units), sum(unit.expert for unit in units)


def local_parameters(scenario: Scenario, stages: Sequence[int]) -> LocalParameters:
    """What a rank holds of the given stages of the model."""
    units = [
        unit
        for index, stage in enumerate(sorted(stages))
        for unit in stage_units(scenario, stage, held=sorted(stages)[:index])
    ]
    return LocalParameters(
        dense=sum(unit.dense for unit in units),
        duplicated=sum(unit.duplicated for unit in units),
        expert=sum(unit.expert for unit in units),
        largest_dense=max((unit.dense for unit in units), default=0.0),
        largest_expert=max((unit.expert for unit in units), default=0.0),
    )


def holders(scenario: Scenario, *, replicas: int) -> tuple[int, int]:
    """Ranks that hold the same dense parameters, and the same experts."""
    mesh = Mesh(scenario.parallelism, scenario.cluster)
    return replicas * len(mesh.dense_gradient_groups()[0]), replicas * len(mesh.expert_gradient_groups()[0])


def state_bytes(scenario: Scenario, stages: Sequence[int], *, replicas: int) -> dict[str, float]:
    """Bytes of every kind of state of a rank that holds `stages`, by `kind.dense` and `kind.experts`."""
    local, precision, zero = local_parameters(scenario, stages), scenario.workload.precision, scenario.parallelism.zero
    size = BYTES_PER_ELEMENT
    dense_ranks, expert_ranks = holders(scenario, replicas=replicas)
    parts: dict[str, float] = {}
    read = [gemm_weights(scenario, stage) for stage in stages]
    dense_gemms, expert_gemms = sum(dense for dense, _ in read), sum(expert for _, expert in read)
    copy = _copy_bytes(scenario)
    for name, count, gemms, largest, ranks, stage in (
        ("dense", local.dense, dense_gemms, local.largest_dense, dense_ranks, zero.dense),
        ("experts", local.expert, expert_gemms, local.largest_expert, expert_ranks, zero.expert),
    ):
        gathered = largest * size[precision.gradients] * (stage >= 2 and ranks > 1)
        gathered += 2 * largest * size[precision.weights] * (stage >= 3 and ranks > 1)
        parts |= {
            f"weights.{name}": count * size[precision.weights] / (ranks if stage >= 3 else 1),
            f"cast_weights.{name}": gemms * copy / (ranks if stage >= 3 else 1),
            f"gradients.{name}": count * size[precision.gradients] / (ranks if stage >= 2 else 1),
            f"master.{name}": count * size["fp32"] * (precision.master == "fp32") / (ranks if stage >= 1 else 1),
            f"optimizer.{name}": 2 * count * size[precision.optimizer] / (ranks if stage >= 1 else 1),
            f"gathered.{name}": gathered,
        }
    return parts


def _copy_bytes(scenario: Scenario) -> float:
    """Bytes of a weight's copies for GEMMs of few bits, in both orders, beyond those of the weight itself.

    With an fp32 master copy the others stand in the weight's place: nothing else reads it.
    """
    precision = scenario.workload.precision
    if precision.scaling is None or not scenario.implementation.software.casts_fp8:
        return 0.0
    weight = BYTES_PER_ELEMENT[precision.weights]
    spared = weight if precision.master == "fp32" or precision.weights == "fp8" else 0.0
    return max(0.0, 2 * precision.scaling.value_bytes - spared)
