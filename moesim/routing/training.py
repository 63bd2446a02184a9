"""Training the thin language model: steps, checkpoints, and what an interrupt leaves.

Legend: B sequences, T tokens per sequence, K selections, E routed experts, S sequences of a micro-batch,
L layers, V vocabulary.

Same request, same trace, to the bit, on one machine: every draw comes from a named stream of (seed, step, micro-batch),
so nothing depends on what ran before; one CPU thread computes, because how sums are split over threads changes bits;
on CUDA torch's deterministic algorithms are on. Other processors or torch versions may round differently. Checkpoints
hold what exact resume needs, and an interrupt waits for the end of a step.
"""

import io
import math
import pickle
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from operator import add
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from moesim.errors import MachineError, UserError
from moesim.files import write_atomically
from moesim.processes import STOP_SIGNALS
from moesim.routing.balance import RoutingSums, balance_loss, load_imbalance, loss_free_update, routing_sums
from moesim.routing.corpus import Corpus, load_corpus
from moesim.routing.held_out import record
from moesim.routing.request import ProgressCallback, StepReport, TrainingRequest, checkpoint_file
from moesim.routing.routers import LearnedRouter
from moesim.routing.transformer import LanguageModel, Mode
from moesim.scenario.routing import DeviceCapacity
from moesim.seeding import stream, stream_seed
from moesim.trace.record import RoutingTrace, TrainingCurves

State = dict[str, Any]


def save_checkpoint(path: Path, state: State) -> None:
    """Write `state` whole or not at all: a crash while writing leaves the checkpoint before it.

    Raises MachineError that says what is kept, for example when the disk is full.
    """
    content = io.BytesIO()  # torch.save to a full disk raises errors of its own
    torch.save(state, content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())
    except (MachineError, OSError) as error:
        kept = "an earlier checkpoint is kept" if path.exists() else "the training so far is lost"
        raise MachineError(f"{error} with MOESIM_CACHE; {kept}") from error


def load_checkpoint(path: Path, *, training_hash: str) -> State | None:
    """The state at `path`, or None where there is none.

    A damaged file, or one of another training, is reported on stderr and left out: training then starts over.
    """
    if not path.exists():
        return None
    try:
        state: State = torch.load(path, weights_only=True, map_location="cpu")
        if state["training_hash"] == training_hash:
            return state
        reason = "it belongs to another scenario"
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, zipfile.BadZipFile, OSError) as error:
        reason = f"it is damaged ({type(error).__name__})"
    print(f"{path.name}: checkpoint not used, {reason}; training starts over", file=sys.stderr)
    return None


class Interrupt:
    """Whether Ctrl-C was pressed, or the end asked for by a signal, since the deferral began."""

    pending = False


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Hold back the first signal to stop (read `.pending`), so that no training step is torn in two; a second strikes.

    Outside the main thread, where signals never arrive, nothing is held back.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    caught = [number for number, handler in previous.items() if callable(handler)]  # others end the process, or nothing

    def defer(number: int, frame: FrameType | None) -> None:
        if interrupt.pending:
            raise KeyboardInterrupt
        interrupt.pending = True

    for number in caught:
        signal.signal(number, defer)
    try:
        yield interrupt
    finally:
        for number in caught:
            signal.signal(number, previous[number])


NUM_THREADS = 1  # fixed for the bits; beside other work the barriers of two cost more than they gain
WARMUP_SHARE = 0.1
FINAL_LEARNING_RATE = 0.1  # share of the peak
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1  # of AdamW
NUM_VALIDATIONS = 5
CHECKPOINT_SECONDS = 60.0


