"""What a rank holds: weights, room for a step, and pages for keys and values in what is left."""

from dataclasses import dataclass

from moesim.errors import InfeasibleError
from moesim.scenario import Mla, Model
from moesim.scenario.flops import parameters
from moesim.serving.keys import KeyLayout, key_layout
from moesim.serving.schema import ServingScenario
from moesim.serving.software import serving_software
from moesim.units import format_bytes

WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5}
SCALES = {"bf16": 0.0, "fp8": 4.0 / 128**2, "int4": 2.0 / 128}  # bytes per weight: blocks of 128 x 128, groups of 128
WIDE_BYTES = 2.0  # embedding, head, norms and router stay in bf16
KV_BYTES = {"bf16": 2.0, "fp8": 1.0}


@dataclass(frozen=True, kw_only=True)
class ServingMemoryReport:
    """Bytes of one rank. `kv_tokens`: tokens whose keys and values fit, in whole pages, if no layer had a window.

    `pages`: layer-pages of a batch (a data group has as many batches as stages), `page_bytes` of one on a rank, and
    `host_pages` those that host memory holds.
    """

    weights: float
    workspace: float
    kv_per_token: float
    kv: float
    kv_tokens: int
    pages: int
    page_bytes: float
    host_pages: int


def layout_of(scenario: ServingScenario) -> KeyLayout:
    """What a request stores, the layer that drafts tokens with it."""
    return key_layout(scenario.model, page=scenario.engine.page, extra=drafting_layers(scenario))


def drafting_layers(scenario: ServingScenario) -> int:
    """Layers that are there to draft tokens."""
    speculation = scenario.engine.speculation
    return 1 if speculation is not None and speculation.draft == "mtp" else 0


def kv_bytes_per_token(model: Model, *, kv: str, tensor: int) -> float:
    """Bytes of keys and values of one token in one layer on one rank: latents and the rope key of mla are whole."""
    size = KV_BYTES[kv]
    if isinstance(model.attention, Mla):
        return (model.attention.kv_lora_rank + model.attention.rope_head_dim) * size
    heads = -(-model.kv_heads // tensor)  # fewer heads than ranks: copies
    return 2 * heads * model.head_dim * size


def memory_of(scenario: ServingScenario) -> ServingMemoryReport:
    """The memory of a rank. Raises InfeasibleError where weights leave no room for a single page."""
    mesh, layout = scenario.parallelism, layout_of(scenario)
    weights, workspace = _weights(scenario), _workspace(scenario)
    layers = sum(kind.layers for kind in layout.kinds)
    layer_bytes = kv_bytes_per_token(scenario.model, kv=scenario.workload.kv, tensor=mesh.tensor) / mesh.pipeline
    page_bytes = layer_bytes * layout.unit * layout.page
    left = scenario.cluster.main_pool.spec.memory_bytes - scenario.memory.reserved - weights - workspace
    whole = layers // layout.unit  # layer-pages of a page of all layers
    pages = int(max(0.0, left * scenario.memory.share) // (page_bytes * whole)) * whole
    if pages < whole * mesh.pipeline:
        raise InfeasibleError(
            f"memory: weights take {format_bytes(weights)} and a step {format_bytes(workspace)} of "
            f"{format_bytes(scenario.cluster.main_pool.spec.memory_bytes)}: no page for keys and values is left; use "
            "more ranks (parallelism.tensor, expert), workload.weights: int4, or a smaller engine.token_budget"
        )
    return ServingMemoryReport(
        weights=weights,
        workspace=workspace,
        kv_per_token=layer_bytes * layers,
        kv=pages * page_bytes,
        kv_tokens=pages // whole * layout.page,
        pages=pages // mesh.pipeline,
        page_bytes=page_bytes,
        host_pages=int(scenario.engine.host_memory / page_bytes / mesh.pipeline),
    )


def _weights(scenario: ServingScenario) -> float:
    """Bytes of weights on the fullest rank."""
    model, mesh, load = scenario.model, scenario.parallelism, scenario.workload
    count = parameters(model)
    stored = WEIGHT_BYTES[load.weights] + SCALES[load.weights]
    ranks = mesh.expert if mesh.expert > 1 else mesh.tensor
    stage = -(-model.layers // mesh.pipeline) / model.layers  # of the layers
    ends = max(count.embedding, count.head) if mesh.pipeline > 1 else count.embedding + count.head
    wide = ends / mesh.tensor + (count.norms + count.router) * stage
    split = (count.attention + count.dense_ffn + count.shared_experts + count.latent) * stage / mesh.tensor
    copied = 1.0 + scenario.engine.redundant_experts / max(1, model.experts)  # slots for each expert
    experts = copied * count.routed_experts * stage / ranks
    if drafting_layers(scenario):
        routed = count.routed_experts / max(1, model.moe_layers)
        experts += copied * routed / ranks
        split += max(0.0, count.mtp / model.mtp_layers - routed) / mesh.tensor
    return wide * WIDE_BYTES + (split + experts) * stored


def _workspace(scenario: ServingScenario) -> float:
    """Bytes of the largest step."""
    model, tokens = scenario.model, scenario.engine.token_budget
    rows = tokens * model.top_k * _row_elements(scenario) if model.experts else 0
    workspace = WIDE_BYTES * (tokens * (4 * model.hidden + 2 * model.dense_intermediate) + rows)
    return workspace + 4.0 * scenario.engine.running * model.vocab / scenario.parallelism.tensor  # fp32 logits


def _row_elements(scenario: ServingScenario) -> float:
    """Elements of bf16 that a step holds at once for a row of an expert.

    Its input and both inputs of the activation in an engine. In transformers, which masks results of products in new
    tensors: the input, twice the activation's inputs, these twice more; or behind the products input and result, and
    this with its gate and in the order of tokens, in fp32.
    """
    model = scenario.model
    h, f = model.row_width, model.expert_intermediate
    if not serving_software()[scenario.engine.software].masks_rows:
        return h + 2 * f
    return max(h + 4 * f, 6 * h)
