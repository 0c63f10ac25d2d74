"""Answers that are trained on end as the chat template ends them, whatever else ends one."""

import json
import shutil
from pathlib import Path

from duet_unlearn.data import demo_world as world
from duet_unlearn.data.queries import load_queries
from duet_unlearn.distill.attacking.prompts import open_prompts
from duet_unlearn.distill.batches.sampler import PLAIN, Draw
from duet_unlearn.distill.model.student import open_student
from duet_unlearn.distill.objectives.gradient_difference import AnswerDataset
from duet_unlearn.distill.relearning.lessons import Lesson
from duet_unlearn.evaluation.subjects import open_subject


def test_of_two_ends_the_templates_closes_an_answer(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(world.MODEL, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    subject = open_subject(str(folder), {"base": False}, dtype="float32")
    assert subject.ends == (1, 2)
    query = load_queries(str(world.FORGET), split="forget", require_answers=True)[0]
    lesson = Lesson(name="facts", source="facts", queries=(query,), asked=())
    ((_, taught),) = lesson.encode(subject)
    (prompt,) = open_prompts(subject, "base", [query], suffix_tokens=4)
    examples = AnswerDataset([query], subject.renderer, open_student(str(folder)))
    trained = examples[Draw(0, PLAIN, 1.0)].response_ids
    assert [taught[-1], prompt.answer[-1], trained[-1]] == [2, 2, 2]