def train_router(
    request: TrainingRequest,
    *,
    progress: ProgressCallback | None = None,
    checkpoint_dir: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> RoutingTrace:
    """Train the model of `request` on real text and record its routing of held-out text at step 0 and at the end.

    With a `checkpoint_dir` the state is saved there every `checkpoint_seconds`, before the last recording, and on
    Ctrl-C (KeyboardInterrupt follows); the same request then resumes, and its trace equals the uninterrupted one to the
    bit. The trained model stays there: a request that records more or less of it trains nothing. `progress` is called
    after every step. Raises UserError for a bad corpus, a missing device or a diverged loss, and MachineError when no
    checkpoint can be written.
    """
    corpus = load_corpus(request.corpus)
    training_hash = request.training_hash()
    path = None if checkpoint_dir is None else checkpoint_file(checkpoint_dir, training_hash)
    with _reproducible(device_of(request)) as device:
        trainer = Trainer(request, corpus, device)
        first = record(trainer.model, request, corpus.held_out, step=0, num_sequences=request.first_sequences)
        trainer.validations.setdefault(0, first.loss)
        if path is not None and (state := load_checkpoint(path, training_hash=training_hash)) is not None:
            trainer.load(state)
        _run(trainer, progress=progress, path=path, training_hash=training_hash, seconds=checkpoint_seconds)
        last = record(
            trainer.model, request, corpus.held_out, step=request.steps, num_sequences=request.recorded_sequences
        )
    return RoutingTrace(
        router=request.router,
        steps=(first.step, last.step),
        curves=trainer.curves(),
        provenance={
            **request.provenance(),
            "content_hash": request.content_hash(),
            "device": device_name(device),
            "threads": NUM_THREADS,
            "recorded_loss": last.loss,
        },
    )


def _run(
    trainer: "Trainer", *, progress: ProgressCallback | None, path: Path | None, training_hash: str, seconds: float
) -> None:
    """Every step that is left, saving as `train_router` promises."""

    def save() -> None:
        if path is not None:
            save_checkpoint(path, {**trainer.state(), "training_hash": training_hash})

    if trainer.step == trainer.request.steps:
        return
    saved_at = time.monotonic()
    whole = True  # no step is half done
    with deferred_interrupt() as interrupt:
        try:
            while trainer.step < trainer.request.steps:
                whole = False
                report = trainer.advance()
                whole = True
                if progress is not None:
                    progress(report)
                if interrupt.pending:
                    raise KeyboardInterrupt
                if time.monotonic() - saved_at > seconds:
                    save()
                    saved_at = time.monotonic()
        except KeyboardInterrupt:
            if whole:
                save()
            raise
        save()


class Trainer:
    """The model, its optimizer and all that was measured so far: a state that a checkpoint holds whole."""

    def __init__(self, request: TrainingRequest, corpus: Corpus, device: torch.device) -> None:
        self.request, self.device = request, device
        self.train = np.frombuffer(corpus.train, dtype=np.uint8)
        self.held_out = corpus.held_out
        if len(self.train) < 2 * (request.thin.context + 1):
            raise UserError(
                f"routing.corpus = {request.corpus}: {len(self.train)} bytes to train on are too few for a context of "
                f"{request.thin.context}; give a larger text"
            )
        self.model = LanguageModel(request, torch.Generator().manual_seed(stream_seed(request.seed, "weights")))
        self.model.to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=request.thin.learning_rate,
            betas=BETAS,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )
        self.step = 0
        self.train_loss: list[float] = []
        self.imbalance: list[float] = []
        self.validations: dict[int, float] = {}

    def advance(self) -> StepReport:
        """One optimizer step. Raises UserError when the loss is not finite."""
        request, step = self.request, self.step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps=request.steps, peak=request.thin.learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        loss, counts_LE = self._backward(step)
        if not math.isfinite(loss):
            raise UserError(f"training diverged at step {step + 1} (loss {loss}); lower routing.thin.learning_rate")
        if request.thin.expert_grad_clip is not None:
            for layer in self.model.moe_layers:
                layer.experts.clip_gradients(request.thin.expert_grad_clip)
        self.optimizer.step()
        update_biases(self.model, self.request, counts_LE)
        self.step += 1
        self.train_loss.append(loss)
        self.imbalance.append(float(np.mean([load_imbalance(count_E) for count_E in counts_LE])))
        self._validate()
        return StepReport(self.step, request.steps, loss, self.imbalance[-1])

    def _backward(self, step: int) -> tuple[float, list[Tensor]]:
        """Accumulate the gradient of a step; its mean cross entropy and the selections per layer and expert.

        With scope global_batch f and P run over the whole step, so all micro-batches' graphs live until one backward.
        """
        request = self.request
        num, scope = request.thin.micro_batches, request.balance.scope
        held_back: list[tuple[Tensor, list[RoutingSums]]] = []
        counts_LE: list[Tensor] = []
        loss = 0.0
        for micro in range(num):
            entropy, sums_L = self._forward(step, micro)
            loss += float(entropy.detach()) / num
            counts = [sums.count_E for sums in sums_L]
            counts_LE = counts if not counts_LE else [a + b for a, b in zip(counts_LE, counts, strict=True)]
            if scope == "global_batch":
                held_back.append((entropy / num, sums_L))
            else:
                torch.autograd.backward((entropy + self._balance(sums_L)) / num)
        if held_back:
            totals_L = [reduce(add, layer) for layer in zip(*(sums_L for _, sums_L in held_back), strict=True)]
            torch.autograd.backward(reduce(add, (entropy for entropy, _ in held_back)) + self._balance(totals_L))
        return loss, counts_LE

    def _forward(self, step: int, micro: int) -> tuple[Tensor, list[RoutingSums]]:
        request = self.request
        bytes_BT, protected_S = self._batch(step, micro)
        generator = torch.Generator().manual_seed(stream_seed(request.seed, "route", step, micro))
        fixed = step < round(request.thin.hash_warmup_share * request.steps)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            logits_BTV, routings = self.model(bytes_BT[:, :-1], Mode(generator, protected_S, fixed))
        entropy = functional.cross_entropy(logits_BTV.float().flatten(0, 1), bytes_BT[:, 1:].flatten())
        return entropy, [routing_sums(each, shape=request.router, num_sequences=len(bytes_BT)) for each in routings]

    def _batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Training windows [B, T + 1] at random places, and which of them are protected from dropping."""
        starts_B, protected_S = draw_batch(self.request, num_bytes=len(self.train), step=step, micro=micro)
        windows = self.train[starts_B[:, None] + np.arange(self.request.thin.context + 1)]
        return torch.from_numpy(windows).to(self.device).long(), torch.from_numpy(protected_S).to(self.device)

    def _balance(self, sums_L: list[RoutingSums]) -> Tensor:
        """The balance losses of all layers together."""
        request = self.request
        return reduce(add, (balance_loss(sums, shape=request.router, balance=request.balance) for sums in sums_L))

    def _validate(self) -> None:
        """Held-out loss at `NUM_VALIDATIONS` evenly spaced steps, always over the same text, without dropping."""
        request = self.request
        if self.step == request.steps or self.step % max(1, request.steps // NUM_VALIDATIONS) == 0:
            recording = record(
                self.model, request, self.held_out, step=self.step, num_sequences=request.first_sequences
            )
            self.validations[self.step] = recording.loss

    def curves(self) -> TrainingCurves:
        """All that was measured."""
        return TrainingCurves(
            steps=np.arange(1, self.step + 1, dtype=np.float64),
            train_loss=np.array(self.train_loss),
            validation_steps=np.array(list(self.validations), dtype=np.float64),
            validation_loss=np.array(list(self.validations.values())),
            imbalance=np.array(self.imbalance),
        )

    def state(self) -> State:
        """Everything that a later process needs to go on; after the last step that is no optimizer."""
        trained = self.step == self.request.steps
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": None if trained else self.optimizer.state_dict(),
            "train_loss": self.train_loss,
            "imbalance": self.imbalance,
            "validations": self.validations,
        }

    def load(self, state: State) -> None:
        """Go on from `state`."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.train_loss, self.imbalance = state["train_loss"], state["imbalance"]
        self.validations = state["validations"]


