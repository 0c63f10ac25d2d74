import json
import logging
import shutil
from pathlib import Path

import pytest

from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.distill.model.student import check_cache_fits, open_student
from duet_unlearn.errors import MismatchError
from duet_unlearn.teacher_cache.format.shard import ShardFile
from duet_unlearn.teacher_cache.reader import CacheReader


def check(model: Path, cache: Path) -> None:
    student = open_student(str(model))
    renderer = PromptRenderer(load_tokenizer(student.folder))
    check_cache_fits(student, renderer, CacheReader.open(cache))


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "student"))


def with_head_width(copy: Path, width: int) -> Path:
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(copy)
    config.vocab_size = width
    (copy / "model.safetensors").unlink()
    LlamaForCausalLM(config).save_pretrained(copy)
    return copy


def test_the_base_itself_fits(tiny_model, tiny_cache):
    check(tiny_model, tiny_cache)


def test_other_ids_for_the_same_tokens_are_refused_with_the_first_difference(copy, tiny_cache):
    def swap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["W"], vocabulary["X"] = vocabulary["X"], vocabulary["W"]

    edit_json(copy / "tokenizer.json", swap)
    with pytest.raises(MismatchError) as caught:
        check(copy, tiny_cache)
    # Prompts are <s><|user|>Who ...: token 2 is the first that differs.
    assert "token 2: " in str(caught.value)
    assert "query forget-" in str(caught.value)


def test_a_vocabulary_that_differs_in_unused_tokens_is_refused(copy, tiny_cache):
    def rename(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["unheard"] = vocabulary.pop("\u0105")

    edit_json(copy / "tokenizer.json", rename)
    with pytest.raises(MismatchError, match="rarer tokens differ"):
        check(copy, tiny_cache)


def test_the_same_vocabulary_with_other_splits_is_refused(copy, tiny_cache):
    edit_json(copy / "tokenizer.json", lambda content: content["model"]["merges"].clear())
    with pytest.raises(MismatchError, match="splits text into other tokens"):
        check(copy, tiny_cache)


def test_another_chat_template_is_a_warning(copy, tiny_cache, caplog):
    path = copy / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|end|>", "<|end|>\n"), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        check(copy, tiny_cache)
    assert "another chat template" in caplog.text


def test_a_head_wider_than_the_teachers_fits(copy, tiny_cache):
    check(with_head_width(copy, 512), tiny_cache)


def test_a_head_too_narrow_for_the_cached_ids_is_refused(copy, tiny_cache):
    with pytest.raises(MismatchError, match=r"head gives 100 logits, .* holds token id \d+"):
        check(with_head_width(copy, 100), tiny_cache)


def test_more_tokens_than_the_head_has_are_refused_before_a_row_is_decoded(
    copy, tiny_cache, monkeypatch
):
    def decode(*_: object) -> None:
        raise AssertionError("a row group was decoded")

    with monkeypatch.context() as patched:
        patched.setattr(ShardFile, "read_row_group", decode)
        with pytest.raises(MismatchError, match="head gives 10 logits, but the cache keeps 20 at"):
            check(with_head_width(copy, 10), tiny_cache)


def test_a_narrower_head_that_covers_the_cached_ids_fits(copy, tiny_cache):
    reader = CacheReader.open(tiny_cache)
    largest = max(int(reader.row(i).token_ids.max()) for i in range(reader.num_rows))
    assert largest + 1 < 384, "the fixture has to leave room below the teacher's width"
    check(with_head_width(copy, largest + 1), tiny_cache)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# M\n", "apache-2.0"),
        ("# M\n", None),
        ("---\nlicense: [a]\n---\n", None),
        ("---\n{: broken\n---\n", None),
    ],
)
def test_the_licence_is_what_the_bases_card_says(copy, card, licence):
    (copy / "README.md").write_text(card)
    assert open_student(str(copy)).licence == licence
