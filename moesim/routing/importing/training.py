"""Readers of what training programs and analyses record: FLAME-MoE, Megatron-LM, OLMoE.

Legend: L layers, T tokens, K selections, E experts.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from moesim.routing.importing.assembly import Layer, note_of_unread, number_in, of_steps, whole
from moesim.routing.importing.source import (
    Array,
    Selections,
    Source,
    field_of,
    files_under,
    json_lines,
    numbers_of,
    refuse,
    table_of,
)
from moesim.routing.importing.tensors import load_counters, load_parquet, load_tensors


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
