"""What `moesim model` prints: the counts of one model on one screen, and the catalogue."""

from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Group, RenderableType
from rich.text import Text

from moesim.report import facts
from moesim.report.facts import Fact
from moesim.report.screen import fact_table, indented, number_table, section, show, warnings
from moesim.units import format_bytes


def print_model(name: str, counts: Mapping[str, Any], *, file: TextIO | None = None, width: int | None = None) -> None:
    """Print parameters, FLOPs and memory of a model."""
    show(lambda _: _model_screen(name, counts), file=file, width=width)


def print_catalogue(
    sizes: Mapping[str, Mapping[str, Any]], *, file: TextIO | None = None, width: int | None = None
) -> None:
    """Print one line per model of the catalogue."""
    head = ("model", "parameters", "activated", "layers", "experts", "attention")
    rows = [
        (
            name,
            f"{size['total'] / 1e9:.2f} B",
            f"{size['activated'] / 1e9:.2f} B",
            str(size["layers"]),
            f"{size['experts']}, top {size['top_k']}" if size["experts"] else "dense",
            str(size["attention"]),
        )
        for name, size in sizes.items()
    ]
    show(lambda _: [number_table(head, rows)], file=file, width=width)


def _model_screen(name: str, counts: Mapping[str, Any]) -> list[RenderableType]:
    held, length = counts["parameters"], counts["sequence_length"]
    training = counts["training_flops_per_token"]
    parts = [key for key in held if key not in ("total", "activated", "inactive_experts") and held[key]]
    share = facts.percent
    return [
        Text(name, style="bold"),
        indented(
            fact_table(
                [
                    Fact("parameters", _billions(held["total"]), f"{_billions(held['activated'])} activated per token"),
                    Fact(
                        "training", f"{training['causal'] / 1e9:.2f} GFLOP per token", "3 x forward, causal attention"
                    ),
                    Fact("", f"{training['causal'] * length / 1e12:.1f} TFLOP per sequence", f"of {length} tokens"),
                    Fact(
                        "",
                        f"{training['non_causal'] * length / 1e12:.1f} TFLOP per sequence",
                        "attention counted whole",
                    ),
                    *_routing(counts["routing"]),
                ],
                strong=True,
            )
        ),
        section(
            "parameters",
            number_table(
                ("", "millions", "share"),
                [
                    (
                        _words(key),
                        f"{held[key] / 1e6:,.1f}",
                        "outside" if key == "mtp" else share(held[key] / held["total"]),
                    )
                    for key in parts
                ],
            ),
        ),
        section(f"training FLOPs of one sequence of {length} tokens, in TFLOP", _flops(counts)),
        section("memory of all parameters, before any sharding", _states(counts)),
        *_keys(counts.get("config")),
        *warnings(counts["left_out"]),
    ]


def _routing(named: str | None) -> list[Fact]:
    """What a scenario without a routing section gets; nothing of a dense model."""
    if named is None:
        return []
    which = "no router is known to be its own; a lower bound of imbalance" if named == "uniform" else "a trained router"
    return [Fact("routing", named, f"where a scenario names none; {which}")]


def _keys(config: Mapping[str, Any] | None) -> list[RenderableType]:
    """What became of the keys of a config.json."""
    if config is None:
        return []
    lines = [Text(f"{name}: {', '.join(config[key])}") for name, key in (("read", "read"), ("no effect", "harmless"))]
    return [section(f"keys of the config.json, of model type {config['model_type']}", Group(*lines))]


def _billions(number: float) -> str:
    return f"{number / 1e9:.2f} B"


def _words(key: str) -> str:
    return "multi-token prediction" if key == "mtp" else key.replace("_", " ")


def _flops(counts: Mapping[str, Any]) -> RenderableType:
    causal, whole = (counts["training_flops_per_sequence"][name] for name in ("causal", "non_causal"))
    totals = sum(causal.values()), sum(whole.values())
    rows = [
        (
            _words(part),
            f"{causal[part] / 1e12:,.2f}",
            facts.percent(causal[part] / totals[0]),
            f"{whole[part] / 1e12:,.2f}",
            facts.percent(whole[part] / totals[1]),
        )
        for part in causal
    ]
    rows.append(("all", f"{totals[0] / 1e12:,.2f}", "", f"{totals[1] / 1e12:,.2f}", ""))
    return number_table(("", "causal", "share", "non-causal", "share"), rows)


def _states(counts: Mapping[str, Any]) -> RenderableType:
    recipes = counts["state_bytes"]
    kinds = list(next(iter(recipes.values())))
    rows = [
        (
            recipe,
            *(format_bytes(sizes[kind]) if sizes[kind] else "-" for kind in kinds),
            format_bytes(sum(sizes.values())),
        )
        for recipe, sizes in recipes.items()
    ]
    return number_table(("", *kinds, "all"), rows)
