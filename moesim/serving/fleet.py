"""Instances side by side: replicas of a deployment, and instances of their own for prompts (disaggregation).

A request goes to the instance with the fewest requests (the first of them). With instances for prompts it gets its
first token there; its keys and values then go to the least loaded instance that decodes. Ranks of the instances for
prompts come first in the cluster, instance by instance.

What a transfer takes, beside exchanges that use the same ports: `moesim.serving.ports`. Where a request will be
decoded is chosen when its transfer begins. Pages of the prompt are free when its decode instance begins with it, which
is not before everything has come.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import simpy

from moesim.network import Fabric, build_fabric, send_recv_seconds
from moesim.serving.batch import Batch, Job
from moesim.serving.clock import Instance, Served, Transfers, Watcher, arrivals
from moesim.serving.costs import StepCost, StepCosts
from moesim.serving.memory import (
    ServingMemoryReport,
    kv_bytes_per_token,
    layout_of,
    memory_of,
    missing_bytes,
    no_room,
)
from moesim.serving.ports import Port, Ports, Transfer, exchanges_over_nics
from moesim.serving.requests import Requests, draw_requests
from moesim.serving.schema import ServingScenario


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Instances that are alike: the scenario of one, what its steps cost and what it holds; where its ranks begin.

    `keys`: where keys that are its own begin in a scenario.
    """

    name: str
    scenario: ServingScenario
    replicas: int
    first_rank: int
    memory: ServingMemoryReport
    costs: StepCosts
    keys: str = ""

    @property
    def decodes(self) -> bool:
        """Whether answers are generated here, not their first tokens alone."""
        return not self.keys

    @property
    def gpus(self) -> int:
        """GPUs of all instances."""
        return self.replicas * self.scenario.parallelism.world_size


def prefill_scenario(scenario: ServingScenario) -> ServingScenario:
    """One instance for prompts as a deployment of its own."""
    prefill = scenario.fleet.prefill
    assert prefill is not None
    engine: dict[str, Any] = {
        "token_budget": prefill.token_budget,
        "redundant_experts": prefill.redundant_experts,
        "speculation": None,
    }
    if prefill.two_batches is not None:
        engine["two_batches"] = prefill.two_batches
    changes: dict[str, Any] = {"parallelism": prefill.parallelism, "engine": scenario.engine.model_copy(update=engine)}
    if prefill.dispatch is not None:
        changes["dispatch"] = prefill.dispatch
    return scenario.model_copy(update=changes)


def pools_of(scenario: ServingScenario) -> tuple[Pool, ...]:
    """The pools, that which decodes last."""
    fleet, first, found = scenario.fleet, 0, []
    parts = [("serve" if fleet.prefill is None else "decode", scenario, fleet.replicas, "")]
    if fleet.prefill is not None:
        parts.insert(0, ("prefill", prefill_scenario(scenario), fleet.prefill.replicas, "fleet.prefill."))
    for name, part, replicas, keys in parts:
        pool = Pool(
            name=name,
            scenario=part,
            replicas=replicas,
            first_rank=first,
            memory=memory_of(part),
            costs=StepCosts(part),
            keys=keys,
        )
        found.append(pool)
        first += pool.gpus
    return tuple(found)


def fleet_gpus(scenario: ServingScenario) -> int:
    """GPUs of all instances."""
    fleet = scenario.fleet
    gpus = fleet.replicas * scenario.parallelism.world_size
    return gpus + (fleet.prefill.replicas * fleet.prefill.parallelism.world_size if fleet.prefill else 0)


def kv_bytes(scenario: ServingScenario, tokens: int) -> float:
    """Bytes of keys and values of a request of so many tokens that all ranks of a data group store together."""
    tensor, layout = scenario.parallelism.tensor, layout_of(scenario)
    stored = sum(kind.layers * float(kind.seen(tokens)) for kind in layout.kinds)
    return stored * tensor * kv_bytes_per_token(scenario.model, kv=scenario.workload.kv, tensor=tensor)


def run_fleet(pools: Sequence[Pool], requests: Requests, *, instant: bool = False) -> Served:
    """Serve all requests to their end; what the last pool did, with `earlier` ones. `instant`: transfers take none."""
    env = simpy.Environment()
    first_N, done_N = np.full(len(requests), np.nan), np.full(len(requests), np.nan)
    decode = pools[-1]
    served = Served(first_N, done_N)
    sender: _Sender | None = None
    if len(pools) == 1:
        instances = _instances(env, decode, served)
        env.process(arrivals(env, requests, lambda job: _least_loaded(instances).give(job)))
    else:
        earlier = Served(first_N, done_N)
        served.earlier, served.transfers = (earlier,), Transfers()
        sender = _Sender(env, pools, requests, served, instant=instant)
        env.process(arrivals(env, requests, sender.begin))
    env.run()
    assert not np.isnan(done_N).any(), "a request was never answered"
    if sender is not None:
        sender.note_ports()
    return served


