"""The routing of a transformers model on a text: a hook on every router, while the model reads.

Legend: L layers, B sequences of a batch, S positions, T = B S tokens of a batch, K selections, E experts.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import moesim
from moesim.errors import UserError
from moesim.routing.hf.loading import (
    FAMILIES,
    OTHERS,
    Family,
    Text,
    check_folder,
    experts_of,
    library,
    load_model,
    load_text,
    quietly,
    routers_of,
)
from moesim.scenario.routers import ROUTERS, Affinity, RouterFacts
from moesim.scenario.routing import RouterShape
from moesim.trace import RoutingTrace
from moesim.trace.check import check_trace, gates_of
from moesim.trace.record import TraceStep

Progress = Callable[[int, int], None]  # tokens read, of how many
FORM = "transformers"
_GATE_DIFFERENCE = 0.02  # of a gate: what numbers of 8 bits of mantissa may do
_UNKNOWN_ROUTER = re.compile(r"Router|TopKGat|MoE(?!TA)|Moe|Experts")

_OF_LOGITS: Mapping[Affinity, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {"softmax": partial(torch.softmax, dim=-1), "sigmoid": torch.sigmoid, "logits": torch.Tensor.float}
)


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How a model reads a text. sequence_length None: 4,096, or fewer where model or text end before."""

    tokens: int = 65_536
    sequence_length: int | None = None
    batch: int = 1
    device: str = "auto"


