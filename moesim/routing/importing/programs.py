"""Readers of what programs record: FLAME-MoE, Megatron-LM and OLMoE in training; SGLang, vLLM, TensorRT-LLM in serving.

Legend: L layers, T tokens, K selections, E experts, P physical slots, W steps of a window.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.routing.importing.data_files import (
    Array,
    load_arrays,
    load_counters,
    load_parquet,
    load_safetensors,
    load_tensors,
    refuse,
)
from moesim.routing.importing.source import (
    NUMBER,
    Layer,
    Selections,
    Source,
    counts_of_logical,
    field_of,
    files_under,
    json_lines,
    logical_ids,
    note_of_silent,
    note_of_unread,
    number_in,
    numbers_of,
    of_counts,
    of_steps,
    table_of,
    whole,
)
from moesim.strict_json import parse_json


def read_flame(path: Path) -> Source:
    """FLAME-MoE: `actives/iter_STEP/layer_LL.parquet` (scores, indices; a row a token), or its captures
    `actives/STEP/LAYER/RANK-BATCH.pt`.

    The steps are checkpoints of one training run. `path` may also be one checkpoint's folder or one layer's file.
    """
    if path.is_file():
        return of_steps({0: {number_in(path): _flame_layer(path)}}, str(path))
    if not path.is_dir():
        refuse(path, "no such file or folder", "name the folder of one run")
    here = sorted(path.glob("layer_*.parquet"))
    if here:
        layers = {number_in(file): _flame_layer(file) for file in here}
        return of_steps({number_in(path): layers}, str(path))
    folders = [path] if path.name == "actives" else sorted(path.rglob("actives"))
    if len(folders) != 1:
        refuse(path, f"holds {len(folders)} folders named actives", "name the folder of one run")
    found: dict[int, dict[int, Layer]] = defaultdict(dict)
    for file in sorted(folders[0].glob("iter_*/layer_*.parquet")):
        found[number_in(file.parent)][number_in(file)] = _flame_layer(file)
    for folder in sorted(folders[0].glob("*/*/")):
        captures = [(file, load_tensors(file)) for file in sorted(folder.glob("*.pt"))]
        if captures:
            found[number_in(folder.parent)][number_in(folder)] = _joined_captures(captures)
    if not found:
        refuse(folders[0], "holds no iter_*/layer_*.parquet and no STEP/LAYER/*.pt", "name the folder of one run")
    return of_steps(found, str(folders[0]))


def _flame_layer(file: Path) -> Layer:
    columns = load_parquet(file)
    scores, ids = field_of(columns, "scores", str(file)), field_of(columns, "indices", str(file))
    return table_of(ids, str(file), axes=2), scores


def _joined_captures(captures: list[tuple[Path, Any]]) -> Layer:
    for file, value in captures:
        if not isinstance(value, list) or len(value) != 2:
            refuse(file, "is no pair (scores, indices)", "capture the router's output again")
    ids = [table_of(value[1], str(file), axes=2) for file, value in captures]
    return np.concatenate(ids), np.concatenate([np.asarray(value[0], dtype=np.float32) for _, value in captures])


def read_megatron(path: Path) -> Source:
    """Megatron-LM's router trace `router_trace_rankR.jsonl` (step, block, layer, rank, top_indices[T][K]), or router
    replay: a `.pt` list of [T, K] per MoE layer.

    Tokens of all ranks follow each other in order of rank. Layers of multi-token prediction are left out.
    """
    if path.suffix == ".pt":
        return _router_replay(path)
    found: dict[int, dict[int, list[tuple[int, Array]]]] = defaultdict(lambda: defaultdict(list))
    predicted = 0
    files = files_under(path, ["router_trace_rank*.jsonl"], what="the folder of router_trace_rank*.jsonl")
    for file in files:
        for where, record in json_lines(file):
            if record.get("block", "decoder") != "decoder":
                predicted += 1
                continue
            ids = table_of(field_of(record, "top_indices", where), where, axes=2)
            step, layer = (whole(field_of(record, key, where), where) for key in ("step", "layer"))
            found[step][layer].append((whole(record.get("rank", 0), where), ids))
    if not found:
        refuse(path, "holds records of prediction layers alone", "record the decoder's layers, too")
    joined: dict[int, dict[int, Layer]] = {
        step: {
            layer: (np.concatenate([ids for _, ids in sorted(parts, key=lambda part: part[0])]), None)
            for layer, parts in layers.items()
        }
        for step, layers in found.items()
    }
    notes = note_of_unread(path, files, why="only router_trace_rank*.jsonl is")
    if predicted:
        notes = (f"{predicted} records of multi-token prediction layers were left out", *notes)
    return of_steps(joined, str(path), notes=notes)


def _router_replay(path: Path) -> Source:
    value = load_tensors(path)
    if not isinstance(value, list) or not value:
        refuse(path, "is no list of tensors, one a layer", "save the indices that router replay recorded")
    layers: dict[int, Layer] = {
        layer: (table_of(ids, f"{path}, layer {layer}", axes=2), None) for layer, ids in enumerate(value)
    }
    return of_steps({0: layers}, str(path), notes=("layers are numbered from 0 in the order of the file",))


def read_olmoe(path: Path) -> Source:
    """OLMoE's analysis: `*_results.jsonl` (exp_ids[T][K][L], a line a sequence), or `expert_counts/DOMAIN.pkl`
    (counters of layers 0, 7 and 15).

    A folder with results of tokens gives those, one with counters alone their sum over the domains.
    """
    if path.suffix == ".pkl":
        return _olmoe_counters([path])
    counters = sorted([*path.glob("*.pkl"), *path.glob("expert_counts/*.pkl")]) if path.is_dir() else []
    if counters and not any(path.glob("*_results.jsonl")):
        return _olmoe_counters(counters)
    files = files_under(path, ["*_results.jsonl"], what="the file *_results.jsonl")
    parts = []
    for file in files:
        for where, record in json_lines(file):
            parts.append(table_of(field_of(record, "exp_ids", where), where, axes=3))
    if len({part.shape for part in parts}) > 1:
        refuse(path, "has lines of different numbers of tokens, experts or layers", "keep whole batches only")
    ids_LTK = np.concatenate(parts).transpose(2, 0, 1)
    notes = note_of_unread(path, files, why="only *_results.jsonl is")
    if counters:
        notes = (*notes, f"{', '.join(file.name for file in counters)}: not read, tokens say more than counts")
    return Source(
        layers=tuple(range(len(ids_LTK))),
        steps=(Selections(step=0, expert_ids_LTK=ids_LTK),),
        sequence_length=len(parts[0]),
        notes=notes,
    )


_COUNTED_LAYERS = (0, 7, 15)  # of OLMoE's run_routing_analysis.py


def _olmoe_counters(files: list[Path]) -> Source:
    domains = [load_counters(file) for file in files]
    for file, counters in zip(files, domains, strict=True):
        if min(min(each) for each in counters) < 0:
            refuse(file, "counts of negative experts", "export the counts again")
        if len(counters) != len(domains[0]):
            refuse(file, f"counts {len(counters)} layers, {files[0].name} {len(domains[0])}", "import them apart")
    experts = 1 + max(max(each) for counters in domains for each in counters)
    counts_LE = np.zeros((len(domains[0]), experts))
    for counters in domains:
        for layer, each in enumerate(counters):
            counts_LE[layer, list(each)] += list(each.values())
    known = len(counts_LE) == len(_COUNTED_LAYERS)
    layers = _COUNTED_LAYERS if known else tuple(range(len(counts_LE)))
    notes = [f"only layers {', '.join(map(str, layers))} were counted"]
    if len(files) > 1:
        notes.append(f"counts of {len(files)} domains were added up")
    return Source(layers=layers, counts_LE=numbers_of(counts_LE, str(files[0]), axes=2), notes=tuple(notes))


def read_sglang(path: Path) -> Source:
    """SGLang's expert distribution recorder, `.pt`: modes stat (logical_count), per_pass and per_token.

    Ids and counts of the latter two are those of physical slots; the file's own map makes experts of them. Where a
    folder has files of several modes, tokens win over counts; counts of stat and per_pass are added up.
    """
    files = files_under(path, ["expert_distribution_recorder_*.pt", "*.pt"], what="the recorder's .pt files")
    loaded = [(file, load_tensors(file)) for file in files]
    for file, value in loaded:
        if not isinstance(value, dict) or not ({"logical_count", "records"} & value.keys()):
            refuse(file, "has neither logical_count nor records", "dump the expert distribution recorder again")
    passes = [
        _Pass(where=str(file), file=value, record=record) for file, value in loaded for record in _records(file, value)
    ]
    of_tokens = [each for each in passes if "topk_ids_of_layer" in each.record]
    statistics = [(file, value) for file, value in loaded if "logical_count" in value]
    if of_tokens:
        read = {each.where for each in of_tokens}
        silent = [file for file in files if str(file) not in read]
        note = f"{', '.join(file.name for file in silent)}: not read, tokens of other files say more than counts"
        return _sglang_tokens(of_tokens, notes=(note,) if silent else ())
    parts = [each.counts_LE() for each in passes]
    parts += [numbers_of(value["logical_count"], str(file), axes=3).sum(axis=0) for file, value in statistics]
    note = f"counts of {len(statistics)} files of mode stat and of {len(passes)} passes were added up"
    if not parts:
        refuse(path, "holds no passes", "record while the model works")
    return of_counts(parts, str(path), notes=(note,) if statistics and passes else ())


def _records(file: Path, value: Mapping[str, Any]) -> list[dict[str, Any]]:
    records = value.get("records", [])
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        refuse(file, "has records that are none", "dump the expert distribution recorder again")
    return records


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """One forward pass of one rank: the record, and the file's content that it stands in."""

    where: str
    file: Mapping[str, Any]
    record: dict[str, Any]

    def map_LP(self) -> Array:
        return table_of(field_of(dict(self.file), "last_physical_to_logical_map", self.where), self.where, axes=2)

    def counts_LE(self) -> NDArray[np.float64]:
        counts_LP = table_of(field_of(self.record, "global_physical_count", self.where), self.where, axes=2)
        return counts_of_logical(counts_LP, self.map_LP(), self.where)

    def ids_LTK(self) -> Array:
        return table_of(self.record["topk_ids_of_layer"], self.where, axes=3)

    def identity(self) -> object:
        """Equal for what ranks that share their tokens (tensor parallelism) record of one pass."""
        return self.record.get("forward_pass_id"), str(self.record.get("input_ids")), self.ids_LTK().tobytes()


