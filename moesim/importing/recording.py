"""The operations of one training step of anyone's torch module, recorded without a GPU: on the meta device.

The module and its loss run once, forward and backward, under a dispatch mode that sees every aten operation with its
shapes at full size; nothing is computed. Attention (`scaled_dot_product_attention`) is one operation, since the meta
device would take it apart. Operations whose result depends on data cannot run there; routing through them is even
where the module counts rows by `histc` or `bincount`, whose counts stay unknown.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moesim.errors import UserError, one_line
from moesim.importing.dimension_rules import follow
from moesim.importing.dimensions import Dimensions, Dims
from moesim.importing.live_tensors import LiveBytes, LivePeak
from moesim.importing.python_work import PythonWork
from moesim.importing.width_names import WidthNames
from moesim.recorded.layers import kinds_of_layers, with_layers
from moesim.recorded.memory_bound import LAID_OUT
from moesim.recorded.pricing import CHECK, GEMMS, OPTIMIZER, SDPA
from moesim.recorded.step_file import (
    AGAIN,
    GRADIENT_WIDTHS,
    GRADIENTS,
    MODEL_SIZES,
    MODULES,
    NODES,
    PEAK,
    PYTHON,
    VIEWS,
    RecordedOp,
    gemm_facts,
    layout_facts,
    merged,
    pieces_facts,
    scan_facts,
)


def record_step(model: nn.Module, loss_of: Callable[[], Tensor]) -> list[RecordedOp]:
    """The operations of `loss_of()` and of its backward pass; `model` and what `loss_of` uses are on the meta device.

    Raises UserError where an operation does not run there.
    """
    recorder = _Recorder(model)
    for weight in model.parameters():
        recorder.dimensions.weight(weight)
    attention = _Attention(recorder)
    with _module_paths(model, recorder, attention), _gradients(model, recorder), recorder, attention:
        loss = _run(loss_of, recorder, model, counted=PythonWork(recorder.interpreted).counted())
        if recorder.trained:
            raise UserError(
                "the closure runs a backward pass itself; let it return the loss of one step alone, whose backward "
                "pass and optimizer are put behind it"
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex() or not loss.requires_grad:
            raise UserError(
                "the closure must return the loss: a tensor of one real number that depends on weights with gradients"
            )
        recorder.phase, recorder.module = "backward", ""
        recorder.host.clear()
        with _nodes(loss, recorder):
            _run(loss.backward, recorder, model)
    peak = recorder.live.peak()
    ops, sizes = _with_widths(model, recorder)
    return merged([*with_layers(ops), _optimizer(model, sizes, peak)])


def _with_widths(model: nn.Module, recorder: "_Recorder") -> tuple[list[RecordedOp], dict[str, int]]:
    """The operations, with the widths of the model that their dimensions are, and the sizes that these speak of."""
    weights = {path: recorder.dimensions.of(weight) for path, weight in model.named_parameters()}
    names = WidthNames(recorder.ops, recorder.followed, weights=weights, kinds=kinds_of_layers(recorder.ops))
    found = []
    for op, dims, gradients in zip(recorder.ops, recorder.followed, recorder.gradients, strict=True):
        made = {GRADIENT_WIDTHS: [list(names.texts(each)) for each in gradients]} if gradients else {}
        found.append(replace(op, widths=tuple(map(names.texts, dims)), facts={**op.facts, **made}))
    return found, names.sizes


def _run(
    what: Callable[[], Any],
    recorder: "_Recorder",
    model: nn.Module,
    *,
    counted: AbstractContextManager[None] | None = None,
) -> Any:
    try:
        with counted or nullcontext():
            return what()
    except UserError:
        raise
    except (NotImplementedError, RuntimeError, TypeError) as error:
        of_meta = isinstance(error, NotImplementedError) or "meta" in str(error).lower()
        if not of_meta and (recorder.phase == "forward" or isinstance(error, TypeError)):
            raise _raised(error, recorder, model) from None
        remedy = "give it a form without operations that depend on data, e.g. grouped GEMMs for its experts"
        if any(text in str(error) for text in ("copy out of meta", "to numpy")):
            remedy = "leave its tensors on the device that they are made on (no .cpu(), .cuda(), .numpy() or .tolist())"
        if recorder.phase == "backward":
            remedy = "switch activation checkpointing off, if it is on: the error may be its own"
        place = recorder.module or type(model).__name__
        raise UserError(f"{place} does not run on the meta device: {one_line(str(error))}; {remedy}") from None
    except Exception as error:  # whatever the user's program raises
        raise _raised(error, recorder, model) from None


def _raised(error: Exception, recorder: "_Recorder", model: nn.Module) -> UserError:
    place = recorder.module or type(model).__name__
    return UserError(f"{place} raised {type(error).__name__}: {one_line(str(error))}")


def _optimizer(model: nn.Module, sizes: Mapping[str, int], peak: LivePeak) -> RecordedOp:
    """One fused AdamW over the parameters that have gradients; in its facts, how many, the sizes of the model, and the
    peak of the step before it.
    """
    weights = {path: weight for path, weight in model.named_parameters() if weight.requires_grad}
    if not weights:
        raise UserError(f"no parameter of {type(model).__name__} has requires_grad: there is nothing to train")
    first = next(iter(weights.values()))
    dtype = str(first.dtype).removeprefix("torch.")
    count = sum(weight.numel() for weight in weights.values())
    seen = (((count,), dtype, count * first.element_size()),)
    alive = {"held": peak.held, **peak.most, "made": peak.made}
    facts = {"parameters": count, MODEL_SIZES: dict(sizes), PEAK: alive}
    return RecordedOp(name=OPTIMIZER, phase="optimizer", module="", reads=seen, writes=seen, facts=facts, layer="")


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.live = LiveBytes(model)
        self.ops: list[RecordedOp] = []
        self.phase, self.module = "forward", ""
        self.entered: list[tuple[int, str]] = []  # autograd's next number when another module begins to run
        self.host: Counter[str] = Counter()  # what it has done since the last operation
        self.trained = False  # a gradient was whole before the loss was there
        self.dimensions = Dimensions()
        self.followed: list[tuple[Dims, ...]] = []  # of the tensors of each operation
        self.gradients: list[list[Dims]] = []  # of the weights whose gradients are whole behind it

    def interpreted(self) -> None:
        """An instruction of the program's Python ran."""
        self.host[PYTHON] += 1

    def enter(self, module: str) -> None:
        """From here on `module` runs, and makes the nodes of autograd."""
        self.module = module
        self.entered.append((torch._C._autograd._get_sequence_nr(), module))

    def running(self) -> str:
        """The module whose operation it is; in the backward pass that whose operation's gradient it makes."""
        node = torch._C._current_autograd_node()
        if self.phase == "forward" or node is None or self.module:
            return self.module
        place = bisect_right(self.entered, node._sequence_nr(), key=lambda each: each[0])
        return self.entered[place - 1][1] if place else ""

    @property
    def again(self) -> dict[str, Any]:
        """The fact that an operation is of a forward pass that activation checkpointing repeats."""
        repeated = self.module or (torch._C._current_autograd_node() is not None and torch.is_grad_enabled())
        return {AGAIN: True} if self.phase == "backward" and repeated else {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            self._condition(args[0])
            return getattr(args[0], LIKELY, True)  # the step is taken to be one for which it is so
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.live.seen(given)
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.live.made(func._schema.name.removeprefix("aten::"), made, phase=self.phase)
        follow(self.dimensions, func, args, kwargs or {}, given, made)
        self._note(func, args, given, made)
        _mark_chance(func, args, out)
        return out

    def _condition(self, asked: Tensor) -> None:
        facts = self.again if hasattr(asked, LIKELY) else {"taken": True, **self.again}
        self._add(CHECK, self.module, (asked,), (), facts)

    def _note(self, func: Any, args: Any, inputs: list[Tensor], results: list[Tensor]) -> None:
        name = func._schema.name.removeprefix("aten::")
        aliased = [result.alias_info for result in func._schema.returns]
        if name in FREE or (aliased and all(alias is not None and not alias.is_write for alias in aliased)):
            self.host[VIEWS] += 1
            return
        self._add(
            name, self.running(), inputs, results, _facts(name, args, inputs, results) | self.again | self._host()
        )

    def note(self, name: str, module: str, reads: Any, writes: Any, facts: Mapping[str, Any] | None = None) -> None:
        """An operation that the meta device would take apart, as the one that it is on a GPU."""
        self._add(name, module, reads, writes, {**(facts or {}), **self._host()})

    def _add(
        self, name: str, module: str, reads: Sequence[Tensor], writes: Sequence[Tensor], facts: Mapping[str, Any]
    ) -> None:
        seen = [tuple(map(_seen, side)) for side in (reads, writes)]
        self.ops.append(
            RecordedOp(name=name, phase=self.phase, module=module, reads=seen[0], writes=seen[1], facts=facts)
        )
        self.followed.append(tuple(map(self.dimensions.of, (*reads, *writes))))
        self.gradients.append([])

    def _host(self) -> dict[str, Any]:
        """How many views and empty tensors the host has made, modules called and nodes run since the last operation."""
        done = dict(self.host)
        self.host.clear()
        return done

    def accumulated(self, weight: Tensor) -> None:
        """The gradient of a weight is whole: said by the operation that was the last one."""
        self.trained = self.trained or self.phase == "forward"
        last = self.ops[-1]
        made = [*last.facts.get(GRADIENTS, ()), list(weight.shape)]
        self.ops[-1] = replace(last, facts={**last.facts, GRADIENTS: made})
        self.gradients[-1].append(self.dimensions.of(weight))


def _facts(name: str, args: Any, inputs: list[Tensor], results: list[Tensor]) -> dict[str, Any]:
    if name == "cumsum":
        return scan_facts(args[0].shape, args[1])
    if name in GEMMS:
        return _gemm_facts([*inputs[-2:], *results])
    if name not in LAID_OUT or not inputs:
        return {}
    if name == "cat":
        return pieces_facts([each.shape for each in inputs], [each.stride() for each in inputs])
    tensors = [*inputs, *results] if name == "clone" else inputs
    return layout_facts([each.shape for each in tensors], [each.stride() for each in tensors])


def _gemm_facts(matrices: list[Tensor]) -> dict[str, Any]:
    shapes, strides = [each.shape for each in matrices], [each.stride() for each in matrices]
    return gemm_facts(shapes, strides, element_bytes=matrices[0].element_size())


UNIFORM, LIKELY = "_drawn_uniformly", "_likely"  # attributes of tensors
COMPARED = {"lt": lambda limit: limit >= 0.5, "le": lambda limit: limit >= 0.5}
COMPARED |= {"gt": lambda limit: limit < 0.5, "ge": lambda limit: limit < 0.5}


def _mark_chance(func: Any, args: Any, out: Any) -> None:
    """Whether a layer is dropped (`torch.rand([]) < share`) is the likelier of both."""
    name = func._schema.name.removeprefix("aten::")
    if name == "rand" and isinstance(out, Tensor):
        setattr(out, UNIFORM, True)
    elif name in COMPARED and hasattr(args[0], UNIFORM) and isinstance(args[1], int | float):
        setattr(out, LIKELY, COMPARED[name](args[1]))


FREE = {
    "detach",
    "_unsafe_view",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "lift_fresh",
}


def _seen(tensor: Tensor) -> tuple[tuple[int, ...], str, int]:
    held = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        held *= size if stride else 1
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), held * tensor.element_size()


SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class _Attention(TorchFunctionMode):
    """Takes attention as one operation, forward and backward, and dropout as a GPU does."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.dropout:
            return _dropout(func, *args, **kwargs)
        if func in (torch.nn.functional.rms_norm, torch.rms_norm):
            return _rms_norm(self.recorder, *args, **kwargs)
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(SDPA_ARGUMENTS, args, strict=False)) | kwargs
        query, key, value = (given[name] for name in SDPA_ARGUMENTS[:3])
        facts = {"causal": bool(given.get("is_causal")) or given.get("attn_mask") is not None}
        facts |= {"dropout": True} if given.get("dropout_p") else {}
        return _AttentionFunction.apply(query, key, value, self.recorder, facts, self.recorder.again)  # type: ignore[no-untyped-call]


def _dropout(func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """The one kernel that a GPU has for it; the meta device would take it apart."""
    if not training or inplace or not 0 < p < 1:
        return func(input, p, training, inplace)  # type: ignore[no-any-return]
    return torch.native_dropout(input, p, True)[0]


def _rms_norm(
    recorder: _Recorder, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """The one kernel that a GPU has for it, forward and backward; the meta device would take it apart."""
    return _NormFunction.apply(input, weight, recorder, recorder.again)  # type: ignore[no-any-return, no-untyped-call]


class _NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, recorder: _Recorder, again: Any) -> Tensor:
        out = torch.empty_like(input)
        scale = input.new_empty((*input.shape[:-1], 1), dtype=torch.float32)
        given = [input] if weight is None else [input, weight]
        ctx.save_for_backward(*given, scale)
        ctx.recorder, ctx.module = recorder, recorder.running()
        if weight is not None:
            recorder.dimensions.same(input, weight)
        recorder.note("_fused_rms_norm", ctx.module, given, (out, scale), again)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        input, *weight, scale = ctx.saved_tensors
        made = [torch.empty_like(each) for each in (input, *weight)]
        ctx.recorder.note("_fused_rms_norm_backward", ctx.module, (gradient, input, scale, *weight), made)
        return (*made, *([] if weight else [None]), None, None)


class _AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, recorder: _Recorder, facts: Any, again: Any
    ) -> Tensor:
        ctx.recorder, ctx.facts, ctx.module = recorder, facts, recorder.running()
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        # A GPU's result lies as the queries do, and is kept. Where these lie token by token the program's copy of it,
        # which is kept here, is none there.
        ctx.save_for_backward(query, key, value, *([out] if query.is_contiguous() else []))
        recorder.dimensions.attend(query, key, value, out)
        recorder.note(SDPA, ctx.module, (query, key, value), (out,), facts | again)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        saved = ctx.saved_tensors[:3]
        gradients = tuple(torch.empty_like(tensor) for tensor in saved)
        ctx.recorder.note(SDPA, ctx.module, saved, gradients, ctx.facts)
        return (*gradients, None, None, None)


@contextmanager
def _nodes(loss: Tensor, recorder: _Recorder) -> Iterator[None]:
    """Tells the recorder of every node of autograd that runs."""
    handles, seen, todo = [], set(), [loss.grad_fn]

    def runs(*_: Any) -> None:
        recorder.host[NODES] += 1

    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        handles.append(node.register_prehook(runs))
        todo += [before for before, _ in node.next_functions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _gradients(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Tells the recorder when the gradient of a weight is whole."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    handles = [weight.register_post_accumulate_grad_hook(recorder.accumulated) for weight in weights]  # type: ignore[no-untyped-call, unused-ignore]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _module_paths(model: nn.Module, recorder: _Recorder, attention: _Attention) -> Iterator[None]:
    """Tells the recorder which module runs.

    The backward pass is without the modes of functions: a module that activation checkpointing runs there gets them.
    """
    stack: list[str] = []
    handles = []
    repeated: list[ExitStack] = []
    for path, module in model.named_modules():

        def enter(module: nn.Module, args: Any, path: str = path) -> None:
            if recorder.phase == "backward" and not stack:
                repeated.append(ExitStack())
                repeated[-1].enter_context(torch.device("meta"))
                repeated[-1].enter_context(attention)
            stack.append(path)
            recorder.host[MODULES] += 1
            recorder.enter(path)

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            stack.pop()
            recorder.enter(stack[-1] if stack else "")
            if repeated and not stack:
                repeated.pop().close()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
