"""Count the parameters of models of `config.json` files as transformers builds them, to hold `moesim model` against.

    python tools/config_parameters.py tests/scenario/configs/*.json [--write tests/scenario/configs/counts.yaml]

Builds each language model on torch's meta device, without memory. Needs torch and transformers, which moesim does not.
Activated: all parameters but those of experts that a token does not select. A file of a model_type that transformers
does not have is passed over by name.
"""

import argparse
import json
from pathlib import Path
from typing import Any

LIKE = {"kimi_k2": "deepseek_v3", "qwen3_vl_moe_text": "qwen3_moe"}  # the same layout under another name
NESTED = "text_config"


def count(path: Path) -> tuple[int, int] | None:
    """Total and activated parameters of the model of the file at `path`, in elements."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    fields: dict[str, Any] = json.loads(path.read_text())
    fields = fields.get(NESTED) or fields
    family = LIKE.get(fields["model_type"], fields["model_type"])
    if family not in CONFIG_MAPPING:
        return None
    kept = {key: value for key, value in fields.items() if key not in ("model_type", "quantization_config", "auto_map")}
    config = CONFIG_MAPPING[family](**kept)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    held = {name: value.numel() for name, value in model.named_parameters()}
    routed = sum(number for name, number in held.items() if ".experts." in name)
    total = sum(held.values())
    return total, total - routed + round(routed * _share(fields))


def _share(fields: dict[str, Any]) -> float:
    """The share of the experts that a token selects."""
    merged = fields | fields.get("ffn_config", {})
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    experts = next(merged[name] for name in names if merged.get(name))
    selected = next(
        merged[name] for name in ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k") if name in merged
    )
    return (selected[0] if isinstance(selected, list) else selected) / experts


def main() -> None:
    """Print total and activated parameters, and write them to a file where one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    lines = []
    for path in args.configs:
        found = count(path)
        if found is None:
            print(f"{path.stem}: not a model_type of transformers")
            continue
        lines.append(f"{path.stem}: {{total: {found[0]}, activated: {found[1]}}}")
        print(lines[-1])
    if args.write:
        head = "# Parameters as transformers builds the models: written by tools/config_parameters.py\n"
        args.write.write_text(head + "\n".join(sorted(lines)) + "\n")


if __name__ == "__main__":
    main()
