"""Where the routers of transformers' models are and what they give: one entry per way to route, as data.

A router is known by the name of its class in transformers 5. What it gives is a tuple of three: the scores of all
experts before softmax or sigmoid ("logits", [T, E]), the experts that it chose ("ids", [T, K]) and their weights
("gates", [T, K]), in an order of its own. Experts are taken from there, never computed again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal["logits", "ids", "gates", "scores"]
Score = Literal["softmax", "sigmoid", "logits", "own"]
LOGITS_FIRST: tuple[Part, ...] = ("logits", "gates", "ids")


def _no_groups(router: Any) -> tuple[int, int]:
    return 1, 1


def _groups(router: Any) -> tuple[int, int]:
    return int(router.num_group), int(router.topk_group)


def _groups_unless_greedy(router: Any) -> tuple[int, int]:
    return _groups(router) if router.topk_method == "group_limited_greedy" else (1, 1)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that route alike. name: for people. classes: of their router modules. place: where the module stands in a
    decoder layer. output: what it returns, in order; "scores" are [T, E] with 0 for experts that are not chosen.
    score: what ranks the experts, before a bias is added; "own" is a rule that no formula of moesim knows. bias: where
    the bias that is added for the choice alone lies, None where there is none. normalised, factor: what divides and
    multiplies the scores of the chosen to give the gates: True, False, or the router's attribute. groups: how many
    there are, and how many of them a token may reach.
    """

    name: str
    classes: tuple[str, ...]
    place: str
    score: Score
    output: tuple[Part, ...] = LOGITS_FIRST
    bias: str | None = None
    normalised: bool | str = True
    factor: str | None = None
    groups: Callable[[Any], tuple[int, int]] = _no_groups

    def normalises(self, router: Any) -> bool:
        """Whether the gates of a token sum to the factor."""
        return bool(getattr(router, self.normalised)) if isinstance(self.normalised, str) else self.normalised

    def factor_of(self, router: Any) -> float:
        """What the gates are multiplied by."""
        return float(getattr(router, self.factor)) if self.factor else 1.0


FAMILIES: tuple[Family, ...] = (
    Family(name="Mixtral", classes=("MixtralTopKRouter",), place="mlp.gate", score="softmax"),
    Family(
        name="Qwen2-MoE, Qwen3-MoE, Qwen3-Next",
        classes=("Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter", "Qwen3NextTopKRouter"),
        place="mlp.gate",
        score="softmax",
        normalised="norm_topk_prob",
    ),
    Family(
        name="Qwen3-VL-MoE, Qwen3.5-MoE",
        classes=("Qwen3VLMoeTextTopKRouter", "Qwen3_5MoeTopKRouter"),
        place="mlp.gate",
        score="softmax",
    ),
    Family(
        name="OLMoE, FlexOlmo",
        classes=("OlmoeTopKRouter", "FlexOlmoTopKRouter"),
        place="mlp.gate",
        score="softmax",
        normalised="norm_topk_prob",
    ),
    Family(
        name="DeepSeek-V2",
        classes=("DeepseekV2TopkRouter",),
        place="mlp.gate",
        score="softmax",
        normalised=False,
        factor="routed_scaling_factor",
        groups=_groups_unless_greedy,
    ),
    Family(
        name="DeepSeek-V3, V3.2, GLM-4.5, 4.6, 4.7 and 5, dots, Exaone, Solar, MiMo-V2, Kimi-Linear",
        classes=(
            "DeepseekV3TopkRouter",
            "DeepseekV32TopkRouter",
            "Glm4MoeTopkRouter",
            "Glm4MoeLiteTopkRouter",
            "Glm4vMoeTextTopkRouter",
            "GlmMoeDsaTopkRouter",
            "Dots1TopkRouter",
            "ExaoneMoeTopkRouter",
            "SolarOpenTopkRouter",
            "MiMoV2FlashTopkRouter",
            "KimiLinearTopkRouter",
        ),
        place="mlp.gate",
        score="sigmoid",
        bias="e_score_correction_bias of the router",
        normalised="norm_topk_prob",
        factor="routed_scaling_factor",
        groups=_groups,
    ),
    Family(
        name="Nemotron-H",
        classes=("NemotronHTopkRouter",),
        place="mixer.gate",
        score="sigmoid",
        bias="e_score_correction_bias of the router",
        normalised="norm_topk_prob",
        factor="routed_scaling_factor",
        groups=_groups,
    ),
    Family(name="gpt-oss", classes=("GptOssTopKRouter",), place="mlp.router", score="logits"),
    Family(
        name="Granite-MoE, shared and hybrid",
        classes=("GraniteMoeTopKRouter", "GraniteMoeSharedTopKRouter", "GraniteMoeHybridTopKRouter"),
        place="block_sparse_moe.router",
        score="logits",
        output=("ids", "gates", "logits"),
    ),
    Family(name="Phi-3.5-MoE", classes=("PhimoeTopKRouter",), place="mlp.router", score="own"),
    Family(
        name="Llama-4",
        classes=("Llama4Router",),
        place="feed_forward.router",
        score="sigmoid",
        output=("scores", "logits"),
        normalised=False,
    ),
    Family(
        name="ERNIE-4.5",
        classes=("Ernie4_5_MoeTopKRouter", "Ernie4_5_VLMoeMoeTopKRouter"),
        place="mlp.gate",
        score="softmax",
        bias="moe_statics.e_score_correction_bias of the router",
    ),
    Family(name="Hunyuan-A13B", classes=("HunYuanMoEV1Gate",), place="mlp.gate", score="softmax"),
    Family(name="MiniMax-Text-01", classes=("MiniMaxTopKRouter",), place="mlp.gate", score="softmax"),
    Family(
        name="MiniMax-M2",
        classes=("MiniMaxM2TopKRouter",),
        place="mlp.gate",
        score="sigmoid",
        bias="e_score_correction_bias of the block",
    ),
    Family(
        name="LFM2-MoE",
        classes=("Lfm2MoeTopKRouter",),
        place="feed_forward.gate",
        score="sigmoid",
        bias="expert_bias of the block, where use_expert_bias is set",
        normalised="norm_topk_prob",
        factor="routed_scaling_factor",
    ),
    Family(
        name="AFMoE (Trinity)",
        classes=("AfmoeTokenChoiceRouter",),
        place="mlp.router",
        score="sigmoid",
        bias="expert_bias of the block",
        factor="route_scale",
    ),
)


# Any other family: what the module that computes the experts is given as their numbers and weights.
OTHERS = Family(name="others", classes=(), place="mlp.experts", output=("ids", "gates"), score="own")
EXPERTS_SUFFIX = "Experts"  # how transformers ends the names of the classes of such modules


def experts_of(model: Any) -> Iterator[tuple[str, Any, Family]]:
    """The same of every module that computes experts, for models whose routers are in no entry."""
    for name, module in model.named_modules():
        if type(module).__name__.endswith(EXPERTS_SUFFIX):
            yield name, module, OTHERS


def routers_of(model: Any) -> Iterator[tuple[str, Any, Family]]:
    """(name, module, family) of every router of a torch module, in the order of its layers."""
    known = {name: family for family in FAMILIES for name in family.classes}
    for name, module in model.named_modules():
        family = known.get(type(module).__name__)
        if family is not None:
            yield name, module, family
