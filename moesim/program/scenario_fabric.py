"""What a scenario is simulated with: kernels of its GPUs, fabric, how transfers share links, loops compiled or not."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moesim.kernels import KernelModel, MixedKernels, compute_model
from moesim.kernels.tabulated import TabulatedModel
from moesim.network import Fabric, build_fabric
from moesim.network.calibration import measured_parameters
from moesim.network.nccl import kind_of
from moesim.network.parameters import NetworkParameters
from moesim.network.transfer import Model
from moesim.parallel import Mesh
from moesim.scenario import Scenario
from moesim.scenario.catalogue import GpuSpec, gpu_spec
from moesim.scenario.check import MOST_PAIRS
from moesim.scenario.cluster import Cluster, Network, Pool
from moesim.scenario.dispatch import DISPATCH
from moesim.scenario.pools import kinds_of_pools, rank_counts, ranked_cluster, specs_of_ranks


def scenario_kernels(scenario: Scenario) -> KernelModel:
    """The kernels of the GPUs that have ranks: one model, or one for each kind."""
    cluster = scenario.cluster
    counts, kinds = rank_counts(cluster, scenario.parallelism), kinds_of_pools(cluster)
    used = dict.fromkeys(kind for kind, count in zip(kinds, counts, strict=True) if count)
    models = {kind: compute_model(cluster.pools[kind].spec, scenario.compute) for kind in used}
    return next(iter(models.values())) if len(models) == 1 else MixedKernels(models)


def scenario_fabric(scenario: Scenario, kernels: KernelModel) -> Fabric:
    """The cluster's links, with the collectives that the profile measured for as many ranks of one NVLink domain.

    Calls among more ranks keep the constants of tables and published rows, as do mixed GPUs.
    """
    spec = specs_of_ranks(scenario.cluster, scenario.parallelism)[0]
    parameters = _parameters(kernels, spec, world=scenario.parallelism.world_size)
    return build_fabric(ranked_cluster(scenario.cluster, scenario.parallelism), parameters=parameters)


def node_fabric(kernels: KernelModel, *, gpu: str, ranks: int) -> Fabric:
    """The links of one node of `ranks` GPUs of the catalogue, with the collectives that were measured on as many."""
    cluster = Cluster(pools=(Pool(gpu=gpu, nodes=1, gpus_per_node=ranks),))
    return build_fabric(cluster, parameters=_parameters(kernels, gpu_spec(gpu), world=ranks))


def _parameters(kernels: KernelModel, spec: GpuSpec, *, world: int) -> NetworkParameters | None:
    kind = kind_of(spec.name, spec.scaled_from)
    tabulated = kind is not None and isinstance(kernels, TabulatedModel)  # whose collectives the library's tables have
    return None if tabulated else _measured(kernels, spec.nvlink_bandwidth, world, kind)  # type: ignore[arg-type]


@lru_cache(maxsize=16)
def _measured(kernels: KernelModel, link_bandwidth: float, world: int, kind: str | None) -> NetworkParameters | None:
    """Asked anew for every run, whose kernels are mostly those of the one before."""
    rows, source = getattr(kernels, "collectives", ()), f"measured, profile {kernels.name}"
    return measured_parameters(rows, link_bandwidth=link_bandwidth, source=source, world=world, kind=kind)


def sharing_model(network: Network, fabric: Fabric, ranks_R: NDArray[np.integer], *, over_nics: bool = False) -> Model:
    """The scenario's model of sharing for transfers among `ranks_R`, else the quickest that is right there.

    `ports` where nothing but ports can be a bottleneck, `fluid` where links that GPUs share can; groups too large for
    `fluid` keep `ports`, of which a run warns.
    """
    if network.model is not None:
        return network.model
    if fabric.multipath:
        return "fluid"  # ports looks at one route of each pair
    domain_R = fabric.domain_of_rank_R[ranks_R]
    spread = fabric.ladder is None or over_nics or bool((domain_R != domain_R[0]).any())
    return "fluid" if fabric.core_can_block and spread and len(ranks_R) ** 2 <= MOST_PAIRS["fluid"] else "ports"


def dispatch_sharing(network: Network, fabric: Fabric, ranks_R: NDArray[np.integer], algorithm: str) -> Model:
    """The same for dispatch and combine, whose algorithm may take NICs inside a node."""
    over_nics = DISPATCH[algorithm].avoids_nvlink and not fabric.is_rack_scale
    return sharing_model(network, fabric, ranks_R, over_nics=over_nics)


COMPILED_RANKS = 32  # groups from here on use compiled loops in any case
LOADING_SECONDS = 1.0
# What numpy takes for one transfer and the kernels around it: per call, and per pair of ranks and routing sample.
SECONDS_PER_TRANSFER = 0.4e-3
SECONDS_PER_PAIR = 0.4e-6


def pays_for_compiled_loops(scenario: Scenario, *, samples: int) -> bool:
    """Whether numpy alone would take longer over the step; decided by its size, so that every run computes the same."""
    ranks = Mesh(scenario.parallelism, scenario.cluster).group_size
    groups = scenario.parallelism.stage_ranks // ranks
    transfers = 4 * scenario.num_micro_batches * scenario.model.layers * groups
    seconds = transfers * (SECONDS_PER_TRANSFER + samples * ranks**2 * SECONDS_PER_PAIR)
    return ranks >= COMPILED_RANKS or seconds > LOADING_SECONDS
