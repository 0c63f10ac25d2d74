"""Queries a second of `duet-cache build`, beside what else could run the same teacher.

    python benchmarks/speed/bench_build.py [--rounds 3] [--top-k 100 1000] [--scored]

The work: a random-weight Llama of about 40M parameters with a vocabulary of 32,000 in float32, and
512 queries of 32 tokens behind a steering prefix of 64. Every side runs in a process of its own,
started once; the sides take turns, each round has queries of its own, and the table shows medians
over the rounds.

- build: the whole of `duet-cache build` from the moment that its engine is ready to the manifest.
- generate: bare `LLM.generate(max_tokens=1)` without log-probabilities, same engine settings.
- transformers: a loop over batches with `logits_to_keep=1`, Top-K and logsumexp kept in memory.
- prompt_logprobs: capture as peers do it, through `prompt_logprobs=K` of the last prompt token.

With --scored the work is documents of 96 tokens, scored at every token: the build reads them with
`--no-prefix --responses`, bare vLLM computes the same prefill, transformers keeps the Top-K of all
positions, and `prompt_logprobs` is what gives peers those of a given text.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, WIDTH, LAYERS, HEADS, INNER = 32_000, 512, 8, 8, 1376
PREFIX_TOKENS, QUERY_TOKENS, SHARD_ROWS = 64, 32, 1024
BATCH, SCORED_BATCH = 64, 8
MAX_LEN = 128
DOCUMENT_TOKENS = PREFIX_TOKENS + QUERY_TOKENS


def words(count: int, seed: int) -> str:
    """Return a text of that many tokens."""
    numbers = np.random.default_rng(seed).integers(3, VOCABULARY, count)
    return " ".join(f"w{number}" for number in numbers)


PREFIX = words(PREFIX_TOKENS, 0)


def queries(round_number: int, count: int) -> list[str]:
    """Return the texts of a round's queries."""
    return [words(QUERY_TOKENS, 1 + round_number * 100_003 + i) for i in range(count)]


def documents(round_number: int, count: int) -> list[str]:
    """Return the texts of a round that are scored, all of one length."""
    return [words(DOCUMENT_TOKENS, 1 + round_number * 100_003 + i) for i in range(count)]


def prompts(round_number: int, count: int, scored: bool) -> list[list[int]]:
    """Return the teacher's prompts of a round, as the build renders them."""
    if scored:
        texts = documents(round_number, count)
    else:
        texts = [f"{PREFIX} {query}" for query in queries(round_number, count)]
    return [[int(word[1:]) for word in text.split()] for text in texts]


