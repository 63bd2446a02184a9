"""What one data group works on: requests that wait, prompts in parts, requests that are being answered, and pages.

A request that is being answered grows by one token a step, so that a group is told by sums: how many there are, the
keys they have together, and when each will be done, counted in steps. Pages are whole: a request takes another one
whenever its stored tokens have filled the last.
"""

import heapq
from collections import deque
from dataclasses import dataclass

import numpy as np

from moesim.serving.schema import Engine


@dataclass(slots=True)
class Job:
    """A request in work: `prompt` tokens to compute (again, after a preemption), then `left` tokens to generate."""

    request: int
    prompt: int
    left: int
    done: int = 0  # tokens of the prompt that are computed
    joined: int = -1  # the group's step in which it began to be answered, -1: not yet
    is_out: bool = False  # done or preempted: what is still listed of it does not count


@dataclass(frozen=True, slots=True)
class Formed:
    """One step of a group: tokens generated, keys they see, and (job, tokens, tokens before) of parts of prompts."""

    generated: int
    context: int
    chunks: tuple[tuple[Job, int, int], ...]

    @property
    def tokens(self) -> int:
        """Tokens that are computed."""
        return self.generated + sum(tokens for _, tokens, _ in self.chunks)


class Batch:
    """The state of one data group; `pages` is its room for keys and values."""

    def __init__(self, engine: Engine, *, pages: int) -> None:
        self.engine, self.pages = engine, pages
        self.waiting: deque[Job] = deque()
        self.prompts: list[Job] = []
        self.used_pages = self.generating = self.context = self.steps = self.preempted = 0
        self._ends: list[tuple[int, int, Job]] = []  # a heap: step in which it is done
        self._residues = np.zeros(engine.page, dtype=np.int64)  # of those that are answered: stored tokens - steps
        self._order: list[Job] = []  # as admitted
        self._admitted = 0

    @property
    def running(self) -> int:
        """Requests in work."""
        return self.generating + len(self.prompts)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.waiting and self.running == 0

    @property
    def load(self) -> int:
        """What a new request would stand behind."""
        return self.running + len(self.waiting)

    def form(self) -> Formed:
        """The next step: every request that is answered, then as much of the prompts as the budget leaves."""
        self._make_room()
        left = self.engine.token_budget - self.generating
        chunks: list[tuple[Job, int, int]] = []
        self._admit(left - sum(job.prompt - job.done for job in self.prompts))
        for job in self.prompts:
            if left <= 0:
                break
            tokens = min(left, job.prompt - job.done)
            if not self.engine.chunked_prefill and tokens < job.prompt - job.done and chunks:
                break
            chunks.append((job, tokens, job.done))
            left -= tokens
        return Formed(self.generating, self.context, tuple(chunks))

    def finish(self, formed: Formed) -> tuple[list[Job], list[Job]]:
        """After the step: jobs that gave their first token (or their first again), and jobs that are done."""
        self.used_pages += self._grown
        self.steps += 1
        self.context += formed.generated
        done = []
        while self._ends and self._ends[0][0] <= self.steps:
            job = heapq.heappop(self._ends)[2]
            if not job.is_out:
                self._leave(job)
                done.append(job)
        first = []
        for job, tokens, _ in formed.chunks:
            job.done += tokens
            if job.done == job.prompt:
                self.prompts.remove(job)
                first.append(job)
                job.left -= 1
                if job.left == 0:
                    self.used_pages -= self._pages_of(job.prompt)
                    job.is_out = True
                    done.append(job)
                else:
                    self._join(job)
        return first, done

    def stored(self, job: Job) -> int:
        """Tokens whose keys and values are stored for a job that is being answered."""
        return job.prompt + self.steps - job.joined

    @property
    def _grown(self) -> int:
        """Pages that the next step fills: of jobs whose stored tokens are whole pages."""
        return int(self._residues[-self.steps % self.engine.page])

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self.engine.page)

    def _admit(self, budget: int) -> None:
        if self.engine.batching == "static" and self.running:
            return
        while self.waiting and budget > 0 and self.running < self.engine.running:
            needed = self._pages_of(self.waiting[0].prompt)
            if self.used_pages + self._grown + needed > self.pages:
                return
            job = self.waiting.popleft()
            self.used_pages += needed
            self.prompts.append(job)
            self._order.append(job)
            budget -= job.prompt

    def _join(self, job: Job) -> None:
        job.joined = self.steps
        self.generating += 1
        self.context += job.prompt
        self._residues[(job.prompt - self.steps) % self.engine.page] += 1
        self._admitted += 1
        heapq.heappush(self._ends, (self.steps + job.left, self._admitted, job))

    def _leave(self, job: Job) -> None:
        """Take a job that is being answered out, with its pages."""
        stored = self.stored(job)
        self.generating -= 1
        self.context -= stored
        self._residues[(stored - self.steps) % self.engine.page] -= 1
        self.used_pages -= self._pages_of(stored)
        job.is_out = True

    def _make_room(self) -> None:
        """Preempt the latest jobs until the pages suffice that the next step fills."""
        while self.used_pages + self._grown > self.pages:
            job = self._order.pop()
            if job.is_out:
                continue
            self.preempted += 1
            if job.joined < 0:
                self.prompts.remove(job)
                self.used_pages -= self._pages_of(job.prompt)
                job.done = 0
                self.waiting.appendleft(job)
                continue
            stored = self.stored(job)
            self._leave(job)
            # all but the token computed last is stored; computing it again gives the next one
            again = Job(job.request, stored + 1, job.left - (self.steps - job.joined))
            self.waiting.appendleft(again)
