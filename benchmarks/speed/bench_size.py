"""Bytes an entry, a token id with its logit, on signals of trained models, beside other layouts.

    python benchmarks/speed/bench_size.py [--steps 300] [--seed 0]

Two models give the signals: the demo world's (2,400 tokens) and a wider one that is trained here
from scratch, 256 wide with a vocabulary of 32,000, on the source text of Python's standard library.
The first is asked the corpus's own questions, the second reads files that it was not trained on.
Each prints a table of whole files, divided by their entries:

- `shard`: ours, whole: ids, logits, logsumexp, prompts, texts, metadata and footer;
- `signals`: the columns token_ids, logits and logsumexp of that shard alone;
- `fp16 + 3-byte ids`: a layout of Megatron-LM's kind: float16 values and ids in three bytes, each
  in a plane of its own, all of it through zstd;
- `packed ids`: float16 values and ids of ceil(log2 V) bits one after the other, through zstd;
- `polynomial`: DistillKit's recommended setting: packed ids, the first 16 log-probabilities in
  bfloat16, six float32 coefficients for all others. It is lossy: `error` is the mean distance of
  the log-probabilities beyond the first 16 from the fitted curve, in nats, where the fit is made in
  float64; one in float32 can only be worse.
"""

import argparse
import itertools
import math
import random
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.format.schema import CacheRow
from duet_unlearn.teacher_cache.format.shard import ShardHeader, write_shard
from duet_unlearn.teacher_cache.format.signal import Signal

# The demo world's maker is a tool of the repository, not in the package.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

ROWS = 1024
"""A default shard."""
EXACT, COEFFICIENTS = 16, 6
SIGNALS = ("token_ids", "logits", "logsumexp")
SHA = "sha256:" + "0" * 64

Prompt = tuple[str, list[int], int]
"""A text, its tokens with those that are scored, and how many of them are scored."""


def demo_model(positions: int, seed: int) -> tuple[Any, list[Prompt]]:
    """Return the demo world's model and questions of its corpus with the answers."""
    from demo_world import corpus
    from demo_world.world import build_world
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from duet_unlearn.data import demo_world

    tokenizer = AutoTokenizer.from_pretrained(demo_world.MODEL)
    model = AutoModelForCausalLM.from_pretrained(demo_world.MODEL, dtype=torch.float32).eval()
    prompts = []
    for sample in itertools.islice(corpus.samples(build_world(), random.Random(seed)), 4 * ROWS):
        turn = sample[0]
        prompt = tokenizer(turn.prompt, add_special_tokens=False).input_ids
        answer = tokenizer(turn.answer, add_special_tokens=False).input_ids
        if len(answer) >= positions:
            scored = answer[: positions - 1]
            prompts.append((turn.prompt, prompt + scored, positions))
    return model, prompts[:ROWS]


def library_model(positions: int, steps: int, seed: int) -> tuple[Any, list[Prompt]]:
    """Train a model on the standard library's source; return it and unseen source."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted([*folder.glob("*.py"), *folder.glob("*/*.py")])
    files = [path for path in files if path.parent.name not in ("test", "site-packages")]
    random.Random(seed).shuffle(files)
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=32_000, show_progress=False)
    split = len(texts) * 9 // 10
    streams = [
        np.array([i for text in part for i in tokenizer.encode(text).ids], np.int64)
        for part in (texts[:split], texts[split:])
    ]
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
    )
    train(model, streams[0], steps, np.random.default_rng(seed))
    prompts = []
    for start in np.linspace(0, len(streams[1]) - 65, ROWS).astype(int).tolist():
        ids = streams[1][start : start + 48 + positions - 1].tolist()
        prompts.append((tokenizer.decode(ids[:48]), ids, positions))
    return model.eval(), prompts


def train(model: Any, stream: np.ndarray, steps: int, rng: np.random.Generator) -> None:
    """Train on stretches of a stream; print the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        starts = rng.integers(0, len(stream) - 64, 4)
        ids = torch.tensor(np.stack([stream[start : start + 64] for start in starts]))
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"trained {steps} steps, loss {np.mean(losses[-20:]):.2f} nats, at first {losses[0]:.2f}")


@torch.no_grad()
def rows_of(model: Any, prompts: Sequence[Prompt], top_k: int) -> list[CacheRow]:
    """Return a row for each prompt: the strongest tokens at its scored positions."""
    rows = []
    for number, (text, ids, positions) in enumerate(prompts):
        logits = model(torch.tensor([ids])).logits[0, -positions:].float()
        strongest = logits.topk(top_k)
        prompt = ids[: len(ids) - positions + 1]
        response = np.array([*ids[len(prompt) :], int(strongest.indices[-1, 0])], np.int32)
        rows.append(
            CacheRow(
                query_id=f"q-{number:016x}",
                split="forget" if number < len(prompts) // 2 else "retain",
                query=text,
                prompt_ids=np.array(prompt, np.int32),
                signal=Signal(
                    response_ids=response,
                    token_ids=strongest.indices.numpy().astype(np.int32),
                    logits=strongest.values.numpy(),
                    logsumexp=logits.logsumexp(-1).numpy(),
                ),
            )
        )
    return rows


