"""The names of the sizes that a recording followed from its weights: hidden, heads, widths of networks, ranks.

Names come from places that every transformer has: the table of tokens, attention, grouped GEMMs, the weights between
them. A size that none of these names is called by the first weight that has it.
"""

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

from moesim.importing.dimensions import Dim, Dims, Size, factors, number_of, of_tokens, roots, tracked
from moesim.recorded import widths as w
from moesim.recorded.layers import DENSE, EXPERTS_GEMM, MOE, module_in_layer, place_of
from moesim.recorded.pricing import SDPA
from moesim.recorded.sizes import SMALL_NUMBER
from moesim.recorded.step_file import RecordedOp

Followed = tuple[Dims, ...]  # of the tensors that an operation reads, then of those that it writes


class WidthNames:
    """Names for the sizes of a step. weights: the dimensions of each by its path; kinds: those of its layers."""

    def __init__(
        self,
        ops: Sequence[RecordedOp],
        followed: Sequence[Followed],
        *,
        weights: Mapping[str, Dims],
        kinds: Mapping[tuple[str, int], str],
    ) -> None:
        self.sizes: dict[str, int] = {}
        self._names: dict[Size, w.Width] = {}
        self._all_named = False
        self._weights, self._kinds = weights, kinds
        forward = [(op, dims) for op, dims in zip(ops, followed, strict=True) if op.phase == "forward"]
        self._tables(forward)
        self._experts(forward)
        self._attention(forward)
        self._rest(forward)
        self._all_named = True

    def texts(self, dims: Dims) -> tuple[str, ...]:
        """Each dimension as a file has it; "" for what is no width of the model."""
        return tuple(self._text(dim) for dim in dims)

    def _text(self, dim: Dim) -> str:
        """Nothing of (token, expert) pairs, too: the number of experts of a token is no size that is followed."""
        width = self._width(dim) if tracked(dim) else None
        if width is None or not any(powers for powers, _ in width):
            return ""
        pairs = any((w.LENGTH, 1) in powers and factor != 1 for powers, factor in width)
        return "" if pairs else w.text_of(width)

    def _width(self, dim: Dim) -> w.Width | None:
        """What is known of it; None where something has no name."""
        found = w.number(1)
        for each in factors(dim):
            own = w.number(each) if isinstance(each, int) else self._of_size(each)
            if own is None:
                return None
            found = w.times(found, own)
        return found

    def _of_size(self, size: Size) -> w.Width | None:
        if size.tokens:
            return w.named(size.tokens)
        if size in self._names:
            return self._names[size]
        if self._all_named and size.free and size.number <= SMALL_NUMBER:
            return w.number(size.number)  # as the pairs of numbers that turn
        parts = [self._width(part) for part in size.parts]
        known = [part for part in parts if part is not None]
        return w.total(known) if parts and len(known) == len(parts) else None

    def _call(self, dim: Dim, name: str, *, share: Fraction = Fraction(1)) -> None:
        """A dimension is the size of that name, or a share of it, so that its one factor without a name gets one."""
        if name in self.sizes and self.sizes[name] * share != number_of(dim):
            return
        known, unnamed = w.number(1), []
        for each in factors(dim):
            if of_tokens((each,)):
                return
            own = w.number(each) if isinstance(each, int) else self._of_size(each)
            if own is None:
                assert isinstance(each, Size)
                unnamed.append(each)
            elif len(own) != 1:
                return
            else:
                known = w.times(known, own)
        if len(unnamed) != 1:
            return
        self.sizes[name] = int(number_of(dim) / share)
        self._names[unnamed[0]] = w.over(w.times(w.named(name), w.number(share)), known)

    def _tables(self, forward: Iterable[tuple[RecordedOp, Followed]]) -> None:
        table = next((dims[0] for op, dims in forward if op.name == "embedding" and tracked(dims[0][-1])), None)
        if table is not None:
            self._call(table[0], w.VOCABULARY)
            self._call(table[1], w.HIDDEN)

    def _experts(self, forward: Iterable[tuple[RecordedOp, Followed]]) -> None:
        for op, dims in forward:
            if op.name == EXPERTS_GEMM and len(dims[1]) == 3:
                self._call(dims[1][0], w.EXPERTS)
                if self._text(dims[1][1]) != w.HIDDEN:
                    self._call(dims[1][1], w.EXPERT_WIDTH)

    def _attention(self, forward: Sequence[tuple[RecordedOp, Followed]]) -> None:
        found = [dims for op, dims in forward if op.name == SDPA]
        for query, key, value, *_ in found:
            self._heads(query[1], key[1])
            self._head_dim(query[3])
            self._head_dim(key[3])
            self._call(value[3], w.VALUE_DIM)
        for op, dims in forward if not found else ():
            if op.name == "bmm":
                self._scores(*dims)

    def _scores(self, left: Dims, right: Dims, result: Dims) -> None:
        """Attention as two batches of GEMMs: of queries with keys, and of scores with values."""
        heads = tuple(each for each in factors(left[0]) if not of_tokens((each,)))
        if of_tokens(result[1]) and of_tokens(result[2]):
            self._heads(heads, heads)
            self._head_dim(left[2])
        elif of_tokens(result[1]) and self._width(heads) is not None:
            self._call(right[2], w.VALUE_DIM)

    def _heads(self, query: Dim, key: Dim) -> None:
        """Of queries and keys; a key that is repeated for several queries is a product of both."""
        shared = factors(query)
        if shared == factors(key) and len(shared) > 1:
            self._call((shared[0],), w.KV_HEADS)
        elif shared != factors(key):
            self._call(key, w.KV_HEADS)
        self._call(query, w.HEADS)

    def _head_dim(self, dim: Dim) -> None:
        """Of queries: one size, a share that turns and the rest, or what turns behind the rest (latent attention)."""
        (whole,) = factors(dim) if len(factors(dim)) == 1 else (None,)
        if not isinstance(whole, Size) or not whole.parts:
            self._call(dim, w.HEAD_DIM)
        elif len(whole.parts) == 2 and self._latent():
            self._call(whole.parts[0], w.HEAD_DIM)
            self._call(whole.parts[1], w.ROPE_DIM)
        else:
            for part in whole.parts:
                self._call(part, w.HEAD_DIM, share=Fraction(number_of(part), whole.number))

    def _latent(self) -> bool:
        """Whether some weight makes keys' parts and something else at once: the low rank that keys are made from."""
        return any(len(dims) == 2 and self._is_latent(dims[0]) for dims in self._weights.values())

    @staticmethod
    def _is_latent(dim: Dim) -> bool:
        (whole,) = factors(dim) if len(factors(dim)) == 1 else (None,)
        return isinstance(whole, Size) and len(whole.parts) == 2

    def _rest(self, forward: Sequence[tuple[RecordedOp, Followed]]) -> None:
        attention = {module_in_layer(op.module) for op, _ in forward if op.name == SDPA}
        for path, dims in self._weights.items():
            kind = self._kinds.get(place_of(path) or ("", -1))
            for place, dim in enumerate(dims):
                if self._width(dim) is None:
                    self._weight(dim, dims[0], kind=kind, in_attention=module_in_layer(path) in attention, place=place)
        for path, dims in self._weights.items():
            pattern = ".".join(part for part in path.split(".") if not part.isdigit())
            for place, dim in enumerate(dims):
                for size in {size for size in roots(dim) if self._of_size(size) is None}:
                    if size.number > SMALL_NUMBER:
                        self._call((size,), f"{pattern}.{place}.{size.number}")

    def _weight(self, dim: Dim, rows: Dim, *, kind: str | None, in_attention: bool, place: int) -> None:
        """A dimension of a weight that no operation has told."""
        if kind is None:
            if number_of(dim) == self.sizes.get(w.VOCABULARY):
                self._call(dim, w.VOCABULARY)
        elif in_attention:
            if place == 1:
                self._call(dim, self._rank_of(rows))
        else:
            router = kind == MOE and number_of(dim) == self.sizes.get(w.EXPERTS)
            name = w.EXPERTS if router else w.DENSE_WIDTH if kind == DENSE else w.SHARED_WIDTH
            self._call(
                tuple(each for each in factors(dim) if isinstance(each, Size)), name
            )  # gate and up may be joined

    def _rank_of(self, rows: Dim) -> str:
        """A low rank, by what is made of it: values and keys, or queries."""
        width = self._width(rows) or ()
        values = any(name == w.VALUE_DIM for powers, _ in width for name, _ in powers)
        return w.KV_RANK if values else w.Q_RANK
