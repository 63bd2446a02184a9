"""Serving: requests that arrive on a clock, batches that form from them, and what the steps cost on a cluster.

schema    WHAT is served: model, routing, cluster, requests, engine
requests  when requests come, how long they are, what they share
keys      which keys a token sees and stores; memory: weights, and pages for them
batch     what a data group of ranks works on; prefixes: what it keeps of prompts; balancing: who gets a request
pricing   HOW LONG a kernel takes; attention, experts: tables of kernels, routing, dispatch; costs: a step of them
clock     WHEN: SimPy processes of arrivals and of steps
answers   latencies, throughput, price, the largest load
"""

from moesim.serving.answers import largest_load, serve, serve_seeds
from moesim.serving.loading import load_serving, load_serving_text
from moesim.serving.schema import ServingScenario

__all__ = ["ServingScenario", "largest_load", "load_serving", "load_serving_text", "serve", "serve_seeds"]
