"""RunRecord: everything that one simulation hands to the store, the reports and the planner.

Legend: L model layers with a router, E experts, R ranks of expert group 0, W ranks of the world, S plain routing
samples, C categories of the attribution, P pipeline ranks, V chunks of a pipeline rank, B drawn micro-batches.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.results.spans import SpanTable
from moesim.scenario import Scenario
from moesim.trace import RoutingTrace

RESULT_SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class RunRecord:
    """The outcome of `moesim.run.simulate`.

    `result` is what result.json holds. `arrays`:
      step_time_S              seconds of every plain sample
      attribution_CW           mean seconds per category and rank (categories in the order of results.CATEGORIES)
      attribution_balanced_C   the same, mean over ranks, of the counterfactual with equal loads
      compute_time_W           mean seconds that a rank computes
      held_bytes_P             bytes of states and what is reserved on each pipeline rank
      kept_bytes_PVBW          bytes that a micro-batch keeps on each rank of a stage until its backward ends, sample 0
      expert_load_LE           rows of an expert / mean rows, over the whole step and all samples
      rank_load_LR             rows of a rank / mean rows, likewise
      placement_LDP            the expert in every slot of every rank, -1 for none; not for contiguous experts
      rank_load_contiguous_LR  rows of a rank in one step of all samples, had it neighbouring experts; likewise
      traffic_RR               dispatched bytes from rank to rank in one step, both passes, group 0
    `pipeline_spans` holds expert group 0 of every pipeline rank in sample 0. `trace` is None for a dense model.
    """

    scenario: Scenario
    result: dict[str, Any]
    arrays: dict[str, NDArray[np.float64]]
    pipeline_spans: tuple[SpanTable, ...]
    trace: RoutingTrace | None

    @property
    def spans(self) -> SpanTable:
        """Those of the first pipeline rank."""
        return self.pipeline_spans[0]