class Deployment:
    """A scenario with its tables of costs and its memory, which many loads can be served on."""

    def __init__(self, scenario: ServingScenario) -> None:
        self.scenario = scenario
        self.pools: tuple[Pool, ...] = pools_of(scenario)
        self.memory: ServingMemoryReport = self.pools[-1].memory
        self.costs: StepCosts = self.pools[-1].costs

    def requests(self, seed: int, *, number: int | None = None) -> Requests:
        """The requests of one seed, or so many. Raises InfeasibleError where one of them can never be held."""
        load = self.scenario.workload
        load = load if number is None else load.model_copy(update={"requests": number})
        requests = draw_requests(load, seed=seed)
        for pool in self.pools:
            others = [each for each in self.pools if each is not pool]
            name = f"a GPU of the {pool.name} pool" if others else "a GPU"
            _check_longest(pool, requests, name=name, others=sum(each.gpus for each in others))
        return requests

    def serve(self, requests: Requests) -> Served:
        """Answer them all."""
        return run_fleet(self.pools, requests)


def _check_longest(pool: Pool, requests: Requests, *, name: str, others: int) -> None:
    answer_N = requests.output_N if pool.decodes else 1
    longest = int((requests.input_N + answer_N).max())
    speculation = pool.scenario.engine.speculation
    most = longest + (len(speculation.acceptance) + 1 if speculation else 1)
    if missing_bytes(pool.scenario, most):
        raise no_room(pool.scenario, most, pool=name, keys=pool.keys, replicas=pool.replicas, others=others)


def _instances(env: simpy.Environment, pool: Pool, served: Served, watcher: Watcher | None = None) -> list[Instance]:
    return [Instance(env, pool.costs, pool.memory, served, watcher) for _ in range(pool.replicas)]


def _least_loaded(instances: Sequence[Instance]) -> Instance:
    return min(instances, key=lambda instance: instance.load)  # the first of them


@dataclass(eq=False)
class _Sent:
    """A request between a batch that computes its prompt and one that decodes it: the job there, and its transfer."""

    job: Job
    transfer: Transfer
    seconds: float
    source: Batch
    target: Batch
    computed: float = 0.0
    pages: int = 0  # that are still taken where the prompt was computed
    first: simpy.Process | None = None  # of its transfer


