"""Without a stack, layers are the block that repeats itself; gradients follow their forward operations."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.importing.trace_file import read_trace
from moesim.importing.trace_layers import repeated_blocks
from moesim.importing.trace_links import OpTree

TRACE = Path(__file__).parent.parent / "data" / "mixtral-8k.trace.json.gz"


@given(
    head=st.integers(0, 6),
    tail=st.integers(0, 6),
    block=st.integers(2, 9),
    times=st.integers(3, 8),
    seed=st.integers(0),
)
def test_a_stack_of_layers_is_found(head: int, tail: int, block: int, times: int, seed: int) -> None:
    signs = [*(f"h{n}" for n in range(head)), *list(range(block)) * times, *(f"t{n}" for n in range(tail))]
    found = repeated_blocks(signs)
    layers = [number for number in range(times) for _ in range(block)]
    assert found == [None] * head + layers + [None] * tail


@pytest.mark.parametrize("signs", [[], ["a"], list("abcdefgh"), [*range(100), 1, 2, 1, 2]])
def test_what_does_not_repeat_has_no_layers(signs: list) -> None:
    assert repeated_blocks(signs) == [None] * len(signs)


def test_the_layers_of_a_real_trace_have_the_same_operations_both_ways() -> None:
    tree = OpTree(read_trace(TRACE))
    for phase in ("forward", "backward"):
        names = {
            layer: [
                op.name
                for op, place, where in zip(tree.ops, tree.modules, tree.phases, strict=True)
                if where == phase and place == f"layer.{layer}"
            ]
            for layer in range(2)
        }
        assert names[0] == names[1] and len(names[0]) > 200
    backward = [place for place, phase in zip(tree.modules, tree.phases, strict=True) if phase == "backward" and place]
    assert backward.index("layer.1") < backward.index("layer.0")
