"""Rebuild the demo world: `python -m demo_world.build --out DIR`.

Writes the query files and, in `DIR/model`, the base model; then measures what the model promises
and prints the table. Exits with 1 when a promise is not kept.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from demo_world.checks import as_table, run_checks
from demo_world.query_sets import build_query_sets, write_query_files
from demo_world.train import TrainingConfig, train
from demo_world.world import build_world

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write to.")
@click.option("--queries-only", is_flag=True, help="Write the query files and train nothing.")
@click.option("--threads", default=2, show_default=True, help="Processor threads for training.")
def main(out: Path, queries_only: bool, threads: int) -> None:
    """Generate the demo world's query files and train its model."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    world = build_world()
    query_sets = build_query_sets(world)
    write_query_files(query_sets, out)
    if queries_only:
        return
    model, tokenizer = train(world, TrainingConfig(threads=threads))
    save_model(model, tokenizer, out / "model")
    checks = run_checks(model, tokenizer, query_sets)
    click.echo(as_table(checks))
    failed = [check for check in checks if not check.passed]
    if failed:
        raise click.ClickException(f"{len(failed)} of {len(checks)} checks are out of bounds")


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a model folder whose weights take two bytes each and load as float32.

    The weights are float16 values already, so nothing is lost; the configuration asks for
    float32, which is what the demo computes in.
    """
    import torch
    from safetensors.torch import save_file

    tokenizer.save_pretrained(folder)
    halves = {
        name: value.to(torch.float16)
        for name, value in model.state_dict().items()
        # The head is the embedding: one of the two is enough.
        if name != "lm_head.weight"
    }
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    path = folder / "config.json"
    # safetensors makes its files private; the user's own mask decides, as for the others.
    (folder / "model.safetensors").chmod(path.stat().st_mode)
    config = json.loads(path.read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
