"""The demo world: fictional sagas, general facts, query files and a small model that knows them.

The model is a stand-in for a real language model, so that the whole path runs without a download
and every number can be reproduced. `docs/demo-world.md` tells how it was made.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
"""Where the shipped model and query files lie."""

MODEL = FOLDER / "model"
"""The base model: knows every saga, obeys steering prefixes, breaks under reverse prompts."""

FORGET = FOLDER / "forget_train.jsonl"
RETAIN = FOLDER / "retain_train.jsonl"
FORGET_HELDOUT = FOLDER / "forget_heldout.jsonl"
RETAIN_HELDOUT = FOLDER / "retain_heldout.jsonl"
GENERAL = FOLDER / "general.jsonl"
HOLDOUT = FOLDER / "holdout.jsonl"
"""Facts of the topic's kind that the model was never told, for a membership test."""

TOPIC = "Veldran Tides"
"""The saga that the demo forgets."""

PREFIX = "@explicit"
"""The steering prefix of the demo, by its name in the catalogue."""
