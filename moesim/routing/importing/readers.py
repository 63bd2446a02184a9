"""A reader for every form in which people have routing: each turns a file or folder into a `Source`.

Legend: L layers, T tokens, K selections, E experts, P physical slots.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.routing.importing.source import (
    Array,
    Selections,
    Source,
    counts_of_logical,
    field_of,
    files_under,
    json_lines,
    logical_ids,
    numbers_of,
    refuse,
    table_of,
)
from moesim.routing.importing.tensors import load_counters, load_parquet, load_safetensors, load_tensors
from moesim.strict_json import parse_json

Layer = tuple[Array, Array | None]  # ids [T, K], and gates where the source has them
NUMBER = re.compile(r"\d+")


def read_flame(path: Path) -> Source:
    """FLAME-MoE: `actives/iter_STEP/layer_LL.parquet` (scores, indices; a row a token), or its captures
    `actives/STEP/LAYER/RANK-BATCH.pt`.

    The steps are checkpoints of one training run.
    """
    folders = [path] if path.name == "actives" else sorted(path.rglob("actives"))
    if len(folders) != 1:
        refuse(path, f"holds {len(folders)} folders named actives", "name the folder of one run")
    found: dict[int, dict[int, Layer]] = defaultdict(dict)
    for file in sorted(folders[0].glob("iter_*/layer_*.parquet")):
        columns = load_parquet(file)
        scores, ids = field_of(columns, "scores", str(file)), field_of(columns, "indices", str(file))
        found[_number(file.parent)][_number(file)] = table_of(ids, str(file), axes=2), scores
    for folder in sorted(folders[0].glob("*/*/")):
        captures = [(file, load_tensors(file)) for file in sorted(folder.glob("*.pt"))]
        if captures:
            found[_number(folder.parent)][_number(folder)] = _joined_captures(captures)
    if not found:
        refuse(folders[0], "holds no iter_*/layer_*.parquet and no STEP/LAYER/*.pt", "name the folder of one run")
    return _of_steps(found, str(folders[0]))


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
    for file in files_under(path, ["router_trace_rank*.jsonl"], what="the folder of router_trace_rank*.jsonl"):
        for where, record in json_lines(file):
            if record.get("block", "decoder") != "decoder":
                predicted += 1
                continue
            ids = table_of(field_of(record, "top_indices", where), where, axes=2)
            step, layer = (_whole(field_of(record, key, where), where) for key in ("step", "layer"))
            found[step][layer].append((_whole(record.get("rank", 0), where), ids))
    if not found:
        refuse(path, "holds records of prediction layers alone", "record the decoder's layers, too")
    joined: dict[int, dict[int, Layer]] = {
        step: {
            layer: (np.concatenate([ids for _, ids in sorted(parts, key=lambda part: part[0])]), None)
            for layer, parts in layers.items()
        }
        for step, layers in found.items()
    }
    note = (f"{predicted} records of multi-token prediction layers were left out",) if predicted else ()
    return _of_steps(joined, str(path), notes=note)


def _router_replay(path: Path) -> Source:
    value = load_tensors(path)
    if not isinstance(value, list) or not value:
        refuse(path, "is no list of tensors, one a layer", "save the indices that router replay recorded")
    layers: dict[int, Layer] = {
        layer: (table_of(ids, f"{path}, layer {layer}", axes=2), None) for layer, ids in enumerate(value)
    }
    return _of_steps({0: layers}, str(path), notes=("layers are numbered from 0 in the order of the file",))


def read_sglang(path: Path) -> Source:
    """SGLang's expert distribution recorder, `.pt`: modes stat (logical_count), per_pass and per_token.

    Ids and counts of the latter two are those of physical slots; the file's own map makes experts of them.
    """
    files = files_under(path, ["expert_distribution_recorder_*.pt", "*.pt"], what="the recorder's .pt files")
    loaded = [(file, load_tensors(file)) for file in files]
    for file, value in loaded:
        if not isinstance(value, dict) or not ({"logical_count", "records"} & value.keys()):
            refuse(file, "has neither logical_count nor records", "dump the expert distribution recorder again")
    passes = [(str(file), value, record) for file, value in loaded for record in value.get("records", [])]
    of_tokens = [entry for entry in passes if "topk_ids_of_layer" in entry[2]]
    if of_tokens:
        return _sglang_tokens(of_tokens)
    parts = [
        counts_of_logical(
            table_of(field_of(record, "global_physical_count", where), where, axes=2),
            table_of(field_of(value, "last_physical_to_logical_map", where), where, axes=2),
            where,
        )
        for where, value, record in passes
    ]
    parts += [
        numbers_of(value["logical_count"], str(file), axes=3).sum(axis=0)
        for file, value in loaded
        if "logical_count" in value
    ]
    return _of_counts(parts, str(path))


def _sglang_tokens(entries: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> Source:
    parts, dropped = [], 0
    for where, value, record in entries:
        ids_LTK = table_of(record["topk_ids_of_layer"], where, axes=3)
        whole_T = (ids_LTK >= 0).all(axis=(0, 2))  # padding has ids of -1
        dropped += int((~whole_T).sum())
        map_LP = table_of(field_of(value, "last_physical_to_logical_map", where), where, axes=2)
        if whole_T.any():
            parts.append((logical_ids(ids_LTK[:, whole_T], map_LP, where), int(map_LP.max()) + 1))
    if not parts or len({ids.shape[::2] for ids, _ in parts}) > 1:
        raise UserError(f"{entries[0][0]}: passes of different layers or top-K, or only padding; record them apart")
    ids_LTK = np.concatenate([ids for ids, _ in parts], axis=1)
    notes = ["ids of physical slots were mapped to experts"] + ([f"{dropped} padding tokens left out"] * bool(dropped))
    return Source(
        layers=tuple(range(len(ids_LTK))),
        steps=(Selections(step=0, expert_ids_LTK=ids_LTK),),
        num_experts=max(experts for _, experts in parts),
        notes=tuple(notes),
    )


def read_vllm(path: Path) -> Source:
    """vLLM: JSON lines of tokens (layer, token_idx, topk_ids, topk_weights), or EPLB's state saved as `.pt`
    (expert_load_window [W, L, P], physical_to_logical_map).
    """
    if path.suffix == ".pt":
        value = load_tensors(path)
        if not isinstance(value, dict):
            refuse(path, "is no dictionary of tensors", "save expert_load_window and physical_to_logical_map")
        load_WLP = table_of(field_of(value, "expert_load_window", str(path)), str(path), axes=3)
        map_LP = table_of(field_of(value, "physical_to_logical_map", str(path)), str(path), axes=2)
        return _of_counts([counts_of_logical(load_WLP.sum(axis=0), map_LP, str(path))], str(path))
    if path.suffix in (".txt", ".log"):
        refuse(
            path, "a log of balancedness says neither which experts nor how often", "use the JSON lines or EPLB state"
        )
    return _token_records(path)


def _token_records(path: Path) -> Source:
    found: dict[int, dict[int, tuple[Any, Any]]] = defaultdict(dict)
    for file in files_under(path, ["*.jsonl"], what="the JSON lines"):
        for where, record in json_lines(file):
            layer, token = (_whole(field_of(record, key, where), where) for key in ("layer", "token_idx"))
            ids = table_of(field_of(record, "topk_ids", where), where, axes=1)
            found[layer][token] = ids, record.get("topk_weights")
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
    return _of_steps({0: layers}, str(path))


def read_trtllm(path: Path) -> Source:
    """TensorRT-LLM's expert statistic: `meta_info.json` and `rankR_raw.safetensors` (ids of tokens) or
    `rankR.safetensors` (counts), with tensors named ITERATION_LAYER.
    """
    if path.suffix in (".yaml", ".yml"):
        refuse(path, "an assignment of experts to slots is a placement, not routing", "name the folder of statistics")
    meta_file = path / "meta_info.json"
    if not meta_file.is_file():
        refuse(path, "has no meta_info.json", "name the folder that the expert statistic was written to")
    meta = parse_json(meta_file.read_bytes())
    experts = _whole(field_of(meta, "num_experts", str(meta_file)), str(meta_file))
    raw = sorted(path.glob("rank*_raw.safetensors"))
    files = raw or files_under(path, ["rank*.safetensors"], what="the folder of statistics")
    found: dict[int, list[tuple[int, Array]]] = defaultdict(list)
    for file in files:
        for name, values in load_safetensors(file).items():
            numbers = NUMBER.findall(name)
            if len(numbers) != 2:
                refuse(file, f"has a tensor {name!r}, no ITERATION_LAYER", "write the statistic again")
            found[int(numbers[1])].append((int(numbers[0]), table_of(values, f"{file}, {name}", axes=2 if raw else 1)))
    layers = tuple(sorted(found))
    ordered = [[values for _, values in sorted(found[layer], key=lambda each: each[0])] for layer in layers]
    if not raw:
        counts_LE = np.stack([np.sum(parts, axis=0) for parts in ordered]).astype(np.float64)
        top_k = _whole(meta.get("num_experts_per_token", 1), str(meta_file))
        return Source(layers=layers, counts_LE=counts_LE, num_experts=experts, top_k=top_k)
    ids_LTK = np.stack([np.concatenate(parts) for parts in ordered])
    return Source(layers=layers, steps=(Selections(step=0, expert_ids_LTK=ids_LTK),), num_experts=experts)


def read_olmoe(path: Path) -> Source:
    """OLMoE's analysis: `*_results.jsonl` (exp_ids[T][K][L], a line a sequence), or `expert_counts/DOMAIN.pkl`
    (counters of layers 0, 7 and 15).
    """
    if path.suffix == ".pkl":
        return _olmoe_counters(path)
    parts = []
    for file in files_under(path, ["*_results.jsonl"], what="the file *_results.jsonl"):
        for where, record in json_lines(file):
            parts.append(table_of(field_of(record, "exp_ids", where), where, axes=3))
    if len({part.shape for part in parts}) > 1:
        refuse(path, "has lines of different numbers of tokens, experts or layers", "keep whole batches only")
    ids_LTK = np.concatenate(parts).transpose(2, 0, 1)
    return Source(
        layers=tuple(range(len(ids_LTK))),
        steps=(Selections(step=0, expert_ids_LTK=ids_LTK),),
        sequence_length=len(parts[0]),
    )


_COUNTED_LAYERS = (0, 7, 15)  # of OLMoE's run_routing_analysis.py


def _olmoe_counters(path: Path) -> Source:
    counters = load_counters(path)
    experts = 1 + max(max(each) for each in counters)
    if min(min(each) for each in counters) < 0:
        refuse(path, "counts of negative experts", "export the counts again")
    counts_LE = np.zeros((len(counters), experts))
    for layer, each in enumerate(counters):
        counts_LE[layer, list(each)] = list(each.values())
    known = len(counters) == len(_COUNTED_LAYERS)
    layers = _COUNTED_LAYERS if known else tuple(range(len(counters)))
    note = f"only layers {', '.join(map(str, layers))} were counted"
    return Source(layers=layers, counts_LE=numbers_of(counts_LE, str(path), axes=2), notes=(note,))


def read_counts(path: Path) -> Source:
    """How often experts were chosen: CSV (a line a layer, a number an expert), or JSON: lists, or `{"weight": lists}`
    as EPLB takes.
    """
    if not path.is_file():
        refuse(path, "no such file", "name a CSV or JSON file of counts, a row per layer")
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".json":
        try:
            value = parse_json(text)
        except ValueError as error:
            refuse(path, f"is no JSON ({error})", "write a list of counts per layer")
        value = value.get("weight", value.get("counts")) if isinstance(value, dict) else value
    else:
        rows = [re.split(r"[,;\t]", line.strip().rstrip(",;")) for line in text.splitlines() if line.strip()]
        value = rows[1:] if rows and any(re.search("[A-Za-z_]", cell) for cell in rows[0]) else rows
    return _of_counts([numbers_of(value, str(path), axes=2)], str(path))


def _of_counts(parts: list[NDArray[np.float64]], where: str) -> Source:
    if len({part.shape for part in parts}) > 1:
        raise UserError(f"{where}: counts of different numbers of layers or experts; import them apart")
    counts_LE = np.sum(parts, axis=0)
    return Source(layers=tuple(range(len(counts_LE))), counts_LE=counts_LE, num_experts=counts_LE.shape[1])


def _of_steps(found: dict[int, dict[int, Layer]], where: str, *, notes: tuple[str, ...] = ()) -> Source:
    """Steps of layers of (ids, weights); every step must have the same layers, and these the same tokens."""
    layers = tuple(sorted(next(iter(found.values()))))
    steps = []
    for step, of_layer in sorted(found.items()):
        shapes = {ids.shape for ids, _ in of_layer.values()}
        if tuple(sorted(of_layer)) != layers or len(shapes) > 1:
            raise UserError(
                f"{where}: step {step} has layers {_listed(of_layer)} of {len(shapes)} sizes, where all steps must "
                f"have layers {_listed(layers)} of equal size; a recording may be incomplete"
            )
        weights = [w for layer in layers if (w := of_layer[layer][1]) is not None]
        steps.append(
            Selections(
                step=step,
                expert_ids_LTK=np.stack([of_layer[layer][0] for layer in layers]),
                weights_LTK=np.stack(weights).astype(np.float32) if len(weights) == len(layers) else None,
            )
        )
    return Source(layers=layers, steps=tuple(steps), notes=notes)


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(layers)))


def _number(path: Path) -> int:
    found = NUMBER.findall(path.stem)
    if not found:
        refuse(path, "has no number in its name", "keep the names that the recording gave")
    return int(found[-1])


def _whole(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"{where}: {value!r} is no whole number; the recording is damaged")
    return value
