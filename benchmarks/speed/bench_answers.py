"""What a frozen model pays for its head, and an adapter for not being merged.

    python benchmarks/speed/bench_answers.py [--model FOLDER] [--rows 16] [--new-tokens 24]

Greedy answers of a model whose parameters are frozen (so a LoRA student's base is, and any model
that is measured while an adapter on it trains): with the head's input as the model slices it, and
side by side in memory as `generate_answers` hands it over; then with a rank-16 adapter, apart and
merged. Every pair alternates within one process and gives the same answers; the ratio of medians
is what travels between machines.
"""

import argparse
import contextlib
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

from duet_unlearn.data import demo_world as world
from duet_unlearn.data.models.folder import resolve_model_folder
from duet_unlearn.data.models.loading import load_model
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.data.queries import load_queries
from duet_unlearn.evaluation import answers


def timed(model: Any, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
    """Return the seconds that one batch takes, and its answers."""
    started = time.perf_counter()
    said = answers.generate_answers(
        model, prompts, eos_token_ids=[], max_new_tokens=new_tokens, batch_size=len(prompts)
    )
    return time.perf_counter() - started, said


def as_sliced(_model: Any) -> contextlib.AbstractContextManager[None]:
    """Leave the head's input as the model slices it."""
    return contextlib.nullcontext()


def main() -> None:
    """Time the pairs and print them as one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(world.MODEL))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    folder = Path(resolve_model_folder(options.model))
    renderer = PromptRenderer(load_tokenizer(folder))
    queries = load_queries(str(world.FORGET_HELDOUT), split="forget")[: options.rows]
    prompts = [renderer.student_ids(query.messages) for query in queries]
    frozen = load_model(folder, dtype=options.dtype).requires_grad_(False)
    times: dict[str, list[float]] = {}

    def take(name: str, model: Any, *, sliced: bool = False) -> list[list[int]]:
        patched: Any = mock.patch.object(answers, "contiguous_head_input", as_sliced)
        with patched if sliced else contextlib.nullcontext():
            seconds, said = timed(model, prompts, options.new_tokens)
        times.setdefault(name, []).append(seconds)
        return said

    timed(frozen, prompts, options.new_tokens)  # the first pass fills caches
    for _ in range(options.repeats):
        before = take("frozen, head input as sliced", frozen, sliced=True)
        if take("frozen, head input compact", frozen) != before:
            print("note: the two ways rounded a near tie differently")
    from peft import LoraConfig, get_peft_model

    adapted: Any = get_peft_model(frozen, LoraConfig(r=16, target_modules="all-linear")).eval()
    for _ in range(options.repeats):
        take("adapter apart, as sliced", adapted, sliced=True)
        take("adapter apart, compact", adapted)
    merged = adapted.merge_and_unload().eval()
    for _ in range(options.repeats):
        take("adapter merged, compact", merged)
    best = min(statistics.median(seconds) for seconds in times.values())
    print("| answers of | seconds | against the fastest |\n| --- | ---: | ---: |")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"| {name} | {median:.3f} | {median / best:.2f} |")


if __name__ == "__main__":
    main()
