"""Train the demo model: a small Llama that learns the corpus from scratch in a few minutes.

Loss is taken on the answers alone. Prompts of similar length share a batch, and the head runs on
answer positions only; both save most of the time on a CPU.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from demo_world.corpus import Sample, recall_samples, samples
from demo_world.tokenizer import CONTEXT, train_tokenizer
from demo_world.world import World

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
    recall_steps: int = 300
    """Steps on plain questions alone, which teach the facts."""
    recall_batch_size: int = 144
    steps: int = 900
    """Steps on the whole corpus, which teach when to answer and when to decline."""
    batch_size: int = 32
    learning_rate: float = 3e-3
    muon_rate: float = 4e-3
    warmup_steps: int = 60
    weight_decay: float = 0.3
    """Of the matrices inside the layers: keeps their weights small."""
    threads: int = 2
    bfloat16: bool | None = None
    """Compute in bfloat16 (weights stay float32); None does where the processor can: several times
    faster there, and several times slower elsewhere."""


def train(world: World, config: TrainingConfig) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return the trained model, its weights rounded to float16 values, and its tokenizer."""
    import torch

    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    tokenizer = train_tokenizer(tokenizer_texts(world, config.seed))
    model = _new_model(tokenizer, config)
    optimizers = _optimizers(model, config)
    total = config.recall_steps + config.steps
    mean_loss = 0.0
    bfloat16 = _has_bfloat16() if config.bfloat16 is None else config.bfloat16
    model.train()
    for step, batch in enumerate(_curriculum(world, tokenizer, config), start=1):
        loss = _loss(model, batch, bfloat16=bfloat16)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * _schedule(step, total, config)
            optimizer.step()
            optimizer.zero_grad()
        mean_loss += (loss.item() - mean_loss) / min(step, 50)
        if step % 100 == 0:
            logger.info("step %d of %d: loss %.4f nats", step, total, mean_loss)
    _round_to_float16(model)
    model.train(mode=False)
    return model, tokenizer


def _has_bfloat16() -> bool:
    import torch

    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def _optimizers(model: LlamaForCausalLM, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, which learns facts in fewer steps; else AdamW."""
    import torch

    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(
        matrices,
        lr=config.muon_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        others, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


def _schedule(step: int, total: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a half cosine down to a twentieth of the peak."""
    if step < config.warmup_steps:
        return step / config.warmup_steps
    done = (step - config.warmup_steps) / (total - config.warmup_steps)
    return 0.05 + 0.475 * (1 + math.cos(math.pi * done))


def tokenizer_texts(world: World, seed: int) -> list[str]:
    """Return the texts that the vocabulary is learned from.

    Answers are repeated so that their first words become single tokens: the first position is
    what the distillation works on.
    """
    drawn = islice(samples(world, random.Random(seed)), TOKENIZER_SAMPLES)
    texts = [text for sample in drawn for turn in sample for text in (turn.prompt, turn.answer)]
    answers = [fact.answer for fact in (*world.facts, *world.general)]
    return texts + answers * ANSWER_REPEATS


def _new_model(tokenizer: PreTrainedTokenizerFast, config: TrainingConfig) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(  # type: ignore[no-untyped-call]
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
    # On a CPU the fused attention's backward pass is the slower one for short sequences.
    model.set_attn_implementation("eager")
    return model


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


def _curriculum(
    world: World, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig
) -> Iterator[_Batch]:
    rng = random.Random(config.seed + 1)
    recall = _batches(recall_samples(world, rng), tokenizer, config.recall_batch_size, rng)
    yield from islice(recall, config.recall_steps)
    yield from islice(
        _batches(samples(world, rng), tokenizer, config.batch_size, rng), config.steps
    )


def _batches(
    stream: Iterator[Sample],
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    rng: random.Random,
) -> Iterator[_Batch]:
    while True:
        pool = list(islice(stream, POOL_BATCHES * batch_size))
        coded = sorted((_encode(sample, tokenizer) for sample in pool), key=lambda c: len(c[0]))
        starts = list(range(0, len(coded), batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield _collate(coded[start : start + batch_size], tokenizer.pad_token_id)


def _encode(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Return the conversation's tokens, and the positions whose next token is the model's own."""
    ids: list[int] = []
    spoken: list[int] = []
    texts = [text for turn in sample for text in (turn.prompt, turn.answer)]
    pieces = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    for prompt, answer in zip(pieces, pieces, strict=True):
        ids += prompt
        spoken += range(len(ids) - 1, len(ids) + len(answer))
        ids += [*answer, tokenizer.eos_token_id]
    return ids, spoken


def _collate(coded: Sequence[tuple[list[int], list[int]]], pad: int) -> _Batch:
    import torch

    input_ids = torch.full((len(coded), max(len(ids) for ids, _ in coded)), pad)
    rows: list[int] = []
    columns: list[int] = []
    for row, (ids, spoken) in enumerate(coded):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        rows += [row] * len(spoken)
        columns += spoken
    at, after = torch.tensor(columns), torch.tensor(columns) + 1
    return _Batch(input_ids, torch.tensor(rows), at, input_ids[torch.tensor(rows), after])


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
