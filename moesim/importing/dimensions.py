"""Which sizes of the model the dimensions of a recorded step's tensors are, followed from its weights.

Every dimension of a weight is a size of its own at first. Operations tie sizes together: what is added lies on the same
dimensions, the depth of a GEMM is that of both matrices. A view cuts a dimension into the factors of a product, a
split into the parts of a sum; what each operation does is in `moesim.importing.dimension_rules`. Dimensions that come
from no weight are plain numbers here; what they are `moesim.recorded.sizes` tells by value and place.
"""

import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Union

from torch import Tensor

from moesim.recorded.widths import LENGTH, SEQUENCES

Factor = Union[int, "Size"]
Dim = tuple[Factor, ...]  # a product; () is 1
Dims = tuple[Dim, ...]


class Size:
    """A size of the model, or what it was found to be: the same as another one, a product or a sum.

    tokens: it is the number of sequences, or of the tokens of each, by its name. Of all sizes of 1, that of sequences
    alone is followed.
    """

    __slots__ = ("number", "parts", "product", "same", "tokens")

    def __init__(self, number: int, *, tokens: str = "") -> None:
        self.number, self.tokens = number, tokens
        self.same: Size | None = None
        self.product: Dim = ()
        self.parts: Dims = ()

    @property
    def root(self) -> "Size":
        """The one that stands for all that are the same."""
        at = self
        while at.same is not None:
            at = at.same
        return at

    @property
    def free(self) -> bool:
        """Whether it is neither product nor sum."""
        return not (self.product or self.parts)


def factors(dim: Dim) -> list[Factor]:
    """The product, as far as it is known."""
    found: list[Factor] = []
    for each in dim:
        if isinstance(each, int):
            found += [each] if each > 1 else []
        else:
            root = each.root
            found += factors(root.product) if root.product else [root]
    return found


def number_of(dim: Dim) -> int:
    """Its value."""
    return math.prod(each if isinstance(each, int) else each.number for each in dim)


def tracked(dim: Dim) -> bool:
    """Whether something of it comes from a weight."""
    return any(isinstance(each, Size) for each in dim)


def of_tokens(dim: Dim) -> bool:
    """Whether it is sequences, tokens of one, or all of them."""
    found = factors(dim)
    return bool(found) and all(isinstance(each, Size) and bool(each.tokens) for each in found)


def roots(dim: Dim) -> Iterator[Size]:
    """The sizes that it is made of."""
    for each in factors(dim):
        if isinstance(each, Size):
            if each.parts:
                for part in each.parts:
                    yield from roots(part)
            else:
                yield each


def new_sizes(shape: Sequence[int]) -> Dims:
    return tuple((Size(size),) if size > 1 else () for size in shape)


def _single(dim: Dim) -> Size | None:
    found = factors(dim)
    return found[0] if len(found) == 1 and isinstance(found[0], Size) else None


def tie(first: Dim, second: Dim) -> None:
    """Both are the same from here on, as far as their factors fit."""
    left, right = ([each for each in factors(dim) if _number(each) > 1] for dim in (first, second))
    while left and right:
        if _number(left[0]) == _number(right[0]):
            _tie_one(left.pop(0), right.pop(0))
            continue
        short, long = (left, right) if _number(left[0]) > _number(right[0]) else (right, left)
        whole, taken = short.pop(0), [long.pop(0)]
        while long and math.prod(map(_number, taken)) < _number(whole):
            taken.append(long.pop(0))
        if math.prod(map(_number, taken)) != _number(whole) or isinstance(whole, int) or not whole.free:
            return
        if all(isinstance(each, int) for each in taken):
            return
        whole.product = tuple(taken)


def _number(factor: Factor) -> int:
    return factor if isinstance(factor, int) else factor.number


