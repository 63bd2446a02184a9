"""Serving: requests that arrive on a clock, batches that form from them, and what the steps cost on a cluster.

schema    WHAT is served: model, routing, cluster, requests, engine
requests  when requests come, how long they are, what they share; logs of them
memory    weights, which keys a token sees and stores, shared beginnings once, and pages for them
batch     what a data group of ranks works on
software  what engines do, their small kernels and their hosts; decode_kernels: those that only serving has
pricing   HOW LONG a kernel takes; attention, experts (routing, dispatch); costs: a step, as one batch or two
clock     WHEN: SimPy processes of arrivals and of steps, and who gets a request; ports: what is sent beside them
fleet     instances side by side, those for prompts apart: a deployment
steady    whether a load is carried
answers   latencies, throughput, price, the largest load, and those of one kind of instances
"""

from moesim.serving.answers import largest_load, serve, serve_seeds
from moesim.serving.loading import load_serving, load_serving_text
from moesim.serving.schema import ServingScenario

__all__ = ["ServingScenario", "largest_load", "load_serving", "load_serving_text", "serve", "serve_seeds"]
