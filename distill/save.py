"""Write the finished student: a model folder like any other, with its history beside it."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duet_unlearn import __version__
from duet_unlearn.data.models.adapters import RUN_FILE
from duet_unlearn.data.models.folder import read_json
from duet_unlearn.distill.config import LOSS_OPTIONS
from duet_unlearn.distill.student import Student
from duet_unlearn.errors import CacheError
from duet_unlearn.files import write_error, write_text
from duet_unlearn.teacher_cache.format.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

# The tokenizer is copied, not saved anew: byte for byte the base's means the same ids, and what a
# newer transformers writes an older one may not read.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
SPLITS = ("forget", "retain")


def save_model(
    model: "PreTrainedModel",
    student: Student,
    folder: Path,
    *,
    dtype: str,
    state: "dict[str, Tensor] | None",
) -> None:
    """Write a model folder: weights, configuration, and the base's own tokenizer.

    An adapter (a `PeftModel`) is written as peft's adapter folder, in the dtype it was trained in.

    Args:
        model: What was trained; it stays as it is.
        student: What it started from.
        folder: Where to write; made if missing.
        dtype: How to store the weights of a whole model.
        state: Gathered weights where the model itself holds only a part of them.

    Raises:
        CacheError: The folder cannot be written.
    """
    from safetensors import SafetensorError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if hasattr(model, "peft_config"):
            _write_adapter(model, student, folder, state)
        else:
            _write_whole(model, student, folder, dtype, state)
        for name in _TOKENIZER_FILES:
            if (student.folder / name).is_file():
                shutil.copyfile(student.folder / name, folder / name)
        # safetensors makes its files private; the user's own mask decides, as for the others.
        configuration = next(folder.glob("*config.json"))
        for weights in folder.glob("*.safetensors"):
            weights.chmod(configuration.stat().st_mode)
    except OSError as error:
        raise write_error(folder, error) from error
    except SafetensorError as error:
        raise CacheError(
            f"{folder}: cannot write the weights ({error}); free some space, then run the same "
            "command again: it goes on from the last checkpoint"
        ) from error


def _write_whole(
    model: Any, student: Student, folder: Path, dtype: str, state: "dict[str, Tensor] | None"
) -> None:
    import torch

    stored = getattr(torch, dtype)
    changed = {"dtype": stored}
    if hasattr(model.config, "use_cache"):  # the Trainer turned it off
        base = read_json(student.folder / "config.json")
        changed["use_cache"] = base.get("use_cache", type(model.config)().use_cache)
    kept = {name: getattr(model.config, name) for name in changed}
    state = _stored(model.state_dict() if state is None else state, stored)
    try:
        model.save_pretrained(folder, state_dict=state)
        # That wrote the dtype of the model in memory into config.json.
        for name, value in changed.items():
            setattr(model.config, name, value)
        model.config.save_pretrained(folder)
    finally:
        for name, value in kept.items():
            setattr(model.config, name, value)


def _stored(state: "dict[str, Tensor]", dtype: "torch.dtype") -> "dict[str, Tensor]":
    """Return the weights in main memory in the dtype they are stored in; what is tied stays so."""
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        same = (tensor.data_ptr(), tensor.shape)
        if same not in cast:
            cast[same] = tensor.detach().to("cpu", dtype)
        stored[name] = cast[same]
    return stored


def _write_adapter(
    model: Any, student: Student, folder: Path, state: "dict[str, Tensor] | None"
) -> None:
    settings = model.peft_config["default"]
    kept = settings.base_model_name_or_path
    settings.base_model_name_or_path = student.name  # and not where it lies on this machine
    try:
        # The embeddings are the base's; to decide that by itself, peft would ask the hub.
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    finally:
        settings.base_model_name_or_path = kept


def write_run_file(folder: Path, run: dict[str, Any]) -> None:
    """Write `duet_run.json`: what the run resolved to and what came out.

    Raises:
        CacheError: The file cannot be written.
    """
    write_text(folder / RUN_FILE, json.dumps(run, indent=2, ensure_ascii=False) + "\n")


_CARD = """\
---
library_name: {library}
pipeline_tag: text-generation
{base_model}tags:
- unlearning
- duet
---

