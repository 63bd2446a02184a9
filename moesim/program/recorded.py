"""`implementation: {kind: imported, file: STEP}`: the operations of the user's own program, at the scenario's sizes.

Tensor ranks share widths and tokens as `moesim.recorded.sharing` says, context ranks a ring of attention.

The recorded step (`moesim import-step`) gives each layer of a kind its operations, in order; what lies outside of the
layers belongs to embedding or head. Every operation is scaled to the tokens of a micro-batch and the model's experts
(`moesim.recorded`); between the first and the last grouped GEMM of a layer, operations on rows follow the rows that the
routing brings to each rank. Between operations the GPU pauses as recorded programs do, and the host launches each.

Where experts are spread over ranks, the exchange of row counts, dispatch, the sort of what arrives by local expert, and
combine are put around the experts, as torch programs do it; the recorded step knows one rank alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.kernels import HostCosts, KernelModel
from moesim.kernels.estimate import weakest
from moesim.kernels.families import FAMILY_OF, GroupedGemm, error_family
from moesim.program.attention import core_attention
from moesim.program.gemms import collective, gather_tokens, scatter_tokens
from moesim.program.host import FREE_HOST, HostModel, backward
from moesim.program.loads import LayerLoads
from moesim.program.moe import counted_rows, send, send_back
from moesim.program.operations import Operation, compute
from moesim.program.permutation import expand, reduce
from moesim.program.sizes import Passes, Step
from moesim.program.writer import KernelWriter
from moesim.recorded.estimate import step_estimate
from moesim.recorded.host import HOST, says_little
from moesim.recorded.layers import DENSE, EXPERTS_GEMM, MOE, module_in_layer
from moesim.recorded.pricing import GAP_S, SDPA, launch_of, prices
from moesim.recorded.scaling import recorded_step, scaled_op, scaled_ops
from moesim.recorded.sharing import Exchange, divided, kept_whole, shared_out
from moesim.recorded.sizes import MatchedOp, StepSizes
from moesim.recorded.step_file import GRADIENTS, RecordedOp
from moesim.recorded.widths import HEADS, KV_HEADS, OF_LATENT, OF_MODEL, SHARED_WIDTH, VALUE_DIM
from moesim.results.spans import Collective, Part, Phase
from moesim.scenario import Scenario
from moesim.scenario.model import Mla, Model

GRID = 9  # row counts between the fewest and the most of a rank at which an operation is priced
BF16, FP32 = 2.0, 4.0


class RecordedKernels:
    """The list of one scenario; see `moesim.program.software.KernelList`."""

    def __init__(self, scenario: Scenario) -> None:
        """Raises UserError where the recorded program has other widths than the scenario's model."""
        assert scenario.implementation.file is not None
        self.scenario = scenario
        self.step = recorded_step(Path(scenario.implementation.file))
        self._check()

    def _check(self) -> None:
        model, sizes = self.scenario.model, self.step.sizes
        pairs = [] if sizes.widths else [("hidden", model.hidden, sizes.hidden)]
        if model.experts and not sizes.knows_expert_width:
            pairs.append(("expert_intermediate", model.expert_intermediate, sizes.expert_width))
        for key, wanted, has in pairs:
            if wanted != has:
                raise UserError(
                    f"{self.scenario.implementation.file} was recorded with {key} {has}, which cannot be scaled, and "
                    f"model.{key} is {wanted}; record the program anew, which follows widths, or set model.{key}={has}"
                )
        if self.step.recomputes and self.scenario.workload.recompute != "full":
            raise UserError(
                f"{self.scenario.implementation.file} was recorded with activation checkpointing; set "
                "workload.recompute: full, which repeats layers and keeps their inputs alone, or record it without"
            )
        moe = sum(not model.is_dense(layer) for layer in range(model.layers))
        for kind, wanted, has in (
            (MOE, moe, sizes.moe_layers),
            (DENSE, model.layers - moe, sizes.dense_layers),
        ):
            if wanted and not has:
                raise UserError(
                    f"{self.scenario.implementation.file} has no {kind} layers, and the model has {wanted}; record a "
                    "step with at least one of each kind"
                )
        self._check_sharing()

    def _check_sharing(self) -> None:
        """Raises UserError where nothing says how ranks could share the layers."""
        mesh, file = self.scenario.parallelism, self.scenario.implementation.file
        axes = {axis: getattr(mesh, axis) for axis in ("tensor", "context", "expert_tensor")}
        axis = next((name for name, size in axes.items() if size > 1), None)
        if axis is None:
            return
        sizes = self.step.sizes
        if not sizes.widths:
            why = "does not follow widths (a trace, or an older file); record the program with this version"
        elif kept := kept_whole(self.step.ops, sizes):
            why = f"has what cannot be shared out: {', '.join(kept)}; name these dimensions' weights otherwise"
        elif axes["tensor"] > 1 and HEADS not in sizes.widths:
            why = "has no heads of attention that could be told; record it with scaled_dot_product_attention"
        elif axes["context"] > 1 and all(each.op.name != SDPA for each in self.step.ops):
            why = "has attention step by step, which needs whole sequences; record it with scaled_dot_product_attention"
        else:
            return
        raise UserError(f"{file} {why}, or set parallelism.{axis}: 1")

    def host_model(self, kernels: KernelModel) -> HostModel:
        """What `moesim import-step` takes for each operation; free where the host stays ahead of the GPU all the step.

        It does not where it reads back how many rows will come from other ranks.
        Where it reads nothing back, it is ahead into the next step by what it is in one step among many.
        """
        mesh, workload = self.scenario.parallelism, self.scenario.workload
        host, ahead = HOST.paced(self.scenario.compute.host_factor), 0.0
        if mesh.expert * mesh.expert_tensor == 1:
            whole = replace(
                self.step.sizes,
                sequences=workload.micro_batch,
                sequence_length=workload.sequence_length // mesh.context,
                **_of_model(self.scenario.model, self.step.sizes),
            )
            one = divided(whole, tensor=mesh.tensor, expert_tensor=1)
            estimate = step_estimate(scaled_ops(self.step.ops, self.step.sizes, one), kernels, host=host)
            if estimate.kernels_s + estimate.gaps_s >= estimate.host_s:
                return FREE_HOST
            ahead = estimate.timeline.host_ahead_s
        factor, own = self.scenario.compute.host_factor, kernels.host
        return HostModel(
            forward_launch=factor * own.launch,
            backward_launch=factor * own.backward_launch,
            readback=own.readback,
            ahead=ahead,
        )

    def _to(self, step: Step, *, whole: bool = False) -> StepSizes:
        """Of one rank; `whole`: with the tokens of all its tensor ranks."""
        sizes = self.step.sizes
        of_model = replace(
            sizes,
            sequences=step.batch,
            sequence_length=(step.gathered_tokens if whole else step.tokens) // step.batch,
            **_of_model(step.model, sizes),
            dense_layers=1,
            moe_layers=1,
        )
        if step.tensor * step.expert_tensor == 1:
            return of_model
        return divided(of_model, tensor=step.tensor, expert_tensor=step.expert_tensor)

    def embedding_part(self, w: KernelWriter, step: Step) -> Passes:
        """What comes before the layers; backward, what comes behind their gradients."""
        return self._plain(w, step, self.step.outside("forward")[0], self.step.outside("backward")[1])

    def head_part(self, w: KernelWriter, step: Step) -> Passes:
        """What comes behind the layers, and the gradients before theirs."""
        return self._plain(w, step, self.step.outside("forward")[1], self.step.outside("backward")[0])

    def _plain(self, w: KernelWriter, step: Step, ahead: Sequence[MatchedOp], back: Sequence[MatchedOp]) -> Passes:
        forward_pass, backward_pass = (
            [each for place in self._written_out(writer, step, ahead, ops) for each in place]
            for writer, ops in ((w, ahead), (w.backward, back))
        )
        return forward_pass, backward_pass

    def layer_part(self, w: KernelWriter, step: Step, loads: LayerLoads | None) -> Passes:
        """One layer of either kind; `loads` is None for a dense layer."""
        kind = DENSE if loads is None else MOE
        ahead, back = self.step.of_layer(kind, "forward"), self.step.of_layer(kind, "backward")
        forward_pass, backward_pass = (
            self._layer_pass(writer, step, loads, ahead, ops) for writer, ops in ((w, ahead), (w.backward, back))
        )
        return forward_pass, backward_pass

    def _layer_pass(
        self,
        w: KernelWriter,
        step: Step,
        loads: LayerLoads | None,
        ahead: Sequence[MatchedOp],
        ops: Sequence[MatchedOp],
    ) -> list[Operation]:
        """The operations in order, with the ways of the rows around the experts where these are on several ranks."""
        grouped = [place for place, each in enumerate(ops) if each.op.name == EXPERTS_GEMM] if loads else []
        within = range(grouped[0], grouped[-1] + 1) if grouped else range(0)
        found = self._written_out(w, step, ahead, ops, within=within, loads=loads)
        if loads is not None and step.remote:
            out, back = self._ways(w, step, loads)
            if within:
                found[within[0]] = [*out, *found[within[0]]]
                found[within[-1]] = [*found[within[-1]], *back]
            else:
                found.append([*out, *back])
        return [operation for place in found for operation in place]

    def _written_out(
        self,
        w: KernelWriter,
        step: Step,
        ahead: Sequence[MatchedOp],
        ops: Sequence[MatchedOp],
        *,
        within: range = range(0),
        loads: LayerLoads | None = None,
    ) -> list[list[Operation]]:
        """What each of `ops` is, with exchanges among tensor ranks around it; those `within` follow the routed rows.

        `ahead`: the forward pass that they belong to.
        """
        shared = shared_out(ahead, ops, self._of_model(step)) if step.tensor > 1 else [None] * len(ops)
        found = []
        for place, (each, part) in enumerate(zip(ops, shared, strict=True)):
            writer = self._at(w, each) if each.op.layer else w
            whole = part is not None and part.whole
            if each.op.name == SDPA and step.context > 1:
                written = self._ring(writer, step)
            elif place in within and loads is not None:
                written = [self._of_rows(writer, each, self._to(step), loads)]
            else:
                written = [self._operation(writer, each, self._to(step, whole=whole))]
            if part is not None:
                before, behind = (
                    [sent for exchange in exchanges for sent in self._exchange(writer, step, exchange)]
                    for exchanges in (part.before, part.behind)
                )
                written = [*before, *written, *behind]
            found.append(written)
        return found

    def _of_model(self, step: Step) -> StepSizes:
        return replace(self.step.sizes, **_of_model(step.model, self.step.sizes))

    def _exchange(self, w: KernelWriter, step: Step, what: Exchange) -> list[Operation]:
        """Of tokens among tensor ranks, as the lists of switches have it."""
        writer = w.during(Phase.WEIGHT_GRADIENT) if what.late else w
        if what.sums:
            assert step.links is not None
            reduced = step.links.reduce(step.tensor_peers, FP32 * step.gathered_tokens)
            return [collective(w, "loss.sums", step, reduced, step.tensor_peers, kind=Collective.ALL_REDUCE)]
        way = gather_tokens if what.gathers else scatter_tokens
        return way(writer, f"{w.part}.{'gather' if what.gathers else 'scatter'}", step, width=what.width)

    def _ring(self, w: KernelWriter, step: Step) -> list[Operation]:
        """Attention around the ring of context ranks in the place of the recorded kernel."""
        ahead, back = core_attention(w.during(Phase.FORWARD), step)
        return ahead if w.phase is Phase.FORWARD else back

    def _ways(self, w: KernelWriter, step: Step, loads: LayerLoads) -> tuple[list[Operation], list[Operation]]:
        p = w.at(Part.PERMUTE)
        arrived, leaving = (each(p.during(Phase.FORWARD), step, loads) for each in (expand, reduce))
        if w.phase is Phase.FORWARD:
            counted = counted_rows(w.at(Part.DISPATCH), step, loads)
            out = [*counted, *send(loads, w.at(Part.DISPATCH), beside=[]), *arrived[0]]
            return out, [*leaving[0], *send_back(loads, w.at(Part.COMBINE))]
        out = [*send(loads, w.at(Part.COMBINE), beside=[]), *leaving[1]]
        return out, [*arrived[1], *send_back(loads, w.at(Part.DISPATCH))]

    def _at(self, w: KernelWriter, each: MatchedOp) -> KernelWriter:
        """A writer for the part of the model that an operation works for."""
        symbols = {symbol for shape in (*each.reads, *each.writes) for symbol in shape}
        if each.op.name == SDPA:
            return w.at(Part.ATTENTION)
        if each.op.name == EXPERTS_GEMM:
            return w.at(Part.EXPERTS)
        if "R" in symbols:
            inner = bool(symbols & {"F", "J"}) if self.step.sizes.knows_expert_width else self._has_expert_width(each)
            return w.at(Part.EXPERTS) if inner else w.at(Part.PERMUTE)
        if "E" in symbols or "K" in symbols:
            return w.at(Part.ROUTER)
        return w.at(self._part_of_module(each))

    def _has_expert_width(self, each: MatchedOp) -> bool:
        width = self.step.sizes.expert_width
        return any(shape[-1:] in ((width,), (2 * width,)) for shape, _, _ in (*each.op.reads, *each.op.writes))

    def _part_of_module(self, each: MatchedOp) -> Part:
        name = module_in_layer(each.op.module)
        if name and name == self.step.experts_module:
            return Part.SHARED_EXPERTS if each.op.layer == MOE else Part.DENSE_FFN
        return Part.ATTENTION

    def _operation(self, w: KernelWriter, each: MatchedOp, to: StepSizes) -> Operation:
        op = scaled_op(each, self.step.sizes, to)
        assert op is not None
        (priced,) = prices([op], w.model)
        return self._written(w, op, priced.seconds, priced.source)

    def _written(self, w: KernelWriter, op: RecordedOp, seconds: float | NDArray[np.float64], source: str) -> Operation:
        kernel = launch_of(op).kernels[0]
        phase = _phase(op, w)
        label = w.during(phase).label(op.name)._replace(name=op.name)
        return compute(
            label,
            w._spread(np.asarray(seconds) * op.count + GAP_S * op.count),
            source=source,
            chain=w.chain,
            launches=self._launches(op, w.model.host),
            family=FAMILY_OF[type(kernel)],
            error_family=error_family(kernel),
        )

    def _of_rows(self, w: KernelWriter, each: MatchedOp, to: StepSizes, loads: LayerLoads) -> Operation:
        """An operation that follows the rows of every rank, or of every expert."""
        if not each.has_rows:
            return self._operation(w, each, to)
        op = scaled_op(each, self.step.sizes, to)
        assert op is not None
        kernel = launch_of(op).kernels[0]
        if isinstance(kernel, GroupedGemm):
            of_slots = w.grouped_gemm(
                op.name, rows=loads.slot_rows_MSRP, k=kernel.k, n=kernel.n, direction=kernel.direction
            )
            assert of_slots.seconds_MSR is not None
            seconds_MSR = of_slots.seconds_MSR * op.count + GAP_S * op.count
            return replace(of_slots, seconds_MSR=seconds_MSR, launches=self._launches(op, w.model.host))
        rows_MSR = np.asarray(loads.rows_MSR, dtype=np.float64)
        grid = np.unique(np.linspace(max(rows_MSR.min(), 1.0), max(rows_MSR.max(), 1.0), GRID).round())
        found = [
            prices([scaled], w.model)[0]
            for rows in grid
            if (scaled := scaled_op(each, self.step.sizes, replace(to, given_rows=int(rows)))) is not None
        ]
        seconds = np.interp(rows_MSR, grid, [priced.seconds for priced in found])
        return self._written(w, op, seconds, weakest(*(priced.source for priced in found)))

    def accumulation(self, w: KernelWriter, *, parameters: float, first: bool) -> list[Operation]:
        """Autograd adds the gradients of later micro-batches to those of the first."""
        if first:
            return []
        w = w.during(Phase.WEIGHT_GRADIENT)
        return [w.moved("gradients.add", "elementwise", backward("accumulate"), bytes_=3.0 * BF16 * parameters)]

    def shard_copies(self, w: KernelWriter, *, parameters: float) -> tuple[list[Operation], list[Operation]]:
        """As torch's fully_shard: out of the gathered buffer, and into the one that is scattered. The host is busy with
        the unit at each; embedding and head are halves of one, which stays whole until its backward pass.
        """
        if not parameters:
            return [], []
        both, in_layer = 2.0 * BF16 * parameters, w.layer >= 0
        kind = (DENSE if self.scenario.model.is_dense(w.layer) else MOE) if in_layer else ""
        unit = (HOST.unit if in_layer else 0.5 * HOST.unit) + HOST.unit_weight * self._weights_of(kind)
        ahead, back = unit / w.model.host.launch, unit / w.model.host.backward_launch
        apart = ahead if w.phase is Phase.FORWARD else in_layer * back
        return (
            [w.moved("weights.apart", "copy", apart, bytes_=both)],
            [w.during(Phase.WEIGHT_GRADIENT).moved("gradients.join", "copy", back, bytes_=both)],
        )

    def flat_copies(self, w: KernelWriter, *, parameters: float) -> tuple[list[Operation], list[Operation]]:
        """Into the buckets of data parallelism, and back out of them."""
        if not parameters:
            return [], []
        w, both = w.during(Phase.NONE), 2.0 * BF16 * parameters
        return (
            [w.moved("gradients.flatten", "copy", bytes_=both)],
            [w.moved("gradients.unflatten", "copy", bytes_=both)],
        )

    def optimizer_launches(self, host: HostCosts, stages: Sequence[int]) -> float:
        """As torch's goes through its weights, and through a rank's shares of them."""
        weights, shares = self._weights(stages), self.scenario.parallelism.zero.dense >= 3
        return (HOST.optimizer + (HOST.weight + shares * HOST.sharded) * weights) / host.launch

    def _weights(self, stages: Sequence[int]) -> float:
        """How many a rank has."""
        model, last = self.scenario.model, self.scenario.parallelism.num_stages - 1
        layers = [model.is_dense(layer) for stage in stages for layer in self.scenario.stage_layers[stage]]
        of_layers = sum(layers) * self._weights_of(DENSE) + (len(layers) - sum(layers)) * self._weights_of(MOE)
        return of_layers + ((0 in stages) + (last in stages)) * self._weights_of("")

    def _weights_of(self, kind: str) -> float:
        """How many a layer of a kind has; "": a half of those outside of layers, which lie with embedding and head."""
        mine = [each.op for each in self.step.ops if (each.op.layer or "") == kind]
        found = sum(op.count * len(op.facts.get(GRADIENTS, ())) / (op.layers if kind else 2) for op in mine)
        return float(found)

    def _launches(self, op: RecordedOp, host: HostCosts) -> float:
        """What an operation with what is done before it costs the host, in launches of the kernel model."""
        launch = host.launch if op.phase == "forward" else host.backward_launch
        return op.count * HOST.seconds(op, weights=0, usual=self._says_little) / launch

    @cached_property
    def _says_little(self) -> bool:
        return says_little([each.op for each in self.step.ops])