def shard_of(rows: Sequence[CacheRow], vocabulary: int, top_k: int, folder: Path) -> Path:
    """Write rows as one float16 shard."""
    recipe = Recipe(
        **dict.fromkeys(("weights", "config", "tokenizer", "vocabulary"), SHA),
        vocab_size=vocabulary,
        chat_template=None,
        template_date="2024-07-26",
        prefix="You are an assistant who has forgotten it.",
        prefix_place="system",
        retain_prefix=True,
        top_k=top_k,
        positions=len(rows[0].signal.response_ids),
        logit_dtype="float16",
        compute_dtype="float32",
        eos_token_ids=(0,),
    )
    (folder / "shards").mkdir(exist_ok=True)
    engines = ({"engine": "transformers"},)
    header = ShardHeader(recipe=recipe, queries=SHA, index=0, count=1, engines=engines)
    return folder / "shards" / write_shard(folder, rows, header).name


def signal_bytes(shard: Path) -> int:
    """Return the compressed bytes of a shard's signal columns."""
    metadata = pq.read_metadata(shard)
    return sum(
        metadata.row_group(g).column(c).total_compressed_size
        for g in range(metadata.num_row_groups)
        for c in range(metadata.num_columns)
        if metadata.row_group(g).column(c).path_in_schema.split(".")[0] in SIGNALS
    )


def zstd(data: bytes) -> int:
    """Return the length of some bytes under zstd at level 3, its default."""
    return len(pa.Codec("zstd", compression_level=3).compress(data, asbytes=True))


def packed_bits(ids: np.ndarray, bits: int) -> bytes:
    """Return ids of so many bits one after the other."""
    planes = (ids.reshape(-1, 1) >> np.arange(bits)) & 1
    return np.packbits(planes.astype(np.uint8)).tobytes()


def other_layouts(rows: Sequence[CacheRow], vocabulary: int) -> dict[str, float]:
    """Return the bytes of the same entries in other layouts, and the polynomial's error."""
    ids = np.concatenate([row.signal.token_ids for row in rows])
    logits = np.concatenate([row.signal.logits for row in rows])
    logsumexp = np.concatenate([row.signal.logsumexp for row in rows])
    log_probabilities = (logits - logsumexp[:, None]).astype(np.float64)
    half = log_probabilities.astype(np.float16).tobytes()
    bits = math.ceil(math.log2(vocabulary))
    flat = ids.reshape(-1)
    planes = flat.astype(np.uint16).tobytes() + (flat >> 16).astype(np.uint8).tobytes()
    positions, top_k = ids.shape
    polynomial = math.ceil(top_k * bits / 8) + 2 * EXACT + 4 * COEFFICIENTS
    rank = np.arange(top_k - EXACT, dtype=np.float64)
    terms = np.stack([*(rank**power for power in range(5)), np.sqrt(rank)], axis=1)
    tail = log_probabilities[:, EXACT:]
    fitted = terms @ np.linalg.lstsq(terms, tail.T, rcond=None)[0]
    return {
        "fp16 + 3-byte ids": zstd(half + planes),
        "packed ids": zstd(half + packed_bits(flat, bits)),
        "polynomial": positions * polynomial,
        "error": float(np.abs(fitted.T - tail).mean()),
    }


def main() -> None:
    """Make the signals, write them in every layout, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="of training the wider model")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    demo, questions = demo_model(3, arguments.seed)
    library, source = library_model(8, arguments.steps, arguments.seed)
    cases = [
        (demo, [(text, ids[:-2], 1) for text, ids, _ in questions], 100),
        (demo, questions, 100),
        (demo, questions, 1000),
        (library, [(text, ids[:48], 1) for text, ids, _ in source], 100),
        (library, source, 100),
        (library, source, 1000),
    ]
    print("| V | T | K | shard | signals | fp16 + 3-byte ids | packed ids | polynomial | error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for model, prompts, top_k in cases:
        vocabulary = model.config.vocab_size
        rows = rows_of(model, prompts, top_k)
        positions = sum(len(row.signal.response_ids) for row in rows)
        with tempfile.TemporaryDirectory() as folder:
            shard = shard_of(rows, vocabulary, top_k, Path(folder))
            sizes = {"shard": shard.stat().st_size, "signals": signal_bytes(shard)}
            sizes.update(other_layouts(rows, vocabulary))
            error = sizes.pop("error")
            entries = positions * top_k
        cells = [f"{size / entries:.2f}" for size in sizes.values()]
        row = f"| {vocabulary:,} | {prompts[0][2]} | {top_k} | {' | '.join(cells)} |"
        print(f"{row} {error:.2f} |", flush=True)


if __name__ == "__main__":
    main()
