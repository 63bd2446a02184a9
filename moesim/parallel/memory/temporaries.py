"""What exists inside one layer for a moment: gradients on their way back, and what attention computes of its scores.

Each moment of a layer's backward pass is bytes per token, per computed row, and fixed ones beside what the layer still
keeps then. With rows of width h, inner width f (a: bytes per element) the routed experts pass, from their results on:

    2 h a                    the gradient of the results, and their copy in the order of experts; h a where one kernel
                             makes that from the gradient of the sum, and once more where the results are made again
    (h + f) a + W2           gradients of results and of W2's input, and that of W2
    2 f a                    those of W2's input and of the activation's two; W2's input is no longer kept
    (h - f) a + W1           the gradient of the rows beside the activation's two, which have taken the place of W1's
                             results, and that of W1

Where gates multiply the results, these are kept up to there, h a less later on; where gradients are made anew they stay
(`made`). An unfused activation keeps one f more, which its gradient replaces.
W1, W2: gradients in the format of weights, where a kernel adds them to a buffer (`accumulation: buffer`); of all
experts of the rank, or of one where each has GEMMs of its own. Dense networks the same, once per token. Attention:
the gradients of its result, queries, keys and values. A fused kernel adds up the gradient of queries in fp32, and where
queries share keys makes those of keys and values of every head before it sums them: what torch's two kernels on an H100
take (tests/data/fused_peaks_h100.json.gz). Unfused attention holds most of a score on the way back, in its format: the
softmax, the gradient, their product, which torch's CUDA kernel of the softmax's gradient makes first, and its result;
as Megatron-Core writes it in fp32, and a buffer in bf16 that stays.
Found in Megatron-Core 0.19.2 by the storages that are alive as it runs, but for that product.
"""

from dataclasses import dataclass

from moesim.parallel.memory.parameters import expert_slice_parameters
from moesim.scenario import Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.model import Mla

SCORES_AT_ONCE = {"fused": 0.0, "unfused": 8.0, "fp32": 16.0}  # bytes of a score, what is kept included
SCORES_BUFFER = 2.0  # of these, what stays from the first layer on where the software adds scores to a buffer
ELEMENT = 2.0  # bytes between kernels
SUMMED = 4.0  # bytes of what a kernel adds up in fp32


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Bytes per token and per row (beside what is kept; negative where that has ended), and fixed ones.

    made: bytes of the gradients of the layer's weights that exist from here on, where they have no buffer that stays.
    """

    token: float = 0.0
    row: float = 0.0
    fixed: float = 0.0
    made: float = 0.0


def _gemms(scenario: Scenario, width: float, inner: float, matrix: float) -> list[tuple[float, float, float]]:
    """Bytes per row, fixed ones and gradients made at each moment; `matrix`: elements of W2, of all or one expert."""
    switches, matrices = scenario.implementation.switches, scenario.model.ffn_matrices
    weight = matrix * BYTES_PER_ELEMENT[scenario.workload.precision.weights]
    if switches.fresh_gradients:
        ended = width * (switches.gates != "inside")  # results that their gates have multiplied
        unfused = 2 * inner if switches.activation == "unfused" else inner
        moments = [
            (_results(scenario) * width, 0.0),
            (width + inner - ended, weight),
            (unfused - ended, weight),
            (width - unfused - ended, matrices * weight),
        ]
        return [(row * ELEMENT, 0.0, made) for row, made in moments]
    added = weight * (switches.accumulation == "buffer")
    moments = [
        ((1 if switches.combine == "fused" and not _repeats_results(scenario) else 2) * width, 0.0),
        (width + inner, added),
        (2 * inner, 0.0),
        (width - inner, (matrices - 1) * added),
    ]
    return [(row * ELEMENT, fixed, 0.0) for row, fixed in moments]


def _results(scenario: Scenario) -> float:
    """Gradients of the results at once, in bf16: theirs, and that in the order of experts, of which `index_put` on the
    way back from a sum has zeros and what it puts into them; in the format of the gates.
    """
    switches = scenario.implementation.switches
    return (3 if switches.combine == "sum" else 2) * (2 if switches.gates == "fp32" else 1)


def _repeats_results(scenario: Scenario) -> bool:
    """Whether the backward pass computes the experts' results again."""
    return scenario.workload.recompute == "full" or "moe" in scenario.workload.recomputed_parts


def _residual(scenario: Scenario) -> float:
    """The gradient of the residual stream and the one that joins it."""
    return 2 * scenario.model.hidden * ELEMENT


def expert_moments(scenario: Scenario) -> list[Moment]:
    """Those of the routed experts."""
    model, switches = scenario.model, scenario.implementation.switches
    if not model.experts:
        return []
    together = scenario.slots_per_rank if switches.expert_gemms == "grouped" else 1
    matrix = together * expert_slice_parameters(scenario) / model.ffn_matrices
    inner = model.expert_intermediate / scenario.parallelism.expert_tensor
    moments = _gemms(scenario, model.row_width, inner, matrix)
    return [Moment(token=_residual(scenario), row=row, fixed=fixed, made=made) for row, fixed, made in moments]


def dense_moments(scenario: Scenario) -> list[Moment]:
    """Those of a dense feed-forward network, whose columns tensor ranks share."""
    model = scenario.model
    matrix = model.hidden * model.dense_intermediate / scenario.parallelism.tensor
    moments = _gemms(scenario, model.hidden, model.dense_intermediate, matrix)
    return [Moment(token=_residual(scenario) + token, fixed=fixed, made=made) for token, fixed, made in moments]


def attention_moment(scenario: Scenario, *, kept_per_query: float) -> Moment:
    """That of attention's backward pass; `kept_per_query`: bytes of a head for one query that the layer has kept."""
    model, switches = scenario.model, scenario.implementation.switches
    latent = isinstance(model.attention, Mla)
    extra = model.attention.rope_head_dim if isinstance(model.attention, Mla) else 0
    kv_heads = model.heads if latent or switches.repeat_keys else model.kv_heads
    width = model.head_dim + extra
    gradients = (2 * model.heads + 2 * kv_heads) * width * ELEMENT
    if switches.attention == "fused":
        gradients += model.heads * (width + 1) * SUMMED + 2 * model.heads * width * ELEMENT * (kv_heads < model.heads)
    keys = scenario.workload.sequence_length
    passing = SCORES_AT_ONCE[switches.attention]
    scores = model.heads * max(0.0, keys * passing - kept_per_query) * (passing > 0)
    return Moment(token=model.hidden * ELEMENT + max(gradients, scores))


def scores_buffer(scenario: Scenario) -> float:
    """Bytes per token of the buffer for scores that stays."""
    implementation = scenario.implementation
    if implementation.switches.attention != "fp32" or not implementation.software.buffers_scores:
        return 0.0
    return SCORES_BUFFER * scenario.model.heads * scenario.workload.sequence_length