def _sglang_tokens(passes: Sequence[_Pass], *, notes: tuple[str, ...]) -> Source:
    """Tokens of all passes, in their order. Padding, silent layers and what other ranks recorded too stay out."""
    seen = Counter(each.identity() for each in passes)
    distinct = list({each.identity(): each for each in reversed(passes)}.values())[::-1]
    shapes = {each.ids_LTK().shape[::2] for each in distinct}
    if len(shapes) > 1:
        raise UserError(f"{passes[0].where}: passes of different layers or top-K; record them apart")
    num_layers = shapes.pop()[0]
    routed = sorted({int(layer) for each in distinct for layer in np.flatnonzero((each.ids_LTK() >= 0).any((1, 2)))})
    parts, dropped, experts = [], 0, 0
    for each in distinct:
        ids_LTK = each.ids_LTK()[routed]
        whole_T = (ids_LTK >= 0).all(axis=(0, 2))  # padding has ids of -1
        dropped += int((~whole_T).sum())
        if whole_T.any() and routed:
            map_LP = each.map_LP()
            if len(map_LP) != num_layers:
                raise UserError(f"{each.where}: selections of {num_layers} layers, but a map of {len(map_LP)}")
            experts = max(experts, int(map_LP.max()) + 1)
            parts.append(logical_ids(ids_LTK[:, whole_T], map_LP[routed], each.where))
    if not parts:
        raise UserError(f"{passes[0].where}: only padding; record while the model works")
    notes = (*notes, "ids of physical slots were mapped to experts", *note_of_silent(routed, num_layers))
    if dropped:
        notes = (*notes, f"{dropped} padding tokens left out")
    if len(seen) < len(passes):
        notes = (*notes, f"{len(passes) - len(seen)} passes were recorded by several ranks alike: counted once")
    return Source(
        layers=tuple(routed),
        steps=(Selections(step=0, expert_ids_LTK=np.concatenate(parts, axis=1)),),
        num_experts=experts,
        notes=notes,
    )


