"""One training step against a bare one, an online teacher and TRL's GKD: seconds and memory.

    python benchmarks/speed/bench_step.py [--positions 1 64] [--rounds 7]
    python benchmarks/speed/bench_step.py --bf16 --hidden 2048 --layers 16     # on a GPU

A random-weight Llama with a vocabulary of 128,000 and tied embeddings, batches of 16 queries of 64
tokens, K = 100. Every side runs in a process of its own with the same model, batches, AdamW and
gradient clipping, and a process is told when to take its next step, so that two sides alternate:

- ours: the product's trainer, from the cache's files to the updated weights;
- bare: forward and backward with the head on the scored positions only, batches already in memory;
- online: a teacher of the same size beside the student, logits of every position of both, forward
  KL over the whole vocabulary with a mask, as distillation scripts do; the teacher reads a steering
  prefix of 32 tokens in front, which is what makes it a teacher (`--prefix 0` leaves it out);
- GKD: the same two models under `trl`'s generalized JSD loss, which knows one prompt for both, on
  the scored positions;
- ours, kl-tail: a loss that needs the student's whole vocabulary at every scored position.

Medians over the rounds; peak memory is the process's own (on a GPU, the allocator's).
"""

import argparse
import contextlib
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench_read import VOCABULARY, write_cache

BATCH, PROMPT = 16, 64
OURS, TAIL, BARE, ONLINE, GKD = "ours", "ours, kl-tail", "bare", "online", "GKD"
PAIRS = ((OURS, BARE), (OURS, ONLINE), (OURS, GKD), (TAIL, BARE))
WARM_UP = 2

Step = Callable[[dict[str, Any]], None]


def make_model(arguments: argparse.Namespace, seed: int) -> Any:
    """Return a random Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    heads = arguments.hidden // 64
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 8 // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def make_trainer(arguments: argparse.Namespace, loss: str, callbacks: list[Any]) -> Any:
    """Return the product's trainer over the cache, with its own settings."""
    from duet_unlearn.distill.config import RunConfig
    from duet_unlearn.distill.model.student import Student
    from duet_unlearn.distill.objectives.duet import Duet
    from duet_unlearn.distill.training.arguments import training_arguments
    from duet_unlearn.distill.training.trainer import DuetTrainer

    config = RunConfig(
        cache=str(arguments.cache),
        student="random",
        out="none",
        loss=loss,
        learning_rate=1e-4,
        batch_size=BATCH,
        epochs=1000,
        dtype="float32",
        precision="bf16" if arguments.bf16 else "float32",
        save_steps=0,
    )
    student = Student(
        name="random",
        folder=Path(),
        hidden_size=arguments.hidden,
        head_width=VOCABULARY,
        max_length=None,
        stored_dtype="float32",
        weights="none",
        config="none",
        chat_template=None,
        licence=None,
    )
    return DuetTrainer(
        config=config,
        model=make_model(arguments, 0),
        args=training_arguments(config, Path(arguments.cache) / "work"),
        objective=Duet(config, student),
        callbacks=callbacks,
    )


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wait_for_turn() -> bool:
    """Say that this side is ready; return False when it is to end."""
    return sys.stdin.readline().strip() == "step"


def answer(value: Any) -> None:
    """Send one line to the parent."""
    print(json.dumps(value), flush=True)


def run_ours(arguments: argparse.Namespace, loss: str) -> float:
    """Take steps inside `Trainer.train`; return the share of them that was spent on data."""
    from transformers import TrainerCallback

    spent = {"steps": 0.0, "data": 0.0, "started": 0.0}

    class Turns(TrainerCallback):
        """Waits for the parent between two steps."""

        def on_train_begin(self, args, state, control, **_):  # noqa: ARG002
            wait_for_turn()
            spent["started"] = time.perf_counter()

        def on_step_end(self, args, state, control, **_):  # noqa: ARG002
            synchronize()
            seconds = time.perf_counter() - spent["started"]
            if state.global_step > WARM_UP:
                spent["steps"] += seconds
            else:
                spent["data"] = 0.0
            answer(seconds)
            control.should_training_stop = not wait_for_turn()
            spent["started"] = time.perf_counter()

    trainer = make_trainer(arguments, loss, [Turns()])
    loader = trainer.get_train_dataloader()
    plain = type(loader).__iter__

    def timed(self: Any) -> Iterator[Any]:
        batches = plain(self)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            spent["data"] += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    type(loader).__iter__ = timed
    trainer.train()
    return spent["data"] / spent["steps"]


def run_baseline(arguments: argparse.Namespace, side: str) -> None:
    """Take steps with the optimizer and the batches of our trainer."""
    import torch
    from transformers import Trainer

    trainer = make_trainer(arguments, "huber", [])
    model, device = trainer.model, trainer.args.device
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(trainer.args)
    optimizer = kind(model.parameters(), **settings)
    precision: Any = contextlib.nullcontext()
    if arguments.bf16:
        precision = torch.autocast(device.type, dtype=torch.bfloat16)
    teacher = make_model(arguments, 1).to(device).eval() if side != BARE else None
    losses = {BARE: bare_loss, GKD: gkd_loss}
    losses[ONLINE] = functools.partial(online_loss, prefix=arguments.prefix)
    loss_of = losses[side]
    batches = [
        {name: value for name, value in batch.items() if hasattr(value, "to")}
        for batch, _ in zip(trainer.get_train_dataloader(), range(4), strict=False)
    ]
    del trainer
    model.train()
    for number in range(1_000_000):
        if not wait_for_turn():
            return
        started = time.perf_counter()
        batch = {name: value.to(device) for name, value in batches[number % 4].items()}
        with precision:
            loss = loss_of(model, teacher, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        answer(time.perf_counter() - started)


def logits_of(model: Any, batch: dict[str, Any], positions: int = 0) -> Any:
    """Return `[B, L, V]` logits, or those of the last positions."""
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: batch[name] for name in names}
    return model(**inputs, logits_to_keep=positions, use_cache=False).logits


