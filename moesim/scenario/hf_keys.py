"""The keys of a `config.json` that `hf_config` does not read: which change nothing here, and which must be named.

Every key of a file is one of four things for its `model_type`: read into a field of `model` (`hf_families`); harmless,
as listed here with the reason or there with the family; expected to have one of some values, with what is left out
otherwise; or unknown. A key that is left out or unknown is named to the user. null says nothing under any key.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moesim.strict_json import json_text

_TEXT = "how text is read and generated"
_NUMERICS = "changes numbers, not work"
_START = "how weights begin, are stored or loaded"
_ROUTING = "stated by routing: which router, how it is balanced"


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A key that costs nothing at one of `values`; at any other, `left_out` says what the model here does not have."""

    values: tuple[Any, ...]
    left_out: str


_HARMLESS = {
    _TEXT: (
        "add_cross_attention", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id", "eos_token_id",
        "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "is_decoder",
        "is_encoder_decoder", "max_length", "max_position_embeddings", "model_max_length", "pad_token_id", "prefix",
        "sep_token_id", "suppress_tokens", "tokenizer_class", "use_cache", "bad_words_ids", "diversity_penalty",
        "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "length_penalty", "min_length",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "remove_invalid_values",
        "repetition_penalty", "temperature", "top_k", "top_p", "typical_p", "output_scores",
        "return_dict_in_generate", "cross_attention_hidden_size", "tie_encoder_decoder",
    ),
    _NUMERICS: (
        "attention_dropout", "clip_qkv", "hidden_dropout", "original_max_position_embeddings", "rms_norm_eps",
        "rope_interleave", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor",
    ),
    _START: (
        "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "attn_implementation",
        "auto_map", "chunk_size_feed_forward", "dtype", "ep_size", "finetuning_task", "id2label", "initializer_range",
        "label2id", "name_or_path", "output_attentions", "output_hidden_states", "pretraining_tp",
        "problem_type", "pruned_heads", "return_dict", "task_specific_params", "tf_legacy_loss", "torch_dtype",
        "torchscript", "transformers_version", "use_bfloat16", "use_return_dict",
    ),
}  # fmt: skip
_EXPECTED = {
    "hidden_act": Expected(values=("silu", "swish"), left_out="feed-forward networks are costed as SwiGLU"),
    "quantization_config": Expected(
        values=(), left_out="it says how the released weights are stored; training is costed with workload.precision"
    ),
}
MOST_NAMED = 8  # unknown keys in one line


class _KeysOfFamily(Protocol):
    """What only one family has: keys that change nothing here, and keys that do not at one of some values."""

    @property
    def harmless(self) -> tuple[str, ...]: ...

    @property
    def expected(self) -> Mapping[str, Expected]: ...


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What became of every key of one `config.json`, in the order of the file; `left_out` holds whole sentences."""

    model_type: str
    read: tuple[str, ...]
    harmless: tuple[str, ...]
    left_out: tuple[str, ...]


def sort_keys(
    fields: Mapping[str, Any],
    *,
    name: str,
    model_type: str,
    family: _KeysOfFamily,
    read: Collection[str],
    noted: Sequence[str],
) -> Keys:
    """The keys of the file `name` by what became of them; `read`: those looked at, `noted`: what reading left out."""
    harmless = {key for keys in _HARMLESS.values() for key in keys} | set(family.harmless)
    expected = {**_EXPECTED, **family.expected}
    left_out, unknown, ignored = list(noted), list[str](), list[str]()
    for key, value in fields.items():
        if key in read:
            continue
        if value is None or key in harmless or (key in expected and value in expected[key].values):
            ignored.append(key)
        elif key in expected:
            left_out.append(f"{name}: {shown(key, value)}: {expected[key].left_out}")
        else:
            unknown.append(shown(key, value))
    if unknown:
        more = f" and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
        left_out.append(
            f"{name}: not known for model_type {model_type} and left out: {', '.join(unknown[:MOST_NAMED])}{more}; "
            "if this changes the layout, write the fields of model beside hf_config"
        )
    return Keys(
        model_type=model_type,
        read=tuple(key for key in fields if key in read),
        harmless=tuple(ignored),
        left_out=tuple(left_out),
    )


def shown(key: str, value: Any) -> str:
    """A key and its value in few words, e.g. `"sliding_window" = 4096`; a section by its kind alone."""
    if isinstance(value, dict):
        kind = value.get("quant_method", value.get("kind"))
        return f"{_short(key)} ({kind if isinstance(kind, str) else f'{len(value)} keys'})"
    return f"{_short(key)} = {_short(value)}"


def _short(value: Any, most: int = 40) -> str:
    text = json_text(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
