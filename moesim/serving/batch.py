"""What one data group works on: requests that wait, prompts in parts, requests that are being answered, and pages.

Requests that are being answered lie in arrays [S], so that a step is a few operations whatever their number. Pages are
layer-pages (`moesim.serving.memory`): a request holds those of its tokens, and shared prefixes are held once.

Legend: S requests that are being answered.
"""

import heapq
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.serving.memory import KeyLayout, PrefixCache
from moesim.serving.schema import Engine, Speculation

IntArray = NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Job:
    """A request in work: `prompt` tokens to compute (again, after a preemption), then `left` tokens to generate.

    `turn` orders those that wait: by arrival, later for classes that wait longer. `prefix`: which shared beginning of
    `prefix_tokens` tokens it has, -1: none.
    """

    request: int
    prompt: int
    left: int
    turn: float = 0.0
    urgency: int = 0  # its class, 0 the most urgent
    prefix: int = -1
    prefix_tokens: int = 0
    done: int = 0  # tokens of the prompt that are computed or were found
    shared: int = 0  # tokens of it whose pages the cache holds
    swapped: int = 0  # tokens whose keys and values lie in host memory
    received: bool = False  # they come from another instance instead


class Chunk(NamedTuple):
    """A part of a prompt: tokens of it behind `before` others."""

    job: Job
    tokens: int
    before: int


@dataclass(frozen=True)
class Formed:
    """One step of a group.

    `generated` requests get tokens, for which `rows` rows each are computed (more than one: drafted tokens); `keys`
    that they see, by kind of layer; parts of prompts; `padding` rows that stand for nothing; layer-pages `moved`
    between GPU and host.
    """

    generated: int
    rows: int
    keys: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    padding: int
    moved: int

    @cached_property
    def tokens(self) -> int:
        """Rows that are computed."""
        return self.generated * self.rows + sum(chunk.tokens for chunk in self.chunks) + self.padding


@dataclass(slots=True)
class Counts:
    """What a group did: for the answers."""

    preempted: int = 0
    swapped: int = 0  # of the preempted: to host memory
    prompt_tokens: int = 0  # of admitted prompts
    found_tokens: int = 0  # of them: in the prefix cache
    answered: int = 0  # steps of one request each in which it got tokens
    given: int = 0  # tokens of those steps
    padding: int = 0
    rows: int = 0