def bare_loss(model: Any, teacher: Any, batch: dict[str, Any]) -> Any:  # noqa: ARG001
    """Give a gradient to every scored logit, at no cost worth naming."""
    return logits_of(model, batch, batch["position_mask"].shape[1]).mean()


def behind_prefix(batch: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Put the same number of tokens in front of every row."""
    import torch

    rows, device = len(batch["input_ids"]), batch["input_ids"].device
    prefix = torch.arange(1, tokens + 1, device=device).expand(rows, -1)
    mask = torch.cat([torch.ones_like(prefix), batch["attention_mask"]], dim=1)
    return {
        "input_ids": torch.cat([prefix, batch["input_ids"]], dim=1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def online_loss(model: Any, teacher: Any, batch: dict[str, Any], *, prefix: int) -> Any:
    """Forward KL over the whole vocabulary at the scored positions, the others masked."""
    import torch
    from torch.nn.functional import kl_div

    with torch.no_grad():
        target = logits_of(teacher, behind_prefix(batch, prefix))[:, prefix:]
        target = target.float().log_softmax(-1)
    found = logits_of(model, batch).float().log_softmax(-1)
    losses = kl_div(found, target, reduction="none", log_target=True).sum(-1)
    mask = torch.zeros_like(losses)
    mask[:, -batch["position_mask"].shape[1] :] = batch["position_mask"]
    return (losses * mask).sum() / mask.sum()


def gkd_loss(model: Any, teacher: Any, batch: dict[str, Any]) -> Any:
    """TRL's loss, called as its trainer calls it: logits of all positions, sliced to the answer."""
    import torch
    from trl.experimental.gkd import GKDTrainer

    scored = slice(-batch["position_mask"].shape[1], None)
    found = logits_of(model, batch)
    with torch.no_grad():
        target = logits_of(teacher, batch)
    labels = torch.where(batch["position_mask"], 0, -100)
    return GKDTrainer.generalized_jsd_loss(
        student_logits=found[:, scored], teacher_logits=target[:, scored], labels=labels, beta=0.5
    )


def run_side(arguments: argparse.Namespace) -> None:
    """Be one side, and tell the peak of memory at the end."""
    from duet_unlearn.distill.job import peak_memory

    share = None
    if arguments.side in (OURS, TAIL):
        share = run_ours(arguments, "huber" if arguments.side == OURS else "kl-tail")
    else:
        run_baseline(arguments, arguments.side)
    answer({"peak": peak_memory(), "data": share})


class Side:
    """A side in its own process."""

    def __init__(self, name: str, cache: Path, flags: list[str]) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.end: dict[str, Any] = {}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--side", name, "--cache", str(cache), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def warm_up(self) -> None:
        """Take the first steps, which allocate and plan, and forget their times."""
        for _ in range(WARM_UP):
            self.step()
        self.seconds.clear()

    def _ask(self, word: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def step(self) -> None:
        """Take a step and keep its time."""
        self.seconds.append(self._ask("step"))

    def close(self) -> None:
        """End the process."""
        self.end = self._ask("end")
        self._process.wait()


def compare(name: str, baseline: str, cache: Path, flags: list[str], rounds: int) -> None:
    """Alternate one of our losses with a baseline and print the row."""
    sides = [Side(name, cache, flags), Side(baseline, cache, flags)]
    for side in sides:
        side.warm_up()
    for _ in range(rounds):
        for side in sides:
            side.step()
    for side in sides:
        side.close()
    ours, other = (statistics.median(side.seconds) for side in sides)
    peaks = [side.end["peak"] / 2**30 for side in sides]
    print(
        f"| {name} | {baseline} | {ours:.3f} s | {other:.3f} s | {ours / other:.2f} | "
        f"{other / ours:.1f} x | {peaks[0]:.2f} GiB | {peaks[1]:.2f} GiB | "
        f"{peaks[0] / peaks[1]:.2f} | {100 * sides[0].end['data']:.2f}% |",
        flush=True,
    )


def main() -> None:
    """Measure every side and print a table for each number of positions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--positions", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=384, help="Width, a multiple of 64.")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prefix", type=int, default=32, help="Tokens before the online teacher.")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments)
        return
    flags = ["--hidden", str(arguments.hidden), "--layers", str(arguments.layers)]
    flags += ["--prefix", str(arguments.prefix)]
    flags += ["--bf16"] if arguments.bf16 else []
    for positions in arguments.positions:
        print(f"\n{positions} position{'s' if positions > 1 else ''}\n")
        print(
            "| side | against | step | its step | ratio | times as fast | peak | its peak | ratio "
            "| data |"
        )
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            cache = Path(scratch) / "cache"
            write_cache(
                cache,
                shards=1,
                positions=positions,
                shard_positions=32 * BATCH * positions,
                prompt_tokens=PROMPT,
            )
            for name, baseline in PAIRS:
                compare(name, baseline, cache, flags, arguments.rounds)


if __name__ == "__main__":
    main()
