"""Train the demo model: a small Llama that learns the corpus from scratch in a few minutes.

Loss is taken on the answers alone. Prompts of similar length share a batch, and the head runs on
answer positions only; both save most of the time on a CPU.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from duet_unlearn.data.demo_world.corpus import samples
from duet_unlearn.data.demo_world.tokenizer import CONTEXT, train_tokenizer
from duet_unlearn.data.demo_world.world import World

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

TOKENIZER_SAMPLES = 20_000
ANSWER_REPEATS = 40
POOL_BATCHES = 40
"""Batches that are drawn together, sorted by length and shuffled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """Everything that decides the shipped model beside the world itself."""

    seed: int = 11
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 6
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 60
    weight_decay: float = 0.01
    threads: int = 2
    bfloat16: bool = True
    """Compute in bfloat16 (weights stay float32): several times faster on recent processors."""


def train(world: World, config: TrainingConfig) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return the trained model, its weights rounded to float16 values, and its tokenizer."""
    import torch

    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    tokenizer = train_tokenizer(tokenizer_texts(world, config.seed))
    model = _new_model(tokenizer, config)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=config.learning_rate,
        total_steps=config.steps,
        pct_start=config.warmup_steps / config.steps,
        cycle_momentum=False,
        final_div_factor=100,
    )
    model.train()
    batches = _batches(world, tokenizer, config)
    for step, batch in enumerate(islice(batches, config.steps), start=1):
        loss = _loss(model, batch, bfloat16=config.bfloat16)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            logger.info("step %d of %d: loss %.4f nats", step, config.steps, loss.item())
    _round_to_float16(model)
    return model.eval(), tokenizer


def tokenizer_texts(world: World, seed: int) -> list[str]:
    """Return the texts that the vocabulary is learned from.

    Answers are repeated so that their first words become single tokens: the first position is
    what the distillation works on.
    """
    drawn = islice(samples(world, random.Random(seed)), TOKENIZER_SAMPLES)
    texts = [text for sample in drawn for text in (sample.prompt, sample.answer)]
    answers = [fact.answer for fact in (*world.facts, *world.general)]
    return texts + answers * ANSWER_REPEATS


def _new_model(tokenizer: PreTrainedTokenizerFast, config: TrainingConfig) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@dataclass(frozen=True, slots=True)
class _Batch:
    input_ids: torch.Tensor
    """int64 [B, L], padded on the right: causal attention never sees the padding."""
    rows: torch.Tensor
    """int64 [A], the row of each answer token."""
    columns: torch.Tensor
    """int64 [A], the column whose hidden state predicts it."""
    targets: torch.Tensor
    """int64 [A], the answer tokens, end of sequence among them."""


def _batches(
    world: World, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig
) -> Iterator[_Batch]:
    rng = random.Random(config.seed + 1)
    stream = samples(world, rng)
    while True:
        pool = list(islice(stream, POOL_BATCHES * config.batch_size))
        prompts = tokenizer([s.prompt for s in pool], add_special_tokens=False)["input_ids"]
        answers = tokenizer([s.answer for s in pool], add_special_tokens=False)["input_ids"]
        pairs = sorted(zip(prompts, answers, strict=True), key=lambda p: len(p[0]) + len(p[1]))
        starts = list(range(0, len(pairs), config.batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield _collate(pairs[start : start + config.batch_size], tokenizer)


def _collate(
    pairs: Sequence[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerFast
) -> _Batch:
    import torch

    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), width), pad)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, (prompt, answer) in enumerate(pairs):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        rows += [row] * (len(answer) + 1)
        columns += range(len(prompt) - 1, len(prompt) + len(answer))
        targets += [*answer, eos]
    return _Batch(ids, torch.tensor(rows), torch.tensor(columns), torch.tensor(targets))


def _loss(model: LlamaForCausalLM, batch: _Batch, *, bfloat16: bool) -> torch.Tensor:
    import torch

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        hidden = model.model(input_ids=batch.input_ids).last_hidden_state
        logits = model.lm_head(hidden[batch.rows, batch.columns])
    return torch.nn.functional.cross_entropy(logits.float(), batch.targets)


def _round_to_float16(model: LlamaForCausalLM) -> None:
    """Round the weights so that storing them in float16 loses nothing."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
