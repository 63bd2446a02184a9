"""Which dimensions the results of an operation lie on, by those of what it reads: a rule for each kind of operation.

A rule gives the dimensions of every result, or None where it does not know them; then, as where there is no rule, they
are told by place and value (`Dimensions.like`).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moesim.importing.dimensions import Dimensions, Dims, Size, cut, new_sizes, number_of, tie, tracked

Found = list[Dims] | None
Rule = Callable[[Dimensions, dict[str, Any], list[Tensor]], Found]


def _viewed(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    dims = known.of(given["self"])
    if given["self"].shape == results[0].shape:
        return [dims]
    found = cut(dims, results[0].shape)
    return None if found is None else [found]


def _transposed(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    dims = list(known.of(given["self"]))
    if len(dims) > 1:
        first, second = given.get("dim0", 0), given.get("dim1", 1)
        dims[first], dims[second] = dims[second], dims[first]
    return [tuple(dims)]


def _permuted(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    dims = known.of(given["self"])
    return [tuple(dims[at] for at in given["dims"])]


def _expanded(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    """What is repeated is a size of its own, as heads that share a key."""
    dims, shape = known.of(given["self"]), results[0].shape
    padded = [()] * (len(shape) - len(dims)) + list(dims)
    return [tuple(dim if number_of(dim) == size else (Size(size),) for dim, size in zip(padded, shape, strict=True))]


def _selected(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    dims = list(known.of(given["self"]))
    del dims[given.get("dim", 0)]
    return [tuple(dims)] * len(results)


def _sliced(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    dims, at = list(known.of(given["self"])), given.get("dim", 0)
    size, length, step = number_of(dims[at]), results[0].shape[at], given.get("step", 1)
    if step > 1 and tracked(dims[at]) and size % step == 0:
        dims[at] = known.pieces(dims[at], [length] * step, alike=True)[0]
    else:
        start = given.get("start") or 0
        dims[at] = known.piece(dims[at], min(max(start + size if start < 0 else start, 0), size), length)
    return [tuple(dims)]


def _strided(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    """A slice along one dimension, as backward passes make it; nothing else is followed."""
    source, result = given["self"], results[0]
    if source.stride() != result.stride():
        return [tuple((size,) if size > 1 else () for size in result.shape)]
    dims = list(known.of(source))
    offset = result.storage_offset() - source.storage_offset()
    for at, (before, after) in enumerate(zip(source.shape, result.shape, strict=True)):
        if before != after:
            dims[at] = known.piece(dims[at], offset // source.stride(at), after)
    return [tuple(dims)]


def _split(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    dims, at = known.of(given["self"]), given.get("dim", 0)
    sizes = [each.shape[at] for each in results]
    found = known.pieces(dims[at], sizes, alike="split_sizes" not in given and len(set(sizes)) == 1)
    place = at % len(dims)
    return [(*dims[:place], piece, *dims[place + 1 :]) for piece in found]


def _joined(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    tensors = [each for each in given["tensors"] if each.dim() == results[0].dim()]
    at = given.get("dim", 0) % results[0].dim()
    for other in tensors[1:]:
        for place, pair in enumerate(zip(known.of(tensors[0]), known.of(other), strict=True)):
            if place != at:
                tie(*pair)
    dims = list(known.of(tensors[0]))
    dims[at] = known.join([known.of(each)[at] for each in tensors])
    return [tuple(dims)]


def _stacked(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    tensors = given["tensors"]
    for other in tensors[1:]:
        known.same(tensors[0], other)
    dims = list(known.of(tensors[0]))
    dims.insert(given.get("dim", 0) % results[0].dim(), (len(tensors),))
    return [tuple(dims)]


def _product(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    left, right = (known.of(given[name]) for name in _matrices(given))
    tie(left[-1], right[-2])
    if len(left) == 3:
        tie(left[0], right[0])
    found = (*left[:-1], right[-1])
    if "batch1" in given or "mat1" in given:
        for own, dim in zip(reversed(known.of(given["self"])), reversed(found), strict=False):
            if number_of(own) == number_of(dim):
                tie(dim, own)
    return [found]


def _matrices(given: Any) -> tuple[str, str]:
    for pair in (("mat1", "mat2"), ("batch1", "batch2"), ("self", "mat2")):
        if all(name in given for name in pair):
            return pair
    raise AssertionError(sorted(given))


def _grouped(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    left, right = known.of(given["self"]), known.of(given["mat2"])
    tie(left[-1], right[-2])
    if results[0].dim() == 3:  # the gradients of weights
        return [((results[0].shape[0],), left[-2], right[-1])]
    return [(left[-2], right[-1])]


def _looked_up(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    ids = given["indices"]
    if not any(map(tracked, known.of(ids))):
        known.set(ids, known.tokens(ids.shape))
    return [(*known.of(given["indices"]), known.of(given["weight"])[-1])]


def _table(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    return [((results[0].shape[0],), known.of(given["grad_output"])[-1])]


def _slice_back(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    dims, at = list(known.of(given["grad_output"])), given["dim"]
    dims[at] = known.whole(dims[at], given["input_sizes"][at])
    return [tuple(dims)]


def _select_back(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    dims, shape = list(known.of(given["grad_output"])), results[0].shape
    at = given["dim"] % len(shape)
    dims.insert(at, (shape[at],))
    return [tuple(dims)]


def _to_complex(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    return [known.of(given["self"])[:-1]]


def _to_real(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    return [(*known.of(given["self"]), (2,))]


def _reduced(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    dims, along = known.of(given["self"]), given.get("dim")
    if along is None or along == []:
        return [tuple(() for _ in results[0].shape)]
    places = {at % len(dims) for at in ([along] if isinstance(along, int) else along)} if dims else set()
    kept = [(() if place in places else dim) for place, dim in enumerate(dims)]
    if not given.get("keepdim", False):
        kept = [dim for place, dim in enumerate(dims) if place not in places]
    return [tuple(kept)] * len(results)


def _filled(known: Dimensions, given: Any, results: list[Tensor]) -> Found:
    """What is written into it later tells its sizes."""
    return [new_sizes(results[0].shape)]


MADE = ("empty", "new_empty", "zeros", "new_zeros", "new_empty_strided", "empty_strided", "full", "new_full")
RULES: dict[str, Rule] = (
    dict.fromkeys(MADE, _filled)
    | dict.fromkeys(("view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze", "alias", "detach"), _viewed)
    | dict.fromkeys(("transpose", "t"), _transposed)
    | dict.fromkeys(("select", "unbind"), _selected)
    | dict.fromkeys(("split", "split_with_sizes", "unsafe_split"), _split)
    | dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _product)
    | dict.fromkeys(("sum", "mean", "amax", "amin", "max", "min", "argmax", "any", "all", "logsumexp"), _reduced)
    | {
        "permute": _permuted,
        "expand": _expanded,
        "slice": _sliced,
        "as_strided": _strided,
        "cat": _joined,
        "stack": _stacked,
        "_grouped_mm": _grouped,
        "embedding": _looked_up,
        "embedding_dense_backward": _table,
        "slice_backward": _slice_back,
        "select_backward": _select_back,
        "view_as_complex": _to_complex,
        "view_as_real": _to_real,
    }
)


def follow(known: Dimensions, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], results: list[Tensor]) -> None:
    """An operation has run: its results lie on the dimensions of what it read, as its rule says."""
    if not results:
        return
    name = func._schema.name.removeprefix("aten::")
    given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
    rule = RULES.get(name)
    found = rule(known, given, results) if rule is not None else None
    if found is None or any(list(map(number_of, f)) != list(r.shape) for f, r in zip(found, results, strict=True)):
        found = [known.like(inputs, result.shape) for result in results]
    for result, dims in zip(results, found, strict=True):
        known.set(result, dims)
