"""What a simulated step gives, before it is told in the words of a result.

Legend: S routing samples, W ranks of the world, C categories, P pipeline ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.results.spans import SpanTable
from moesim.results.uncertainty import Basis

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Samples simulated in lockstep. `spans`: group 0 of every pipeline rank, first sample; `critical_path`: of it.

    `jitter_SW`: at most so many seconds of the waiting in `attribution_CSW` are for chips and hosts that are slower
    than others by chance. `shared_links`: how many links groups of ranks can fill together. `waits`: seconds of sample
    0 by (who, for whom).
    """

    step_S: FloatArray
    attribution_CSW: FloatArray
    jitter_SW: FloatArray
    compute_time_SW: FloatArray
    busy_SP: FloatArray
    source_seconds: Mapping[Basis, float]
    tensor_bytes: float
    transfer_sources: tuple[str, ...]
    spans: tuple[SpanTable, ...]
    critical_path: dict[str, Any]
    shared_links: int
    waits: Mapping[tuple[int, int], float]

    def samples(self, chosen: slice) -> "Outcome":
        """The outcome of some of the samples."""
        return replace(
            self,
            step_S=self.step_S[chosen],
            attribution_CSW=self.attribution_CSW[:, chosen],
            jitter_SW=self.jitter_SW[chosen],
            compute_time_SW=self.compute_time_SW[chosen],
            busy_SP=self.busy_SP[chosen],
        )

    @classmethod
    def joined(cls, parts: "Sequence[Outcome]") -> "Outcome":
        """Samples simulated one part after the other; what is kept of one sample alone is that of the first part."""
        return replace(
            parts[0],
            step_S=np.concatenate([part.step_S for part in parts]),
            attribution_CSW=np.concatenate([part.attribution_CSW for part in parts], axis=1),
            jitter_SW=np.concatenate([part.jitter_SW for part in parts]),
            compute_time_SW=np.concatenate([part.compute_time_SW for part in parts]),
            busy_SP=np.concatenate([part.busy_SP for part in parts]),
            shared_links=max(part.shared_links for part in parts),
        )