def read_vllm(path: Path) -> Source:
    """vLLM: JSON lines of tokens (layer, token_idx, topk_ids, topk_weights), the `routed_experts` of requests
    ([T, L, K]; .npy, .npz, or JSON lines), or EPLB's state saved as `.pt` (expert_load_window [W, L, P],
    physical_to_logical_map).
    """
    if path.is_dir():
        tables = sorted(path.glob("*.npy")) + sorted(path.glob("*.npz"))
        states = [] if tables or any(path.glob("*.jsonl")) else sorted(path.glob("*.pt"))
        if len(states) == 1:
            return _eplb_state(states[0])
        return _routed_experts(path, tables) if tables else _token_records(path)
    if path.suffix in (".npy", ".npz"):
        return _routed_experts(path, [path])
    if path.suffix == ".pt":
        return _eplb_state(path)
    if path.suffix in (".txt", ".log"):
        _refuse_log(path)
    return _token_records(path)


_LOGGED = re.compile(r"EPLB step: .*balancedness=(\d*\.?\d+)")


def _refuse_log(path: Path) -> NoReturn:
    """The one line about a log of EPLB, with the balancedness that it states."""
    steps = [float(value) for value in _LOGGED.findall(path.read_text(encoding="utf-8", errors="replace"))]
    remedy = "use the JSON lines or EPLB state"
    if steps:
        mean = sum(steps) / len(steps)
        remedy = f"its mean over {len(steps)} steps is routing: {{kind: balancedness, value: {mean:.3f}}}; or {remedy}"
    refuse(path, "a log of balancedness says neither which experts nor how often", remedy)


