"""A transformers model from a folder, and a text as its tokens. Nothing is fetched, and no code of the folder runs."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesim.errors import UserError
from moesim.strict_json import parse_json

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
