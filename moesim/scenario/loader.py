"""From a scenario file to a Scenario: parse, override, rewrite the short forms, validate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.scenario.catalogue import model_preset
from moesim.scenario.document import parse_yaml
from moesim.scenario.schema import Scenario


def load_scenario(path: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """The scenario in the file `path` with `a.b=c` overrides applied. Raises UserError."""
    text = Path(path).read_text(encoding="utf-8")
    data = parse_yaml(text, source=str(path)).plain
    if not isinstance(data, dict):
        raise UserError(f"{path}: a scenario is a mapping")
    for override in overrides:
        target, _, value = override.partition("=")
        *parents, last = target.split(".")
        section = data
        for key in parents:
            section = section.setdefault(key, {})
        section[last] = parse_yaml(value, source=f"--set {override}", located=False).plain
    return scenario_from_mapping(data)


def scenario_from_mapping(data: Mapping[str, Any]) -> Scenario:
    """A scenario from nested dicts in any form that a file may have. Raises UserError."""
    data = dict(data)
    cluster = dict(data["cluster"])
    flat = {k: cluster.pop(k) for k in ("name", "gpu", "nodes", "gpus_per_node", "price_per_gpu_hour") if k in cluster}
    if flat:
        cluster["pools"] = [flat]
    model = dict(data["model"])
    if "preset" in model:
        model = model_preset(model["preset"]) | model
    return Scenario.model_validate(data | {"cluster": cluster, "model": model})
