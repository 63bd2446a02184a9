"""What kernels cost that no profile holds, over their plain sisters: ratios measured by themselves on an H100.

`python tools/measure_odd_kernels.py` measures them, tests/data/odd_kernels_h100.json.gz keeps the rows that these
numbers are the medians of. Other GPUs are taken to have the same ratios.
"""

from collections.abc import Mapping

# A product in which rows of some matrix begin at multiples of 2, 4 or 8 bytes, and not of 16 (a vocabulary of 50,257
# in bf16: 2), over the aligned one.
UNALIGNED: Mapping[int, Mapping[str, float]] = {
    2: {"forward": 7.9, "dgrad": 5.7, "wgrad": 5.3},
    4: {"forward": 2.8, "dgrad": 3.3, "wgrad": 2.9},
    8: {"forward": 2.9, "dgrad": 3.3, "wgrad": 2.95},
}
# Causal attention that draws a random number for each score, over that without.
DROPOUT: Mapping[str, float] = {"forward": 2.2, "backward": 1.2}
# Sums into rows by places that are sorted first (the backward pass of `x[ids]`): seconds of the sort's passes, and the
# bytes of an elementwise kernel that take as long as one added element does, whatever its format.
SUMMED_S, SUMMED_BYTES = 5e-5, 8.0
