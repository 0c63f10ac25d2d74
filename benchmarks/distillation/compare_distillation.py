"""One task, several ways to distill: a cache, an online teacher, TRL, DistillKit.

    python benchmarks/distillation/compare_distillation.py TEACHER STUDENT [--steps 40]

TEACHER and STUDENT are model folders or hub ids that share a vocabulary. The task is text of this
Python's own standard library, cut into documents of whole lines; some of its files are held out.
All students start from the same weights with the same LoRA adapter, take the same documents in the
same order, and lower the forward divergence from the teacher with AdamW at one rate. They differ in
where the teacher's side comes from:

- cache, kl-tail: Top-K logits that `duet-cache build` wrote before; the build's time stands apart.
- online teacher: the teacher runs in every step, over its whole vocabulary, in a plain loop.
- TRL: `GKDTrainer` with `lmbda=0` (the given documents), `beta=0` (forward divergence).
- DistillKit: its `sparse_kl_div` on the same Top-K signals, the student's whole logits beside them.

TRL is among the development dependencies. DistillKit is on no index and wants an older TRL, but its
losses do not: `pip install --no-deps --target DIR git+https://github.com/arcee-ai/DistillKit`, and
put DIR on PYTHONPATH. A way that cannot run says why.

Printed are, on held-out documents after some of the steps, cross-entropy and the divergence from
the teacher over whole distributions, both in nats a token, and the seconds of training up to there.
"""

import argparse
import json
import random
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_distillation import divergences, train
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel as Model
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from duet_unlearn.data.models.loading import load_model
from duet_unlearn.data.prompts import load_tokenizer
from duet_unlearn.distill.batches.dataset import CacheDataset, collate
from duet_unlearn.distill.batches.sampler import PLAIN, Draw, sampler_of
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.model.student import open_student
from duet_unlearn.distill.model.trainable import select_trained
from duet_unlearn.distill.objectives.base import Objective, open_objective
from duet_unlearn.errors import first_line
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.config import BuildConfig
from duet_unlearn.teacher_cache.reader import CacheReader

HELD_OUT = 8
RANK = 16
_A_FILE = 4  # documents, so that no file is most of the task


