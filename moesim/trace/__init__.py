"""RoutingTrace, the exchange format between routers and the simulator (numpy only)."""

from moesim.trace.check import check_trace
from moesim.trace.record import NO_EXPERT, RoutingTrace, StepCounts, TraceStep, TrainingCurves
from moesim.trace.store import load_trace, save_trace, trace_hash
from moesim.trace.synthetic import popularity_trace, uniform_trace

__all__ = [
    "NO_EXPERT",
    "RoutingTrace",
    "StepCounts",
    "TraceStep",
    "TrainingCurves",
    "check_trace",
    "load_trace",
    "popularity_trace",
    "save_trace",
    "trace_hash",
    "uniform_trace",
]
