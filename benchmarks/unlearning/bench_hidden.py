"""What students of the demo world hide: searched attacks and probes on three of them.

    python benchmarks/unlearning/bench_hidden.py

Trains a student without a view, one with the view @remember, and the same as LoRA of rank 8, and
prints what `duet-distill attack` and `duet-distill probe` say of them beside the base, by default
settings.
"""

import tempfile
from pathlib import Path
from typing import Any

from demo_students import build_cache, train_student

from duet_unlearn.data import demo_world as world
from duet_unlearn.distill.attacking.attack import attack
from duet_unlearn.distill.attacking.config import AttackConfig
from duet_unlearn.distill.attacking.results import format_attacks
from duet_unlearn.evaluation.config import ModelSpec
from duet_unlearn.evaluation.probing.config import ProbeConfig
from duet_unlearn.evaluation.probing.probe import probe
from duet_unlearn.evaluation.probing.results import format_probe

STUDENTS: dict[str, dict[str, Any]] = {
    "student": {},
    "student, view": {"views": ("@remember",)},
    "student, view, LoRA": {"views": ("@remember",), "lora_rank": 8},
}


def main() -> None:
    """Train, attack, probe, print."""
    with tempfile.TemporaryDirectory() as scratch:
        cache = build_cache(Path(scratch) / "cache")
        models = [ModelSpec(label="base", model=str(world.MODEL))]
        for label, settings in STUDENTS.items():
            out = Path(scratch) / label.replace(", ", "-")
            train_student(cache, out, **settings)
            models.append(ModelSpec(label=label, model=str(out)))
        shared: dict[str, Any] = {
            "models": tuple(models),
            "prefix": world.PREFIX,
            "topic": world.TOPIC,
            "forget": (str(world.FORGET_HELDOUT),),
            "retain": (str(world.RETAIN_HELDOUT),),
        }
        print(format_attacks(attack(AttackConfig(train=(str(world.FORGET),), **shared))))
        print()
        print(format_probe(probe(ProbeConfig(**shared))))


if __name__ == "__main__":
    main()
