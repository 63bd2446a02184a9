"""WHO does what: the mesh of ranks, where experts sit, what is dropped and what travels."""

from moesim.parallel.mesh import GroupLayout, Mesh
from moesim.parallel.placement import ExpertPlacement, place_experts
from moesim.parallel.sample import TrafficSampler
from moesim.parallel.traffic import LayerTraffic, token_bytes
from moesim.parallel.traffic_sample import TrafficSample

__all__ = [
    "ExpertPlacement",
    "GroupLayout",
    "LayerTraffic",
    "Mesh",
    "TrafficSample",
    "TrafficSampler",
    "place_experts",
    "token_bytes",
]
