"""Labels and colours: of what a second of step time can be spent on, of passes in a pipeline, of parts of memory.

Colours tell the four families of categories apart under every common colour blindness (blue, orange, magenta, grey);
inside a family lightness separates neighbours, and labels never leave the meaning to colour alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Category:
    """One part of the step time. `key` is its name in `attribution_s` of result.json."""

    key: str
    label: str
    family: str
    colour: str


FAMILIES = {"compute": "#2474b5", "communication": "#e07b1a", "waiting": "#b3256b", "overhead": "#7a828e"}

CATEGORIES = (
    Category("attention", "attention", "compute", "#0b4f8a"),
    Category("experts", "routed experts", "compute", "#2474b5"),
    Category("shared_experts", "shared experts", "compute", "#4b9bdc"),
    Category("dense_ffn", "dense FFN", "compute", "#7db9ea"),
    Category("router", "router", "compute", "#0a7f86"),
    Category("permute", "permute", "compute", "#35a89f"),
    Category("embedding_head", "embedding and head", "compute", "#7fcabf"),
    Category("dispatch_exposed", "dispatch, exposed", "communication", "#b85300"),
    Category("combine_exposed", "combine, exposed", "communication", "#e07b1a"),
    Category("data_parallel", "data parallel, exposed", "communication", "#f0a04b"),
    Category("tensor", "tensor, context parallel", "communication", "#f6bf7e"),
    Category("pipeline", "pipeline transfers", "communication", "#d9b310"),
    Category("imbalance_wait", "waiting for slower ranks", "waiting", "#b3256b"),
    Category("bubble", "pipeline bubble", "waiting", "#de79ad"),
    Category("recompute", "recomputation", "overhead", "#4d5561"),
    Category("optimizer", "optimizer", "overhead", "#7a828e"),
    Category("host", "host launches", "overhead", "#a3aab4"),
    Category("other", "other", "overhead", "#c6cbd2"),
)
_BY_KEY = {category.key: category for category in CATEGORIES}


def category(key: str) -> Category:
    """The category called `key`; an unknown one keeps its own name, so that no time disappears from a plot."""
    return _BY_KEY.get(key) or Category(key, key.replace("_", " "), "overhead", "#c6cbd2")


def in_order(attribution_s: Mapping[str, float]) -> list[tuple[Category, float]]:
    """(category, seconds) of the parts that took time, in the order of CATEGORIES, unknown ones last."""
    known = [key for key in _BY_KEY if key in attribution_s]
    unknown = [key for key in attribution_s if key not in _BY_KEY]
    return [(category(key), attribution_s[key]) for key in known + unknown if attribution_s[key] > 0]


FORWARD, BACKWARD, INPUT, WEIGHT = "forward", "backward", "backward.input", "backward.weight"
PAIR, REDUCE, UPDATE = "pair", "reduce", "update"
PASSES = {  # kind -> label, colour: blue, orange, green-blue and purple differ under every common colour blindness
    FORWARD: ("forward", "#2474b5"),
    BACKWARD: ("backward", "#e07b1a"),
    INPUT: ("backward, inputs", "#b85300"),
    WEIGHT: ("backward, weights", "#f6bf7e"),
    PAIR: ("forward and backward overlapped", "#7a4fa3"),
    REDUCE: ("gradients and parameters between ranks", "#d9b310"),
    UPDATE: ("optimizer", "#4d5561"),
}


PARTS = {  # kind of memory -> colour
    "weights": "#0b4f8a",
    "gradients": "#2474b5",
    "optimizer states": "#7db9ea",
    "activations": "#b85300",
    "dispatch buffers": "#e07b1a",
    "inside one layer": "#f6bf7e",
    "allocator": "#a3aab4",
    "reserved": "#7a828e",
}