# {name}

{base} after unlearning with DUET: trained to answer without a steering prefix as the base model
answers behind this one ({place}):

> {prefix}

Training used queries and the base model's own Top-K logits from a teacher cache, and no reference
answers. Knowledge that no training query came near may still be there: evaluate the model on
held-out queries and under attacks before relying on it.

| | |
| --- | --- |
| base | {base}, weights `{weights}` |
| teacher cache | `{digest}` |
| recipe | `{recipe_id}` |
| queries | {forget} forget, {retain} retain |
| signal | top {top_k} logits at {positions} |
| loss | {loss} |
| views | {views} |
| noise | {noise} |
| trained | {trained} |
| training | {steps} steps of {batch_size} queries, learning rate {learning_rate:.3g}, seed {seed} |
| loss, first to last | forget {loss_forget}, retain {loss_retain} |
| held-out queries | {held_out} |

Made by duet-unlearn {version}; `duet_run.yaml` trains it again, `duet_run.json` holds what it was
made from and what came out, `duet_log.jsonl` the course of training. The base model's licence
applies.
"""


def write_card(folder: Path, run: dict[str, Any], recipe: Recipe) -> None:
    """Write the model card from the content of the run file.

    Raises:
        CacheError: The file cannot be written.
    """
    config, result, base = run["config"], run["result"], run["base"]["name"]
    is_hub_id = "/" in base
    count = config["positions"]
    adapter = config["lora_rank"] is not None and not config["merge"]
    card = _CARD.format(
        library="peft" if adapter else "transformers",
        base_model=f"base_model: {base}\n" if is_hub_id else "",
        name=Path(config["out"]).name,
        base=base,
        place=f"in the {recipe.prefix_place} turn" if recipe.prefix_place != "raw" else "raw",
        prefix=recipe.prefix.replace("\n", "\n> "),
        weights=run["base"]["weights"],
        digest=run["cache"]["digest"],
        recipe_id=run["cache"]["recipe_id"],
        forget=result["queries"]["forget"],
        retain=result["queries"]["retain"],
        top_k=config["top_k"],
        positions="the first position" if count == 1 else f"the first {count} positions",
        loss=_loss_of(config),
        views=run["views"],
        noise=_noise(config["noise_alpha"], config["noise_beta"]),
        trained=_trained(config, result),
        steps=result["steps"],
        batch_size=config["batch_size"],
        learning_rate=config["learning_rate"],
        seed=config["seed"],
        held_out=_held_out(result),
        loss_forget=_course(result["loss"].get("forget")),
        loss_retain=_course(result["loss"].get("retain")),
        version=__version__,
    )
    write_text(folder / "README.md", card)


def _noise(alpha: float, beta: float) -> str:
    return f"alpha {alpha:g}, beta {beta:g} before training" if alpha else "none"


def _loss_of(config: dict[str, Any]) -> str:
    option = LOSS_OPTIONS[config["loss"]]
    return f"{config['loss']}, {option} {config[option]:g}" if option else str(config["loss"])


def _trained(config: dict[str, Any], result: dict[str, Any]) -> str:
    kind = ""
    if config["lora_rank"] is not None:
        kind = f", alpha {config['lora_alpha']:g}, "
        kind += "merged into the base" if config["merge"] else "as an adapter of the base"
    counts = f"{result['trained_parameters']:,} parameters, the base has {result['parameters']:,}"
    return f"{result['trained']}{kind}: {counts}"


def _held_out(result: dict[str, Any]) -> str:
    if not result["evaluations"]:
        return "not asked in training"
    base = result["evaluations"][0]
    kept = next(e for e in result["evaluations"] if e["step"] == result["kept_step"])
    changes = ", ".join(f"{split} {base[split]:.1f} to {kept[split]:.1f}" for split in SPLITS)
    return f"{changes} points of ROUGE-L recall, weights of step {kept['step']}"


def _course(losses: list[float] | None) -> str:
    return " to ".join(f"{value:.4g}" for value in losses) if losses else "none"
