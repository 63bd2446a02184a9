"""Facts that a simulation leaves, and the numbers derived from them."""

from moesim.results.attribution import attribute, overlapped_transfer, waited_for
from moesim.results.spans import CATEGORIES, ActionRows, Label, SpanRecorder, SpanTable, Stream
from moesim.results.store import RESULT_SCHEMA_VERSION, RunRecord

__all__ = [
    "CATEGORIES",
    "RESULT_SCHEMA_VERSION",
    "ActionRows",
    "Label",
    "RunRecord",
    "SpanRecorder",
    "SpanTable",
    "Stream",
    "attribute",
    "overlapped_transfer",
    "waited_for",
]