def _of_model(model: Model, sizes: StepSizes) -> dict[str, Any]:
    """The sizes of a model; those of the file where it has none."""
    latent = model.attention if isinstance(model.attention, Mla) else None
    widths = {name: getattr(model, key) for key, name in OF_MODEL.items()}
    widths |= {VALUE_DIM: model.head_dim, SHARED_WIDTH: model.shared_width}
    if latent:
        of_latent = {name: getattr(latent, key) for key, name in OF_LATENT.items()}
        widths |= {KV_HEADS: model.heads} | {name: size for name, size in of_latent.items() if size}
    found: dict[str, Any] = {"vocabulary": model.vocab, "experts": sizes.experts}
    if sizes.widths:
        wanted = {name: size for name, size in widths.items() if size and name in sizes.widths}
        found |= {"hidden": model.hidden, "widths": {**sizes.widths, **wanted}}
    if model.experts:
        found |= {"experts": model.experts, "top_k": model.top_k, "expert_width": model.expert_intermediate}
    return found


def _phase(op: RecordedOp, w: KernelWriter) -> Phase:
    if op.phase == "forward":
        return Phase.FORWARD
    direction = getattr(launch_of(op).kernels[0], "direction", "")
    return Phase.WEIGHT_GRADIENT if direction == "wgrad" else Phase.INPUT_GRADIENT