def _tie_one(first: Factor, second: Factor) -> None:
    if isinstance(first, int) or isinstance(second, int):
        return
    first, second = first.root, second.root
    if first is second:
        return
    if first.free:
        first, second = second, first
    if not second.free:
        if not (first.parts and list(map(number_of, first.parts)) == list(map(number_of, second.parts))):
            return
        for pair in zip(first.parts, second.parts, strict=True):
            tie(*pair)
        first, second = first.root, second.root
        if first is second:
            return
    second.same, second.parts = first, ()
    first.tokens = first.tokens or second.tokens


def cut(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """The dimensions of a view of another shape; None where it cuts what cannot be cut."""
    left = [each for dim in dims for each in factors(dim)]
    found = []
    for size in shape:
        taken: list[Factor] = []
        if size == 1 and left and _number(left[0]) == 1:
            taken.append(left.pop(0))
        rest = size
        while rest > 1:
            if not left:
                return None
            each = left.pop(0)
            if rest % _number(each) == 0:
                taken.append(each)
                rest //= _number(each)
                continue
            pair = _halves(each, rest)
            if pair is None:
                return None
            taken.append(pair[0])
            left.insert(0, pair[1])
            rest = 1
        found.append(tuple(taken))
    return tuple(found)


def _halves(factor: Factor, first: int) -> tuple[Factor, Factor] | None:
    """The factor as `first` times the rest."""
    number = _number(factor)
    if number % first:
        return None
    if isinstance(factor, int):
        return first, number // first
    if not factor.free:
        return None
    pair = Size(first), Size(number // first)
    factor.product = pair
    return pair


class Dimensions:
    """The dimensions of every tensor of a step, while it runs on the meta device."""

    def __init__(self) -> None:
        self._known: dict[Any, Dims] = {}
        self._of_storage: dict[int, list[Any]] = {}  # keys by the storage that they are of, until it is gone
        self._joined: dict[Any, Dim] = {}
        self._tokens: dict[Any, Dims] = {}
        self._cuts: list[tuple[Dim, Dim]] = []  # a piece, and what it is a piece of

    def weight(self, tensor: Tensor) -> None:
        """A weight: each of its dimensions is a size of its own."""
        self.set(tensor, new_sizes(tensor.shape))

    def set(self, tensor: Tensor, dims: Dims) -> None:
        """What its dimensions are."""
        key, storage = _key(tensor), tensor.untyped_storage()
        if storage._cdata not in self._of_storage:
            self._of_storage[storage._cdata] = []
            weakref.finalize(storage, self._gone, storage._cdata)
        if key not in self._known:
            self._of_storage[storage._cdata].append(key)
        self._known[key] = dims

    def _gone(self, storage: int) -> None:
        """Another tensor may have its address from here on."""
        for key in self._of_storage.pop(storage):
            del self._known[key]

    def of(self, tensor: Tensor) -> Dims:
        """Its dimensions; plain numbers of a tensor that no operation made."""
        return self._known.get(_key(tensor)) or tuple((size,) if size > 1 else () for size in tensor.shape)

    def same(self, first: Tensor, second: Tensor) -> None:
        """Both lie on the same dimensions, but for those of one."""
        for left, right in zip(reversed(self.of(first)), reversed(self.of(second)), strict=False):
            if number_of(left) == number_of(right):
                tie(left, right)

    def tokens(self, shape: Sequence[int]) -> Dims:
        """Sequences and tokens of each, the same for all that are looked up."""
        names = (SEQUENCES, LENGTH)[-len(shape) :] if shape else ()
        named = tuple((Size(size, tokens=name),) for size, name in zip(shape[-2:], names, strict=True))
        return self._tokens.setdefault(tuple(shape), (*new_sizes(shape[:-2]), *named))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        """Attention: queries and keys have the same dimensions of a head, its result those of values."""
        tie(self.of(query)[-1], self.of(key)[-1])
        tie(self.of(key)[1], self.of(value)[1])
        self.set(out, (*self.of(query)[:-1], self.of(value)[-1]))

    def like(self, inputs: Sequence[Tensor], shape: Sequence[int]) -> Dims:
        """Of an operation without a rule: as the operands have it at the same place from the right, else anywhere."""
        given = [self.of(each) for each in inputs]
        found: list[Dim] = []
        left = [list(dims) for dims in given]  # without those that are at the place of one of the result
        for place in range(1, len(shape) + 1):
            size = shape[-place]
            here = [dims[-place] for dims in given if len(dims) >= place and number_of(dims[-place]) == size]
            here = [dim for dim in here if tracked(dim)]
            for other in here[1:]:
                tie(here[0], other)
            for dims in left:
                if here and len(dims) >= place and number_of(dims[-place]) == size:
                    dims[-place] = ()
            found.insert(0, here[0] if here else ((size,) if size > 1 else ()))
        for place, dim in enumerate(found):
            others = {tuple(factors(dim)): dim for dims in left for dim in dims if number_of(dim) == shape[place]}
            if dim and not tracked(dim) and len(others) == 1:
                found[place] = next(iter(others.values()))
        return tuple(found)

    def pieces(self, dim: Dim, sizes: Sequence[int], *, alike: bool) -> list[Dim]:
        """A dimension that is split into parts of these sizes; alike: because they are meant to be the same."""
        plain: list[Dim] = [(size,) for size in sizes]
        whole = factors(dim)
        if not tracked(dim) or of_tokens(dim) or len(sizes) < 2:
            return plain if len(sizes) != 1 else [dim]
        one = _single(dim)
        if one is not None and list(map(number_of, one.parts)) == list(sizes):
            found = list(one.parts)
        elif alike:
            each = self._share(whole, len(sizes))
            found = plain if each is None else [each] * len(sizes)
        elif one is not None and one.free:
            one.parts = tuple((Size(size),) for size in sizes)
            found = list(one.parts)
        else:
            return plain
        self._cuts += [(piece, dim) for piece in found]
        return found

    def _share(self, whole: list[Factor], number: int) -> Dim | None:
        """One of `number` equal parts of a product."""
        first, rest = whole[0], tuple(whole[1:])
        if _number(first) == number:
            return rest
        if isinstance(first, int):
            return (first // number, *rest) if first % number == 0 else None
        if first.parts:
            alike = {tuple(factors(part)) for part in first.parts}
            return (*first.parts[0], *rest) if len(first.parts) == number and len(alike) == 1 else None
        if first.number % number:
            return None
        each = Size(first.number // number)
        first.product = (number, each)
        return (each, *rest)

    def piece(self, dim: Dim, start: int, length: int) -> Dim:
        """A part of a dimension."""
        size = number_of(dim)
        if length == size or not tracked(dim) or of_tokens(dim):
            return dim if length == size else (length,)
        if 2 * length == size and start in (0, length):
            return self.pieces(dim, [length, length], alike=True)[0]
        one = _single(dim)
        if one is not None and one.parts:
            at = 0
            for part in one.parts:
                if at <= start and start + length <= at + number_of(part):
                    found = self.piece(part, start - at, length)
                    self._cuts.append((found, dim))
                    return found
                at += number_of(part)
            return (length,)
        sizes = [each for each in (start, length, size - start - length) if each]
        return self.pieces(dim, sizes, alike=False)[1 if start else 0]

    def whole(self, piece: Dim, size: int) -> Dim:
        """What a piece was cut from."""
        wanted = factors(piece)
        for known, dim in reversed(self._cuts):
            if number_of(dim) == size and factors(known) == wanted:
                return dim
        return (size,)

    def join(self, parts: Sequence[Dim]) -> Dim:
        """A dimension that is made of these, one behind the other."""
        parts = [part for part in parts if number_of(part)]
        each = [tuple(factors(part)) for part in parts]
        if len(parts) == 1:
            return parts[0]
        if not all(map(tracked, parts)):
            return (sum(map(number_of, parts)),)
        if len(set(each)) == 1:
            return (len(parts), *parts[0])
        key = tuple(each)
        if key not in self._joined:
            made = Size(sum(map(number_of, parts)))
            made.parts = tuple(parts)
            self._joined[key] = (made,)
        return self._joined[key]


def _key(tensor: Tensor) -> Any:
    return (
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.is_complex(),
    )
