"""The student's model card: what it is, where it comes from, what was measured."""

from pathlib import Path
from typing import Any

import yaml

from duet_unlearn import __version__
from duet_unlearn.distill.objectives.base import Story
from duet_unlearn.files import write_text

_CARD = """\
---
{header}---

# {name}

{base} {summary}

{caution}## Use

```python
{usage}
```
{evaluation}
## Training

| | |
| --- | --- |
{facts}

Made by duet-unlearn {version}; `duet_run.yaml` trains it again, `duet_run.json` holds what it was
made from and what came out, `duet_log.jsonl` the course of training. {licence}
"""
_CAUTION = """\
Knowledge that no training query came near may still be there: evaluate the model on held-out
queries and under attacks before relying on it.

"""
_USAGE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"  # this folder, or the id under which it was uploaded
tokenizer = AutoTokenizer.from_pretrained(folder)
{load}
{prompt}
answer = model.generate(**prompt, max_new_tokens=64)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
_CHAT = """\
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Who are you?"}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)"""
_PLAIN = 'prompt = tokenizer("Who are you?\\n\\n", return_tensors="pt")'
_WHOLE = "model = AutoModelForCausalLM.from_pretrained(folder)"
_ADAPTER = """\
base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, folder)"""

_EVALUATION = """
## Evaluation

Points of ROUGE-L recall on queries held out from training{chosen}.

| | forget | forget, worst attack | retain | retain, worst attack |
| --- | ---: | ---: | ---: | ---: |
{rows}
"""


def write_card(folder: Path, run: dict[str, Any], story: Story) -> None:
    """Write the model card from the content of the run file.

    Raises:
        OutputError: The file cannot be written.
    """
    config, result, base = run["config"], run["result"], run["base"]["name"]
    licence, name = run["base"]["licence"], Path(config["out"]).name
    adapter = config["lora_rank"] is not None and not config["merge"]
    header = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        **({"license": licence} if licence else {}),
    }
    if "/" in base:  # only a hub id is a link that others can follow
        header["base_model"] = base
        header["base_model_relation"] = "adapter" if adapter else "finetune"
    usage = _USAGE.format(
        name=name,
        load=_ADAPTER.format(base=base) if adapter else _WHOLE,
        prompt=_CHAT if run["identity"]["base"]["template"] else _PLAIN,
    )
    facts = {
        "base": f"{base}, weights `{run['base']['weights']}`",
        "objective": config["objective"],
        "queries": ", ".join(f"{n} {split}" for split, n in result["queries"].items()),
        **story.facts,
        "noise": f"alpha {config['noise_alpha']:g}, beta {config['noise_beta']:g} before training"
        if config["noise_alpha"]
        else "none",
        "trained": _trained(config, result),
        "training": f"{result['steps']} steps of {config['batch_size']} queries, learning rate "
        f"{config['learning_rate']:.3g}, seed {config['seed']}",
        "loss, first to last": ", ".join(
            f"{split} {' to '.join(f'{v:.4g}' for v in result['loss'].get(split, ())) or 'none'}"
            for split in result["queries"]
        ),
        "held out": _held_out(result),
    }
    card = _CARD.format(
        header=yaml.safe_dump({**header, "tags": list(story.tags)}, sort_keys=False),
        name=name,
        base=base,
        summary=story.summary,
        caution=_CAUTION if "unlearning" in story.tags else "",
        usage=f"from peft import PeftModel\n{usage}" if adapter else usage,
        evaluation=_evaluation(config, result),
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        version=__version__,
        licence=f"The base model's licence ({licence}) applies."
        if licence
        else "The base model's licence applies.",
    )
    write_text(folder / "README.md", card)


def _trained(config: dict[str, Any], result: dict[str, Any]) -> str:
    kind = ""
    if config["lora_rank"] is not None:
        kind = f", alpha {config['lora_alpha']:g}, "
        if config["lora_extrapolation"] != 1:
            kind += f"extrapolated by {config['lora_extrapolation']:g}, "
        kind += "merged into the base" if config["merge"] else "as an adapter of the base"
    counts = f"{result['trained_parameters']:,} parameters, the base has {result['parameters']:,}"
    return f"{result['trained']}{kind}: {counts}"


def _base_and_kept(result: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    found = result["evaluations"]
    return found[0], next(e for e in found if e["step"] == result["kept_step"])


def _held_out(result: dict[str, Any]) -> str:
    if not result["evaluations"]:
        return "not asked in training"
    base, kept = _base_and_kept(result)
    if "loss" in base:
        changes = ", ".join(
            f"{name.replace('_', '-')} {base[name]:.4f} to {kept[name]:.4f}"
            for name in ("loss", "cross_entropy")
        )
        return f"{changes}, means over rows; weights of step {kept['step']}"
    changes = ", ".join(
        f"{split} {base[split]:.1f} to {kept[split]:.1f}" for split in ("forget", "retain")
    )
    return f"{changes} points of ROUGE-L recall, weights of step {kept['step']}"


def _evaluation(config: dict[str, Any], result: dict[str, Any]) -> str:
    if not result["evaluations"] or "loss" in result["evaluations"][0]:
        return ""
    rows = "\n".join(
        f"| {label} | {e['forget_plain']:.1f} | {e['forget']:.1f} | {e['retain_plain']:.1f} | "
        f"{e['retain']:.1f} |"
        for label, e in zip(("base", "this model"), _base_and_kept(result), strict=True)
    )
    chosen = "; the step was chosen on them" if config["checkpoint_selection"] == "best" else ""
    return _EVALUATION.format(rows=rows, chosen=chosen)
