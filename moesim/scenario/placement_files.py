"""Files that say which expert sits in which slot of every layer: those of SGLang, TensorRT-LLM and vLLM, slots rank by
rank.

SGLang's expert location (`--init-expert-location`, python/sglang/srt/eplb/expert_location.py) is JSON with
`physical_to_logical_map`: one list per layer of the model, dense ones included, of the expert in every slot.
TensorRT-LLM's `moe_load_balancer.yaml` (examples/ep_load_balancer) has `initial_global_assignments`, such a list by
the number of each layer with experts, and `num_slots`.
vLLM keeps three maps of the layers with experts (vllm/distributed/eplb/eplb_state.py): `physical_to_logical_map`,
`logical_to_physical_map` (the slots of every expert, filled up with -1) and `logical_replica_count`. No released vLLM
loads them from a file; the proposed `initial_expert_map_path` (vllm pull request 49572) reads the first map alone, or
one list for all layers, which are read here as well.
vLLM Ascend's `expert_map_path` is JSON with `layer_list`, of each layer with experts the `device_list` with the
`device_expert` of every rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from moesim.errors import UserError
from moesim.strict_json import json_text, parse_json

SGLANG, TENSORRT_LLM, ASCEND = "physical_to_logical_map", "initial_global_assignments", "layer_list"
VLLM_SLOTS, VLLM_COUNTS = "logical_to_physical_map", "logical_replica_count"

_KEYS = f"{SGLANG} (SGLang, vLLM), {TENSORRT_LLM} (TensorRT-LLM) or {ASCEND} (vLLM Ascend)"

try:
    from yaml import CSafeLoader as _Loader
except ImportError:  # a PyYAML without libyaml reads the same, slowly
    from yaml import SafeLoader as _Loader  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class PlacementFile:
    """The expert in every slot, by layer. `numbers`: of the layers, None where the lists stand for all in order.

    `alike`: there is one list, for every layer.
    """

    path: Path
    slots: tuple[tuple[int, ...], ...]
    numbers: tuple[int, ...] | None
    alike: bool = False

    @property
    def num_slots(self) -> int:
        """Slots of all ranks; the same in every layer."""
        return len(self.slots[0])

    def of_layers(self, moe_layers: Sequence[int], *, num_layers: int) -> tuple[tuple[int, ...], ...] | None:
        """The slots of the model's layers with experts, of `num_layers` in all; None where the file is no map of them.

        Lists without numbers are those of all layers, or of the ones with experts. Layers beyond the model's own (of
        multi-token prediction) take the last list where the file stops before them.
        """
        if self.alike:
            return self.slots * len(moe_layers)
        if self.numbers is not None:
            by_number = dict(zip(self.numbers, self.slots, strict=True))
            if not set(self.numbers) <= set(moe_layers):
                return None
        elif len(self.slots) in (num_layers, max(moe_layers) + 1):
            by_number = dict(enumerate(self.slots))
        else:
            own = [layer for layer in moe_layers if layer < num_layers]
            if len(self.slots) not in (len(own), len(moe_layers)):
                return None
            by_number = dict(zip(moe_layers, self.slots, strict=False))
        for layer in moe_layers:
            if layer not in by_number:
                if layer < num_layers:
                    return None
                by_number[layer] = by_number[max(by_number)]
        return tuple(by_number[layer] for layer in moe_layers)


def read_placement(path: Path) -> PlacementFile:
    """The maps of a file. Raises UserError, one line, for a file that holds none."""
    try:
        seen = path.stat()
    except OSError as error:
        raise UserError(f"{path.name}: cannot read the placement: {error.strerror}") from None
    return _read(path, (seen.st_mtime_ns, seen.st_size))


@lru_cache(maxsize=4)
def _read(path: Path, version: tuple[int, int]) -> PlacementFile:
    """`version`: of the file, so that a changed one is read again."""
    data = _parsed(path)
    if isinstance(data, list):
        alike = bool(data) and all(type(expert) is int for expert in data)
        return _checked(path, "the list", [data] if alike else data, numbers=None, alike=alike)
    if SGLANG in data:
        lists = data[SGLANG]
        if not isinstance(lists, list) or not lists:
            raise UserError(f"{path.name}: {SGLANG} must be a list of lists, one per layer")
        found = _checked(path, SGLANG, lists, numbers=None)
        _check_inverse(path, data, found)
        return found
    if ASCEND in data:
        return _checked(path, ASCEND, _device_lists(path, data[ASCEND]), numbers=None)
    if isinstance(data.get(TENSORRT_LLM), dict) and data[TENSORRT_LLM]:
        layers = data[TENSORRT_LLM]
        if not all(isinstance(number, int) and number >= 0 for number in layers):
            raise UserError(f"{path.name}: {TENSORRT_LLM} must have numbers of layers as keys")
        numbers = tuple(sorted(layers))
        found = _checked(path, TENSORRT_LLM, [layers[number] for number in numbers], numbers=numbers)
        if data.get("num_slots", found.num_slots) != found.num_slots:
            raise UserError(f"{path.name}: num_slots = {data['num_slots']!r}, but the lists hold {found.num_slots}")
        return found
    raise UserError(f"{path.name}: holds no placement; it needs {_KEYS}")


def _parsed(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        data = parse_json(text) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise UserError(f"{path.name}: cannot read the placement: {error.strerror}") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise UserError(f"{path.name}: not valid {kind}: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(data, dict) and not (isinstance(data, list) and data):
        raise UserError(f"{path.name}: expected a mapping with {_KEYS}, or a list per layer")
    return data


def _device_lists(path: Path, layers: Any) -> list[list[int]]:
    """The experts of all ranks in a row, of every layer of vLLM Ascend's map."""
    try:
        ranks = [[device["device_expert"] for device in layer["device_list"]] for layer in layers]
        found = [[expert for held in lists for expert in held] for lists in ranks]
    except (TypeError, KeyError) as error:
        raise UserError(f"{path.name}: {ASCEND}: every layer needs a device_list with device_expert of each rank "
                        f"({type(error).__name__}: {error})") from None  # fmt: skip
    for layer, lists in enumerate(ranks):
        if len(set(map(len, lists))) > 1:
            raise UserError(f"{path.name}: {ASCEND}: ranks of layer {layer} hold different numbers of experts")
    return found


