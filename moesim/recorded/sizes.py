"""The sizes of a recorded step, and which dimension of each operation's tensors is which of them.

A dimension is what the recording says of it, where it followed the widths of the model from its weights. Others are
matched by their value and place: tokens, sequences and rows of experts by where an operation has them
(the rows of a GEMM's first matrix, not of a weight), experts in the layers that have them alone. Widths are what
weights have. What is matched to nothing is kept as it was recorded, and listed.

Legend of symbols: B sequences, S tokens of each, T = B S, R = T K rows of experts, E experts, K experts of a token,
V vocabulary, F the width of an expert and J twice that, W another width of the model, 1 a small number, ? nothing that
is known. Where the recording followed the widths of weights, a symbol may be such a width as a text, too
(`moesim.recorded.widths`).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from moesim.errors import UserError
from moesim.recorded.layers import DENSE, EXPERTS_GEMM, MOE
from moesim.recorded.pricing import GEMMS, OPTIMIZER, SDPA
from moesim.recorded.step_file import MODEL_SIZES, RecordedOp, Seen
from moesim.recorded.widths import EXPERT_WIDTH, EXPERTS, HIDDEN, LENGTH, SEQUENCES, VOCABULARY, value_of

SMALL_NUMBER = 16
PADDED_ROWS = 16  # of one expert, at most
NEAR = (0, 1, -1)  # a row for padding, or labels that are shifted by one
TABLES = ("embedding", "embedding_dense_backward")
Symbols = tuple[str, ...]  # of the dimensions of a tensor


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """What a step can be scaled in: sequences and tokens of each of one micro-batch, experts, those of a token, layers
    of each kind. hidden, expert_width and vocabulary are those of the program; 0 where it has none.
    """

    sequences: int
    sequence_length: int
    experts: int
    top_k: int
    dense_layers: int
    moe_layers: int
    hidden: int
    expert_width: int
    vocabulary: int
    given_rows: int | None = None  # of experts, where other than those of all tokens come to a rank
    widths: Mapping[str, int] = field(default_factory=dict)  # other sizes of the model by name, where they are known

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.sequences * self.sequence_length

    @property
    def rows(self) -> int:
        """(token, expert) pairs of one layer."""
        return self.tokens * self.top_k if self.given_rows is None else self.given_rows

    def of(self, symbol: str) -> float:
        """The size that a symbol stands for."""
        plain = self._of_letters.get(symbol)
        return value_of(symbol, self.named) if plain is None else plain

    @cached_property
    def _of_letters(self) -> dict[str, int]:
        return {
            "B": self.sequences,
            "S": self.sequence_length,
            "T": self.tokens,
            "R": self.rows,
            "E": self.experts,
            "K": self.top_k,
            "V": self.vocabulary,
            "F": self.expert_width,
            "J": 2 * self.expert_width,
        }

    @cached_property
    def named(self) -> Mapping[str, int]:
        """The sizes of the model by their names in widths."""
        own = {HIDDEN: self.hidden, VOCABULARY: self.vocabulary, EXPERTS: self.experts}
        own |= {SEQUENCES: self.sequences, LENGTH: self.sequence_length}
        return {**self.widths, **own, EXPERT_WIDTH: self.expert_width}

    @property
    def knows_expert_width(self) -> bool:
        """Whether the width of experts can be told from that of the model."""
        return bool(self.widths) or self.hidden not in (self.expert_width, 2 * self.expert_width)


def sizes_of(ops: Sequence[RecordedOp], *, where: str) -> StepSizes:
    """The sizes of a recorded step, read off its lookups, its attention and its experts.

    Raises UserError where the step has no lookup of tokens in a table, or no kinds of layers.
    """
    lookup = next((op for op in ops if op.name == "embedding" and op.phase == "forward" and len(op.reads) > 1), None)
    if lookup is None:
        raise UserError(
            f"{where} has no lookup of tokens in a table, which tells how many tokens there are; record a program that "
            "begins with torch.nn.Embedding"
        )
    if all(op.layer is None for op in ops):
        raise UserError(f"{where} does not say which layer an operation works for; import the step again")
    table, ids = lookup.reads[0][0], lookup.reads[1][0]
    sequences, length = _sequences(ops, ids, where=where)
    layers = {op.layer: op.layers for op in ops if op.layer}
    experts, top_k, width = _experts(ops, sequences * length)
    return StepSizes(
        sequences=sequences,
        sequence_length=length,
        experts=experts,
        top_k=top_k,
        dense_layers=layers.get(DENSE, 0),
        moe_layers=layers.get(MOE, 0),
        hidden=table[-1],
        expert_width=width,
        vocabulary=table[0],
        widths=next((dict(op.facts[MODEL_SIZES]) for op in ops if op.facts.get(MODEL_SIZES)), {}),
    )


def _sequences(ops: Sequence[RecordedOp], ids: tuple[int, ...], *, where: str) -> tuple[int, int]:
    if len(ids) >= 2:
        return ids[-2], ids[-1]
    for op in ops:
        if op.name == SDPA:
            batch, _, length, _ = op.reads[0][0]
            return batch, length
    if len(ids) == 1:
        return 1, ids[0]
    raise UserError(f"{where} looks up tokens without a dimension; record a step of whole sequences")


def _experts(ops: Sequence[RecordedOp], tokens: int) -> tuple[int, int, int]:
    """Experts, how many of them a token takes, and their width: the depth of the last of their GEMMs."""
    found = [op for op in ops if op.name == EXPERTS_GEMM and op.phase == "forward" and len(op.reads[1][0]) == 3]
    if not found:
        return 0, 0, 0
    experts, width, _ = found[-1].reads[1][0]
    return experts, max(1, found[0].reads[0][0][0] // tokens), width


@dataclass(frozen=True, kw_only=True)
class MatchedOp:
    """An operation with the symbols of the dimensions of what it reads and writes."""

    op: RecordedOp
    reads: tuple[Symbols, ...]
    writes: tuple[Symbols, ...]

    @property
    def known(self) -> bool:
        """Whether every dimension is matched."""
        return not any("?" in symbols for symbols in (*self.reads, *self.writes))

    @property
    def has_rows(self) -> bool:
        """Whether it follows what was routed to the experts of a rank."""
        return any("R" in symbols for symbols in (*self.reads, *self.writes))


def matched(ops: Sequence[RecordedOp], sizes: StepSizes) -> list[MatchedOp]:
    """Every operation with its symbols."""
    matcher = _Matcher(sizes, _widths(ops, sizes), _only_texts(ops))
    return [matcher.match(op) for op in ops]


def of_experts(op: RecordedOp, shape: Sequence[int], sizes: StepSizes) -> bool:
    """Whether a tensor is a weight of all experts, or its gradient."""
    return op.layer == MOE and len(shape) == 3 and shape[0] == sizes.experts and sizes.knows_expert_width


def _widths(ops: Sequence[RecordedOp], sizes: StepSizes) -> frozenset[int]:
    """What weights, heads and tables have as dimensions, and what they make together."""
    found = {sizes.hidden, sizes.vocabulary, sizes.expert_width, 2 * sizes.expert_width}
    for op in ops:
        if op.phase == "forward" and op.name in GEMMS and len(op.reads[-1][0]) == 2:
            found |= set(op.reads[-1][0])
        if op.name == EXPERTS_GEMM and op.phase == "forward":
            found |= set(op.reads[1][0][1:])
        if op.name == SDPA:
            found |= {size for shape, _, _ in op.reads for size in (shape[1], shape[3], shape[1] * shape[3])}
    for op in ops:
        for shape, _, _ in op.reads:
            if len(shape) == 4 and shape[0] == sizes.sequences:
                others = [size for size in shape[1:] if size != sizes.sequence_length]
                found |= set(others) if len(others) == 2 and math.prod(others) in found else set()
    halves = {size // 2 for size in found if size % 2 == 0} | {size // 4 for size in found if size % 4 == 0}
    return frozenset(found | halves)


def _only_texts(ops: Sequence[RecordedOp]) -> Mapping[int, str]:
    """The numbers that the step has as one width alone."""
    found: dict[int, set[str]] = defaultdict(set)
    for op in ops:
        for (shape, _, _), texts in zip((*op.reads, *op.writes), op.widths or (), strict=False):
            for size, text in zip(shape, texts, strict=True):
                found[size] |= {text} - {""}
    return {size: next(iter(texts)) for size, texts in found.items() if len(texts) == 1}


LETTERS = {
    SEQUENCES: "B",
    LENGTH: "S",
    f"{LENGTH}*{SEQUENCES}": "T",
    VOCABULARY: "V",
    EXPERTS: "E",
    EXPERT_WIDTH: "F",
    f"2*{EXPERT_WIDTH}": "J",
}


class _Matcher:
    def __init__(self, sizes: StepSizes, widths: frozenset[int], only: Mapping[int, str]) -> None:
        self.sizes, self.widths, self.only = sizes, widths, only

    def match(self, op: RecordedOp) -> MatchedOp:
        found = self._by_value(op)
        if op.widths is None or op.name == OPTIMIZER:
            return found
        told = [
            tuple(
                self._told(size, symbol, text)
                for size, symbol, text in zip(shape, symbols, texts, strict=True)
            )
            for (shape, _, _), symbols, texts in zip(
                (*op.reads, *op.writes), (*found.reads, *found.writes), op.widths, strict=True
            )
        ]  # fmt: skip
        return replace(found, reads=tuple(told[: len(op.reads)]), writes=tuple(told[len(op.reads) :]))

    def _told(self, size: int, symbol: str, text: str) -> str:
        """What the recording says; of a width that it lost, the only one of that number."""
        if not text and symbol == "W":
            text = self.only.get(size, "")
        return LETTERS.get(text, text) or symbol

    def _by_value(self, op: RecordedOp) -> MatchedOp:
        if op.name == OPTIMIZER:
            return MatchedOp(op=op, reads=(("W",),) * len(op.reads), writes=(("W",),) * len(op.writes))
        reads, writes = self._reads(op), tuple(self._tensor(op, seen) for seen in op.writes)
        named = [
            tuple(self._named(op, seen[0], symbols) for seen, symbols in zip(tensors, each, strict=True))
            for tensors, each in ((op.reads, reads), (op.writes, writes))
        ]
        return MatchedOp(op=op, reads=named[0], writes=named[1])

    def _named(self, op: RecordedOp, shape: tuple[int, ...], symbols: Symbols) -> Symbols:
        """With the names of widths that can be others: of the vocabulary outside of the layers, of an expert's rows."""
        names = {self.sizes.vocabulary: "V"} if not op.layer else {}
        if of_experts(op, shape, self.sizes) or ("R" in symbols and self.sizes.knows_expert_width):
            names = {self.sizes.expert_width: "F", 2 * self.sizes.expert_width: "J"}
        return tuple(
            names.get(size, symbol) if symbol == "W" else symbol for size, symbol in zip(shape, symbols, strict=True)
        )

    def _reads(self, op: RecordedOp) -> tuple[Symbols, ...]:
        if op.name == SDPA:
            return tuple(("B", "W", "S", "W") for _ in op.reads)
        if op.name in TABLES:
            forward = op.name == "embedding"
            return tuple(
                ("W",) * len(shape) if forward and place == 0 else self._shape(op, shape)
                for place, (shape, _, _) in enumerate(op.reads)
            )
        if op.name == EXPERTS_GEMM and len(op.reads[1][0]) == 2:  # the gradients of weights
            return (("W", "R"), ("R", "W"), *(("E",) for _ in op.reads[2:]))
        if op.name in GEMMS and len(op.reads[-1][0]) == 2:
            return self._gemm(op)
        return tuple(self._tensor(op, seen) for seen in op.reads)

    def _gemm(self, op: RecordedOp) -> tuple[Symbols, ...]:
        """Tokens or rows are the rows of the first matrix, or the depth of the gradient of a weight."""
        (rows, depth), (_, columns) = op.reads[-2][0], op.reads[-1][0]
        first = self._many(op, rows)
        if first:
            return (
                *(self._weight(op, seen) for seen in op.reads[:-2]),
                (first, self._width(depth)),
                self._weight(op, op.reads[-1]),
            )
        inner = self._many(op, depth)
        if inner:
            sides = (self._one(op, rows), self._one(op, columns))
            return (*(self._weight(op, seen) for seen in op.reads[:-2]), (sides[0], inner), (inner, sides[1]))
        return tuple(self._weight(op, seen) for seen in op.reads)

    def _weight(self, op: RecordedOp, seen: Seen) -> Symbols:
        return tuple(self._one(op, size) for size in seen[0])

    def _many(self, op: RecordedOp, size: int) -> str:
        """Tokens or rows, or nothing."""
        if size == self.sizes.tokens:
            return "T"
        if op.layer == MOE and self._is_rows(size):
            return "R"
        return "T" if size - self.sizes.tokens in NEAR else ""

    def _is_rows(self, size: int) -> bool:
        extra = size - self.sizes.rows
        return self.sizes.top_k > 0 and 0 <= extra <= 1 + PADDED_ROWS * self.sizes.experts

    def _tensor(self, op: RecordedOp, seen: Seen) -> Symbols:
        shape = seen[0]
        if op.name == EXPERTS_GEMM and len(shape) == 3:
            return ("E", "W", "W")
        return self._shape(op, shape)

    def _shape(self, op: RecordedOp, shape: tuple[int, ...]) -> Symbols:
        symbols = [""] * len(shape)
        for place, symbol in self._token_places(op, shape):
            symbols[place] = symbol
        has_tokens = any(symbols)
        for place, size in enumerate(shape):
            if not symbols[place]:
                symbols[place] = self._one(op, size, beside_tokens=has_tokens)
        return tuple(symbols)

    def _token_places(self, op: RecordedOp, shape: tuple[int, ...]) -> Iterable[tuple[int, str]]:
        sizes = self.sizes
        for at in (0, 1):  # behind what was stacked
            if len(shape) - at >= 2 and shape[at] in ((sizes.sequences, 1) if at == 0 else (sizes.sequences,)):
                later = [place for place, size in enumerate(shape) if place > at and self._near_length(size)]
                if later and (len(shape) - at >= 3 or shape[at] == sizes.sequences):
                    squares = len(shape) == 4 and later[-2:] == [2, 3]
                    symbol = "B" if shape[at] == sizes.sequences else "1"
                    return [(at, symbol), *((place, "S") for place in (later if squares else later[:1]))]
        if len(shape) == 3 and shape[0] % sizes.sequences == 0 and shape[1] == sizes.sequence_length:
            heads = shape[0] // sizes.sequences  # batches of GEMMs have heads and sequences in one dimension
            if heads in self.widths and shape[0] != sizes.tokens:
                square = shape[2] - sizes.sequence_length in NEAR
                return [(0, "B"), (1, "S"), *([(2, "S")] if square else [])]
        for place, size in enumerate(shape):
            found = self._many(op, size)
            if found:
                return [(place, found)]
        if len(shape) == 2 and shape == (sizes.sequence_length,) * 2:
            return [(0, "S"), (1, "S")]
        positions = [place for place, size in enumerate(shape) if size == sizes.sequence_length]
        return [(positions[0], "S")] if positions and len(shape) <= 2 else []

    def _near_length(self, size: int) -> bool:
        return size - self.sizes.sequence_length in NEAR

    def _one(self, op: RecordedOp, size: int, *, beside_tokens: bool = False) -> str:
        if op.layer == MOE and size == self.sizes.experts and size > 1:
            return "E"
        if op.layer == MOE and beside_tokens and size == self.sizes.top_k and size > 1:
            return "K"
        return self._width(size)

    def _width(self, size: int) -> str:
        if size in self.widths:
            return "W"
        return "1" if size <= SMALL_NUMBER else "?"
