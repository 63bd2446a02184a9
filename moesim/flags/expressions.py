"""Numbers, lists and stages written as expressions, both ways: worked out from their syntax, never run as code.

Megatron-LM's strings of pipeline stages are such as `Et*3|(tt|)*29|mL`. E is the embedding, t a layer, m a layer of
multi-token prediction, L the loss; | ends a stage, x*N repeats one letter and (...)*N a part. Stages are listed along
the model, so that rank r of P holds stages r, r + P, and so on.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from moesim.scenario.base import MOST_LAYERS

_LONGEST = 2_000  # characters
_LARGEST = 10**18

Pattern = int | list[int]

_COMPARED: Mapping[type[ast.cmpop], Callable[[int, int], bool]] = MappingProxyType(
    {
        ast.Eq: operator.eq,
        ast.NotEq: operator.ne,
        ast.Lt: operator.lt,
        ast.LtE: operator.le,
        ast.Gt: operator.gt,
        ast.GtE: operator.ge,
    }
)


def whole_number(text: str) -> int:
    """What a shell's arithmetic comes to: + - * / % and brackets, comparisons, && and ||, and one a ? b : c.

    / rounds towards zero; what holds is 1. Raises ValueError for anything else.

    >>> whole_number("(8 + 1) * 4 / 5"), whole_number("(3 > 1) ? 7 : 0")
    (7, 7)
    """
    condition, asks, rest = text.partition("?")
    if asks:
        first, colon, second = rest.rpartition(":")
        if not colon:
            raise ValueError(f"{text!r} has a ? without a :")
        return whole_number(first if whole_number(condition) else second)
    return _number(_parsed(text.replace("&&", " and ").replace("||", " or ").strip()))


def pattern(text: str) -> Pattern:
    """A whole number, or a list made of [ ] ( ) , + and *, such as a pattern of layers.

    Raises ValueError for anything else, and for a list of more entries than a model may have layers.

    >>> pattern("[0]*3+[1]*2"), pattern("([1]+[0])*2"), pattern("2")
    ([0, 0, 0, 1, 1], [1, 0, 1, 0], 2)
    """
    return _pattern(_parsed(text.strip().strip("'\"")))


def _parsed(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise ValueError(f"{len(text):,} characters")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{text!r} is no expression of numbers") from None


def _number(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARED:
        return int(_COMPARED[type(node.ops[0])](_number(node.left), _number(node.comparators[0])))
    if isinstance(node, ast.BoolOp):
        values = [bool(_number(value)) for value in node.values]
        return int(all(values) if isinstance(node.op, ast.And) else any(values))
    if isinstance(node, ast.BinOp):
        left, right = _number(node.left), _number(node.right)
        match node.op:
            case ast.Add():
                return _bounded(left + right)
            case ast.Sub():
                return _bounded(left - right)
            case ast.Mult():
                return _bounded(left * right)
            case ast.Div() | ast.FloorDiv() if right:
                return int(left / right) if abs(left) < 2**52 else left // right
            case ast.Mod() if right:
                return left % right
    raise ValueError(f"{ast.unparse(node)} is no whole number")


def _bounded(number: int) -> int:
    if abs(number) > _LARGEST:
        raise ValueError("a number of more than 18 digits")
    return number


def _pattern(node: ast.expr) -> Pattern:
    if isinstance(node, ast.List | ast.Tuple):
        return [_number(entry) for entry in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _pattern(node.left), _pattern(node.right)
        if isinstance(left, list) and isinstance(right, list) and isinstance(node.op, ast.Add):
            return _short(left, right)
        if isinstance(node.op, ast.Mult) and isinstance(left, list) != isinstance(right, list):
            entries, times = (left, right) if isinstance(left, list) else (right, left)
            assert isinstance(entries, list) and isinstance(times, int)
            if len(entries) * times > MOST_LAYERS:
                raise ValueError(f"more than {MOST_LAYERS} entries")
            return entries * times
    return _number(node)


def _short(left: list[int], right: list[int]) -> list[int]:
    if len(left) + len(right) > MOST_LAYERS:
        raise ValueError(f"more than {MOST_LAYERS} entries")
    return left + right


_WORDS = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
_REPEATED = re.compile(r"\(([^()]*)\)\*([0-9]{1,4})|([EtmL|])\*([0-9]{1,4})|\(([^()]*)\)(?!\*)")
_MOST = 4 * MOST_LAYERS  # letters


def stages_of(text: str) -> tuple[str, ...]:
    """The letters of every stage, first stage first. Raises ValueError for a string that is none.

    >>> stages_of("Et*2|(tt|)*2,mL")
    ('Ett', 'tt', 'tt', 'mL')
    """
    for word, letter in _WORDS.items():
        text = re.sub(rf"\b{word}\b", letter, text, flags=re.IGNORECASE)
    text = re.sub(r"[,\s]", "", text)
    while (found := _REPEATED.search(text)) is not None:
        inside = found[1] or found[3] or found[5] or ""
        times = int(found[2] or found[4] or 1)
        if len(inside) * times > _MOST:
            raise ValueError(f"more than {_MOST:,} letters")
        text = text[: found.start()] + inside * times + text[found.end() :]
        if len(text) > _MOST:
            raise ValueError(f"more than {_MOST:,} letters")
    if wrong := sorted(set(text) - set("EtmL|")):
        raise ValueError(f"{''.join(wrong)!r} is none of E, t, m, L, |, *N and ( )")
    if not re.fullmatch(r"E[t|]*[m|]*L", text):
        raise ValueError("must begin with E, hold layers t before m, and end with L")
    return tuple(text.split("|"))


def text_of(lengths: Sequence[int], *, prediction_layers: int) -> str:
    """Stages of so many layers as a string, with embedding, prediction layers and loss at the ends.

    >>> text_of([3, 2, 0], prediction_layers=1)
    'Et*3|tt|mL'
    """
    stages = ["t" * length if length < 3 else f"t*{length}" for length in lengths]
    stages[0] = "E" + stages[0]
    stages[-1] += ("m" if prediction_layers == 1 else f"m*{prediction_layers}" if prediction_layers else "") + "L"
    return "|".join(stages)


def runs(entries: Iterable[int]) -> str:
    """A list as an expression of its runs.

    >>> runs([0, 0, 0, 1, 1]), runs([1, 0])
    ('[0]*3+[1]*2', '[1,0]')
    """
    counted: list[list[int]] = []
    listed = list(entries)
    for entry in listed:
        if counted and counted[-1][0] == entry:
            counted[-1][1] += 1
        else:
            counted.append([entry, 1])
    if 2 * len(counted) > len(listed):
        return str(listed).replace(" ", "")
    return "+".join(f"[{entry}]*{count}" if count > 1 else f"[{entry}]" for entry, count in counted)
