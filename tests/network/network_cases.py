"""Fabrics and traffic that the network tests share."""

import numpy as np

from moesim.network import Fabric, build_fabric
from moesim.scenario.cluster import Cluster, Link, Pool
from moesim.scenario.cluster import Fabric as Section


def make_fabric(nodes: int = 1, *, gpu: str = "h200", gpus_per_node: int = 8, **keys: object) -> Fabric:
    """A fabric with the section's keys; the preset defaults to rail_optimised."""
    pool = Pool(gpu=gpu, nodes=nodes, gpus_per_node=gpus_per_node)
    return build_fabric(Cluster(pools=(pool,), fabric=Section.model_validate(keys)))


def star(gpus: int, *, gigabytes: float = 1.0, extra: tuple[Link, ...] = ()) -> Fabric:
    """GPUs around one switch, each link 1 GB/s and without latency: times are bytes * 1e-9."""
    links = tuple(Link(source=f"gpu{g}", target="hub", bandwidth=f"{gigabytes} GB/s") for g in range(gpus)) + extra
    return make_fabric(1, gpus_per_node=gpus, preset="custom", links=links)


def skewed_bytes(rng: np.random.Generator, ranks: int, *, mean: float = 1e6) -> np.ndarray:
    """Positive bytes with hot receivers and a zero diagonal."""
    popularity = rng.dirichlet(np.full(ranks, 2.0)) * ranks
    bytes_RR = rng.gamma(2.0, mean / 2, (ranks, ranks)) * popularity
    np.fill_diagonal(bytes_RR, 0.0)
    return bytes_RR


def rank_finish(finish_RR: np.ndarray) -> np.ndarray:
    """When each rank has sent and received all."""
    return np.maximum(finish_RR.max(axis=0), finish_RR.max(axis=1))
