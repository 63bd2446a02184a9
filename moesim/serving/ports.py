"""Ports that keys and values leave and come in by, beside the exchanges of steps.

Keys and values go from instances for prompts to those that decode through ports that exchanges use, too. A transfer
takes the bytes that the receiving ranks will store, sent by as many ranks side by side as the smaller of both tensor
groups has, on `nic_share` of what a message between them reaches. Those that leave by one port, or come in by one, do
so one after the other. `by_layer`: all but the last layer's share may be sent while the prompt is computed.

No port passes more than its capacity. Of a step of T seconds an exchange keeps the ports of its ranks busy for X. While
both are there they halve a port (a transfer takes no more than its share s of it, g = min(s, 1/2)), so that the step
grows by f X g / (1 - g): f is the part of the step in which transfers that were waiting at its beginning are there, and
all ranks wait for the busiest port. Of a step that lasts T' transfers get 1 - X / T'.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import simpy

from moesim.scenario import Cluster
from moesim.serving.batch import Batch
from moesim.serving.schema import ServingScenario

NEARLY = 1e-9  # of a transfer: what is left by round-off


class Port:
    """One direction of a NIC, or of a GPU's NVLink: transfers one after the other, beside exchanges of steps.

    `fullest`: the largest share of a step that exchange and transfers together kept it busy for.
    """

    def __init__(self, env: simpy.Environment, share: float) -> None:
        self._env, self.share = env, share
        self.queue = simpy.Resource(env)
        self.pending: list[Transfer] = []
        self.fullest = 0.0
        self._taken: dict[Batch, tuple[float, float, float]] = {}  # exchange, begin, passed until then
        self._of_step: dict[Batch, float] = {}  # share of its step
        self._passed = 0.0  # seconds of the whole port

    @property
    def rate(self) -> float:
        """How fast a transfer is now, of what it is alone."""
        left = 1.0 - max(self._of_step.values(), default=0.0)
        return min(1.0, left / self.share)

    def lengthened(self, exchange: float, total: float) -> float:
        """Seconds by which a step grows for the transfers that wait here."""
        half = min(self.share, 0.5)
        most = exchange * half / (1.0 - half)
        passes = total - exchange + most / self.share  # seconds of transfers alone, if they are always there
        waiting = sum(each.left_now for each in self.pending)
        return most * min(1.0, waiting / passes) if passes > 0.0 else most

    def take(self, owner: Batch, exchange: float, total: float) -> None:
        """A step begins whose exchange keeps the port busy for so many seconds of it."""
        self._taken[owner] = exchange, self._env.now, self._passed_now
        self._of_step[owner] = exchange / total
        self._wake()

    def release(self, owner: Batch) -> None:
        """It is over."""
        if owner not in self._taken:
            return
        exchange, begin, passed = self._taken.pop(owner)
        busy = exchange + self._passed_now - passed
        self.fullest = max(self.fullest, busy / (self._env.now - begin))
        del self._of_step[owner]
        self._wake()

    def note(self, seconds: float) -> None:
        """A transfer was alone for as long as it takes so many seconds."""
        self._passed += self.share * seconds

    @property
    def _passed_now(self) -> float:
        return self._passed + self.share * sum(each.passing for each in self.pending)

    def _wake(self) -> None:
        for each in self.pending:
            each.wake()


@dataclass(eq=False)
class Transfer:
    """Keys and values of one prompt; `left` seconds of it, alone, are still to pass, once it has been asked for."""

    env: simpy.Environment
    ports: tuple[Port, Port]
    left: float = 0.0
    taken: float = 0.0  # seconds that it had its ports for
    _rate: float = 0.0
    _since: float = 0.0
    _woken: simpy.Event | None = None

    @property
    def passing(self) -> float:
        """Seconds that have passed since its rate was last looked at."""
        return self._rate * (self.env.now - self._since)

    @property
    def left_now(self) -> float:
        """Seconds that are left at this moment."""
        return max(0.0, self.left - self.passing)

    def ask(self, seconds: float) -> None:
        """So many more are to pass."""
        self.left += seconds
        for port in self.ports:
            if self not in port.pending:
                port.pending.append(self)

    def run(self) -> Generator[Any, Any, None]:
        """Pass what was asked for."""
        source, target = self.ports
        whole = self.left
        with source.queue.request() as out:
            yield out
            with target.queue.request() as into:
                yield into
                begin = self.env.now
                while self.left > NEARLY * whole:
                    self._rate, self._since = min(port.rate for port in self.ports), self.env.now
                    self._woken = self.env.event()
                    enough = [self.env.timeout(self.left / self._rate)] if self._rate > 0.0 else []
                    yield simpy.AnyOf(self.env, [self._woken, *enough])
                    passed, self._rate = self.passing, 0.0
                    self.left -= passed
                    for port in self.ports:
                        port.note(passed)
                self.taken += self.env.now - begin
        self.left, self._woken = 0.0, None
        for port in self.ports:
            port.pending.remove(self)

    def wake(self) -> None:
        """The rate may be another one now."""
        if self._woken is not None and not self._woken.triggered:
            self._woken.succeed()


@dataclass
class Ports:
    """The ports that transfers leave and come in by, made when one is first used."""

    env: simpy.Environment
    cluster: Cluster
    share: float
    found: dict[tuple[str, str, int], Port] = field(default_factory=dict)

    def between(self, source: int, target: int) -> tuple[Port, Port]:
        """Those of a transfer between two ranks."""
        tier = self._tier(source, target)
        return self._of("out", tier, source), self._of("into", tier, target)

    def tiers(self, sources: Iterable[int], targets: Iterable[int]) -> set[str]:
        """Which kinds of ports transfers between any of these ranks can use."""
        out, into = ({self._places[rank][0] for rank in ranks} for ranks in (sources, targets))
        return {"nvlink" if a == b else "nic" for a in out for b in into}

    def used_by(self, way: str, rank: int, tiers: Iterable[str]) -> list[Port]:
        """Those of a rank, of each kind."""
        return [self._of(way, tier, rank) for tier in tiers]

    def _tier(self, source: int, target: int) -> str:
        return "nvlink" if self._places[source][0] == self._places[target][0] else "nic"

    @cached_property
    def _places(self) -> list[tuple[int, int, int]]:
        """Of every rank its node, its place there, and the GPUs of that node."""
        sizes = self.cluster.domain_sizes
        return [(node, place, size) for node, size in enumerate(sizes) for place in range(size)]

    def _of(self, way: str, tier: str, rank: int) -> Port:
        _, place, size = self._places[rank]
        if tier == "nic":  # shared where a node has fewer of them than GPUs
            rank = rank - place % (size // (self.cluster.fabric.nics_per_node or size))
        if (way, tier, rank) not in self.found:
            self.found[way, tier, rank] = Port(self.env, self.share)
        return self.found[way, tier, rank]


def exchanges_over_nics(scenario: ServingScenario) -> bool:
    """Whether dispatch and combine, or all-reduces of tensor ranks, leave a node."""
    mesh = scenario.parallelism
    return (mesh.stage_size if mesh.expert > 1 else mesh.tensor) > scenario.cluster.domain_sizes[0]
