"""Fingerprints: which tokens a tokenizer has, and which weights a folder means."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from duet_unlearn.data.models.fingerprint import (
    tokenizer_fingerprint,
    vocabulary_fingerprint,
    weights_fingerprint,
)
from duet_unlearn.errors import DataError


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


CONFIGURATION = "tokenizer_config.json"


def configure(folder: Path, name: str = CONFIGURATION, **settings: Any) -> tuple[str, str]:
    """Add to one of the tokenizer's files; return both fingerprints."""
    path = folder / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | settings))
    return tokenizer_fingerprint(folder), vocabulary_fingerprint(folder)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (CONFIGURATION, {"added_tokens_decoder": {"384": {"content": "<|new|>"}}}),
        (CONFIGURATION, {"additional_special_tokens": ["<|new|>"]}),
        (CONFIGURATION, {"extra_special_tokens": ["<|new|>"]}),
        (CONFIGURATION, {"extra_special_tokens": {"new_token": "<|new|>"}}),
        (CONFIGURATION, {"pad_token": "<|new|>"}),
        ("special_tokens_map.json", {"additional_special_tokens": ["<|new|>"]}),
        ("added_tokens.json", {"<|new|>": 384}),
    ],
)
def test_tokens_that_other_files_than_the_tokenizers_add_count(
    name: str, settings: dict[str, Any], copy: Path
) -> None:
    before = (tokenizer_fingerprint(copy), vocabulary_fingerprint(copy))
    after = configure(copy, name, **settings)
    loaded = AutoTokenizer.from_pretrained(str(copy))
    assert "<|new|>" in loaded.get_vocab(), "transformers adds it"
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_what_adds_no_token_changes_no_fingerprint(copy: Path) -> None:
    before = (tokenizer_fingerprint(copy), vocabulary_fingerprint(copy))
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    known = {str(token["id"]): token for token in tokenizer["added_tokens"]}
    assert known
    listed = {"added_tokens_decoder": known, "model_max_length": 77}
    named = {"additional_special_tokens": [token["content"] for token in known.values()]}
    assert configure(copy, **listed, **named) == before


def test_malformed_added_tokens_are_one_line(copy: Path) -> None:
    for value in ({"x": {"content": "<|new|>"}}, ["<|new|>"]):
        with pytest.raises(DataError, match="its added tokens are malformed"):
            configure(copy, added_tokens_decoder=value)


def test_two_sets_of_weights_in_one_folder_are_refused(copy: Path) -> None:
    shutil.copy(copy / "model.safetensors", copy / "part-1.safetensors")
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "part-1.safetensors"}}))
    with pytest.raises(DataError, match=r"both model\.safetensors and model\.safetensors\.index"):
        weights_fingerprint(copy)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}}))
    assert weights_fingerprint(copy) == weights_fingerprint(copy)
