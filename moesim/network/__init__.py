"""How long bytes take: the fabric, fair sharing of its links, dispatch implementations and collectives."""

from moesim.network.collectives import (
    CollectiveEstimate,
    all_gather_seconds,
    all_reduce_seconds,
    crowded,
    reduce_scatter_seconds,
    ring_seconds,
    ring_shares,
    send_recv_seconds,
)
from moesim.network.describe import FabricFacts, describe
from moesim.network.dispatch import deepep_bytes, prepare_combine, prepare_dispatch
from moesim.network.fabric import Fabric, build_fabric, group_shape
from moesim.network.parameters import NetworkParameters, Protocol, load_parameters
from moesim.network.rank_ports import RankPorts
from moesim.network.transfer import PreparedTransfer, lower_bound, prepare_transfer, transfer_times

__all__ = [
    "CollectiveEstimate",
    "Fabric",
    "FabricFacts",
    "NetworkParameters",
    "PreparedTransfer",
    "Protocol",
    "RankPorts",
    "all_gather_seconds",
    "all_reduce_seconds",
    "build_fabric",
    "crowded",
    "deepep_bytes",
    "describe",
    "group_shape",
    "load_parameters",
    "lower_bound",
    "prepare_combine",
    "prepare_dispatch",
    "prepare_transfer",
    "reduce_scatter_seconds",
    "ring_seconds",
    "ring_shares",
    "send_recv_seconds",
    "transfer_times",
]
