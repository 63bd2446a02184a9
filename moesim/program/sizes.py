"""What every implementation's list of kernels starts from: the sizes of one micro-batch, and passes to chain."""

from dataclasses import dataclass, replace
from functools import cached_property

from moesim.program.collectives import GroupLinks, Peers
from moesim.program.operations import Operation
from moesim.results.spans import Part
from moesim.scenario import Model
from moesim.scenario.model import Mla
from moesim.scenario.routers import DEEPSEEK_MOE, RouterFacts
from moesim.scenario.software import FUSED, SoftwareFacts, Switches

Passes = tuple[list[Operation], list[Operation]]  # forward, backward (each in issue order)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Sizes of one micro-batch on one rank: `batch` sequences of `sequence` tokens; `quantise` when dispatch is fp8.

    `tensor`, `context` and `expert_tensor` are the ranks that share GEMMs and tokens (see Parallelism), `links` what
    their collectives cost; a rank alone needs none. `remote`: experts are spread over more than one rank. `router`:
    the facts of the one that runs. `shared_beside`: shared experts run beside the dispatch, where the software
    can. `software`: whose kernels they are, with `switches` as the scenario sets them. `deduplicated`: a token travels
    once for several of its experts; `gathers`: every rank gets all tokens; `moves_rows`: the dispatch takes tokens
    where they lie, and its combine brings sums. `weights_beside`: the experts' gradients of weights run
    beside the exchange behind them. `local`: the layer is one of model.local.
    """

    model: Model
    batch: int
    sequence: int
    quantise: bool
    remote: bool
    router: RouterFacts = DEEPSEEK_MOE
    shared_beside: bool = True
    software: SoftwareFacts = FUSED
    switches: Switches = FUSED.switches
    deduplicated: bool = False
    gathers: bool = False
    moves_rows: bool = False
    local: bool = False
    tensor: int = 1
    context: int = 1
    expert_tensor: int = 1
    links: GroupLinks | None = None
    weights_beside: bool = False

    @cached_property
    def tokens(self) -> int:
        """Tokens of one micro-batch that one rank holds: sequence parallelism splits them over tensor ranks, too."""
        return self.batch * self.sequence // (self.context * (self.tensor if self.switches.sequence_parallel else 1))

    @property
    def gathered_tokens(self) -> int:
        """Tokens that the GEMMs of a tensor-parallel rank see: those of all its tensor ranks."""
        return self.tokens * (self.tensor if self.switches.sequence_parallel else 1)

    @property
    def heads(self) -> int:
        """Query heads of one rank."""
        return self.model.heads // self.tensor

    @property
    def kv_heads(self) -> int:
        """Key and value heads of one rank; latent attention makes as many as there are query heads."""
        return (self.model.heads if isinstance(self.model.attention, Mla) else self.model.kv_heads) // self.tensor

    @property
    def tensor_peers(self) -> Peers:
        """Ranks that share each matrix of attention and dense feed-forward networks."""
        return Peers(self.tensor)

    @property
    def context_peers(self) -> Peers:
        """Ranks that share each sequence, one per tensor index."""
        return Peers(self.context, self.tensor)


def repeated_whole(word: str, passes: Passes, *, but: Part | None = None) -> Passes:
    """The passes with a forward one that this word of workload.recompute repeats whole, but for one part."""
    forward, backward = passes
    return [
        operation if operation.part is but else replace(operation, again=(*operation.again, word))
        for operation in forward
    ], backward


def chain(*parts: Passes) -> Passes:
    """Forward in order, backward in the opposite order."""
    forward = [operation for part in parts for operation in part[0]]
    backward = [operation for part in reversed(parts) for operation in part[1]]
    return forward, backward
