"""The student's card: what its header tells a hub."""

import pytest
import yaml

from duet_unlearn.distill.objectives.base import Story
from duet_unlearn.distill.output.card import write_card


def header_of(folder, *, base: str, licence: str | None, lora_rank: int | None = None) -> dict:
    run = {
        "config": {
            **{"out": "student", "objective": "duet", "lora_rank": lora_rank, "lora_alpha": 4.0},
            **{"merge": False, "noise_alpha": 0.0, "noise_beta": 0.1, "batch_size": 8},
            "lora_extrapolation": 1.0,
            **{"learning_rate": 1e-3, "seed": 0},
        },
        "base": {"name": base, "weights": "sha256:0", "licence": licence},
        "identity": {"base": {"template": None}},
        "result": {
            **{"queries": {"forget": 1, "retain": 1}, "steps": 1, "loss": {}, "evaluations": []},
            **{"trained": "everything", "trained_parameters": 1, "parameters": 1},
        },
    }
    write_card(folder, run, Story(summary="forgot.", tags=("unlearning",)))
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


@pytest.mark.parametrize(
    ("lora_rank", "library", "relation"),
    [(None, "transformers", "finetune"), (2, "peft", "adapter")],
)
def test_the_header_names_licence_and_base_model(tmp_path, lora_rank, library, relation):
    header = header_of(tmp_path, base="org/base", licence="apache-2.0", lora_rank=lora_rank)
    assert header["license"] == "apache-2.0"
    assert header["base_model"] == "org/base"
    assert (header["library_name"], header["base_model_relation"]) == (library, relation)


def test_a_strange_licence_stays_one_entry(tmp_path):
    licence = "other: see\u2028injected: true"
    header = header_of(tmp_path, base="org/base", licence=licence)
    assert header["license"] == licence
    assert "injected" not in header


def test_a_base_without_licence_or_hub_id_is_linked_to_nothing(tmp_path):
    header = header_of(tmp_path, base="base", licence=None)
    assert not header.keys() & {"license", "base_model", "base_model_relation"}
