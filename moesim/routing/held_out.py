"""How the thin language model routes held-out text, without dropping: what a trace records of it.

Legend: B sequences of a window, T tokens per sequence, K selections, S recorded sequences, L layers, V vocabulary.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from moesim.errors import UserError
from moesim.routing.request import TrainingRequest
from moesim.routing.routers import Routing
from moesim.routing.transformer import LanguageModel, Mode
from moesim.scenario.routers import ROUTERS
from moesim.seeding import stream_seed
from moesim.trace.record import NO_EXPERT, TraceStep

TOKENS_PER_FORWARD = 8192


class Recording(NamedTuple):
    """The routing of some held-out text and the mean cross entropy (nats per byte) on it."""

    step: TraceStep
    loss: float


def held_out_sequences(held_out: bytes, *, num_sequences: int, length: int) -> NDArray[np.uint8]:
    """`num_sequences` distinct contiguous sequences and each one's next byte, uint8 [S, T + 1], spread over the text.

    Raises UserError when the text is too short for so many.
    """
    available = (len(held_out) - 1) // length
    if num_sequences > available:
        raise UserError(
            f"the corpus holds out {len(held_out)} bytes, too few for {num_sequences} distinct sequences of {length}; "
            "name a larger one (routing.corpus), or lower routing.tokens, sequence_length or parallelism.expert"
        )
    text: NDArray[np.uint8] = np.frombuffer(held_out, dtype=np.uint8)
    starts_S = np.arange(num_sequences) * available // num_sequences * length
    sequences: NDArray[np.uint8] = text[starts_S[:, None] + np.arange(length + 1)]
    return sequences


def record(
    model: LanguageModel, request: TrainingRequest, held_out: bytes, *, step: int, num_sequences: int
) -> Recording:
    """Route `num_sequences` held-out sequences of the workload's length, each evaluated in windows of `thin.context`.

    Expert choice competes over one simulated micro-batch of a rank; other routers do not see how tokens are batched.
    """
    length = request.sequence_length
    bytes_ST = held_out_sequences(held_out, num_sequences=num_sequences, length=length)
    if ROUTERS[request.router.kind].by_experts:
        per_forward = request.micro_batch
    else:
        per_forward = max(1, TOKENS_PER_FORWARD // length)
    generator = torch.Generator().manual_seed(stream_seed(request.seed, "record", step))
    device = next(model.parameters()).device
    pieces: list[list[NDArray[Any]]] = []
    losses = []
    with torch.inference_mode():
        for start in range(0, num_sequences, per_forward):
            chunk = torch.from_numpy(bytes_ST[start : start + per_forward]).to(device).long()
            loss, arrays = _record_chunk(model, chunk, request.thin.context, Mode(generator))
            pieces.append(arrays)
            losses.append(loss * len(chunk))
    ids, affinities, gates = (_join([piece[part] for piece in pieces]) for part in range(3))
    trace_step = TraceStep(
        step=step,
        expert_ids_LSTK=ids.astype(np.int16),
        affinities_LSTK=affinities.astype(np.float32),
        gates_LSTK=gates.astype(np.float32),
    )
    return Recording(trace_step, sum(losses) / num_sequences)


def _record_chunk(model: LanguageModel, bytes_ST: Tensor, context: int, mode: Mode) -> tuple[float, list[NDArray[Any]]]:
    """Mean loss and [ids, affinities, gates], each [L, S, T, K], of sequences with their next byte [S, T + 1].

    A sequence is cut into whole windows and one shorter rest, which go through the model apart.
    """
    sequences, length = len(bytes_ST), bytes_ST.shape[1] - 1
    whole = length - length % context
    parts, total_loss = [], 0.0
    for first, last, window in ((0, whole, context), (whole, length, length - whole)):
        if first == last:
            continue
        inputs = bytes_ST[:, first:last].reshape(-1, window)
        targets = bytes_ST[:, first + 1 : last + 1].reshape(-1)
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=inputs.is_cuda):
            logits_BTV, routings = model(inputs, mode)
        total_loss += float(functional.cross_entropy(logits_BTV.float().flatten(0, 1), targets, reduction="sum"))
        parts.append(_as_arrays(routings, sequences))
    arrays = parts[0] if len(parts) == 1 else [_join(list(pair), axis=2) for pair in zip(*parts, strict=True)]
    return total_loss / (sequences * length), arrays


def _as_arrays(routings: list[Routing], sequences: int) -> list[NDArray[Any]]:
    """[ids, affinities, gates] of all layers, each [L, S, T, K]."""
    arrays = []
    for field in ("expert_ids_TK", "affinities_TK", "gates_TK"):
        layers = [getattr(routing, field).unflatten(0, (sequences, -1)).cpu().numpy()[None] for routing in routings]
        arrays.append(_join(layers, axis=0))
    return arrays


def _join(arrays_LSTK: list[NDArray[Any]], *, axis: int = 1) -> NDArray[Any]:
    """Concatenate along `axis`, columns padded to the widest (expert choice): ids by -1, scores by 0."""
    width = max(array.shape[-1] for array in arrays_LSTK)
    fill = NO_EXPERT if np.issubdtype(arrays_LSTK[0].dtype, np.integer) else 0
    padded = [
        np.pad(array, [(0, 0)] * 3 + [(0, width - array.shape[-1])], constant_values=fill) for array in arrays_LSTK
    ]
    return np.concatenate(padded, axis=axis)
