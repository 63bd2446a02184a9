"""WHO does what: the mesh of ranks, where experts sit, what is dropped and what travels."""

from moesim.parallel.arrays import TrafficArrays, balanced
from moesim.parallel.mesh import GroupLayout, Mesh
from moesim.parallel.placement import ExpertPlacement, place_experts
from moesim.parallel.sample import TrafficSampler, sample_traffic
from moesim.parallel.traffic import LayerTraffic, TierBytes, token_bytes
from moesim.parallel.traffic_sample import TrafficSample

__all__ = [
    "ExpertPlacement",
    "GroupLayout",
    "LayerTraffic",
    "Mesh",
    "TierBytes",
    "TrafficArrays",
    "TrafficSample",
    "TrafficSampler",
    "balanced",
    "place_experts",
    "sample_traffic",
    "token_bytes",
]