def _eplb_state(path: Path) -> Source:
    value = load_tensors(path)
    if not isinstance(value, dict):
        refuse(path, "is no dictionary of tensors", "save expert_load_window and physical_to_logical_map")
    load_WLP = table_of(field_of(value, "expert_load_window", str(path)), str(path), axes=3)
    map_LP = table_of(field_of(value, "physical_to_logical_map", str(path)), str(path), axes=2)
    return of_counts([counts_of_logical(load_WLP.sum(axis=0), map_LP, str(path))], str(path))


def _routed_experts(path: Path, files: Sequence[Path]) -> Source:
    """Arrays [T, L, K], one a request."""
    requests = [(f"{file}, {name}", array) for file in files for name, array in sorted(load_arrays(file).items())]
    return _of_requests([table_of(array, where, axes=3) for where, array in requests], path)


def _of_requests(requests_TLK: Sequence[Array], path: Path) -> Source:
    if len({array.shape[1:] for array in requests_TLK}) > 1:
        refuse(path, "has requests of different numbers of layers or experts", "keep those of one model")
    ids_LTK = np.concatenate(requests_TLK).transpose(1, 0, 2)
    note = (f"{len(requests_TLK)} requests follow each other",) if len(requests_TLK) > 1 else ()
    return Source(layers=tuple(range(len(ids_LTK))), steps=(Selections(step=0, expert_ids_LTK=ids_LTK),), notes=note)


def _token_records(path: Path) -> Source:
    found: dict[int, dict[tuple[int, int], tuple[Any, Any]]] = defaultdict(dict)  # by layer, then by pass and token
    times: Counter[tuple[int, int]] = Counter()
    requests: list[Array] = []
    files = files_under(path, ["*.jsonl"], what="the JSON lines")
    for file in files:
        for where, record in json_lines(file):
            if "routed_experts" in record:
                requests.append(table_of(record["routed_experts"], where, axes=3))
                continue
            layer, token = (whole(field_of(record, key, where), where) for key in ("layer", "token_idx"))
            ids = table_of(field_of(record, "topk_ids", where), where, axes=1)
            found[layer][times[layer, token], token] = ids, record.get("topk_weights")
            times[layer, token] += 1
    if requests and found:
        refuse(path, "has lines of requests and lines of tokens", "import them apart")
    if requests:
        return _of_requests(requests, path)
    notes = note_of_unread(path, files, why="only *.jsonl is")
    if (passes := max(times.values())) > 1:
        notes = (*notes, f"token_idx begins again: {passes} passes follow each other")
    return of_steps({0: _layers_of_records(found, path)}, str(path), notes=notes)


