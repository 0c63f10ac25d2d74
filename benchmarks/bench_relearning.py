"""Does what was forgotten come back when the student is trained on answers again, and at what cost?

    python benchmarks/bench_relearning.py [--alphas 0 0.3 0.5 0.7] [--epochs 60]

Someone who holds the student may fine-tune it on the answers to the *training* forget queries. What
counts is how many of the facts that this does not teach come back with them: other facts of those
characters, and other characters. Students start from the demo world's model with more or less noise
and are distilled from one cache, with a broad retain set at many positions, so that what the noise
shook is rebuilt. Then each is relearned from the same state with several learning rates, and the
worst of them counts. Points of ROUGE-L recall on held-out queries.

A fact of this world is one fact: nothing else implies it. So the broad retain set asks every fact
that is to be kept, and retain is measured on questions that the set does not hold.
"""

import argparse
import copy
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from demo_students import build_cache, measure, train_student
from demo_world.query_sets import (
    ANOTHER_CHARACTER,
    ANOTHER_FACT,
    QueryRow,
    render_rows,
)
from demo_world.world import SAGAS, build_world

from duet_unlearn.data import demo_world as world
from duet_unlearn.data.models.loading import load_model
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.data.queries import Query, load_queries
from duet_unlearn.evaluation.answers import generate_answers
from duet_unlearn.evaluation.measures.overlap import contains_answer

LOOKS = (0, 10, 30, 100)
"""Relearning steps after which the facts are asked."""
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
BATCH = 16
UNTAUGHT = (ANOTHER_FACT, ANOTHER_CHARACTER)
WORDINGS = 2
"""In how many wordings the broad retain set asks each fact."""


def main() -> None:
    """Build one cache, train a student for each strength of noise, relearn each, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.7, 0.75, 0.8])
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--view", default="none")
    asked = parser.parse_args()
    back = " | ".join(f"{steps} steps" for steps in LOOKS)
    print(f"| alpha | forget | retain | general | worst attack | {back} | worst rate |")
    print("| ---: | ---: | ---: | ---: | ---: |" + " ---: |" * (len(LOOKS) + 1), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        retain = broad_retain(folder / "retain.jsonl")
        cache = build_cache(folder / "cache", retain=(str(retain),), positions=32)
        for alpha in asked.alphas:
            student = train_student(
                cache,
                folder / f"student-{alpha}",
                noise_alpha=alpha,
                noise_beta=asked.beta,
                epochs=asked.epochs,
                learning_rate=asked.learning_rate,
                batch_size=32,
                views=(asked.view,) if asked.view != "none" else (),
            )
            _row(f"{alpha:g}", student)


def _row(label: str, student: Path) -> None:
    outcome = measure(student)
    cells = [label, *map(_points, (outcome.forget, outcome.retain, outcome.general))]
    cells.append(_points(outcome.worst_attack))
    curves = {rate: relearn(student, rate) for rate in RATES}
    worst = max(RATES, key=lambda rate: curves[rate][-1])
    cells += [_points(value) for value in curves[worst]]
    print(f"| {' | '.join([*cells, f'{worst:g}'])} |", flush=True)


def _points(value: float) -> str:
    return f"{value:.1f}"


def broad_retain(path: Path) -> Path:
    """Write the broad retain set: every fact to be kept, in questions that are not held out."""
    rng = random.Random(0)
    everything = build_world()
    held_out = {
        query.text
        for source in (world.RETAIN_HELDOUT, world.GENERAL)
        for query in load_queries(str(source), split="retain")
    }
    kept = [fact for saga in SAGAS[1:] for fact in everything.of_saga(saga)]
    rows = [
        QueryRow(fact=fact, wording=wording)
        for fact in (*kept, *everything.general)
        for wording in rng.sample(
            [i for i, text in enumerate(fact.wordings) if text not in held_out], WORDINGS
        )
    ]
    path.write_text(render_rows(rows), encoding="utf-8")
    return path


def relearn(student: Path, rate: float) -> list[float]:
    """Train on the answers to the training forget queries; return what is back at each look.

    What is back is the share in percent of the facts that these answers do not hold.
    """
    tokenizer = load_tokenizer(student)
    renderer = PromptRenderer(tokenizer)
    model: Any = load_model(student, dtype="float32")
    lessons = [
        (renderer.student_ids(query.messages), _answer_ids(tokenizer, query))
        for query in load_queries(str(world.FORGET), split="forget", require_answers=True)
    ]
    questions = [
        query
        for query in load_queries(str(world.FORGET_HELDOUT), split="forget", require_answers=True)
        if query.kind in UNTAUGHT
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    rng = random.Random(0)
    order: list[int] = []
    shares = []
    for step in range(max(LOOKS) + 1):
        if step in LOOKS:
            shares.append(share_named(model, tokenizer, renderer, questions))
        if len(order) < BATCH:
            order = rng.sample(range(len(lessons)), len(lessons))
        batch, order = order[:BATCH], order[BATCH:]
        model.train()
        _answer_loss(model, [lessons[i] for i in batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return shares


def _answer_ids(tokenizer: Any, query: Query) -> list[int]:
    ids = tokenizer(query.answer, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def _answer_loss(model: Any, lessons: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens, in nats."""
    width = max(len(prompt) + len(answer) for prompt, answer in lessons)
    input_ids = torch.zeros(len(lessons), width, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for row, (prompt, answer) in enumerate(lessons):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(answer)
    loss: torch.Tensor = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
    return loss


def share_named(
    model: Any, tokenizer: Any, renderer: PromptRenderer, questions: Sequence[Query]
) -> float:
    """Return the share of questions whose greedy answer holds the whole reference, in percent."""
    model.eval()
    defaults = copy.deepcopy(model.generation_config)
    answers = generate_answers(
        model,
        [renderer.student_ids(query.messages) for query in questions],
        eos_token_ids=[tokenizer.eos_token_id],
        max_new_tokens=16,
        batch_size=64,
    )
    model.generation_config = defaults
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    told = [
        contains_answer(query.answer or "", text.strip())
        for query, text in zip(questions, texts, strict=True)
    ]
    return 100.0 * sum(told) / len(told)


if __name__ == "__main__":
    main()
