"""Published interruptions of real jobs as data: what stopped them, how often, on how many GPUs, and who says so.

A scenario names a record in `failures.record`; its rates are the counts over the parts and the time that were observed.
"""

from dataclasses import dataclass
from typing import Literal

Part = Literal["gpu", "nic", "node", "job"]


@dataclass(frozen=True, kw_only=True)
class RecordedCause:
    """What stopped a job. per: the part that fails, of which a job has more the larger it is; job: of any size alike.

    broken: the part's node leaves the job and is repaired; otherwise the job starts again on the same nodes.
    """

    name: str
    count: float
    per: Part
    broken: bool


@dataclass(frozen=True, kw_only=True)
class FailureRecord:
    """Interruptions of `gpus` GPUs in `days` days. kinds: the GPUs of the catalogue that they were.

    checked: whether the figures here were compared with the published table; else they are quoted, an assumption.
    """

    name: str
    about: str
    kinds: tuple[str, ...]
    gpus: int
    gpus_per_node: int
    nics_per_node: int
    days: float
    causes: tuple[RecordedCause, ...]
    source: str
    checked: bool

    def per_hour(self, cause: RecordedCause) -> float:
        """Interruptions of one part (GPU, NIC, node, or the whole job) in an hour."""
        nodes = self.gpus / self.gpus_per_node
        parts = {"gpu": self.gpus, "nic": nodes * self.nics_per_node, "node": nodes, "job": 1}[cause.per]
        return cause.count / (parts * self.days * 24)


def _cause(name: str, count: float, per: Part, *, broken: bool) -> RecordedCause:
    return RecordedCause(name=name, count=count, per=per, broken=broken)


# The counts are published. Which part each row belongs to, and whether its node leaves, is our reading. Software counts
# by node as well: nobody has published how its failures grow with a job, and by job eight GPUs would fail once a day.
LLAMA3_H100 = FailureRecord(
    name="llama3_h100",
    about="419 unexpected interruptions of Llama 3 405B in 54 days on 16,384 H100, by 18 causes",
    kinds=("h100",),
    gpus=16_384,
    gpus_per_node=8,
    nics_per_node=8,
    days=54,
    causes=(
        _cause("faulty GPU", 148, "gpu", broken=True),
        _cause("GPU HBM3 memory", 72, "gpu", broken=True),
        _cause("software bug", 54, "node", broken=False),
        _cause("network switch or cable", 35, "nic", broken=True),
        _cause("unplanned host maintenance", 32, "node", broken=True),
        _cause("GPU SRAM memory", 19, "gpu", broken=True),
        _cause("GPU system processor", 17, "gpu", broken=True),
        _cause("NIC", 7, "nic", broken=True),
        _cause("NCCL watchdog timeout", 7, "gpu", broken=False),
        _cause("silent data corruption", 6, "gpu", broken=True),
        _cause("GPU thermal interface or sensor", 6, "gpu", broken=True),
        _cause("SSD", 3, "node", broken=True),
        _cause("power supply", 3, "node", broken=True),
        _cause("server chassis", 2, "node", broken=True),
        _cause("IO expansion board", 2, "node", broken=True),
        _cause("dependency", 2, "node", broken=False),
        _cause("CPU", 2, "node", broken=True),
        _cause("system memory", 2, "node", broken=True),
    ),
    source="arXiv 2407.21783, table 5",
    checked=True,
)
RSC1_A100 = FailureRecord(
    name="rsc1_a100",
    about="6.5 failures in a thousand node-days of a research cluster of 16 thousand A100",
    kinds=("a100",),
    gpus=8_000,
    gpus_per_node=8,
    nics_per_node=8,
    days=1,
    causes=(_cause("node failure", 6.5, "node", broken=True),),
    source="arXiv 2410.21680, RSC-1",
    checked=False,
)
RSC2_A100 = FailureRecord(
    name="rsc2_a100",
    about="2.34 failures in a thousand node-days of a research cluster of 8 thousand A100",
    kinds=("a100",),
    gpus=8_000,
    gpus_per_node=8,
    nics_per_node=8,
    days=1,
    causes=(_cause("node failure", 2.34, "node", broken=True),),
    source="arXiv 2410.21680, RSC-2",
    checked=False,
)
NO_FAILURES = FailureRecord(
    name="none",
    about="nothing but the causes that the scenario lists",
    kinds=(),
    gpus=1,
    gpus_per_node=1,
    nics_per_node=1,
    days=1,
    causes=(),
    source="scenario",
    checked=True,
)
FAILURE_RECORDS = {record.name: record for record in (LLAMA3_H100, RSC1_A100, RSC2_A100, NO_FAILURES)}


def record_of_gpu(gpu: str) -> FailureRecord:
    """The first record of this kind of GPU; Llama 3's where nobody has published one."""
    own = (record for record in FAILURE_RECORDS.values() if gpu in record.kinds)
    return next(own, LLAMA3_H100)
