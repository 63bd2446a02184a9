"""A transformers model from a folder, a text as its tokens, and where the routers of such models are.

Nothing is fetched, and no code of the folder runs. One entry per way to route says, as data, what its router gives
(`FAMILIES`). A router is known by the name of its class in transformers 5. What it gives is a tuple of three: the
scores of all experts before softmax or sigmoid ("logits", [T, E]), the experts that it chose ("ids", [T, K]) and their
weights ("gates", [T, K]), in an order of its own. Experts are taken from there, never computed again.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from moesim.errors import UserError
from moesim.strict_json import parse_json

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


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text as token ids, int64 [N]; sha256 of its bytes; notes about how the tokens came about."""

    ids: torch.Tensor
    sha256: str
    notes: tuple[str, ...]


def check_folder(folder: Path) -> None:
    """Raise UserError, one line, unless a folder holds a config.json and safetensors."""
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {what}; name the folder that save_pretrained or a download made")
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{folder}: has no config.json; name the folder that save_pretrained or a download made")
    try:
        kind = parse_json(config.read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(f"{config}: is no JSON ({error}); fetch it again") from None
    if not isinstance(kind, dict) or not isinstance(kind.get("model_type"), str):
        raise UserError(f"{config}: names no model_type; it is the configuration of no transformers model")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: holds no .safetensors; weights in other files are not read, as they can hold code")


def library() -> Any:
    """The module transformers, offline and silent. Raises UserError where it is not installed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers
    except ImportError:
        raise UserError("a transformers model needs transformers; pip install 'moesim[hf]'") from None
    return transformers


@contextmanager
def quietly() -> Iterator[None]:
    """transformers without its bars and warnings, which would run into ours. Raises UserError where it is missing."""
    logging = library().utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_model(folder: Path, *, device: torch.device) -> Any:
    """The model of a folder without its head, in the number format of its file, ready to read.

    Raises UserError, one line, for a model that transformers does not know, and for weights that are missing: they
    would be random, and so would the routing be.
    """
    transformers = library()
    settings: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **settings)
        model, report = transformers.AutoModel.from_pretrained(
            folder, config=config, use_safetensors=True, dtype="auto", output_loading_info=True, **settings
        )
        model = model.to(device).eval()
    except Exception as error:  # whatever a library of any version raises about a folder of any kind
        raise UserError(
            f"{folder}: transformers {transformers.__version__} cannot load it ({_first_line(error)})"
        ) from error
    lost = sorted(report.get("missing_keys", ())) + sorted(str(each) for each in report.get("mismatched_keys", ()))
    if lost:
        raise UserError(
            f"{folder}: weights are missing there or have another shape ({len(lost)}, e.g. {lost[0]}), so that the "
            "routing would be random; fetch it again"
        )
    return model


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]


def load_text(file: Path, folder: Path, *, vocabulary: int, most: int) -> Text:
    """The first `most` tokens of a text: by the folder's tokenizer, or else its bytes modulo the vocabulary.

    Raises UserError for a file that cannot be read and for a tokenizer that is not the model's.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); name a file of text") from None
    if not content:
        raise UserError(f"{file}: is empty; name a file of text")
    notes: tuple[str, ...] = ()
    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        ids = _tokens(file, content, folder)
    else:
        ids = torch.frombuffer(bytearray(content), dtype=torch.uint8).long() % vocabulary
        notes = (f"no tokenizer in {folder.name}: the tokens are the text's bytes modulo {vocabulary:,}",)
    ids = ids[:most]
    if len(ids) and int(ids.max()) >= vocabulary:
        raise UserError(f"{folder}: its tokenizer gives token {int(ids.max())}, the model knows {vocabulary}")
    return Text(ids=ids, sha256=hashlib.sha256(content).hexdigest(), notes=notes)


def _tokens(file: Path, content: bytes, folder: Path) -> torch.Tensor:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is no UTF-8 text (byte {error.start}); save it as UTF-8") from None
    transformers = library()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception as error:  # as above
        raise UserError(
            f"{folder}: transformers {transformers.__version__} cannot use its tokenizer ({_first_line(error)})"
        ) from error
    return torch.tensor(found, dtype=torch.long)
