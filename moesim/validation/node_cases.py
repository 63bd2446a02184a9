"""The cases of a whole node: three models that the standard cases do not have, in the layouts that N ranks allow."""

from collections.abc import Iterator
from typing import Any

from moesim.scenario import scenario_from_mapping
from moesim.validation.cases import SEQUENCE_LENGTH, Case, case_data, popularity_counts

EXPERTS: dict[str, dict[str, Any]] = {
    "wide64": {
        "layers": 4, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "experts": 64, "top_k": 4,
        "shared_experts": 1, "expert_intermediate": 1536, "vocab": 65536, "attention": {"kind": "gqa"},
    },
    "narrow96": {
        "layers": 10, "hidden": 1536, "heads": 24, "kv_heads": 24, "head_dim": 64, "experts": 96, "top_k": 6,
        "shared_experts": 0, "expert_intermediate": 1024, "vocab": 50304,
    },
    "square32": {
        "layers": 5, "hidden": 2880, "heads": 64, "kv_heads": 8, "head_dim": 64, "experts": 32, "top_k": 4,
        "shared_experts": 0, "expert_intermediate": 2880, "vocab": 98304, "attention": {"kind": "gqa"},
    },
}  # fmt: skip
DENSE: dict[str, dict[str, Any]] = {
    "dense4096": {
        "layers": 6, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "dense_intermediate": 14336,
        "vocab": 131072, "attention": {"kind": "gqa"},
    },
    "dense2560": {
        "layers": 12, "hidden": 2560, "heads": 32, "kv_heads": 32, "head_dim": 80, "dense_intermediate": 10240,
        "vocab": 50432,
    },
    "dense5120": {
        "layers": 4, "hidden": 5120, "heads": 40, "kv_heads": 8, "head_dim": 128, "dense_intermediate": 20480,
        "vocab": 98304, "attention": {"kind": "gqa"},
    },
}  # fmt: skip
SKEWS = ("uniform", "skewed", "hot")
SLOPE, HOT = 0.6, 3.0  # of popularity over the number of an expert; of the first rank's experts over the others'
TOKENS = (1024, 4096, 8192)


def node_cases(gpus: int) -> Iterator[Case]:
    """Expert parallelism over 2, 4 and 8 ranks, as far as `gpus` go, the largest over all of them in every skew and
    size; replicas, ZeRO 1 and FSDP2 over all ranks; tensor ranks of three dense models.
    """
    for label, model in EXPERTS.items():
        for ranks in (size for size in (2, 4, 8) if size <= gpus):
            for tokens in TOKENS:
                for skew in SKEWS:
                    if (ranks == gpus or tokens == 4096) and (tokens > 1024 or skew == SKEWS[0]):
                        yield _case(f"ep{ranks}", label, model, gpus, tokens, skew, {"expert": ranks})
        yield _case("replicas", label, model, gpus, 4096, SKEWS[0], {})
        yield _case("zero1", label, model, gpus, 4096, SKEWS[0], {"zero": {"dense": 1, "expert": 1}})
        for tokens in (2048, 8192):
            yield _case("fsdp2", label, model, gpus, tokens, SKEWS[0], {"zero": {"dense": 3, "expert": 3}})
    for label, model in DENSE.items():
        for tokens in (2048, 8192):
            yield _case("fsdp2", label, model, gpus, tokens, None, {"zero": {"dense": 3, "expert": 3}})
            for ranks in (size for size in (2, 4, 8) if size <= gpus):
                yield _case(f"tensor{ranks}", label, model, gpus, tokens, None, {"tensor": ranks})


def is_held_out(name: str) -> bool:
    """Whether a case is kept out of every choice: every other one by the sum of its letters."""
    return sum(name.encode()) % 2 == 1


def _case(
    layout: str, label: str, model: dict[str, Any], gpus: int, tokens: int, skew: str | None, mesh: dict[str, Any]
) -> Case:
    tensor = mesh.get("tensor", 1)
    name = "-".join(str(part) for part in (layout, label, tokens, skew, f"{gpus}gpu") if part)
    routing: dict[str, Any] = {"kind": "uniform"}
    if skew == "skewed":
        routing = {"kind": "popularity", "counts": popularity_counts(model, SLOPE)}
    elif skew == "hot":
        share = model["experts"] // mesh["expert"]
        row = [HOT if expert < share else 1.0 for expert in range(model["experts"])]
        routing = {"kind": "popularity", "counts": [row] * model["layers"]}
    data = case_data(name, model, gpus, tokens, routing, "h100")
    length = min(tokens, SEQUENCE_LENGTH)
    data["parallelism"] = {"data": gpus // tensor, **mesh}
    data["workload"]["global_batch"] = gpus // tensor * tokens // length
    if tensor > 1:
        data["implementation"] |= {"sequence_parallel": False, "loss": "parallel"}
    if skew is None:
        del data["routing"]
    return Case(name, scenario_from_mapping(data))