def documents(tokenizer: Any, tokens: int, train_on: int) -> tuple[list[str], list[str]]:
    """Return texts to train on, and texts of other files; each has at most so many tokens.

    Raises:
        SystemExit: The library is too small for that many.
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(files)
    # A fifth of the files is held out, and of each one document.
    held_out = [text for path in files[::5] for text in _cut(path, tokenizer, tokens)[:1]]
    others = [path for number, path in enumerate(files) if number % 5]
    trained = [text for path in others for text in _cut(path, tokenizer, tokens)[:_A_FILE]]
    if len(trained) < train_on or len(held_out) < HELD_OUT:
        raise SystemExit(
            f"error: the standard library has {len(trained)} documents of {tokens} tokens, "
            f"expected {train_on}; give fewer --steps, or a smaller --batch or --tokens"
        )
    return trained[:train_on], held_out[:HELD_OUT]


def _cut(path: Path, tokenizer: Any, tokens: int) -> list[str]:
    """Cut a file between its lines; a piece that is much shorter or too long is left out."""
    found: list[str] = []
    text, length = "", 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        added = len(tokenizer(line, add_special_tokens=False)["input_ids"])
        if length + added >= tokens and text:  # less than: one may begin with a special token
            found += [text] if tokens // 2 < length < tokens else []
            text, length = "", 0
        text, length = text + line, length + added
        if len(found) == _A_FILE:
            break
    return found


class Examined:
    """Held-out documents with what the teacher says along them."""

    def __init__(self, teacher: Model, rows: CacheDataset) -> None:
        self._batches = [collate([rows[Draw(row, PLAIN, 0.0)]]) for row in range(len(rows))]
        self._teacher_TV = [_log_shares(teacher, batch).half() for batch in self._batches]

    def __call__(self, student: Model) -> tuple[float, float]:
        """Return cross-entropy and divergence from the teacher, means over all tokens in nats."""
        sums, tokens = torch.zeros(2), 0
        for batch, teacher_TV in zip(self._batches, self._teacher_TV, strict=True):
            found_TV, wanted_T = _log_shares(student, batch), batch["response_ids"][0]
            sums[0] += nll_loss(found_TV, wanted_T, reduction="sum")
            sums[1] += kl_div(found_TV, teacher_TV.float(), log_target=True, reduction="sum")
            tokens += len(wanted_T)
        of_tokens, divergence = (sums / tokens).tolist()
        return of_tokens, divergence


@torch.no_grad()
def _log_shares(model: Model, row: dict[str, Any]) -> Tensor:
    """Return log-probabilities at the scored positions of a batch of one, `[T, V]` float32."""
    training, positions = model.training, row["position_mask"].shape[1]
    model.eval()
    logits_TV = model(row["input_ids"], logits_to_keep=positions).logits[0]
    model.train(training)
    return logits_TV.float().log_softmax(dim=-1)


class Course:
    """What is measured on the way, and the seconds that training took without it."""

    def __init__(self, examined: Examined, student: Model, at: list[int]) -> None:
        self._examined, self._student, self._at = examined, student, at
        self.cells = ["{:.3f} / {:.3f}".format(*examined(student))]
        self.begin()

    def begin(self) -> None:
        """Start the clock."""
        self._seconds, self._since = 0.0, time.perf_counter()

    def step(self, done: int) -> None:
        """Note the end of a step."""
        self._seconds += time.perf_counter() - self._since
        if done in self._at:
            found = self._examined(self._student)
            self.cells.append("{:.3f} / {:.3f}, {:.0f} s".format(*found, self._seconds))
        self._since = time.perf_counter()


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What every way to distill is given."""

    objective: Objective
    config: RunConfig
    student: Model
    teacher: Model
    course: Course

    def train_by(self, losses: Callable[[dict[str, Any]], Tensor]) -> None:
        """Train in a plain loop, by a function from a batch to one loss a row."""
        steps = int(self.config.max_steps or 0)
        for done in train(self.objective, self.config, self.student, losses, steps):
            self.course.step(done)


def from_cache(task: Task) -> None:
    """Train on the cache as `duet-distill run` does."""
    task.train_by(lambda batch: task.objective.row_losses(task.student, batch))


def online(task: Task) -> None:
    """Train with the teacher in every step."""
    task.train_by(lambda batch: divergences(task.teacher, task.student, batch))


def with_distillkit(task: Task) -> None:
    """Train on the cached signals by DistillKit's loss with its own defaults."""
    from distillkit.lossfuncs import sparse_kl_div

    def losses(batch: dict[str, Any]) -> Tensor:
        mask_BT = batch["position_mask"]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        logits_BTV = task.student(**inputs, logits_to_keep=mask_BT.shape[1]).logits
        cached_BTK = batch["teacher_logits"] - batch["teacher_logsumexp"][..., None]
        # It sums over what it is given: one row each, for its mean.
        rows = zip(logits_BTV, batch["token_ids"], cached_BTK, mask_BT, strict=True)
        sums = [sparse_kl_div(*(x[None] for x in row)) for row in rows]
        return torch.stack(sums) / mask_BT.sum(dim=-1)

    task.train_by(losses)