def make_model(folder: Path) -> None:
    """Save a random Llama, and a tokenizer with one token a word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<eos>", "<pad>"]
    names = [*special, *(f"w{i}" for i in range(len(special), VOCABULARY))]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=MAX_LEN,
        initializer_range=0.1,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters", file=sys.stderr)


class BuildSide:
    """The real build; its engine is started once and lent to every build."""

    def __init__(self, model: Path, scratch: Path, top_k: int, scored: bool) -> None:
        self.model, self.scratch, self.top_k, self.scored = model, scratch, top_k, scored
        self.engine: Any = None
        self.ready = 0.0

    name = "vllm"
    continuous = True

    def signals(self, source: Any) -> Any:
        """Pass on to the engine."""
        return self.engine.signals(source)

    def responses(self, prompts: Any, max_new_tokens: int) -> Any:
        """Pass on to the engine."""
        return self.engine.responses(prompts, max_new_tokens)

    def describe(self) -> dict[str, Any]:
        """Pass on to the engine."""
        return dict(self.engine.describe())

    def close(self) -> None:
        """Keep the engine for the next round."""

    def _lend(self, config: Any) -> "BuildSide":
        from duet_unlearn.teacher_cache.engines import open_engine

        self.engine = self.engine or open_engine("vllm", config)
        self.ready = time.perf_counter()
        return self

    def run(self, round_number: int, count: int, top_k: int) -> float:
        """Return the seconds that a round took."""
        from duet_unlearn.teacher_cache.build.build import build
        from duet_unlearn.teacher_cache.build.config import BuildConfig

        del top_k
        file = self.scratch / f"queries-{self.top_k}-{round_number}.jsonl"
        name, texts = ("text", documents) if self.scored else ("query", queries)
        rows = ({"id": str(i), name: text} for i, text in enumerate(texts(round_number, count)))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        work: dict[str, Any] = {"forget": (str(file),), "prefix": PREFIX, "prefix_place": "raw"}
        if self.scored:
            work = {"responses": (str(file),), "prefix": None, "positions": DOCUMENT_TOKENS}
        config = BuildConfig(
            check=False,
            teacher=str(self.model),
            **work,
            out=self.scratch / f"cache-{self.top_k}-{round_number}",
            top_k=self.top_k,
            engine="vllm",
            shard_rows=SHARD_ROWS,
        )
        result = build(config, self._lend)
        ended = time.perf_counter()
        assert result.computed_rows == count
        return ended - self.ready


class VllmSide:
    """Bare vLLM with the settings that the build's engine resolved."""

    def __init__(
        self, model: Path, settings: dict[str, Any], most_logprobs: int, scored: bool
    ) -> None:
        from vllm import LLM

        self.scored = scored
        token = 2 * LAYERS * WIDTH * 4
        blocks = -(-settings["max_model_len"] // settings["block_size"])
        self.llm = LLM(
            model=str(model),
            dtype=settings["dtype"],
            max_model_len=settings["max_model_len"],
            max_num_seqs=settings["max_num_seqs"],
            max_num_batched_tokens=settings["max_num_batched_tokens"],
            block_size=settings["block_size"],
            kv_cache_memory_bytes=(blocks * settings["max_num_seqs"] + 16)
            * settings["block_size"]
            * token,
            enforce_eager=settings["enforce_eager"],
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            generation_config="vllm",
            seed=0,
            logprobs_mode="raw_logits",
            max_logprobs=most_logprobs,
        )

    def run(self, round_number: int, count: int, top_k: int) -> float:
        """Return the seconds that a round took."""
        from vllm import SamplingParams, TokensPrompt

        found = prompts(round_number, count, self.scored)
        texts = [TokensPrompt(prompt_token_ids=ids) for ids in found]
        peers = {"prompt_logprobs": top_k, "flat_logprobs": True} if top_k else {}
        params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, **peers)
        started = time.perf_counter()
        outputs = self.llm.generate(texts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        assert len(outputs) == count
        return seconds


class TransformersSide:
    """A plain loop over batches."""

    def __init__(self, model: Path, scored: bool) -> None:
        self.last = 0 if scored else 1  # 0: of all positions
        self.scored = scored
        import torch
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def run(self, round_number: int, count: int, top_k: int) -> float:
        """Return the seconds that a round took."""
        import torch

        ids = torch.tensor(prompts(round_number, count, self.scored))
        kept = []
        started = time.perf_counter()
        with torch.inference_mode():
            for batch in ids.split(SCORED_BATCH if self.scored else BATCH):
                logits = self.model(batch, logits_to_keep=self.last, use_cache=False).logits
                kept.append((logits.topk(top_k), logits.logsumexp(dim=-1)))
        return time.perf_counter() - started


class Side:
    """A side in a process of its own that answers one request at a time."""

    def __init__(
        self, words_: list[str], log: Path, environment: dict[str, str], scored: bool
    ) -> None:
        self.log = log
        words_ = [*words_, *(["--scored"] if scored else [])]
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--side", *words_],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
        )

    def ask(self, **request: int) -> Any:
        """Return the answer to a request."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise SystemExit(f"a side ended: {self.log.read_text()[-2000:]}")

    def end(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(kind: str, model: Path, scratch: Path, rest: str, scored: bool) -> None:
    """Answer requests on standard input until it closes."""
    side: Any
    if kind == "build":
        side = BuildSide(model, scratch, int(rest), scored)
    elif kind == "vllm":
        side = VllmSide(model, *json.loads(rest), scored)
    else:
        side = TransformersSide(model, scored)
    for line in sys.stdin:
        request = json.loads(line)
        seconds = side.run(request["round"], request["count"], request["top_k"])
        settings = side.describe()["settings"] if kind == "build" else {}
        print("answer", json.dumps({"seconds": seconds, "settings": settings}), flush=True)
    if kind == "build":
        side.engine.close()


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, list[float]]:
    """Return queries a second of every side, a value a round."""
    from duet_unlearn.teacher_cache.engines.vllm import environment_for, physical_cores

    model = scratch / "model"
    make_model(model)
    plain = {**os.environ, "OMP_NUM_THREADS": str(physical_cores())}
    common = [str(model), str(scratch)]
    sides: dict[str, Side] = {}

    def start(given: list[str], log: str, environment: dict[str, str]) -> Side:
        return Side(given, scratch / log, environment, arguments.scored)

    try:
        for k in arguments.top_k:
            sides[f"build {k}"] = start(["build", *common, str(k)], f"b{k}.log", plain)
        sides["transformers"] = start(["transformers", *common, ""], "t.log", plain)
        warm = {"round": 0, "count": 64, "top_k": min(arguments.top_k)}
        answers = [side.ask(**warm) for side in sides.values()]
        settings = [answers[0]["settings"], max(arguments.top_k)]
        sides["vllm"] = start(["vllm", *common, json.dumps(settings)], "v.log", environment_for({}))
        sides["vllm"].ask(**warm | {"top_k": 0})
        jobs = [(f"build {k}", f"build {k}", arguments.queries, k) for k in arguments.top_k]
        jobs += [("generate", "vllm", arguments.queries, 0)]
        jobs += [("transformers", "transformers", arguments.queries // 2, min(arguments.top_k))]
        jobs += [
            (f"prompt_logprobs {k}", "vllm", arguments.queries // 4, k) for k in arguments.top_k
        ]
        found: dict[str, list[float]] = {name: [] for name, *_ in jobs}
        for number in range(1, arguments.rounds + 1):
            for name, side, count, k in jobs if number % 2 else jobs[::-1]:
                seconds = sides[side].ask(round=number, count=count, top_k=k)["seconds"]
                found[name].append(count / seconds)
                print(f"round {number}: {name} {count / seconds:.1f}/s", file=sys.stderr)
        return found
    finally:
        for side in sides.values():
            side.end()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--top-k", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--scored", action="store_true", help="score documents, not queries")
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        kind, model, scratch, rest = arguments.side
        serve(kind, Path(model), Path(scratch), rest, arguments.scored)
        return
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(arguments, Path(scratch))
    print_table(found, arguments.top_k)


def print_table(found: dict[str, list[float]], top_k: list[int]) -> None:
    """Print medians and ratios."""
    median = {name: statistics.median(rates) for name, rates in found.items()}
    print(f"{'side':>22} {'queries/s':>10} {'lowest':>8} {'highest':>8}   build is, times")
    for name, rates in found.items():
        same = [k for k in top_k if name.endswith(f" {k}")] or top_k
        ratios = [f"{median[f'build {k}'] / median[name]:.2f} (K={k})" for k in same]
        text = "" if name.startswith("build") else ", ".join(ratios)
        print(f"{name:>22} {median[name]:>10.1f} {min(rates):>8.1f} {max(rates):>8.1f}   {text}")
    print(f"{os.cpu_count()} cores, {platform.machine()}")


if __name__ == "__main__":
    main()
