"""Everything that determines a trained router's trace, without importing torch."""

import hashlib
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

import moesim
from moesim.errors import UserError
from moesim.routing.corpus import load_corpus
from moesim.scenario import Scenario
from moesim.scenario.routers import ROUTERS
from moesim.scenario.routing import Balance, Capacity, DeviceCapacity, NoCapacity, RouterShape, Thin, TrainRouting
from moesim.strict_json import json_text

RECIPE = 2  # raise when a change of the code changes the traces that equal requests give
LEAST_RECORDED_TOKENS = 65_536
CHEAP_RECORDED_TOKENS = 262_144  # a few seconds of forward passes
FIRST_RECORDED_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """One thin model to train and the held-out text on which its routing is recorded.

    `sequence_length` and `micro_batch` are the simulated workload's: `recorded_sequences` sequences of that length are
    recorded at the last step, and fewer at step 0. Expert choice alone competes over a micro-batch. Raises UserError
    when the parts do not fit each other.
    """

    router: RouterShape
    steps: int
    sequence_length: int
    recorded_sequences: int
    micro_batch: int = 1
    shared_experts: int = 0
    balance: Balance = field(default_factory=Balance)
    capacity: Capacity = field(default_factory=NoCapacity)
    thin: Thin = field(default_factory=Thin)
    corpus: str = "stdlib"
    seed: int = 0

    @classmethod
    def from_scenario(cls, scenario: Scenario) -> "TrainingRequest":
        """The request of a scenario whose routing is trained.

        Recorded are at least 65,536 tokens, one EP group's micro-batch and `routing.tokens`; and, up to 262,144 tokens,
        as many sequences as the global batch has, because samples drawn from fewer understate their own spread.
        What plays no part in training or recording is 1, so that layouts that differ in nothing else share a router.
        """
        routing = scenario.routing
        assert isinstance(routing, TrainRouting)
        workload = scenario.workload
        group_tokens = scenario.parallelism.expert * workload.micro_batch * workload.sequence_length
        batch_tokens = workload.global_batch * workload.sequence_length
        wanted = max(LEAST_RECORDED_TOKENS, group_tokens, routing.tokens or 0, min(batch_tokens, CHEAP_RECORDED_TOKENS))
        router = scenario.router_shape()
        if not _knows_devices(routing.balance, scenario.capacity):
            router = replace(router, num_devices=1)
        return cls(
            router=router,
            steps=routing.steps,
            sequence_length=workload.sequence_length,
            recorded_sequences=-(-wanted // workload.sequence_length),
            micro_batch=workload.micro_batch if ROUTERS[router.kind].by_experts else 1,
            shared_experts=scenario.model.shared_experts,
            balance=routing.balance,
            capacity=scenario.capacity,
            thin=routing.thin,
            corpus=routing.corpus,
            seed=scenario.seed,
        )

    def __post_init__(self) -> None:
        for complaint in self._complaints():
            raise UserError(complaint)

    @property
    def first_sequences(self) -> int:
        """Sequences recorded at step 0: about 16,384 tokens, at least one sequence."""
        return min(self.recorded_sequences, max(1, FIRST_RECORDED_TOKENS // self.sequence_length))

    @property
    def batch_sequences(self) -> int:
        """Training sequences of one micro-batch of the thin model."""
        return self.thin.tokens_per_step // (self.thin.micro_batches * self.thin.context)

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON values."""
        return {
            "router": asdict(self.router),
            "steps": self.steps,
            "sequence_length": self.sequence_length,
            "recorded_sequences": self.recorded_sequences,
            "micro_batch": self.micro_batch,
            "shared_experts": self.shared_experts,
            "balance": self.balance.model_dump(mode="json"),
            "capacity": self.capacity.model_dump(mode="json"),
            "thin": self.thin.model_dump(mode="json"),
            "corpus": self.corpus,
            "seed": self.seed,
        }

    def provenance(self) -> dict[str, Any]:
        """What makes the trace: all fields, the corpus by hash, and the versions of all that computes."""
        corpus = load_corpus(self.corpus)
        return {
            "request": self.to_json(),
            "recipe": RECIPE,
            "corpus_hash": corpus.content_hash,
            "corpus_files": corpus.num_files,
            "corpus_train_bytes": len(corpus.train),
            "corpus_held_out_bytes": len(corpus.held_out),
            "versions": {
                "moesim": moesim.__version__,
                "torch": version("torch"),
                "python": platform.python_version(),
            },
        }

    def content_hash(self) -> str:
        """SHA-256 (hex) of `provenance`: equal hashes give equal traces on one machine. Raises UserError (corpus)."""
        return _hash(self.provenance())

    def training_hash(self) -> str:
        """Likewise of what determines the trained model, whatever is recorded of it at the end."""
        provenance = self.provenance()
        fields = {key: value for key, value in provenance["request"].items() if key != "recorded_sequences"}
        provenance["request"] = {**fields, "first_sequences": self.first_sequences}
        return _hash(provenance)

    def _complaints(self) -> Iterator[str]:
        thin, router, balance = self.thin, self.router, self.balance
        if thin.hidden % thin.heads or thin.hidden // thin.heads % 2:
            yield (
                f"routing.thin.hidden = {thin.hidden} is not an even multiple of heads = {thin.heads}; "
                "use e.g. hidden 128 with heads 4"
            )
        for name in ("hidden", "expert_intermediate"):
            width = getattr(thin, name)
            if width % 8:
                yield f"routing.thin.{name} = {width} is no multiple of 8 (grouped GEMMs); use {width // 8 * 8 + 8}"
        if thin.tokens_per_step % (thin.micro_batches * thin.context):
            yield (
                f"routing.thin.tokens_per_step = {thin.tokens_per_step} is not a multiple of micro_batches * context = "
                f"{thin.micro_batches * thin.context}; use {thin.micro_batches * thin.context * 8}"
            )
        facts = ROUTERS[router.kind]
        fixed_k = facts.fixed_k
        if fixed_k is not None and router.top_k != fixed_k:
            yield (
                f"routing.router.kind {router.kind} selects {fixed_k} expert(s) per token, but model.top_k = "
                f"{router.top_k}; set it to {fixed_k}"
            )
        if not facts.biased and balance.loss_free is not None:
            others = " or ".join(other.name for other in ROUTERS.values() if other.biased)
            yield (
                f"routing.balance.loss_free needs the bias of router {others}, not {router.kind}; "
                "remove it or change the router"
            )
        yield from self._balance_complaints()

    def _balance_complaints(self) -> Iterator[str]:
        router, balance = self.router, self.balance
        coefficients = ("expert", "device", "communication", "variance", "sequence")
        used = [name for name in coefficients if getattr(balance, name)]
        if used and ROUTERS[router.kind].affinity == "none":
            yield f"routing.balance.{used[0]} has no effect on router {router.kind}, which has no affinities; remove it"
        if _knows_devices(balance, self.capacity) and router.num_experts % router.num_devices:
            yield (
                f"{router.num_experts} experts do not divide among {router.num_devices} devices: device capacity and "
                "the device and communication losses need that; change parallelism.expert"
            )


def _knows_devices(balance: Balance, capacity: Capacity) -> bool:
    """Whether training looks at which experts lie on one device."""
    return bool(balance.device or balance.communication) or isinstance(capacity, DeviceCapacity)


def _hash(provenance: dict[str, Any]) -> str:
    text = json_text(provenance, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
