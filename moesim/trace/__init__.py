"""RoutingTrace, the exchange format between routers and the simulator (numpy only)."""

from moesim.trace.record import NO_EXPERT, RoutingTrace, TraceStep, TrainingCurves, check_trace

__all__ = ["NO_EXPERT", "RoutingTrace", "TraceStep", "TrainingCurves", "check_trace"]