def _layers_of_records(found: Mapping[int, Mapping[tuple[int, int], tuple[Any, Any]]], path: Path) -> dict[int, Layer]:
    tokens = set.intersection(*(set(of_layer) for of_layer in found.values()))
    widths = {len(ids) for of_layer in found.values() for ids, _ in of_layer.values()}
    if not tokens or len(widths) > 1:
        refuse(path, "layers without a common token, or tokens of different top-K", "record all layers of a pass")
    layers: dict[int, Layer] = {}
    for layer, of_layer in found.items():
        rows = [of_layer[token] for token in sorted(tokens)]
        weights = None if any(weight is None for _, weight in rows) else [weight for _, weight in rows]
        of_weights = None if weights is None else numbers_of(weights, str(path), axes=2)
        layers[layer] = np.stack([ids for ids, _ in rows]), of_weights
    return layers


def read_trtllm(path: Path) -> Source:
    """TensorRT-LLM's expert statistic: `meta_info.json` and `rankR_raw.safetensors` (ids of tokens) or
    `rankR.safetensors` (counts), with tensors named ITERATION_LAYER. `path` is that folder, or the one around it.
    """
    if path.suffix in (".yaml", ".yml"):
        refuse(
            path,
            "an assignment of experts to slots is a placement, not routing",
            f"placement: {{kind: explicit, file: {path.name}}} takes it; routing is in the folder of statistics",
        )
    around, notes = path, tuple[str, ...]()
    inside = sorted(path.glob("*/meta_info.json"))
    if len(inside) == 1 and not (path / "meta_info.json").is_file():
        path = inside[0].parent
        notes = note_of_unread(around, [], why=f"only {path.name} is")
    meta_file = path / "meta_info.json"
    if not meta_file.is_file():
        refuse(path, "has no meta_info.json", "name the folder that the expert statistic was written to")
    try:
        meta = parse_json(meta_file.read_bytes())
    except ValueError as error:
        refuse(meta_file, f"is no JSON ({error})", "write the statistic again")
    if not isinstance(meta, dict):
        refuse(meta_file, "is no JSON object", "write the statistic again")
    experts = whole(field_of(meta, "num_experts", str(meta_file)), str(meta_file))
    raw = sorted(path.glob("rank*_raw.safetensors"))
    layers, ordered = _statistic(raw or files_under(path, ["rank*.safetensors"], what="the folder of statistics"), raw)
    if not raw:
        counts_LE = np.stack([np.sum(parts, axis=0) for parts in ordered]).astype(np.float64)
        top_k = whole(meta.get("num_experts_per_token", 1), str(meta_file))
        return Source(layers=layers, counts_LE=counts_LE, num_experts=experts, top_k=top_k, notes=notes)
    sizes = {sum(len(part) for part in parts) for parts in ordered}
    if len(sizes) > 1 or len({part.shape[1] for parts in ordered for part in parts}) > 1:
        refuse(path, "has layers of different numbers of tokens or top-K", "write the statistic again")
    ids_LTK = np.stack([np.concatenate(parts) for parts in ordered])
    steps = (Selections(step=0, expert_ids_LTK=ids_LTK),)
    return Source(layers=layers, steps=steps, num_experts=experts, notes=notes)


def _statistic(files: Sequence[Path], raw: Sequence[Path]) -> tuple[tuple[int, ...], list[list[Array]]]:
    """Layers, and of each its tensors in order of iteration, then of rank: [T, K] of `raw` files, else counts [E]."""
    found: dict[int, list[tuple[int, Array]]] = defaultdict(list)
    for file in files:
        for name, values in load_safetensors(file).items():
            numbers = NUMBER.findall(name)
            if len(numbers) != 2:
                refuse(file, f"has a tensor {name!r}, no ITERATION_LAYER", "write the statistic again")
            found[int(numbers[1])].append((int(numbers[0]), table_of(values, f"{file}, {name}", axes=2 if raw else 1)))
    layers = tuple(sorted(found))
    return layers, [[values for _, values in sorted(found[layer], key=lambda each: each[0])] for layer in layers]