class _Sender:
    """Moves requests from the instances for prompts to those that decode."""

    def __init__(
        self, env: simpy.Environment, pools: Sequence[Pool], requests: Requests, served: Served, *, instant: bool
    ) -> None:
        prefill, decode = pools
        section = decode.scenario.fleet.prefill
        assert section is not None and served.transfers is not None
        self.env, self.requests, self.served, self.instant = env, requests, served, instant
        self.by_layer, self.nic_share = section.transfer == "by_layer", section.nic_share
        self.scenario, self.noted = decode.scenario, served.transfers
        self.layers = decode.scenario.model.layers
        self.lanes = min(prefill.scenario.parallelism.tensor, decode.scenario.parallelism.tensor)
        self.fabric: Fabric = build_fabric(decode.scenario.cluster)
        self.layout = layout_of(prefill.scenario)
        self.ports = Ports(env, decode.scenario.cluster, self.nic_share)
        self.prefill = _instances(env, prefill, served.earlier[0], _Watched(self, prefill, "out"))
        self.decode = _instances(env, decode, served, _Watched(self, decode, "into"))
        self.rank_of = _first_ranks(self.prefill, prefill) | _first_ranks(self.decode, decode)
        self.instance_of = {batch: each for each in (*self.prefill, *self.decode) for batch in each.batches}
        ranks = [
            {self.rank_of[batch] for each in pool for batch in each.batches} for pool in (self.prefill, self.decode)
        ]
        self.tiers = self.ports.tiers(*ranks)
        self.under_way: dict[int, _Sent] = {}
        self.arrived: dict[Batch, list[_Sent]] = {batch: [] for each in self.decode for batch in each.batches}

    def begin(self, job: Job) -> None:
        """A request comes: its prompt and one token are computed on an instance for prompts."""
        job.left = 1
        _least_loaded(self.prefill).give(job)

    def prompts_begun(self, batches: Sequence[Batch]) -> None:
        """The step that begins computes parts of prompts: those that are new are on their way, if by layers."""
        if not self.by_layer:
            return
        for batch in batches:
            for job in batch.prompts:
                if job.request not in self.under_way and self.requests.output_N[job.request] > 1:
                    sent = self._on_its_way(batch, job.request)
                    self._ask(sent, 1.0 - 1.0 / self.layers)

    def computed(self, batch: Batch, job: Job) -> None:
        """Its prompt is done: send what is left of it, unless its first token was all."""
        number = job.request
        if self.requests.output_N[number] == 1:
            return
        self.served.done_N[number] = np.nan
        sent = self.under_way.get(number) or self._on_its_way(batch, number)
        sent.computed = self.env.now
        sent.pages = int(self.layout.pages(job.prompt)) - self.layout.shared_pages(job.shared)
        sent.source = batch
        batch.hold(sent.pages)
        self.env.process(self._rest(sent))

    def _on_its_way(self, source: Batch, number: int) -> _Sent:
        """A request gets a place where it will be decoded, and a transfer."""
        target = _least_loaded(self.decode)
        stored, left = int(self.requests.input_N[number]), int(self.requests.output_N[number]) - 1
        onward = replace(
            self.requests.job(number), prompt=stored, left=left, prefix=-1, prefix_tokens=0, swapped=stored,
            received=True,
        )  # fmt: skip
        batch = target.expect(onward)
        ranks, size = (self.rank_of[source], self.rank_of[batch]), kv_bytes(self.scenario, stored)
        seconds = 0.0
        if not self.instant:
            seconds = send_recv_seconds(self.fabric, *ranks, size / self.lanes / self.nic_share).seconds
        self.noted.tokens += stored
        self.noted.bytes += size
        sent = _Sent(onward, Transfer(self.env, self.ports.between(*ranks)), seconds, source, batch)
        self.under_way[number] = sent
        return sent

    def _ask(self, sent: _Sent, share: float) -> simpy.Process:
        sent.transfer.ask(share * sent.seconds)
        sent.first = self.env.process(sent.transfer.run())
        return sent.first

    def _rest(self, sent: _Sent) -> Generator[Any, Any, None]:
        """What is sent once a prompt is computed: all of it, or the share of the last layer."""
        if sent.first is not None:
            yield sent.first
        if not self.instant:
            yield self._ask(sent, 1.0 if sent.first is None else 1.0 / self.layers)
        self.noted.seconds.append(sent.transfer.taken)
        self.noted.shown.append(self.env.now - sent.computed)
        del self.under_way[sent.job.request]
        self.arrived[sent.target].append(sent)
        self.instance_of[sent.target].take(sent.target, sent.job)

    def free_pages(self, batches: Sequence[Batch]) -> None:
        """Decode instances have begun with some of what came: its pages are free where it was computed."""
        for batch in batches:
            for sent in self.arrived[batch]:
                if not sent.job.received:
                    sent.source.hold(-sent.pages)
                    self.instance_of[sent.source].ring(sent.source)
            self.arrived[batch] = [sent for sent in self.arrived[batch] if sent.job.received]

    def note_ports(self) -> None:
        """How full the fullest port was in a step."""
        self.noted.fullest_port = max((port.fullest for port in self.ports.found.values()), default=0.0)


class _Watched(Watcher):
    """The instances of one pool: what the sender hears of them, and the ports that their exchanges use."""

    def __init__(self, sender: _Sender, pool: Pool, way: str) -> None:
        self.sender, self.way = sender, way
        self.tiers = {"nvlink", "nic"} if exchanges_over_nics(pool.scenario) else {"nvlink"}
        self.ports: dict[Batch, list[Port]] = {}  # of the step that the batch leads

    def formed(self, batches: Sequence[Batch]) -> None:
        """Prompts begin to be sent; or what was received frees pages."""
        if self.way == "out":
            self.sender.prompts_begun(batches)
        else:
            self.sender.free_pages(batches)

    def beside(self, batches: Sequence[Batch], cost: StepCost) -> StepCost:
        """Ports are shared with transfers."""
        exchange = cost.exchange + cost.hidden
        if self.sender.instant or exchange <= 0.0:
            return cost
        rank_of, ports = self.sender.rank_of, self.sender.ports
        ranks = dict.fromkeys(rank_of[batch] for batch in batches)
        tiers = sorted(self.tiers & self.sender.tiers)
        used = [port for rank in ranks for port in ports.used_by(self.way, rank, tiers)]
        if not used:
            return cost
        grown = max(port.lengthened(exchange, cost.total) for port in used)
        for port in used:
            port.take(batches[0], exchange, cost.total + grown)
        self.ports[batches[0]] = used
        return cost.longer(grown)

    def ended(self, batches: Sequence[Batch]) -> None:
        """They are free again."""
        for port in self.ports.pop(batches[0], []):
            port.release(batches[0])

    def done(self, batch: Batch, job: Job) -> None:
        """A prompt is computed."""
        if self.way == "out":
            self.sender.computed(batch, job)


def _first_ranks(instances: Sequence[Instance], pool: Pool) -> dict[Batch, int]:
    """The first rank in the cluster of the data group of every batch."""
    mesh, found = pool.scenario.parallelism, dict[Batch, int]()
    for number, instance in enumerate(instances):
        first = pool.first_rank + number * mesh.world_size
        for place, batch in enumerate(instance.batches):
            found[batch] = first + place // mesh.pipeline * mesh.tensor
    return found