@dataclass
class _RouterHook:
    """What one router said so far, batch by batch: experts, gates, and their scores as recorded in a trace."""

    name: str
    router: Any
    family: Family
    ids: list[NDArray[np.int16]] = field(default_factory=list)
    gates: list[NDArray[np.float32]] = field(default_factory=list)
    scores: list[NDArray[np.float32]] = field(default_factory=list)
    experts: int = 0

    def attach(self) -> Any:
        """Begin to listen; gives the handle by which it ends."""
        if self.family is OTHERS:
            return self.router.register_forward_pre_hook(self.record_inputs, with_kwargs=True)
        return self.router.register_forward_hook(self.record_output)

    def record_inputs(self, module: Any, inputs: Any, named: Any) -> None:
        """A hook before the experts: their numbers are the whole numbers [T, K] that they are given."""
        given = [each for each in (*inputs, *named.values()) if isinstance(each, torch.Tensor) and each.ndim == 2]
        for ids_TK in given:
            for gates_TK in given:
                if ids_TK.dtype in _WHOLE and gates_TK.is_floating_point() and gates_TK.shape == ids_TK.shape:
                    self.experts = _experts_in(module)
                    self._keep(ids_TK.detach(), gates_TK.detach().float(), gates_TK.detach().float())
                    return

    def record_output(self, module: Any, inputs: Any, output: Any) -> None:
        """A forward hook: takes experts, gates and logits from where the family has them."""
        parts = dict(zip(self.family.output, output, strict=True))
        logits_TE = parts["logits"].detach().reshape(-1, parts["logits"].shape[-1]).float()
        if "ids" in parts:
            ids_TK = parts["ids"].detach().reshape(len(logits_TE), -1)
            gates_TK = parts["gates"].detach().reshape(ids_TK.shape).float()
        else:
            gates_TK, ids_TK = parts["scores"].detach().float().topk(self.router.top_k, dim=-1)
        self.experts = logits_TE.shape[-1]
        self._keep(ids_TK, gates_TK, self._scores(logits_TE, ids_TK, gates_TK))

    def _keep(self, ids_TK: torch.Tensor, gates_TK: torch.Tensor, scores_TK: torch.Tensor) -> None:
        self.ids.append(ids_TK.to(torch.int16).cpu().numpy())
        self.gates.append(gates_TK.cpu().numpy())
        self.scores.append(scores_TK.cpu().numpy())

    def _scores(self, logits_TE: torch.Tensor, ids_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        facts = self.facts()
        if facts is None:
            return gates_TK
        return _OF_LOGITS[facts.affinity](logits_TE).gather(-1, ids_TK.long())

    def facts(self) -> RouterFacts | None:
        """The router of moesim whose formula makes these gates, None where none does."""
        score, normalised = self.family.score, self.family.normalises(self.router)
        affinity = "logits" if score == "softmax" and normalised else score
        scaled = self.family.factor is not None
        for facts in ROUTERS.values():
            fits = facts.affinity == affinity and facts.normalised == normalised and facts.learned
            if fits and facts.scaled >= scaled and facts.fixed_k is None and not facts.by_experts:
                return facts
        return None


_WHOLE = {torch.int16, torch.int32, torch.int64}


def _experts_in(module: Any) -> int:
    """How many experts a module computes: as it says, or the first axis of its weights."""
    said = getattr(module, "num_experts", None)
    sizes = {len(weight) for weight in module.parameters(recurse=False) if weight.ndim == 3}
    return int(said) if isinstance(said, int) else int(max(sizes, default=0))


def record_model(
    folder: Path, text: Path, *, reading: ReadingOptions | None = None, progress: Progress | None = None
) -> RoutingTrace:
    """The routing of the model in `folder` on `text`: layers, experts, gates, and affinities where a formula has them.

    Raises UserError, one line, where there is no such model, no router in it, or too little text.
    """
    check_folder(folder)
    with quietly():
        return _recorded(folder, text, reading=reading or ReadingOptions(), progress=progress)


def _recorded(folder: Path, text: Path, *, reading: ReadingOptions, progress: Progress | None) -> RoutingTrace:
    device = _device(reading.device)
    model = load_model(folder, device=device)
    found = list(routers_of(model)) or list(experts_of(model))
    watches = [_RouterHook(name=name, router=router, family=family) for name, router, family in found]
    if not watches:
        raise UserError(f"{folder}: {_without_routers(model)}")
    config = model.config.get_text_config()
    read = load_text(text, folder, vocabulary=int(config.vocab_size), most=reading.tokens)
    length = _sequence_length(reading, config, len(read.ids), text)
    ids_ST = read.ids[: len(read.ids) // length * length].reshape(-1, length)
    handles = [watch.attach() for watch in watches]
    try:
        _read(model, ids_ST, batch=reading.batch, device=device, folder=folder, progress=progress)
    finally:
        for handle in handles:
            handle.remove()
    if not any(watch.ids for watch in watches):
        raise UserError(f"{folder}: {_without_routers(model)}")
    return _trace(watches, folder, text, read=read, shape=tuple(ids_ST.shape))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0][:120]}; use cpu, cuda or auto") from None
    return device


def _without_routers(model: Any) -> str:
    kinds = {type(module).__name__ for module in model.modules()}
    unknown = sorted(kind for kind in kinds if _UNKNOWN_ROUTER.search(kind))
    if unknown:
        return (
            f"has no router that is known (its parts are {', '.join(unknown[:4])}); docs/routing.md lists the "
            f"{len(FAMILIES)} families that are"
        )
    return f"the model is dense ({model.config.model_type}: no routers), so nothing is routed; name one with experts"


def _sequence_length(reading: ReadingOptions, config: Any, tokens: int, text: Path) -> int:
    longest = getattr(config, "max_position_embeddings", None) or 4096
    length = reading.sequence_length or min(4096, longest, tokens)
    if length > longest:
        raise UserError(f"--sequence-length {length} exceeds the {longest} positions of the model; use fewer")
    if tokens < length:
        raise UserError(f"{text}: has {tokens} tokens, less than one sequence of {length}; lower --sequence-length")
    return length


