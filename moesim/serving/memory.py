"""What a rank holds: weights, room for a step, and pages for keys and values in what is left."""

from dataclasses import dataclass

from moesim.errors import InfeasibleError
from moesim.scenario import Mla, Model
from moesim.scenario.flops import parameters
from moesim.serving.schema import ServingScenario
from moesim.units import format_bytes

WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5}
SCALES = {"bf16": 0.0, "fp8": 4.0 / 128**2, "int4": 2.0 / 128}  # bytes per weight: blocks of 128 x 128, groups of 128
WIDE_BYTES = 2.0  # embedding, head, norms and router stay in bf16
KV_BYTES = {"bf16": 2.0, "fp8": 1.0}


@dataclass(frozen=True, kw_only=True)
class ServingMemoryReport:
    """Bytes of one rank. `kv_tokens`: tokens whose keys and values fit, in whole pages."""

    weights: float
    workspace: float
    kv_per_token: float
    kv: float
    kv_tokens: int


def kv_bytes_per_token(model: Model, *, kv: str, tensor: int) -> float:
    """Bytes of keys and values of one token in all layers on one rank: latents and the rope key of mla are whole."""
    size = KV_BYTES[kv]
    if isinstance(model.attention, Mla):
        return model.layers * (model.attention.kv_lora_rank + model.attention.rope_head_dim) * size
    heads = -(-model.kv_heads // tensor)  # fewer heads than ranks: copies
    return model.layers * 2 * heads * model.head_dim * size


def memory_of(scenario: ServingScenario) -> ServingMemoryReport:
    """The memory of a rank. Raises InfeasibleError where weights leave no room for a single page."""
    model, mesh, load = scenario.model, scenario.parallelism, scenario.workload
    count = parameters(model)
    stored = WEIGHT_BYTES[load.weights] + SCALES[load.weights]
    wide = (count.embedding + count.head) / mesh.tensor + count.norms + count.router
    split = (count.attention + count.dense_ffn + count.shared_experts + count.latent) / mesh.tensor
    experts = count.routed_experts / (mesh.expert if mesh.expert > 1 else mesh.tensor)
    weights = wide * WIDE_BYTES + (split + experts) * stored
    tokens = scenario.engine.token_budget
    rows = tokens * (model.top_k * (model.row_width + 2 * model.expert_intermediate) if model.experts else 0)
    workspace = WIDE_BYTES * (tokens * (4 * model.hidden + 2 * model.dense_intermediate) + rows)
    workspace += 4.0 * scenario.engine.running * model.vocab / mesh.tensor  # fp32 logits
    per_token = kv_bytes_per_token(model, kv=load.kv, tensor=mesh.tensor)
    left = scenario.cluster.pools[0].spec.memory_bytes - scenario.memory.reserved - weights - workspace
    pages = int(max(0.0, left * scenario.memory.share) // (per_token * scenario.engine.page))
    if pages < 1:
        raise InfeasibleError(
            f"memory: weights take {format_bytes(weights)} and a step {format_bytes(workspace)} of "
            f"{format_bytes(scenario.cluster.pools[0].spec.memory_bytes)}: no page for keys and values is left; use "
            "more ranks (parallelism.tensor, expert), workload.weights: int4, or a smaller engine.token_budget"
        )
    kv_tokens = pages * scenario.engine.page
    return ServingMemoryReport(
        weights=weights, workspace=workspace, kv_per_token=per_token, kv=kv_tokens * per_token, kv_tokens=kv_tokens
    )
