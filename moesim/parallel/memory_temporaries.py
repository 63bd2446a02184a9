"""What exists inside one layer for a moment: gradients on their way back, and what attention computes of its scores.

Each moment of a layer's backward pass is bytes per token, per computed row, and fixed ones beside what the layer still
keeps then. With rows of width h, inner width f (a: bytes per element) the routed experts pass, from their results on:

    2 h a                    the gradient of the results, and their copy in the order of experts
    (h + f) a + W2           gradients of results and of W2's input, and that of W2
    2 f a                    those of W2's input and of the activation's two; W2's input is no longer kept
    (h - f) a + W1           the gradient of the rows beside the activation's two, which have taken the place of W1's
                             results, and that of W1

W1, W2: gradients in the format of weights, where a kernel adds them to a buffer (`accumulation: buffer`); of all
experts of the rank, or of one where each has products of its own. Dense networks the same, once per token. Attention:
the gradients of its result, queries, keys and values. Unfused attention holds most of a score on the way back, in its
format: the softmax, the gradient, their product, which torch's CUDA kernel of the softmax's gradient makes first, and
its result; as Megatron-Core writes it in fp32, and a buffer in bf16 that stays.
Found in Megatron-Core 0.19.2 by the storages that are alive as it runs, but for that product.
"""

from dataclasses import dataclass

from moesim.parallel.memory_parameters import expert_slice_parameters
from moesim.scenario import Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.model import Mla

SCORES_AT_ONCE = {"fused": 0.0, "unfused": 8.0, "fp32": 18.0}  # bytes of a score, what is kept included
SCORES_BUFFER = {"fused": 0.0, "unfused": 0.0, "fp32": 2.0}  # of these, what stays from the first layer on
ELEMENT = 2.0  # bytes between kernels


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Bytes per token and per row (beside what is kept; negative where that has ended), and fixed ones."""

    token: float = 0.0
    row: float = 0.0
    fixed: float = 0.0


def _products(width: float, inner: float, weights: float, matrices: int) -> list[tuple[float, float]]:
    """Bytes per row and fixed ones at each moment; `weights`: bytes of one matrix's gradient, 0 where none is made."""
    both = (matrices - 1) * weights
    return [
        (2 * width * ELEMENT, 0.0),
        ((width + inner) * ELEMENT, weights),
        (2 * inner * ELEMENT, 0.0),
        ((width - inner) * ELEMENT, both),
    ]


def _residual(scenario: Scenario) -> float:
    """The gradient of the residual stream and the one that joins it."""
    return 2 * scenario.model.hidden * ELEMENT


def expert_moments(scenario: Scenario) -> list[Moment]:
    """Those of the routed experts."""
    model, switches = scenario.model, scenario.implementation.switches
    if not model.experts:
        return []
    matrix = expert_slice_parameters(scenario) / model.ffn_matrices * _gradient_bytes(scenario)
    together = scenario.slots_per_rank if switches.expert_products == "grouped" else 1
    inner = model.expert_intermediate / scenario.parallelism.expert_tensor
    moments = _products(model.row_width, inner, together * matrix, model.ffn_matrices)
    return [Moment(token=_residual(scenario), row=row, fixed=fixed) for row, fixed in moments]


def dense_moments(scenario: Scenario) -> list[Moment]:
    """Those of a dense feed-forward network, whose columns tensor ranks share."""
    model = scenario.model
    inner = model.dense_intermediate
    matrix = model.hidden * inner / scenario.parallelism.tensor * _gradient_bytes(scenario)
    moments = _products(model.hidden, inner, matrix, model.ffn_matrices)
    return [Moment(token=_residual(scenario) + token, fixed=fixed) for token, fixed in moments]


def attention_moment(scenario: Scenario, *, kept_per_query: float) -> Moment:
    """That of attention's backward pass; `kept_per_query`: bytes of a head for one query that the layer has kept."""
    model, switches = scenario.model, scenario.implementation.switches
    latent = isinstance(model.attention, Mla)
    extra = model.attention.rope_head_dim if isinstance(model.attention, Mla) else 0
    kv_heads = model.heads if latent or switches.repeat_keys else model.kv_heads
    gradients = (2 * model.heads + 2 * kv_heads) * (model.head_dim + extra) * ELEMENT
    keys = scenario.workload.sequence_length
    passing = SCORES_AT_ONCE[switches.attention] - SCORES_BUFFER[switches.attention]
    scores = model.heads * max(0.0, keys * passing - kept_per_query) * (passing > 0)
    return Moment(token=model.hidden * ELEMENT + max(gradients, scores))


def scores_buffer(scenario: Scenario) -> float:
    """Bytes per token of the buffer for scores that stays."""
    return (
        SCORES_BUFFER[scenario.implementation.switches.attention]
        * scenario.model.heads
        * (scenario.workload.sequence_length)
    )


def _gradient_bytes(scenario: Scenario) -> float:
    added = scenario.implementation.switches.accumulation == "buffer"
    return BYTES_PER_ELEMENT[scenario.workload.precision.weights] * added
