"""Serving: requests that arrive on a clock, batches that form from them, and what the steps cost on a cluster.

schema    WHAT is served: model, routing, cluster, requests, engine
requests  when requests come, how long they are, what they share
keys      which keys a token sees and stores; memory: weights, and pages for them
batch     what a data group of ranks works on; prefixes: what it keeps of prompts; balancing: who gets a request
pricing   HOW LONG a kernel takes; attention, experts: tables of kernels, routing, dispatch; costs: a step of them
copies    where experts and copies of them are; overlap: two half batches; step: the cost of one by part
clock     WHEN: SimPy processes of arrivals and of steps
fleet     instances side by side, those for prompts apart, and what is sent between them
answers   latencies, throughput, price, the largest load; pool_answers: of one kind of instances
"""

from moesim.serving.answers import largest_load, serve, serve_seeds
from moesim.serving.loading import load_serving, load_serving_text
from moesim.serving.schema import ServingScenario

__all__ = ["ServingScenario", "largest_load", "load_serving", "load_serving_text", "serve", "serve_seeds"]