def with_trl(task: Task) -> None:
    """Train by TRL's GKDTrainer on the same documents in the same order."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            task.course.begin()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            task.course.step(state.global_step)

    def pad(rows: list[dict[str, int]]) -> dict[str, Tensor]:
        examples = [task.objective.dataset[Draw(row["row"], PLAIN, 0.0)] for row in rows]
        parts = [(e.prompt_ids.tolist(), e.response_ids.tolist()) for e in examples]
        ids = [torch.tensor(prompt + response) for prompt, response in parts]
        labels = [torch.tensor([-100] * len(prompt) + response) for prompt, response in parts]
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }

    config, order = task.config, sampler_of(task.objective.order, task.config)
    with tempfile.TemporaryDirectory() as scratch:
        args = GKDConfig(
            output_dir=scratch,
            max_steps=config.max_steps,
            per_device_train_batch_size=config.batch_size,
            train_sampling_strategy="sequential",
            learning_rate=config.learning_rate,
            lr_scheduler_type="constant",
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.accelerator.is_available(),
        )
        trainer = GKDTrainer(
            model=task.student,
            teacher_model=task.teacher,
            args=args,
            data_collator=pad,
            train_dataset=Dataset.from_dict({"row": [d.row for draws in order for d in draws]}),
            processing_class=load_tokenizer(open_student(config.student).folder),
            callbacks=[Watch()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


WAYS: dict[str, Callable[[Task], None]] = {
    "cache, kl-tail": from_cache,
    "online teacher": online,
    "TRL, GKDTrainer": with_trl,
    "DistillKit, sparse_kl_div": with_distillkit,
}


def main() -> None:
    """Build the caches, then train by each way; print a row of the table as it is done."""
    arguments = _arguments()
    steps, rows = arguments.steps, arguments.steps * arguments.batch
    at = sorted({-(-steps * part // 4) for part in range(1, 5)})
    base = open_student(arguments.student)
    texts = documents(load_tokenizer(base.folder), arguments.tokens, rows)
    with tempfile.TemporaryDirectory() as scratch:
        caches = []
        for name, documents_of in zip(("train", "held-out"), texts, strict=True):
            started = time.perf_counter()
            caches.append(_build(Path(scratch) / name, documents_of, arguments))
            seconds = time.perf_counter() - started
            print(f"cache of {len(documents_of)} {name} documents: {seconds:.0f} s")
        teacher = load_model(open_student(arguments.teacher).folder)
        examined = Examined(teacher, CacheDataset(CacheReader.open(str(caches[1]))))
        config = RunConfig(
            cache=str(caches[0]),
            student=arguments.student,
            out="none",
            loss="kl-tail",
            lora_rank=RANK,
            learning_rate=arguments.rate,
            batch_size=arguments.batch,
            max_steps=steps,
            epochs=1,
        )
        print(f"held-out cross-entropy of the teacher: {examined(teacher)[0]:.3f}\n")
        columns = [f"{number} steps" for number in (0, *at)]
        print(f"| cross-entropy / divergence | {' | '.join(columns)} |")
        print("| --- |" + " ---: |" * len(columns), flush=True)
        for label, way in WAYS.items():
            whole = load_model(base.folder, trainable=True)
            student, _ = select_trained(whole, config)
            student.train()
            objective = open_objective(config, base)
            objective.attach(student)
            course = Course(examined, student, at)
            task = Task(
                objective=objective, config=config, student=student, teacher=teacher, course=course
            )
            try:
                way(task)
            except (ImportError, TypeError, ValueError) as error:
                print(f"{label} cannot run: {first_line(error)}", flush=True)
                continue
            print(f"| {label} | {' | '.join(course.cells)} |", flush=True)


def _build(out: Path, texts: list[str], arguments: argparse.Namespace) -> Path:
    source = out.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = BuildConfig(
        teacher=arguments.teacher,
        prefix=None,
        responses=(str(source),),
        out=out,
        engine="transformers",
        positions=arguments.tokens,
        logit_dtype="float32",
    )
    if (found := build(config).manifest.num_rows) != len(texts):
        raise SystemExit(f"error: {len(texts)} documents are {found} rows; expected one each")
    return out


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4, help="documents a step")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens of a document")
    parser.add_argument("--rate", type=float, default=2e-4, help="AdamW's learning rate")
    return parser.parse_args()


if __name__ == "__main__":
    main()
