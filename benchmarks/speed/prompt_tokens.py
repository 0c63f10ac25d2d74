"""Tokens of training steps: padded, real, and in a tree where prompts begin alike.

    python benchmarks/speed/prompt_tokens.py CACHE MODEL [--steps 26] [--batch-size 16]

Counts the batches of a run in the views that CACHE holds; needs no weights but the tokenizer of
MODEL, and no time. A tree has no padding; a batch that is too long for one is trained padded.
"""

import argparse

from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.distill.batches.sampler import sampler_of
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.model.student import open_student
from duet_unlearn.distill.model.token_tree import merge
from duet_unlearn.distill.objectives import duet


def main() -> None:
    """Print the mean of each count and how they relate."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cache")
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=26)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    config = RunConfig(
        cache=arguments.cache,
        student=arguments.model,
        out="none",
        batch_size=arguments.batch_size,
    )
    student = open_student(arguments.model)
    objective = duet.Duet(config, student)
    objective.prepare(PromptRenderer(load_tokenizer(student.folder)))
    dataset, counts = objective.dataset, {"padded": 0, "real": 0, "in a tree": 0}
    steps = trees = 0
    for draws, _ in zip(sampler_of(objective.order, config), range(arguments.steps), strict=False):
        batch = objective.collate([dataset[draw] for draw in draws])
        tree = merge(batch)
        counts["padded"] += batch["input_ids"].numel()
        counts["real"] += int(batch["attention_mask"].sum())
        counts["in a tree"] += (batch["input_ids"] if tree is None else tree.input_ids).numel()
        steps, trees = steps + 1, trees + (tree is not None)
    print(f"{steps} steps, {trees} of them in a tree, the others padded")
    for name, count in counts.items():
        print(f"{name:9} {count / steps:8.1f} a step")
    print(f"padding   {1 - counts['real'] / counts['padded']:.0%} of a padded step")
    print(f"in a tree / padded {counts['in a tree'] / counts['padded']:.2f}")
    print(f"in a tree / real   {counts['in a tree'] / counts['real']:.2f}")


if __name__ == "__main__":
    main()