def _check_inverse(path: Path, data: Mapping[Any, Any], found: PlacementFile) -> None:
    """Raises UserError where the maps of experts, which vLLM has beside those of slots, say something else."""
    for layer, slots in enumerate(found.slots):
        expected = slots_of_experts(slots)
        for key, wanted in (
            (VLLM_SLOTS, expected),
            (VLLM_COUNTS, [len(held) for held in expected]),
        ):
            if key not in data:
                continue
            try:
                given = data[key][layer]
                held = [sorted(slot for slot in row if slot >= 0) for row in given] if key == VLLM_SLOTS else given
            except (TypeError, IndexError):
                held = None
            if held != wanted:
                raise UserError(f"{path.name}: {key}: layer {layer} is not what {SGLANG} says; drop one of them")


def slots_of_experts(slots: Sequence[int]) -> list[list[int]]:
    """The slots of every expert, in order."""
    held: list[list[int]] = [[] for _ in range(1 + max(slots))]
    for slot, expert in enumerate(slots):
        held[expert].append(slot)
    return held


def _checked(
    path: Path, key: str, lists: Sequence[Any], *, numbers: tuple[int, ...] | None, alike: bool = False
) -> PlacementFile:
    for index, slots in enumerate(lists):
        layer = index if numbers is None else numbers[index]
        if not isinstance(slots, list) or not slots or not all(type(expert) is int for expert in slots):
            raise UserError(f"{path.name}: {key}: layer {layer} must be a list of whole numbers")
        if min(slots) < 0:
            raise UserError(f"{path.name}: {key}: layer {layer} has expert {min(slots)}; slots may not be empty")
        if len(slots) != len(lists[0]):
            raise UserError(f"{path.name}: {key}: layer {layer} has {len(slots)} slots, the first {len(lists[0])}")
    return PlacementFile(path=path, slots=tuple(map(tuple, lists)), numbers=numbers, alike=alike)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What files count: the numbers of the layers with experts, all layers, and the ranks that share the slots."""

    moe_layers: Sequence[int]
    num_layers: int
    num_ranks: int


SlotLists = Sequence[Sequence[int]]  # by layer with experts, the expert in every slot


def sglang_text(slots: SlotLists, layers: Layers) -> str:
    """SGLang's file. A dense layer, of which it wants a list as well, gets the first one's experts in order."""
    num_experts = 1 + max(slots[0])
    plain = [slot % num_experts for slot in range(len(slots[0]))]
    by_number = dict(zip(layers.moe_layers, slots, strict=True))
    numbers = range(max(layers.num_layers, max(layers.moe_layers) + 1))
    return json_text({SGLANG: [list(by_number.get(layer, plain)) for layer in numbers]}) + "\n"


def tensorrt_llm_text(slots: SlotLists, layers: Layers) -> str:
    """TensorRT-LLM's file: offline placement, nothing moved while it serves."""
    lines = [f"{TENSORRT_LLM}:"]
    lines += [f"  {layer}: {list(row)}" for layer, row in zip(layers.moe_layers, slots, strict=True)]
    return "\n".join([*lines, f"num_slots: {len(slots[0])}", "layer_updates_per_iter: 0", ""])


def vllm_text(slots: SlotLists, layers: Layers) -> str:
    """vLLM's three maps; an expert has room for one slot more than there are slots beyond one for each."""
    held = [slots_of_experts(row) for row in slots]
    room = 1 + len(slots[0]) - len(held[0])
    maps = {
        SGLANG: [list(row) for row in slots],
        VLLM_SLOTS: [[[*each, *[-1] * (room - len(each))] for each in layer] for layer in held],
        VLLM_COUNTS: [[len(each) for each in layer] for layer in held],
    }
    return json_text(maps) + "\n"


def vllm_ascend_text(slots: SlotLists, layers: Layers) -> str:
    """vLLM Ascend's expert map; layers with experts are numbered from 0."""
    per_rank = len(slots[0]) // layers.num_ranks
    listed = [
        {
            "layer_id": number,
            "device_count": layers.num_ranks,
            "device_list": [
                {"device_id": rank, "device_expert": list(row[rank * per_rank : (rank + 1) * per_rank])}
                for rank in range(layers.num_ranks)
            ],
        }
        for number, row in enumerate(slots)
    ]
    return json_text({"moe_layer_count": len(slots), ASCEND: listed}) + "\n"


# Whose file, by the word of the command line: (name, ending, text of slots)
WRITERS: Mapping[str, tuple[str, str, Callable[[SlotLists, Layers], str]]] = {
    "sglang": ("SGLang", ".json", sglang_text),
    "tensorrt-llm": ("TensorRT-LLM", ".yaml", tensorrt_llm_text),
    "vllm": ("vLLM", ".json", vllm_text),
    "vllm-ascend": ("vLLM Ascend", ".json", vllm_ascend_text),
}
