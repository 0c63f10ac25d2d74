"""Fingerprints of a model folder's content: weights, configuration, tokenizer, chat template.

A recipe names what decided a signal by content, so that a copy of the model in another place
gives the same recipe and a changed model never does. Hashing the weights of a large model takes
minutes; the result is remembered in the user's cache folder, by all that the file system says of a
file (path, size, times, inode) and by a sample of its bytes.
"""

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duet_unlearn.data.models.folder import SLOW_TOKENIZER_FILES, read_json, weight_files
from duet_unlearn.data.models.tokenizer import load_tokenizer
from duet_unlearn.errors import DataError, OutputError
from duet_unlearn.files import make_folder, write_text

# Changing how a fingerprint is computed must forget every remembered one.
_MEMORY_VERSION = 3
_CHUNK_BYTES = 1 << 22
_SAMPLES, _SAMPLE_BYTES = 32, 4096
# Where the folder lies, which library wrote it and how it was stored decide no logit.
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash")
# transformers reads the tokenizer's own configuration last.
_TOKEN_FILES = ("special_tokens_map.json", "tokenizer_config.json")
_NAMED_TOKENS = ("extra_special_tokens", "model_specific_special_tokens")
# What decides tokens where no tokenizer.json says it.
_SLOW_SETTINGS = (
    *("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "do_lower_case"),
    *("added_tokens_decoder", "additional_special_tokens"),
)
_MAX_HEADER_BYTES = 100_000_000


def sha256_json(value: object) -> str:
    """Return `sha256:<hex>` of a JSON value in canonical form (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256_file(path: Path) -> str:
    """Return `sha256:<hex>` of a file's bytes."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def weights_fingerprint(folder: Path) -> str:
    """Fingerprint the tensors of a model folder: names, dtypes, shapes and bytes.

    How the tensors are spread over files does not matter.

    Raises:
        DataError: A weight file is not a safetensors file.
    """
    files = weight_files(folder)
    return _remembered("weights", files, lambda: _hash_tensors(files))


def _hash_tensors(files: tuple[Path, ...]) -> str:
    tensors = {name: (path, *entry) for path in files for name, entry in _header(path).items()}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        path, dtype, shape, start, stop = tensors[name]
        digest.update(json.dumps([name, dtype, shape]).encode())
        with path.open("rb") as file:
            file.seek(start)
            left = stop - start
            while left > 0:
                chunk = file.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise DataError(f"{path}: ends inside tensor {name}; copy the file again")
                digest.update(chunk)
                left -= len(chunk)
    return "sha256:" + digest.hexdigest()


def _header(path: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """Return name -> (dtype, shape, first byte, byte after the last) of a safetensors file."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(file.read(length))
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = (8 + length + offset for offset in entry["data_offsets"][:2])
                found[name] = (entry["dtype"], entry["shape"], start, stop)
        return found
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a safetensors file ({error}); copy the file again") from error


def config_fingerprint(folder: Path, *, with_code: bool = False) -> str:
    """Fingerprint `config.json` without the entries that decide no logit, and code beside it."""
    config = read_json(folder / "config.json")
    kept = {k: v for k, v in config.items() if k not in _VOLATILE_CONFIG}
    code = {f.name: sha256_file(f) for f in sorted(folder.glob("*.py"))} if with_code else {}
    return sha256_json([kept, code] if code else kept)


def tokenizer_fingerprint(folder: Path) -> str:
    """Fingerprint how the tokenizer turns text into ids.

    Padding and truncation settings are left out: nothing here uses them, and saving a tokenizer
    again changes them.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        files = _slow_tokenizer_files(folder)
        digest = _remembered(
            "tokenizer", files, lambda: sha256_json({f.name: sha256_file(f) for f in files})
        )
        settings = _read_if_there(folder / "tokenizer_config.json")
        own = {name: settings[name] for name in _SLOW_SETTINGS if name in settings}
        return sha256_json([digest, own | _special_tokens(folder)])

    def compute() -> str:
        content = read_json(path)
        kept = {k: v for k, v in content.items() if k not in ("padding", "truncation")}
        added = sorted(_tokens_beside(folder, content))
        return sha256_json(kept | {"tokens_beside": added} if added else kept)

    return _remembered("tokenizer", _tokenizer_files(folder), compute)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _slow_tokenizer_files(folder: Path) -> tuple[Path, ...]:
    return tuple(folder / name for name in SLOW_TOKENIZER_FILES if (folder / name).is_file())


def _tokenizer_files(folder: Path) -> tuple[Path, ...]:
    names = ("tokenizer.json", *_TOKEN_FILES, "added_tokens.json")
    return tuple(folder / name for name in names if (folder / name).is_file())


def vocabulary_fingerprint(folder: Path, *, trust_remote_code: bool = False) -> str:
    """Fingerprint which token has which id, added tokens with it.

    Two tokenizers with the same vocabulary fingerprint mean the same token by an id, whatever
    else differs between them.
    """
    files = dict.fromkeys((*_tokenizer_files(folder), *_slow_tokenizer_files(folder)))

    def compute() -> str:
        return sha256_json(sorted(_vocabulary(folder, trust_remote_code)))

    return _remembered("vocabulary", tuple(files), compute)


def _vocabulary(folder: Path, trust_remote_code: bool) -> set[tuple[int, str]]:
    path = folder / "tokenizer.json"
    if path.is_file():
        content = read_json(path)
        return _pairs(content) | _tokens_beside(folder, content)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    return {(index, token) for token, index in tokenizer.get_vocab().items()}


def _pairs(content: dict[str, Any]) -> set[tuple[int, str]]:
    """Return id and text of every token of a `tokenizer.json`, added ones with them."""
    vocabulary = content.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, dict):
        pairs = {(index, token) for token, index in vocabulary.items()}
    else:  # Unigram models list (token, score) in the order of their ids
        pairs = {(index, entry[0]) for index, entry in enumerate(vocabulary)}
    return pairs | {(t["id"], t["content"]) for t in content.get("added_tokens") or ()}


def _tokens_beside(folder: Path, content: dict[str, Any]) -> set[tuple[int, str]]:
    """Return the tokens that files beside `tokenizer.json` add to it when it is loaded.

    Those that are named without an id get one then, by their order: they stand under -1, -2, ...
    here.

    Raises:
        DataError: They are not what transformers writes.
    """
    known = _pairs(content)
    with_id, named = set(), list(_special_tokens(folder).values())
    try:
        for name in _TOKEN_FILES:
            settings = _read_if_there(folder / name)
            listed = settings.get("added_tokens_decoder") or {}
            with_id |= {(int(index), _text(token)) for index, token in listed.items()}
            for key in ("additional_special_tokens", "extra_special_tokens"):
                more = settings.get(key)
                named += more if isinstance(more, list) else []
        added = _read_if_there(folder / "added_tokens.json")
        with_id |= {(int(index), text) for text, index in added.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{folder}: its added tokens are malformed ({error})") from error
    texts = {text for _, text in known | with_id}
    new = dict.fromkeys(text for text in map(_text, named) if text not in texts)
    return with_id - known | {(-1 - number, text) for number, text in enumerate(new)}


def _text(token: object) -> str:
    return str(token.get("content") if isinstance(token, dict) else token)


def read_chat_template(folder: Path) -> str | None:
    """Return the model's default chat template, or None where it has none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    # As the tokenizer does; `chat_template.json` is of processors, for want of anything else.
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = _read_if_there(folder / name).get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template}
            template = named.get("default")
        if isinstance(template, str):
            return template
    return None


def chat_template_fingerprint(folder: Path) -> str | None:
    """Fingerprint the chat template with the special tokens it may print; None without one."""
    template = read_chat_template(folder)
    if template is None:
        return None
    return sha256_json({"template": template, "special_tokens": _special_tokens(folder)})


def _special_tokens(folder: Path) -> dict[str, object]:
    """Return the special tokens by name: every `*_token` is a variable of the chat template."""
    found: dict[str, object] = {}
    for name in _TOKEN_FILES:
        for key, value in _read_if_there(folder / name).items():
            if key.endswith("_token") and not isinstance(value, bool | None):
                found[key] = _text(value)
            elif key in _NAMED_TOKENS and isinstance(value, dict):
                found |= {token: _text(text) for token, text in value.items()}
    return found


def _remembered(kind: str, files: tuple[Path, ...], compute: Callable[[], str]) -> str:
    """Return a fingerprint from the user's memory file, or compute and remember it."""
    key = sha256_json([_MEMORY_VERSION, kind, [_state(path) for path in files]])
    memory = user_folder() / "fingerprints" / key.removeprefix("sha256:")
    with contextlib.suppress(OSError, ValueError):
        known = memory.read_text(encoding="ascii")
        if known.startswith("sha256:") and len(known) == 71:
            return known
    value = compute()
    # A home folder that cannot be written costs time, not correctness.
    with contextlib.suppress(OutputError):
        make_folder(memory.parent)
        write_text(memory, value)
    return value


def _state(path: Path) -> list[object]:
    """Return what changes when a file's content does, without reading all of it.

    Images that are built reproducibly, and `cp -p`, keep size and time of another content. The time
    of the inode's change cannot be set by such tools, and a sample of bytes catches the rest.
    """
    status = path.stat()
    sample = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(_SAMPLES):
            file.seek(max(0, status.st_size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            sample.update(file.read(_SAMPLE_BYTES))
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return [str(path.resolve()), status.st_size, *times, status.st_ino, sample.hexdigest()]


def user_folder() -> Path:
    """Return the folder for what this project keeps for a user between runs."""
    home = os.environ.get("DUET_CACHE_HOME") or os.environ.get("XDG_CACHE_HOME")
    root = Path(home) if home else Path.home() / ".cache"
    return root / "duet-unlearn"