class Batch:
    """The state of one data group; `pages` is its room, `host_pages` that in host memory, in layer-pages."""

    def __init__(
        self,
        engine: Engine,
        *,
        layout: KeyLayout,
        pages: int,
        host_pages: int = 0,
        rng: np.random.Generator | None = None,
    ) -> None:
        self.engine, self.layout, self.pages, self.host_pages = engine, layout, pages, host_pages
        self.rows = 1 + (len(engine.speculation.acceptance) if engine.speculation else 0)
        self.most_running = min(engine.running, max(1, engine.token_budget // self.rows))
        self._rng = rng or np.random.default_rng(0)
        self._waiting: list[tuple[float, int, Job]] = []
        self.prompts: list[Job] = []
        self._jobs: list[Job] = []  # those being answered, as in the arrays
        self._stored_S, self._left_S = (np.zeros(engine.running, dtype=np.int64) for _ in range(2))
        self._shared_S = np.zeros(engine.running, dtype=np.int64)  # layer-pages of them that the cache holds
        self.cache = PrefixCache(layout)
        self._expected: dict[int, int] = {}  # requests with a prefix that wait or whose prompts are computed
        self._prompt_pages = self._host_used = self._moved = 0
        self.coming = 0  # requests that are on their way here
        self.held_pages = 0  # layer-pages that the step holds, those that it may fill with them
        self.counts = Counts()

    @property
    def generating(self) -> int:
        """Requests that are being answered."""
        return len(self._jobs)

    @property
    def running(self) -> int:
        """Requests in work."""
        return len(self._jobs) + len(self.prompts)

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._waiting and self.running == 0

    @property
    def load(self) -> int:
        """What a new request would stand behind."""
        return self.running + len(self._waiting) + self.coming

    @property
    def used_pages(self) -> int:
        """Layer-pages in use, those of the prefix cache with them."""
        return self._answered_pages(0) + self._prompt_pages + self.cache.pages

    @property
    def stored_S(self) -> IntArray:
        """Tokens stored of each request that is being answered."""
        return self._stored_S[: len(self._jobs)]

    def _answered_pages(self, ahead: int) -> int:
        n = len(self._jobs)
        if not n:
            return 0
        return int((self.layout.pages(self._stored_S[:n] + ahead) - self._shared_S[:n]).sum())

    def knows(self, prefix: int) -> bool:
        """Whether a prefix is held, or a request that will compute it is here."""
        return prefix >= 0 and (prefix in self.cache or self._expected.get(prefix, 0) > 0)

    def add(self, job: Job) -> None:
        """A request that arrives, or waits again."""
        if job.prefix >= 0:
            self._expected[job.prefix] = self._expected.get(job.prefix, 0) + 1
        heapq.heappush(self._waiting, (job.turn, job.request, job))

    def hold(self, pages: int) -> None:
        """Layer-pages of a prompt that is done stay taken until they are sent; negative ones are free again."""
        self._prompt_pages += pages

    def form(self) -> Formed:
        """The next step: every request that is answered, then as much of the prompts as the budget leaves."""
        self._moved = 0
        needed = self._make_room()
        budget = self.engine.token_budget - self.generating * self.rows
        by_length = self.engine.batching == "by_length"
        if by_length:
            needed = self._admit_alike(needed)
        else:
            needed = self._admit(budget - sum([job.prompt - job.done for job in self.prompts]), needed)
        self.held_pages = needed + self.cache.pages
        left = self.engine.token_budget - self.generating * self.rows
        chunks: list[Chunk] = []
        for job in self.prompts:
            if left <= 0:
                break
            tokens = min(left, job.prompt - job.done)
            if not self.engine.chunked_prefill and tokens < job.prompt - job.done and chunks:
                break
            chunks.append(Chunk(job, tokens, job.done))
            left -= tokens
        padding = 0
        if by_length and len(chunks) > 1:
            longest = max(chunk.tokens for chunk in chunks)
            padding = sum(longest - chunk.tokens for chunk in chunks)
        keys = self.layout.seen(self.stored_S) if self._jobs else (0,) * len(self.layout.kinds)
        return Formed(self.generating, self.rows, keys, tuple(chunks), padding, self._moved)

    def finish(self, formed: Formed) -> tuple[list[Job], list[Job]]:
        """After the step: jobs that gave their first token (or their first again), and jobs that are done."""
        self.counts.padding += formed.padding
        self.counts.rows += formed.tokens
        done = self._advance() if self._jobs else []
        first = []
        for job, tokens, _ in formed.chunks:
            job.done += tokens
            if job.done < job.prompt:
                continue
            self.prompts.remove(job)
            self._forget(job)
            self._prompt_pages -= self._own_pages(job, job.prompt)
            if self.engine.prefix_cache and job.prefix >= 0 and not job.shared:
                self._keep_prefix(job)
            first.append(job)
            job.left -= 1
            if job.left == 0:
                self._release(job)
                done.append(job)
            else:
                self._join(job, stored=job.prompt)
        return first, done

    def _advance(self) -> list[Job]:
        """Every request that is answered gets its tokens; those that are done leave."""
        n = len(self._jobs)
        self.counts.answered += n
        if self.engine.speculation is None:
            self._stored_S[:n] += 1
            self._left_S[:n] -= 1
            self.counts.given += n
        else:
            given_S = np.minimum(self._accepted(n, self.engine.speculation), self._left_S[:n])
            self._stored_S[:n] += given_S
            self._left_S[:n] -= given_S
            self.counts.given += int(given_S.sum())
        places = (self._left_S[:n] == 0).nonzero()[0].tolist()
        done = [self._jobs[place] for place in places]
        for place in reversed(places):
            job = self._take(place)
            job.left = 0
            self._release(job)
        return done

    def _accepted(self, n: int, speculation: Speculation) -> IntArray:
        """Tokens of a step for each of n requests: one, and the drafted ones up to the first that is refused."""
        kept_SD = self._rng.random((n, len(speculation.acceptance))) < np.array(speculation.acceptance)
        return np.asarray(1 + np.cumprod(kept_SD, axis=1, dtype=np.int64).sum(axis=1))

    def _forget(self, job: Job) -> None:
        if job.prefix >= 0:
            self._expected[job.prefix] -= 1

    def _own_pages(self, job: Job, tokens: int) -> int:
        return int(self.layout.pages(tokens)) - self.layout.shared_pages(job.shared)

    def _release(self, job: Job) -> None:
        if job.shared:
            self.cache.leave(job.prefix)

    def _keep_prefix(self, job: Job) -> None:
        """The cache takes over the pages of a prefix that was just computed, unless another request was first."""
        whole = job.prefix_tokens // self.engine.page * self.engine.page
        if whole == 0 or job.prefix in self.cache:
            return
        extra = int(self.layout.pages(whole)) - self.layout.shared_pages(whole)
        if (
            self._answered_pages(0) + self._prompt_pages + self.cache.pages + extra + self._own_pages(job, job.prompt)
            <= self.pages
        ):
            self.cache.keep(job.prefix, whole)
            job.shared = whole

    def _join(self, job: Job, *, stored: int) -> None:
        place = len(self._jobs)
        self._jobs.append(job)
        self._stored_S[place], self._left_S[place] = stored, job.left
        self._shared_S[place] = self.layout.shared_pages(job.shared)

    def _take(self, place: int) -> Job:
        """Take a request that is being answered out of the arrays; the last one takes its place."""
        job, last = self._jobs[place], len(self._jobs) - 1
        job.left = int(self._left_S[place])
        self._jobs[place] = self._jobs[last]
        for values_S in (self._stored_S, self._left_S, self._shared_S):
            values_S[place] = values_S[last]
        self._jobs.pop()
        return job

    def _make_room(self) -> int:
        """Preempt the latest jobs until the pages suffice that the next step can fill; those pages."""
        while True:
            needed = self._answered_pages(self.rows) + self._prompt_pages
            if needed + self.cache.pages <= self.pages:
                return needed
            if self.cache.evict():
                continue
            self._preempt(max(self._jobs + self.prompts, key=lambda job: (job.turn, job.request)))

    def _preempt(self, job: Job) -> None:
        """Its pages are given up, or moved to host memory; it waits in its old turn."""
        self.counts.preempted += 1
        if job in self.prompts:
            self.prompts.remove(job)
            self._forget(job)
            self._prompt_pages -= self._own_pages(job, job.prompt)
            job.done = 0
        else:
            place = self._jobs.index(job)
            stored = int(self._stored_S[place])
            self._take(place)
            pages = int(self.layout.pages(stored))  # those of a shared prefix, too
            if self.engine.preemption == "swap" and self._host_used + pages <= self.host_pages:
                self.counts.swapped += 1
                self._host_used += pages
                self._moved += pages
                job.swapped = stored
            else:
                # all but the token computed last is stored; computing it again gives the next one
                job.prompt, job.done = stored + 1, 0
        self._release(job)
        job.shared = 0
        self.add(job)

    def _admit(self, budget: int, needed: int) -> int:
        """Begin with those that wait, in turn; the layer-pages that are needed then."""
        whole_batch = self.engine.batching == "static"  # its prompts take as many steps as they need
        if whole_batch and self.running:
            return needed
        while self._waiting and (budget > 0 or whole_batch):
            job = self._waiting[0][2]
            if self.running >= self.most_running or not self._fits(job, needed):
                victim = self._less_urgent(job)
                if victim is None:
                    return needed
                self._preempt(victim)
                needed = self._answered_pages(self.rows) + self._prompt_pages
                continue
            heapq.heappop(self._waiting)
            needed += self._start(job)
            budget -= job.prompt - job.done
        return needed

    def _less_urgent(self, job: Job) -> Job | None:
        """The latest job in work of a class that gives way to that of `job`."""
        others = [other for other in self._jobs + self.prompts if other.urgency > job.urgency and other.turn > job.turn]
        return max(others, key=lambda other: (other.urgency, other.turn, other.request), default=None)

    def _pages_to_start(self, job: Job, shared: int) -> int:
        tokens = job.swapped + self.rows if job.swapped else job.prompt
        return int(self.layout.pages(tokens)) - self.layout.shared_pages(shared)

    def _found(self, job: Job) -> int:
        """Tokens of its prompt that the cache holds in whole pages: never all of them, as the last gives a token."""
        if job.swapped or not self.engine.prefix_cache or job.prefix not in self.cache:
            return 0
        return min(self.cache.tokens(job.prefix), (job.prompt - 1) // self.engine.page * self.engine.page)

    def _fits(self, job: Job, needed: int) -> bool:
        """Whether its pages are there, once prefixes that nobody uses have left the cache."""
        while needed + self.cache.pages + self._pages_to_start(job, self._found(job)) > self.pages:
            if not self.cache.evict(but=job.prefix) and not self.cache.evict():
                return False
        return True

    def _start(self, job: Job) -> int:
        """Begin with a request that waited; the pages that it takes."""
        if job.swapped:
            stored, pages = job.swapped, int(self.layout.pages(job.swapped))
            if not job.received:
                self._host_used -= pages
                self._moved += pages
            job.swapped, job.received = 0, False
            self._forget(job)
            self._join(job, stored=stored)
            return int(self.layout.pages(stored + self.rows))
        job.done = job.shared = self._found(job)
        if job.shared:
            self.cache.use(job.prefix)
        self.counts.prompt_tokens += job.prompt
        self.counts.found_tokens += job.done
        self.prompts.append(job)
        own = self._own_pages(job, job.prompt)
        self._prompt_pages += own
        return own

    def _admit_alike(self, needed: int) -> int:
        """A whole batch at once: the request whose turn it is, and those nearest to its length."""
        if self.running or not self._waiting:
            return needed
        oldest = self._waiting[0][2]
        ordered = sorted(
            (entry[2] for entry in self._waiting),
            key=lambda job: (job is not oldest, abs(job.prompt - oldest.prompt), job.turn, job.request),
        )
        longest, chosen = 0, set[int]()
        for job in ordered:
            longest = max(longest, job.prompt)
            padded = longest * (len(chosen) + 1)
            if chosen and (padded > self.engine.token_budget or len(chosen) == self.most_running):
                break
            if not self._fits(job, needed):
                break
            needed += self._start(job)
            chosen.add(job.request)
        self._waiting = [entry for entry in self._waiting if entry[2].request not in chosen]
        heapq.heapify(self._waiting)
        return needed
