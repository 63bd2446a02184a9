"""Serving: requests that arrive on a clock, batches that form from them, and what the steps cost on a cluster.

schema    WHAT is served: model, routing, cluster, requests, engine
requests  when requests come and how long they are
costs     HOW LONG a step takes: kernels, routing, dispatch
memory    weights, and pages for keys and values
batch     what a data group of ranks works on
clock     WHEN: SimPy processes of arrivals and of steps
answers   latencies, throughput, price, the largest load
"""

from moesim.serving.answers import largest_load, serve, serve_seeds
from moesim.serving.loading import load_serving, load_serving_text
from moesim.serving.schema import ServingScenario

__all__ = ["ServingScenario", "largest_load", "load_serving", "load_serving_text", "serve", "serve_seeds"]
