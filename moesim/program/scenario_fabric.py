"""The fabric that a scenario is simulated on."""

from moesim.kernels import KernelModel
from moesim.network import Fabric, build_fabric
from moesim.network.calibration import measured_parameters
from moesim.scenario import Scenario


def scenario_fabric(scenario: Scenario, kernels: KernelModel) -> Fabric:
    """The cluster's links, with the collectives that were measured on as many ranks where the profile has them.

    Larger worlds than any that was measured keep the constants calibrated on published rows.
    """
    rows = [row for row in getattr(kernels, "collectives", ()) if row["ranks"] == scenario.parallelism.world_size]
    bandwidth = scenario.cluster.pools[0].spec.nvlink_bandwidth
    parameters = measured_parameters(rows, link_bandwidth=bandwidth, source=f"measured, profile {kernels.name}")
    return build_fabric(scenario.cluster, parameters=parameters)
