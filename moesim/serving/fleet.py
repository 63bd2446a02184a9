"""Instances side by side: replicas of a deployment, and instances of their own for prompts (disaggregation).

A request goes to the instance with the fewest requests (the first of them). With instances for prompts it gets its
first token there; its keys and values then go to the least loaded instance that decodes. Ranks of the instances for
prompts come first in the cluster, instance by instance.

What a transfer takes: the bytes that the receiving ranks will store, sent by as many ranks side by side as the smaller
of both tensor groups has. Those of a data group go out, and come in, one after the other. `by_layer`: a prompt's
transfer may begin with its computation, and ends one layer's share after it at the earliest. Pages of the prompt are
free when its decode instance begins with it, which is not before everything has come. All-to-alls over NICs take
longer by what transfers of the busiest data group keep the same NICs busy beside them (`StepCost.beside`).
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import simpy

from moesim.network import Fabric, build_fabric, send_recv_seconds
from moesim.serving.batch import Batch, Job
from moesim.serving.clock import Instance, Served, Transfers, arrivals
from moesim.serving.costs import StepCosts
from moesim.serving.memory import ServingMemoryReport, kv_bytes_per_token, layout_of, memory_of
from moesim.serving.requests import Requests
from moesim.serving.schema import ServingScenario


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Instances that are alike: the scenario of one, what its steps cost and what it holds; where its ranks begin."""

    name: str
    scenario: ServingScenario
    replicas: int
    first_rank: int
    memory: ServingMemoryReport
    costs: StepCosts

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
    """The pools, that which decodes last. Raises InfeasibleError where weights do not fit."""
    fleet, first, found = scenario.fleet, 0, []
    parts = [("serve" if fleet.prefill is None else "decode", scenario, fleet.replicas)]
    if fleet.prefill is not None:
        parts.insert(0, ("prefill", prefill_scenario(scenario), fleet.prefill.replicas))
    for name, part, replicas in parts:
        memory = memory_of(part)
        pool = Pool(name=name, scenario=part, replicas=replicas, first_rank=first, memory=memory, costs=StepCosts(part))
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
    return served


def _exchanges_over_nics(scenario: ServingScenario) -> bool:
    mesh = scenario.parallelism
    return mesh.expert > 1 and mesh.stage_size > scenario.cluster.domain_sizes[0]


def _instances(env: simpy.Environment, pool: Pool, served: Served, **told: Any) -> list[Instance]:
    return [Instance(env, pool.costs, pool.memory, served, **told) for _ in range(pool.replicas)]


def _least_loaded(instances: Sequence[Instance]) -> Instance:
    return min(instances, key=lambda instance: instance.load)  # the first of them


@dataclass
class _Link:
    """What a data group sends, or receives: its first rank in the cluster, and since when it is free."""

    rank: int
    free: float = 0.0


@dataclass
class _Sent:
    """A prompt whose pages are still taken where it was computed."""

    job: Job
    pages: int
    batch: Batch
    instance: Instance


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
        self.began: dict[int, float] = {}
        told: list[dict[str, Any]] = [{}, {}]
        for each, pool, links in zip(told, pools, ("out", "into"), strict=True):
            if not instant and _exchanges_over_nics(pool.scenario):
                each["shared"] = partial(self._busy, links)
        self.prefill = _instances(
            env, prefill, served.earlier[0], formed=self._note_begin, done=self._computed, **told[0]
        )
        self.decode = _instances(env, decode, served, formed=self._free_pages, **told[1])
        self.out, self.into = _links(self.prefill, prefill), _links(self.decode, decode)
        self.instance_of = {batch: instance for instance in self.prefill for batch in instance.batches}
        self.waiting: dict[Batch, list[_Sent]] = {batch: [] for each in self.decode for batch in each.batches}

    def _busy(self, links: str, batches: Sequence[Batch]) -> float:
        """Seconds for which the busiest link of these batches has transfers, at all that a NIC reaches."""
        own: dict[Batch, _Link] = getattr(self, links)
        return self.nic_share * max(0.0, max(own[batch].free for batch in batches) - self.env.now)

    def begin(self, job: Job) -> None:
        """A request comes: its prompt and one token are computed on an instance for prompts."""
        job.left = 1
        _least_loaded(self.prefill).give(job)

    def _note_begin(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            for job in batch.prompts:
                self.began.setdefault(job.request, self.env.now)

    def _computed(self, batch: Batch, job: Job) -> None:
        """Its prompt is done: send it on, unless that was all."""
        if self.requests.output_N[job.request] == 1:
            return
        self.served.done_N[job.request] = np.nan
        pages = int(self.layout.pages(job.prompt)) - self.layout.shared_pages(job.shared)
        batch.hold(pages)
        self.env.process(self._send(_Sent(job, pages, batch, self.instance_of[batch])))

    def _send(self, sent: _Sent) -> Generator[Any, Any, None]:
        job, now = sent.job, self.env.now
        number = job.request
        target = _least_loaded(self.decode)
        stored = int(self.requests.input_N[number])
        left = int(self.requests.output_N[number]) - 1
        onward = replace(
            self.requests.job(number), prompt=stored, left=left, prefix=-1, prefix_tokens=0, swapped=stored,
            received=True,
        )  # fmt: skip
        batch = target.expect(onward)
        size = kv_bytes(self.scenario, stored)
        seconds = self._seconds(self.out[sent.batch].rank, self.into[batch].rank, size)
        arrival = self._book(self.out[sent.batch], self.into[batch], seconds, began=self.began[number])
        self.noted.tokens += stored
        self.noted.bytes += size
        self.noted.seconds.append(seconds)
        self.noted.shown.append(arrival - now)
        if arrival > now:
            yield self.env.timeout(arrival - now)
        self.waiting[batch].append(replace(sent, job=onward))
        target.take(batch, onward)

    def _book(self, out: _Link, into: _Link, seconds: float, *, began: float) -> float:
        """When everything has come."""
        now = self.env.now
        start = max(out.free, into.free, began if self.by_layer else now)
        end = max(start + seconds, now + (seconds / self.layers if self.by_layer else 0.0))
        out.free = into.free = end
        return end

    def _seconds(self, source: int, target: int, size: float) -> float:
        if self.instant:
            return 0.0
        return send_recv_seconds(self.fabric, source, target, size / self.lanes / self.nic_share).seconds

    def _free_pages(self, batches: Sequence[Batch]) -> None:
        """Decode instances have begun with some of what came: its pages are free where it was computed."""
        for batch in batches:
            waiting = self.waiting[batch]
            if not waiting:
                continue
            for sent in waiting:
                if not sent.job.received:
                    sent.batch.hold(-sent.pages)
                    sent.instance.ring(sent.batch)
            self.waiting[batch] = [sent for sent in waiting if sent.job.received]


def _links(instances: Sequence[Instance], pool: Pool) -> dict[Batch, _Link]:
    """The link of the data group of every batch."""
    mesh, found = pool.scenario.parallelism, dict[Batch, _Link]()
    for number, instance in enumerate(instances):
        first = pool.first_rank + number * mesh.world_size
        links = [_Link(first + group * mesh.tensor) for group in range(mesh.data)]
        found |= {batch: links[place // mesh.pipeline] for place, batch in enumerate(instance.batches)}
    return found
