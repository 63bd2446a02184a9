"""Files that say which expert sits in which slot of every layer: those of SGLang and TensorRT-LLM.

SGLang's expert location (`--init-expert-location`, python/sglang/srt/eplb/expert_location.py) is JSON with
`physical_to_logical_map`: one list per layer of the model, dense ones included, of the expert in every slot.
TensorRT-LLM's `moe_load_balancer.yaml` (examples/ep_load_balancer) has `initial_global_assignments`, such a list by
the number of each layer with experts, and `num_slots`. In both slots are numbered rank by rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from moesim.errors import UserError
from moesim.strict_json import json_text, parse_json

SGLANG, TENSORRT_LLM = "physical_to_logical_map", "initial_global_assignments"

try:
    from yaml import CSafeLoader as _Loader
except ImportError:  # a PyYAML without libyaml reads the same, slowly
    from yaml import SafeLoader as _Loader  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class PlacementFile:
    """The expert in every slot, by layer. `numbers`: of the layers, None where the lists stand for all in order."""

    path: Path
    slots: tuple[tuple[int, ...], ...]
    numbers: tuple[int, ...] | None

    @property
    def num_slots(self) -> int:
        """Slots of all ranks; the same in every layer."""
        return len(self.slots[0])

    def of_layers(self, moe_layers: Sequence[int], *, num_layers: int) -> tuple[tuple[int, ...], ...] | None:
        """The slots of the model's layers with experts, of `num_layers` in all; None where the file is no map of them.

        Lists without numbers are those of all layers, or of the ones with experts. Layers beyond the model's own (of
        multi-token prediction) take the last list where the file stops before them.
        """
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
    if SGLANG in data:
        lists = data[SGLANG]
        if not isinstance(lists, list) or not lists:
            raise UserError(f"{path.name}: {SGLANG} must be a list of lists, one per layer")
        return _checked(path, SGLANG, lists, numbers=None)
    if isinstance(data.get(TENSORRT_LLM), dict) and data[TENSORRT_LLM]:
        layers = data[TENSORRT_LLM]
        if not all(isinstance(number, int) and number >= 0 for number in layers):
            raise UserError(f"{path.name}: {TENSORRT_LLM} must have numbers of layers as keys")
        numbers = tuple(sorted(layers))
        found = _checked(path, TENSORRT_LLM, [layers[number] for number in numbers], numbers=numbers)
        if data.get("num_slots", found.num_slots) != found.num_slots:
            raise UserError(f"{path.name}: num_slots = {data['num_slots']!r}, but the lists hold {found.num_slots}")
        return found
    raise UserError(f"{path.name}: holds no placement; it needs {SGLANG} (SGLang) or {TENSORRT_LLM} (TensorRT-LLM)")


def _parsed(path: Path) -> Mapping[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        data = parse_json(text) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise UserError(f"{path.name}: cannot read the placement: {error.strerror}") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise UserError(f"{path.name}: not valid {kind}: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path.name}: expected a mapping with {SGLANG} or {TENSORRT_LLM}")
    return data


def _checked(path: Path, key: str, lists: Sequence[Any], *, numbers: tuple[int, ...] | None) -> PlacementFile:
    for index, slots in enumerate(lists):
        layer = index if numbers is None else numbers[index]
        if not isinstance(slots, list) or not slots or not all(type(expert) is int for expert in slots):
            raise UserError(f"{path.name}: {key}: layer {layer} must be a list of whole numbers")
        if len(slots) != len(lists[0]):
            raise UserError(f"{path.name}: {key}: layer {layer} has {len(slots)} slots, the first {len(lists[0])}")
    return PlacementFile(path=path, slots=tuple(map(tuple, lists)), numbers=numbers)


def sglang_text(slots: Sequence[Sequence[int]], *, moe_layers: Sequence[int], num_layers: int) -> str:
    """SGLang's file. A dense layer, of which it wants a list as well, gets the first one's experts in order."""
    num_experts = 1 + max(slots[0])
    plain = [slot % num_experts for slot in range(len(slots[0]))]
    by_number = dict(zip(moe_layers, slots, strict=True))
    lists = [list(by_number.get(layer, plain)) for layer in range(max(num_layers, max(moe_layers) + 1))]
    return json_text({SGLANG: lists}) + "\n"


def tensorrt_llm_text(slots: Sequence[Sequence[int]], *, moe_layers: Sequence[int]) -> str:
    """TensorRT-LLM's file: offline placement, nothing moved while it serves."""
    lines = [f"{TENSORRT_LLM}:"]
    lines += [f"  {layer}: {list(row)}" for layer, row in zip(moe_layers, slots, strict=True)]
    return "\n".join([*lines, f"num_slots: {len(slots[0])}", "layer_updates_per_iter: 0", ""])