def draw_batch(
    request: TrainingRequest, *, num_bytes: int, step: int, micro: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where the windows of a micro-batch start in a text of `num_bytes` [B], and which are protected from drops [B]."""
    rng = stream(request.seed, "batch", step, micro)
    size = request.batch_sequences
    starts_B = rng.integers(0, num_bytes - request.thin.context, size=size)
    protected_S = np.zeros(size, dtype=bool)
    if isinstance(request.capacity, DeviceCapacity):
        # rounded up or down by chance, so that few sequences still give the wanted share on average
        num_protected = math.floor(request.capacity.protected_share * size + rng.random())
        protected_S[rng.permutation(size)[:num_protected]] = True
    return starts_B, protected_S


def learning_rate(step: int, *, num_steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, round(WARMUP_SHARE * num_steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    passed = (step - warmup) / max(1, num_steps - warmup)
    return peak * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * passed)))


def update_biases(model: LanguageModel, request: TrainingRequest, counts_LE: Iterable[Tensor]) -> None:
    """Loss-free balancing after a step in which experts of each layer got `counts_LE` rows; nothing without it."""
    if request.balance.loss_free is None:
        return
    for layer, count_E in zip(model.moe_layers, counts_LE, strict=True):
        assert isinstance(layer.router, LearnedRouter)
        loss_free_update(layer.router.bias_E, count_E, gamma=request.balance.loss_free.gamma)


def device_of(request: TrainingRequest) -> torch.device:
    """Where the request trains; `auto` takes CUDA where there is one. Raises UserError for CUDA that is not there."""
    wanted = request.thin.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("routing.thin.device = cuda, but torch finds no CUDA device; use cpu or auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The model of a GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@contextmanager
def _reproducible(device: torch.device) -> Iterator[torch.device]:
    """One CPU thread, and deterministic algorithms on CUDA; the former settings come back."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(NUM_THREADS)
    # Only where it matters: the call imports torch's compiler, which costs seconds.
    switch = device.type == "cuda" and not deterministic
    if switch:
        torch.use_deterministic_algorithms(True)
    try:
        yield device
    finally:
        torch.set_num_threads(threads)
        if switch:
            torch.use_deterministic_algorithms(False)
