"""Weights, gradients and optimizer states of one rank, in bytes.

With n local parameters that g ranks hold, and ZeRO stage z (arXiv 1910.02054):

    weights    n * bytes(weights)      / g if z >= 3       gradients  n * bytes(gradients)  / g if z >= 2
    master     n * 4, if there is one  / g if z >= 1       optimizer  2 n * bytes(optimizer) / g if z >= 1
    gathered   z >= 2: the full gradients of the largest layer; z = 3: also the weights of two layers, one in use and
               the next on its way

Dense parameters are held by data * context ranks, routed experts by data * context * tensor / (expert *
expert_tensor); twice as many under a bidirectional schedule, where two pipeline ranks hold each stage.
Tensor parallelism splits the products of attention and feed-forward networks, the shared experts, embedding and head
(arXiv 1909.08053, 2205.05198); norms, routers and the down-projections of latent attention stay whole on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moesim.parallel.mesh import Mesh
from moesim.scenario import Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.flops import attention_layer_parameters, expert_parameters
from moesim.scenario.model import Mla


@dataclass(frozen=True, kw_only=True)
class LocalParameters:
    """Parameters on one rank, in elements; `largest` are those of its largest layer."""

    dense: float
    expert: float
    largest_dense: float
    largest_expert: float


def attention_parameters(scenario: Scenario) -> float:
    """Parameters of one attention layer on one rank, both norms of the layer included."""
    model, tensor = scenario.model, scenario.parallelism.tensor
    whole, norms = 0, 2 * model.hidden
    if isinstance(model.attention, Mla):
        mla = model.attention
        whole = model.hidden * (mla.kv_lora_rank + mla.rope_head_dim + (mla.q_lora_rank or 0))
        norms += mla.kv_lora_rank + (mla.q_lora_rank or 0)
    return norms + whole + (attention_layer_parameters(model) - whole) / tensor


def local_parameters(scenario: Scenario, stages: Sequence[int]) -> LocalParameters:
    """What a rank holds of the given stages of the model."""
    model, mesh = scenario.model, scenario.parallelism
    attention = attention_parameters(scenario)
    expert = expert_parameters(model)
    dense_layer = attention + 3 * model.hidden * model.dense_intermediate / mesh.tensor
    moe_layer = attention + model.hidden * model.experts + model.shared_experts * expert / mesh.tensor
    experts = model.experts * expert / (mesh.expert * mesh.expert_tensor)
    layers = [layer for stage in stages for layer in scenario.stage_layers[stage]]
    num_dense = sum(layer < model.dense_layers for layer in layers)
    num_moe = len(layers) - num_dense
    is_first, is_last = 0 in stages, mesh.num_stages - 1 in stages
    table = model.vocab * model.hidden / mesh.tensor
    tables = int(is_first)
    dense = num_dense * dense_layer + num_moe * moe_layer
    if is_last:
        # The head, unless it is the embedding on the same rank; prediction layers read the embedding as well.
        tables += not (model.tied_embeddings and is_first)
        tables += bool(model.mtp_layers) and not is_first and not model.tied_embeddings
        join = 2 * model.hidden**2 / mesh.tensor + 3 * model.hidden
        dense += model.hidden + model.mtp_layers * (moe_layer + join)
        num_moe += model.mtp_layers
    return LocalParameters(
        dense=dense + tables * table,
        expert=num_moe * experts,
        largest_dense=max(dense_layer * bool(num_dense), moe_layer * bool(num_moe), table * bool(tables)),
        largest_expert=experts * bool(num_moe),
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
    for name, count, largest, ranks, stage in (
        ("dense", local.dense, local.largest_dense, dense_ranks, zero.dense),
        ("experts", local.expert, local.largest_expert, expert_ranks, zero.expert),
    ):
        gathered = largest * size[precision.gradients] * (stage >= 2 and ranks > 1)
        gathered += 2 * largest * size[precision.weights] * (stage >= 3 and ranks > 1)
        parts |= {
            f"weights.{name}": count * size[precision.weights] / (ranks if stage >= 3 else 1),
            f"gradients.{name}": count * size[precision.gradients] / (ranks if stage >= 2 else 1),
            f"master.{name}": count * size["fp32"] * (precision.master == "fp32") / (ranks if stage >= 1 else 1),
            f"optimizer.{name}": 2 * count * size[precision.optimizer] / (ranks if stage >= 1 else 1),
            f"gathered.{name}": gathered,
        }
    return parts
