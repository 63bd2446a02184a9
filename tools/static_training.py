"""Training whose steps ask the host for nothing: batches, learning rate and log lie on the device.

Legend: P steps, B sequences of a batch, T tokens per sequence, S evaluated sequences, L layers, E routed experts.

The same model, data and update as `moesim.routing.training.Trainer`, arranged so that one step is one CUDA graph: many
small models then share a GPU without waiting for a host (`train_together`). On a CPU the same step simply runs.

`RoutedExperts` leaves rows that are not kept out of its GEMMs, and the host must know how many are left. In
`StaticExperts` every row is computed (R = T * K rows, I expert width, H hidden size, K selections per token) and a row
that is not kept weighs nothing: the same output and gradients for up to 1 / kept share more work. Moving rows is a
permutation both ways, so its gradient is a gather too and no atomic addition rounds differently from run to run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from moesim.routing.balance import balance_loss, routing_sums
from moesim.routing.corpus import Corpus
from moesim.routing.request import TrainingRequest
from moesim.routing.training import BETAS, WEIGHT_DECAY, draw_batch, learning_rate, update_biases
from moesim.routing.transformer import LanguageModel, Mode, RoutedExperts
from moesim.scenario.routers import ROUTERS
from moesim.seeding import stream_seed
from moesim.trace import TrainingCurves

EAGER_STEPS = 3  # real steps before the capture: libraries allocate their workspaces in them
BYTE_EXPERTS = 256  # up to so many ids are sorted as bytes, in a fourth of the time
LANE_STEPS = 20  # steps queued per model before the host waits, so that an interrupt strikes soon


class Evaluation(NamedTuple):
    """Held-out loss (nats per byte, no drops) and selections per layer, sequence and expert [L, S, E] at `step`."""

    step: int
    loss: float
    counts_LSE: NDArray[np.int32]


class StaticTrainer:
    """One model in training. Expert choice and random second experts need the host; their steps are not captured."""

    def __init__(self, request: TrainingRequest, corpus: Corpus, *, device: torch.device) -> None:
        assert request.thin.micro_batches == 1 and request.thin.hash_warmup_share == 0
        self.request, self.device = request, device
        dynamic = ROUTERS[request.router.kind].by_experts or request.router.random_second
        self.captures = device.type == "cuda" and not dynamic
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.done = 0
        self.evaluations: list[Evaluation] = []
        steps = request.steps
        batches = [draw_batch(request, num_bytes=len(corpus.train), step=step) for step in range(steps)]
        rates = [learning_rate(step, num_steps=steps, peak=request.thin.learning_rate) for step in range(steps)]
        self.text = torch.frombuffer(bytearray(corpus.train), dtype=torch.uint8).to(device)
        self.starts_PB = torch.from_numpy(np.stack([starts_B for starts_B, _ in batches])).to(device)
        self.protected_PB = torch.from_numpy(np.stack([protected_B for _, protected_B in batches])).to(device)
        self.rates_P = torch.tensor(rates, device=device)
        self.offsets_T = torch.arange(request.thin.context + 1, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.log_P3 = torch.zeros(steps, 3, device=device)  # cross entropy, imbalance, kept share
        self.model = LanguageModel(
            request,
            torch.Generator().manual_seed(stream_seed(request.seed, "weights")),
            experts=RoutedExperts if dynamic else StaticExperts,
        ).to(device)
        self.rate = torch.tensor(rates[0], device=device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.rate,
            betas=BETAS,
            weight_decay=WEIGHT_DECAY,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.generator = torch.Generator()  # of random second experts, seeded anew for every step

    def advance(self, num_steps: int) -> None:
        """Queue `num_steps` steps on this model's stream; the host does not wait for them."""
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            for _ in range(num_steps):
                if self.captures and self.graph is None and self.done == EAGER_STEPS:
                    self._capture()
                if self.graph is not None:
                    self.graph.replay()
                else:
                    self.generator.manual_seed(stream_seed(self.request.seed, "route", self.done, 0))
                    self._one_step()
                self.done += 1

    def wait(self) -> None:
        """Until all queued steps are done."""
        if self.stream is not None:
            self.stream.synchronize()

    def _capture(self) -> None:
        assert self.stream is not None
        self.stream.synchronize()
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self._one_step()
        self.graph = graph

    def _one_step(self) -> None:
        request = self.request
        starts_B = self.starts_PB.index_select(0, self.step)[0]
        protected_B = self.protected_PB.index_select(0, self.step)[0]
        windows_BT = self.text[starts_B[:, None] + self.offsets_T].long()
        self.rate.copy_(self.rates_P.index_select(0, self.step)[0])
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast(), flash_attention(self.device):
            logits_BTV, routings = self.model(windows_BT[:, :-1], Mode(self.generator, protected_B))
        entropy = functional.cross_entropy(logits_BTV.float().flatten(0, 1), windows_BT[:, 1:].flatten())
        sums_L = [routing_sums(each, shape=request.router, num_sequences=len(windows_BT)) for each in routings]
        losses = [balance_loss(sums, shape=request.router, balance=request.balance) for sums in sums_L]
        with _deterministic(self.device):
            torch.autograd.backward(entropy + torch.stack(losses).sum())
        if request.thin.expert_grad_clip is not None:
            for layer in self.model.moe_layers:
                layer.experts.clip_gradients(request.thin.expert_grad_clip)
        self.optimizer.step()
        counts_LE = torch.stack([sums.count_E for sums in sums_L])
        update_biases(self.model, self.request, counts_LE)
        imbalance = (counts_LE.amax(dim=1) / counts_LE.mean(dim=1)).mean()
        experts = [layer.experts for layer in self.model.moe_layers]
        kept = [each.kept_share if isinstance(each, StaticExperts) else torch.ones_like(imbalance) for each in experts]
        self.log_P3.index_copy_(
            0, self.step, torch.stack([entropy.detach(), imbalance, torch.stack(kept).mean()])[None]
        )
        self.step += 1

    def _autocast(self) -> Any:
        # without the cache: its casts of the weights would live on from one graph replay to the next
        on_gpu = self.device.type == "cuda"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on_gpu, cache_enabled=False)

    @torch.no_grad()
    def evaluate(self, bytes_ST: NDArray[np.uint8], *, tokens_per_forward: int) -> Evaluation:
        """Held-out loss and expert counts over sequences with their next byte [S, T + 1]; kept in `evaluations`.

        Each sequence is cut into windows of `thin.context`, as for the recording. Expert choice competes over one
        sequence at a time. Waits for the device.
        """
        context, length = self.request.thin.context, bytes_ST.shape[1] - 1
        assert length % context == 0
        alone = ROUTERS[self.request.router.kind].by_experts
        per_forward = 1 if alone else max(1, tokens_per_forward // length)
        losses, counts = [], []
        generator = torch.Generator().manual_seed(stream_seed(self.request.seed, "record", self.done))
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            text = torch.from_numpy(bytes_ST).to(self.device).long()
            for chunk in torch.split(text, per_forward):
                with self._autocast(), flash_attention(self.device):
                    logits_BTV, routings = self.model(chunk[:, :-1].reshape(-1, context), Mode(generator))
                targets = chunk[:, 1:].flatten()
                losses.append(functional.cross_entropy(logits_BTV.float().flatten(0, 1), targets, reduction="sum"))
                ids = [each.expert_ids_TK.view(len(chunk), -1) for each in routings]
                counts.append(torch.stack([self._count_SE(ids_SR) for ids_SR in ids]))
            loss = float(torch.stack(losses).double().sum()) / (len(bytes_ST) * length)
            counts_LSE = torch.cat(counts, dim=1).cpu().numpy()
        evaluation = Evaluation(self.done, loss, counts_LSE)
        self.evaluations.append(evaluation)
        return evaluation

    def _count_SE(self, ids_SR: Tensor) -> Tensor:
        num_experts = self.request.router.num_experts
        count_SE = torch.zeros(len(ids_SR), num_experts + 1, dtype=torch.int32, device=ids_SR.device)
        ids_SR = torch.where(ids_SR < 0, num_experts, ids_SR)
        return count_SE.scatter_add_(1, ids_SR, torch.ones_like(ids_SR, dtype=torch.int32))[:, :num_experts]

    def curves(self) -> TrainingCurves:
        """All that was measured so far."""
        log_3P = self.log_P3[: self.done].double().cpu().numpy().T
        return TrainingCurves(
            steps=np.arange(1, self.done + 1, dtype=np.float64),
            train_loss=log_3P[0].copy(),
            validation_steps=np.array([each.step for each in self.evaluations], dtype=np.float64),
            validation_loss=np.array([each.loss for each in self.evaluations]),
            imbalance=log_3P[1].copy(),
        )

    def dropped_share_P(self) -> NDArray[np.float64]:
        """Share of the rows that capacity dropped in each step so far, mean over the layers."""
        return np.asarray(1 - self.log_P3[: self.done, 2].double().cpu().numpy())


def flash_attention(device: torch.device) -> AbstractContextManager[None]:
    """On CUDA the one fast attention kernel whose backward pass can be deterministic."""
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device.type == "cuda" else nullcontext()


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms for the backward pass, whose attention alone adds in changing order; CUDA only."""
    before = torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.use_deterministic_algorithms(before)


def train_together(
    trainers: Sequence[StaticTrainer], *, until: int, progress: Callable[[int], None] | None = None
) -> None:
    """Advance every trainer to step `until`, their steps side by side; `progress(steps)` is told of each few."""
    while left := [trainer for trainer in trainers if trainer.done < until]:
        steps = 0
        for _ in range(LANE_STEPS):
            for trainer in left:
                if trainer.done < until:
                    trainer.advance(1)
                    steps += 1
        for trainer in left:
            trainer.wait()
        if progress is not None:
            progress(steps)


class StaticExperts(RoutedExperts):
    """`RoutedExperts` of the same parameters, computed over all T * K rows.

    `kept_share`: share of the last call's rows that were kept, a tensor on the device.
    """

    kept_share: Tensor

    def forward(self, hidden_TH: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, keep_TK: Tensor) -> Tensor:
        """sum_k gate * FFN_{id}(hidden) over the kept rows, [T, H]."""
        dtype = torch.bfloat16 if hidden_TH.is_cuda else torch.float32
        self.kept_share = keep_TK.float().mean()
        order_R, place_TK, offsets_E = static_permutation(expert_ids_TK, num_experts=self.num_experts)
        rows_RH = _Dispatch.apply(hidden_TH.to(dtype), order_R, place_TK)
        weights_R = _Permute.apply((gates_TK * keep_TK).flatten(), order_R, place_TK)
        gate_RI, up_RI = functional.grouped_mm(rows_RH, self.w13_EHF.to(dtype), offs=offsets_E).chunk(2, dim=-1)
        inner_RI = functional.silu(gate_RI) * up_RI * weights_R.to(dtype).unsqueeze(1)
        outer_RH = functional.grouped_mm(inner_RI, self.w2_EIH.to(dtype), offs=offsets_E)
        output_TH: Tensor = _Combine.apply(outer_RH, order_R, place_TK)
        return output_TH.to(hidden_TH.dtype)


def static_permutation(expert_ids_TK: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert order of the flattened rows: (order_R, place_TK, offsets_E).

    Row `order_R[r]` of the [T * K] selections comes r-th, `place_TK` is the inverse, and expert n's rows end at
    `offsets_E[n]` (int32). Id -1, which weighs nothing, goes to expert 0.
    """
    dtype = torch.uint8 if num_experts <= BYTE_EXPERTS else torch.int16
    ids_R = expert_ids_TK.clamp_min(0).flatten().to(dtype)
    sorted_R, order_R = torch.sort(ids_R, stable=True)
    place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    experts_E = torch.arange(num_experts, device=ids_R.device, dtype=dtype)
    offsets_E = torch.searchsorted(sorted_R, experts_E, right=True, out_int32=True)
    return order_R, place_R.view_as(expert_ids_TK), offsets_E


def _sum_of_rows(rows_RH: Tensor, place_TK: Tensor) -> Tensor:
    """Each token's K rows added up, [T, H]."""
    return rows_RH.index_select(0, place_TK.flatten()).view(*place_TK.shape, -1).sum(dim=1)


class _Dispatch(torch.autograd.Function):
    """Token t's hidden state to each of its K rows; back: the sum of the K gradients."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return hidden_TH.index_select(0, order_R // place_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _sum_of_rows(gradients[0], ctx.saved_tensors[0]), None, None


class _Combine(torch.autograd.Function):
    """Each token's K rows added up; back: the token's gradient to each row."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.top_k = place_TK.shape[1]
        return _sum_of_rows(rows_RH, place_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, ctx.saved_tensors[0] // ctx.top_k), None, None


class _Permute(torch.autograd.Function):
    """One number per row into expert order; back: into token order."""

    @staticmethod
    def forward(ctx: Any, values_R: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return values_R.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, ctx.saved_tensors[0].flatten()), None, None