def _read(
    model: Any, ids_ST: torch.Tensor, *, batch: int, device: torch.device, folder: Path, progress: Progress | None
) -> None:
    for start in range(0, len(ids_ST), batch):
        part = ids_ST[start : start + batch].to(device)
        try:
            with torch.inference_mode():
                model(input_ids=part, use_cache=False)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise UserError(
                f"{folder}: the model cannot read the text on {device} ({reason}); try a smaller --batch or "
                "--sequence-length, or another --device"
            ) from error
        if progress is not None:
            progress(min(start + batch, len(ids_ST)) * ids_ST.shape[1], ids_ST.numel())


def _trace(watches: list[_RouterHook], folder: Path, text: Path, *, read: Text, shape: tuple[int, ...]) -> RoutingTrace:
    heard = [watch for watch in watches if watch.ids]
    layouts = {(watch.experts, watch.ids[0].shape[1]) for watch in heard}
    if len(layouts) != 1:
        raise UserError(f"{folder}: its layers have different experts or top-K {sorted(layouts)}; a trace has one")
    (experts, top_k) = layouts.pop()
    stacks = [np.stack([np.concatenate(each) for each in parts]) for parts in zip(*map(_parts, heard), strict=True)]
    if stacks[0].shape[1] != shape[0] * shape[1]:
        raise UserError(f"{folder}: its routers saw {stacks[0].shape[1]} tokens of {shape[0] * shape[1]}")
    ids, gates, scores = (stack.reshape(len(heard), *shape, top_k) for stack in stacks)
    router, affinities, gates, notes = _weighed(heard[0], ids, gates, scores, experts=experts)
    provenance: Mapping[str, Any] = {
        "source": f"watched, {heard[0].family.name}",
        "form": FORM,
        "path": folder.name,
        "layers": [_layer(watch.name) for watch in heard],
        "routers": [heard[0].name, type(heard[0].router).__name__],
        "text": text.name,
        "text_sha256": read.sha256,
        "notes": [*read.notes, *_note_of_others(heard[0]), *notes],
        "versions": {"moesim": moesim.__version__, "torch": torch.__version__, FORM: library().__version__},
    }
    step = TraceStep(step=0, expert_ids_LSTK=ids, affinities_LSTK=affinities, gates_LSTK=gates)
    trace = RoutingTrace(router=router, steps=(step,), provenance=provenance)
    check_trace(trace)
    return trace


def _note_of_others(watch: _RouterHook) -> list[str]:
    if watch.family is not OTHERS:
        return []
    return [f"routers of no known family: experts are those that {type(watch.router).__name__} was given"]


def _parts(watch: _RouterHook) -> tuple[list[Any], list[Any], list[Any]]:
    return watch.ids, watch.gates, watch.scores


def _layer(name: str) -> int:
    numbers = re.findall(r"\.(\d+)\.", f".{name}.")
    return int(numbers[0]) if numbers else 0


def _weighed(
    watch: _RouterHook,
    ids: NDArray[np.int16],
    gates: NDArray[np.float32],
    scores: NDArray[np.float32],
    *,
    experts: int,
) -> tuple[RouterShape, NDArray[np.float32], NDArray[np.float32], list[str]]:
    """Router, affinities and gates: by a formula of moesim where it makes the gates that were seen, else as seen."""
    groups, limit = watch.family.groups(watch.router)
    factor = watch.family.factor_of(watch.router)
    seen = RouterShape(kind="recorded", num_experts=experts, top_k=ids.shape[-1], num_groups=groups, group_limit=limit)
    facts = watch.facts()
    if facts is not None:
        scale = factor if facts.scaled else 1.0
        router = replace(seen, kind=facts.name, routed_scaling_factor=scale)
        made = gates_of(router, ids, scores)
        if np.allclose(made, gates, rtol=_GATE_DIFFERENCE, atol=_GATE_DIFFERENCE * scale / ids.shape[-1]):
            return router, scores, made, []
    most = max(factor, float(gates.max()))
    if most > 1:
        gates = gates / np.float32(most)
        return seen, gates, gates, [f"gates are divided by {most:g}, so that they are shares"]
    return seen, gates, gates, []
