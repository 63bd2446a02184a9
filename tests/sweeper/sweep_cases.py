"""The base scenario of the studies under test: it simulates in a blink."""

BASE = """
schema_version: 1
name: small
model: {layers: 2, hidden: 64, heads: 4, kv_heads: 4, head_dim: 16, vocab: 256, experts: 8, top_k: 2,
        expert_intermediate: 32}
routing: {kind: uniform}
cluster: {gpu: h200, nodes: 1, gpus_per_node: 2, price_per_gpu_hour: 3.5}
parallelism: {data: 2, expert: 2}
workload: {sequence_length: 512, global_batch: 4}
compute: {profile: roofline}
uncertainty: {samples: 2}
"""
