"""Model folders: find one by path or hub id, and read what its configuration files say.

Nothing here loads weights or imports torch, so that a finished cache is found again in about a
second.
"""

import json
from pathlib import Path
from typing import Any

from duet_unlearn.errors import DataError, first_line
from duet_unlearn.files import holds_cache, named_path, user_path

_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
SLOW_TOKENIZER_FILES = (
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
    *("added_tokens.json", "special_tokens_map.json"),
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def resolve_model_folder(model: str | Path, *, need_weights: bool = True) -> Path:
    """Return the local folder of a model, downloading it where `model` is a hub id.

    Raises:
        DataError: There is no such folder or hub model, or it lacks its configuration,
            tokenizer or weights.
    """
    folder = user_path(model, "model")
    if folder.is_dir():
        folder = folder.resolve()
    elif folder.exists():
        raise DataError(f"model {model}: a file, expected a model folder or a hub id")
    else:
        folder = _download(str(model), need_weights=need_weights)
    _check_folder(folder, need_weights=need_weights)
    return folder


def _download(model: str, *, need_weights: bool) -> Path:
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_like_path:
        raise DataError(
            f"model {model}: no such folder; give a model folder or a hub id (org/name)"
        )
    from huggingface_hub import snapshot_download

    patterns = [p for p in _HUB_FILES if need_weights or p != "*.safetensors"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise DataError(
            f"model {model}: no such folder, and the hub did not give it ({first_line(error)}); "
            "check the path or name, the network, and `hf auth login` for gated models"
        ) from error


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a peft adapter instead of a whole model."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _check_folder(folder: Path, *, need_weights: bool) -> None:
    if is_adapter(folder):
        raise DataError(
            f"model {folder}: an adapter, expected a whole model; merge it into its base first "
            "(duet-distill run --merge makes whole ones)"
        )
    if not (folder / "config.json").is_file():
        what = "a teacher cache" if holds_cache(folder) else "no config.json"
        raise DataError(f"model {folder}: {what}, expected a transformers model folder")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise DataError(
            f"model {folder}: no tokenizer ({', '.join(_TOKENIZER_FILES[:3])}); "
            "save the tokenizer into the model folder"
        )
    if need_weights and not weight_files(folder):
        found = [p.name for p in sorted(folder.glob("*.bin"))[:1]]
        hint = f"found {found[0]}, which may run code when read" if found else "found none"
        raise DataError(
            f"model {folder}: no *.safetensors weights ({hint}); "
            "save the model with save_pretrained() and try again"
        )


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a model folder that make up the model, sorted by name.

    Where an index names the shards, exactly those are returned: folders often hold the same
    weights a second time in a consolidated file.

    Raises:
        DataError: The index is unreadable, names a file that is not there, or lies beside a
            whole model in one file that it does not name.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return tuple(
            sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
        )
    listed = read_json(index).get("weight_map")
    names = sorted(set(map(str, listed.values()))) if isinstance(listed, dict) else []
    whole = folder / "model.safetensors"
    if whole.is_file() and whole.name not in names:
        raise DataError(
            f"model {folder}: both {whole.name} and {index.name} with other files, of which "
            "libraries take one or the other; remove the one that is not meant"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise DataError(
            f"model {folder}: {index.name} names {missing[0] if missing else 'no files'}, "
            "which is not there; copy the model again"
        )
    return tuple(folder / name for name in names)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a model folder.

    Raises:
        DataError: The file is missing, unreadable, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); copy the file again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Read the model's `config.json`; for a multimodal model, its text part."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def context_length(config: dict[str, Any]) -> int | None:
    """Return the longest sequence the model reads in tokens, or None where it names none."""
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return None


def stored_dtype(config: dict[str, Any]) -> str:
    """Return the dtype the configuration names: `float32` where it names none."""
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(value).removeprefix("torch.")


def head_width(config: dict[str, Any]) -> int:
    """Return the number of logits the model's head gives.

    Raises:
        DataError: The configuration has no positive `vocab_size`.
    """
    width = config.get("vocab_size")
    if not isinstance(width, int) or width < 1:
        raise DataError(f"model configuration: vocab_size is {width!r}, expected a positive number")
    return width


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Return the ids that end a response, sorted: the generation configuration's, else the model's.

    Raises:
        DataError: The ids are not numbers.
    """
    generation = folder / "generation_config.json"
    sources = [read_json(generation)] if generation.is_file() else []
    for source in [*sources, read_config(folder)]:
        value = source.get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(i, int) and i >= 0 for i in ids):
                raise DataError(f"model {folder}: eos_token_id is {value!r}, expected token ids")
            return tuple(sorted(set(ids)))
    return ()


def model_name(model: str) -> str:
    """Return a hub id as it is, or a folder's own name: what is shared tells no one's paths."""
    path = named_path(model)
    return path.resolve().name if path.exists() else model
