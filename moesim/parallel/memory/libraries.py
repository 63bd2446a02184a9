"""What libraries keep of a GPU beside the tensors of a step: of GEMMs, of the dispatch, and of NCCL."""

from moesim.parallel.memory.parameters import holders
from moesim.parallel.memory.temporaries import scores_buffer
from moesim.scenario import Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.dispatch import DISPATCH, BufferSizes

WORKSPACE_BYTES = 2 * 32 * 2**20  # cuBLAS on Hopper: 32 MiB for the handle of each thread, forward and backward
# Of NCCL, with the buffers that its first collective makes, beyond the four that memory.reserved was measured with: two
# H100s, NCCL 2.28.9 (tests/data/fused_peaks_h100.json.gz); the second of all-to-alls and messages.
COMMUNICATOR_BYTES, OF_MESSAGES_BYTES = 0.51e9, 0.61e9
COMMUNICATORS_RESERVED = 4


def libraries_bytes(scenario: Scenario, *, tokens: float, has_moe: bool, replicas: int) -> dict[str, float]:
    """Bytes by part of memory on a rank with `tokens` in a micro-batch. has_moe: whether it has layers with experts;
    replicas: copies of the model that a pipeline schedule holds.
    """
    return {
        "workspace": _workspace(scenario, tokens),
        "dispatch_library": _dispatch_library(scenario, tokens) if has_moe else 0.0,
        "communicators": _communicators(scenario, replicas),
    }


def _workspace(scenario: Scenario, tokens: float) -> float:
    """Of libraries of GEMMs, once more for the stream that CUDA graphs run on, and of scores."""
    graphs = scenario.implementation.switches.cuda_graphs != "none"
    return WORKSPACE_BYTES * (1 + graphs) + scores_buffer(scenario) * tokens


def _dispatch_library(scenario: Scenario, tokens: float) -> float:
    mesh, pool = scenario.parallelism, scenario.cluster.main_pool
    ranks, algorithm = mesh.expert * mesh.expert_tensor, DISPATCH[scenario.dispatch.algorithm]
    if ranks == 1:
        return 0.0
    sizes = BufferSizes(
        tokens=tokens,
        width=scenario.model.row_width,
        dispatched=BYTES_PER_ELEMENT[scenario.dispatch.dtype],
        ranks=ranks,
        domain=scenario.cluster.trays_per_domain(pool) * pool.gpus_per_node,
        experts=scenario.model.experts,
        sms=scenario.dispatch.sms(pool.spec.sm_count) or algorithm.sms or 0.0,
    )
    return algorithm.buffers(sizes)


def _communicators(scenario: Scenario, replicas: int) -> float:
    """One for each set of ranks that the layout makes: those that reduce, share layers, exchange rows, and stages.

    Rows that a library of its own carries need none of NCCL.
    """
    mesh, has_moe = scenario.parallelism, bool(scenario.model.experts)
    dense, expert = holders(scenario, replicas=replicas)
    exchange = has_moe and mesh.expert * mesh.expert_tensor > 1 and DISPATCH[scenario.dispatch.algorithm].uses_nccl
    of_sums = sum(ranks > 1 for ranks in (dense, expert * has_moe, mesh.tensor, mesh.context))
    of_messages = (mesh.pipeline > 1) + exchange
    more = max(0, of_sums + of_messages - COMMUNICATORS_RESERVED)
    return min(more, of_messages) * OF_MESSAGES_BYTES + max(0, more - of_messages) * COMMUNICATOR_BYTES
