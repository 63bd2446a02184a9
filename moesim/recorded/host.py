"""What a recorded step costs the host that launches it, piece by piece.

Each kind of piece - an operation, a view, a call of a module, an instruction of Python, a node of autograd - was put by
itself into a small model whose GPU waits for its host, and costs what that model's step became longer
(`moesim.kernels.benchmarks.host_in_situ`, one H100's host). So put, pieces cost about a half of what that model's own
step costs over the same sum of its own pieces: what is issued again and again is found in the host's caches. DILUTED is
this ratio, of the same model. But for what wrappers do, no step of any other model is in a number.
"""

from collections.abc import Sequence
from typing import NamedTuple

from moesim.recorded.step_file import AGAIN, GRADIENTS, MODULES, NODES, PYTHON, VIEWS, RecordedOp

# How many times as long as pieces put into it the small model's own forward and backward pass take, measured between
# steps of other programs.
DILUTED = {"forward": 2.15, "backward": 1.7}
# What operations cost in ordinary ones; all others are one. Of the forward pass:
FORWARD_KINDS = {
    "mm": 1.8,
    "addmm": 1.8,
    "bmm": 2.0,
    "baddbmm": 2.0,
    "_grouped_mm": 2.5,
    "scaled_dot_product_attention": 3.1,
    "sort": 3.7,
    "topk": 2.5,
    "_fused_rms_norm": 1.4,
}
BACKWARD_KINDS = {
    "mm": 2.5,
    "addmm": 2.5,
    "bmm": 2.5,
    "baddbmm": 2.5,
    "_grouped_mm": 3.7,
    "scaled_dot_product_attention": 9.0,  # with the sums of gradients that one operation of a GPU's makes of several
    "index_put": 8.3,
    "_index_put_impl_": 8.3,
    "embedding_dense_backward": 8.3,
    "_fused_rms_norm_backward": 3.0,
}
# Steps that the host paces took as long as hosts between these paces would have made them, on six machines and
# occasions (tests/importing/test_measured_steps.py). One host differs by a third of this from one minute to the next.
PACES = (0.75, 1.75)
# Of steps that do not say (traces, and files of older versions), what others have on average for each operation.
USUAL = {
    "forward": {VIEWS: 0.8, MODULES: 0.2, PYTHON: 55.0},
    "backward": {VIEWS: 0.9, NODES: 1.0},
}


class Host(NamedTuple):
    """Seconds of the host. Forward: of an operation, a view, a module's call, an instruction of Python. Backward, in
    torch's own loop: of an operation, a view, a node. Of an optimizer's step, and of a weight in it.

    Of what wrappers do: a weight that DDP copies into or out of a bucket (`moved`), a bucket; a unit of FSDP2 in a pass
    and each of its weights there, a weight in the optimizer that is a DTensor (`sharded`, beyond `weight`); a GEMM
    of a plan's DTensors (`shared`).
    """

    op: float = 0.0
    view: float = 0.0
    module: float = 0.0
    python: float = 0.0
    backward_op: float = 0.0
    backward_view: float = 0.0
    node: float = 0.0
    optimizer: float = 0.0
    weight: float = 0.0
    moved: float = 0.0
    bucket: float = 0.0
    unit: float = 0.0
    unit_weight: float = 0.0
    sharded: float = 0.0
    shared: float = 0.0
    alike: bool = False  # every operation costs the same

    def times(self, factor: float) -> "Host":
        """One that is slower by a factor; what wrappers do is left as it is."""
        own = {name: factor * getattr(self, name) for name in OWN}
        return self._replace(**own)

    def paced(self, factor: float) -> "Host":
        """One that is slower by a factor in all that it does."""
        return self._replace(**{name: factor * getattr(self, name) for name in self._fields[:-1]})

    def per_op(self, seconds: float) -> "Host":
        """One that needs the same for every operation, whatever stands around it."""
        each = {"op": seconds, "backward_op": seconds, "optimizer": seconds}
        return self._replace(**dict.fromkeys(OWN, 0.0) | each, alike=True)

    def seconds(self, op: RecordedOp, *, weights: float, usual: bool = False) -> float:
        """To launch one operation, with what is done before it; the optimizer goes through all `weights`.

        usual: the step does not say what is done before its operations.
        """
        if op.phase == "optimizer":
            return self.optimizer + self.weight * weights
        done = USUAL[op.phase] if usual else op.facts
        if op.works == "backward":
            kind = 1.0 if self.alike else BACKWARD_KINDS.get(op.name, 1.0)
            around = self.backward_view * done.get(VIEWS, 0) + self.node * done.get(NODES, 0)
            return float(self.backward_op * kind + around)
        kind = 1.0 if self.alike else FORWARD_KINDS.get(op.name, 1.0)
        before = self.view * done.get(VIEWS, 0) + self.module * done.get(MODULES, 0) + self.python * done.get(PYTHON, 0)
        nodes = self.node * done.get(NODES, 0) if op.facts.get(AGAIN) else 0.0
        return float(self.op * kind + before + nodes)


OWN = Host._fields[: Host._fields.index("moved")]  # what it does without a wrapper
_FORWARD, _BACKWARD = DILUTED["forward"], DILUTED["backward"]
HOST = Host(
    op=_FORWARD * 10.5e-6,
    view=_FORWARD * 2.5e-6,
    module=_FORWARD * 1.9e-6,
    python=_FORWARD * 22e-9,
    backward_op=_BACKWARD * 7.1e-6,
    backward_view=_BACKWARD * 1.35e-6,
    node=_BACKWARD * 4.7e-6,
    optimizer=_BACKWARD * 330e-6,
    weight=_BACKWARD * 7.1e-6,
    # Rows of GEMMs in units of a few weights, on two machines with two H100s each (tools/wrapper_table.py); a unit
    # took 0.8 ms there and up to 2 on others: the median of five occasions.
    moved=_BACKWARD * 9.3e-6,
    bucket=_BACKWARD * 260e-6,
    unit=1.0e-3,
    unit_weight=32e-6,
    sharded=33e-6,
    shared=0.8e-3,  # of 1.0 and 0.65 ms on two machines, from Qwen3-MoE's tensor plan
)


def says_little(ops: Sequence[RecordedOp]) -> bool:
    """Whether a step does not say what its host does between operations."""
    return not any(NODES in op.facts for op in ops)


def weights_of(ops: Sequence[RecordedOp]) -> float:
    """How many weights have gradients."""
    return float(sum(op.count * len(op.facts.get(GRADIENTS, ())) for op in ops))
