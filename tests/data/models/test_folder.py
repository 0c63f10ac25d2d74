"""Model folders that cannot be used: one line names the file, what is wrong and what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from duet_unlearn.data.models.fingerprint import weights_fingerprint
from duet_unlearn.data.models.folder import (
    eos_token_ids,
    head_width,
    is_adapter,
    read_config,
    read_json,
    resolve_model_folder,
)
from duet_unlearn.errors import CacheError, DataError
from duet_unlearn.teacher_cache.format.manifest import read_manifest

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def index_of(entries: object) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(json.dumps(entries))

    return write


def to_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def to_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert is_adapter(folder)


def without(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (to_adapter, "an adapter, expected a whole model; merge it into its base first"),
        (without("config.json"), "no config.json, expected a transformers model folder"),
        (without(*TOKENIZER), r"no tokenizer \(tokenizer.json, .*save the tokenizer into"),
        (without(WEIGHTS), r"no \*.safetensors weights \(found none\); save the model with"),
        (to_pickle, r"\(found pytorch_model.bin, which may run code when read\)"),
        (index_of({"weight_map": {"a": "gone.safetensors"}}), "names gone.safetensors, which is"),
        (index_of({"weight_map": {}}), "names no files, which is not there; copy the model again"),
        (index_of({"weight_map": ["a"]}), "names no files, which is not there"),
        (index_of({}), "names no files, which is not there"),
        (index_of([]), f"{INDEX}: expected a JSON object, found list"),
        (lambda f: shutil.rmtree(f) or f.touch(), "a file, expected a model folder or a hub id"),
    ],
)
def test_what_is_no_model_folder_is_one_line(
    tiny_model: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    change(folder)
    with pytest.raises(DataError, match=message) as caught:
        resolve_model_folder(str(folder), need_weights=True)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_index_names_the_files_that_are_meant(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    whole = weights_fingerprint(folder)
    (folder / WEIGHTS).rename(folder / "model-1.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    shutil.copy(folder / "model-1.safetensors", folder / "consolidated.safetensors")
    assert weights_fingerprint(folder) == whole


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x08\x00\x00\x00\x00\x00\x00\x00not json", "not a safetensors file"),
        (b"\xff" * 16, r"not a safetensors file \(header of "),
        (b"\x01", "not a safetensors file"),
    ],
)
def test_weights_that_are_none_are_one_line(
    tiny_model: Path, tmp_path: Path, data: bytes, message: str
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(DataError, match=message):
        weights_fingerprint(folder)


def test_weights_cut_off_are_named_by_their_tensor(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-10])
    with pytest.raises(DataError, match=r"ends inside tensor \S+; copy the file again"):
        weights_fingerprint(folder)


def test_a_configuration_without_what_is_needed_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(DataError, match=r"config.json: no such file"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"config.json: not readable as JSON"):
        read_json(path)
    for width in (None, 0, "many"):
        with pytest.raises(DataError, match=f"vocab_size is {width!r}, expected a positive number"):
            head_width({"vocab_size": width})
    path.write_text('{"text_config": {"vocab_size": 7}, "eos_token_id": ["</s>"]}')
    assert head_width(read_config(tmp_path)) == 7
    with pytest.raises(DataError, match=r"eos_token_id is \['</s>'\], expected token ids"):
        eos_token_ids(tmp_path)


def test_a_cache_and_a_model_in_each_others_place_are_told_apart(
    tiny_cache: Path, tiny_model: Path
) -> None:
    with pytest.raises(DataError, match="a teacher cache, expected a transformers model folder"):
        resolve_model_folder(str(tiny_cache))
    with pytest.raises(CacheError, match="a model folder, expected a teacher cache"):
        read_manifest(tiny_model)
