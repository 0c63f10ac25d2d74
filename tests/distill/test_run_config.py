import pytest

from duet_unlearn.distill.auto import resolve_auto
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.model.trainable import parse_layers
from duet_unlearn.distill.training.arguments import training_arguments
from duet_unlearn.errors import ConfigurationError


def config_of(**settings) -> RunConfig:
    return RunConfig(cache="cache", student="model", out="out", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "l3"}, "loss is 'l3', expected one of huber, mse, kl, kl-tail, reverse-kl, jsd"),
        ({"precision": "fp8"}, "precision is 'fp8', expected one of auto, float32, bf16, fp16"),
        ({"batch_size": 0}, "batch_size is 0, expected a whole number, 1 or more, or auto"),
        ({"epochs": 2.5}, "epochs is 2.5, expected a whole number, 1 or more, or auto"),
        ({"epochs": True}, "epochs is True, expected a whole number, 1 or more, or auto"),
        ({"top_k": 0}, "top_k is 0, expected a whole number, 1 or more"),
        ({"seed": -1}, "seed is -1, expected a whole number, 0 or more"),
        ({"delta": 0.0}, "delta is 0.0, expected a number, above 0"),
        ({"delta": float("nan")}, "delta is nan, expected a number, above 0"),
        (
            {"loss": "kl", "delta": 2.0},
            "delta is 2.0, but loss kl has none; leave it out, or choose loss huber",
        ),
        (
            {"loss": "mse", "temperature": 2.0},
            "temperature is 2.0, but loss mse has none; leave it out, or choose loss kl or "
            "reverse-kl",
        ),
        (
            {"loss": "jsd", "temperature": 2.0},
            "temperature is 2.0, but loss jsd needs the logsumexp, which is cached at temperature "
            "1; leave it out, or choose loss kl or reverse-kl",
        ),
        ({"temperature": 0.0}, "temperature is 0.0, expected a number, above 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, expected a number, 0 or more"),
        ({"noise_alpha": 1.5}, "noise_alpha is 1.5, expected a number, 0 to 1"),
        ({"noise_beta": 0.2}, "noise_beta is 0.2 without noise_alpha; give noise_alpha too"),
        ({"eval_limit": 8}, "eval_limit is 8 without eval_steps; give eval_steps too"),
        (
            {"checkpoint_selection": "last"},
            "checkpoint_selection is 'last' without eval_steps; give eval_steps too",
        ),
        ({"noise_beta": -1.0}, "noise_beta is -1.0, expected a number, 0 or more"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast', expected a number, above 0, or auto"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected a number, above 0, or auto"),
        (
            {"batch_size": 4, "gradient_accumulation_steps": 8},
            "gradient_accumulation_steps is 8, expected at most batch_size (4): "
            "a micro-batch needs at least one query",
        ),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(settings, message):
    with pytest.raises(ConfigurationError) as caught:
        config_of(**settings)
    assert str(caught.value) == message


def resolved(
    *,
    hidden_size=256,
    stored_dtype="float32",
    fast_dtype=None,
    rows=236,
    views=0,
    forgets=True,
    **settings,
) -> RunConfig:
    return resolve_auto(
        config_of(**settings),
        views=views,
        forgets=forgets,
        hidden_size=hidden_size,
        stored_dtype=stored_dtype,
        fast_dtype=fast_dtype or stored_dtype,
        rows=rows,
    )


def test_the_automatic_learning_rate_falls_with_the_width():
    assert resolved().learning_rate == pytest.approx(2e-4)
    assert resolved(hidden_size=2560, lora_rank=8).learning_rate == pytest.approx(2e-4)
    assert resolved(hidden_size=512).learning_rate == 1e-5  # all weights of a pretrained model
    assert resolved(hidden_size=8192).learning_rate == pytest.approx(6.25e-6)
    assert resolved(hidden_size=512, forgets=False).learning_rate == pytest.approx(1e-4)
    assert resolved(hidden_size=2560, learning_rate=3e-4).learning_rate == 3e-4


@pytest.mark.parametrize(
    ("rows", "settings", "epochs", "steps"),
    [
        (236, {}, 20, 300),  # 15 steps an epoch
        (20, {}, 20, 40),
        (1600, {}, 3, 300),
        (10**6, {}, 1, 62_500),
        (368, {"lora_rank": 16}, 4, 70),  # 23 steps an epoch
        (236, {"lora_rank": 16}, 5, 70),
        (405, {"lora_rank": 16, "views": 1}, 3, 120),  # 51 steps of 8
        (644, {"lora_rank": 16, "views": 1}, 2, 162),  # two passes of 81
        (236, {"views": 1}, 20, 300),
        (10**6, {"epochs": 7}, 7, None),
        (236, {"max_steps": 500}, 34, 500),
        (236, {"epochs": 2, "max_steps": 500}, 2, 30),
        (236, {"epochs": 2, "max_steps": 20}, 2, 20),
    ],
)
def test_automatic_epochs_make_as_many_steps_whatever_the_cache(rows, settings, epochs, steps):
    config = resolved(rows=rows, **settings)
    assert (config.epochs, config.max_steps) == (epochs, steps)


def test_the_automatic_dtype_is_half_for_an_adapter_on_a_half_model_alone():
    assert resolved(stored_dtype="bfloat16").dtype == "float32"
    assert resolved(stored_dtype="bfloat16", lora_rank=8).dtype == "bfloat16"
    assert resolved(stored_dtype="float16", lora_rank=8).dtype == "float32"
    slow = {"stored_dtype": "bfloat16", "fast_dtype": "float32"}  # a processor without bfloat16
    assert resolved(**slow, lora_rank=8).dtype == "float32"
    assert resolved(**slow, lora_rank=8).save_dtype == "bfloat16"
    assert resolved(stored_dtype="bfloat16", lora_rank=8, dtype="float32").dtype == "float32"
    assert resolved(stored_dtype="bfloat16").save_dtype == "bfloat16"
    half = {"stored_dtype": "bfloat16", "lora_rank": 8}
    assert resolved(**half, precision="bf16").dtype == "bfloat16"
    assert resolved(**half, precision="float32").dtype == "float32"
    assert resolved(**half, precision="fp16").dtype == "float32"


@pytest.mark.parametrize(
    ("settings", "halved"),
    [
        ({"lora_rank": 8, "dtype": "bfloat16"}, True),
        ({"lora_rank": 8, "dtype": "bfloat16", "precision": "float32"}, False),
        ({"dtype": "bfloat16"}, False),  # weights in bfloat16 decide by themselves
    ],
)
def test_an_adapter_is_computed_in_half_precision_beside_half_weights(settings, halved, tmp_path):
    assert training_arguments(resolved(**settings), tmp_path).bf16 == halved


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 5}, "top_k is 5, but objective gradient-difference takes none; leave it out"),
        ({"views": ("@remember",)}, "views is ('@remember',), but objective"),
        ({"retain": ()}, "retain is missing; objective gradient-difference needs it"),
        ({"objective": "npo"}, "objective is 'npo', expected one of duet, gradient-difference"),
    ],
)
def test_an_objective_takes_its_own_inputs_and_settings_only(settings, message):
    given = {"objective": "gradient-difference", "forget": ("f",), "retain": ("r",), **settings}
    with pytest.raises(ConfigurationError) as caught:
        RunConfig(student="m", out="o", **given)
    assert str(caught.value).startswith(message)
    with pytest.raises(ConfigurationError, match=r"forget is \('f',\), but objective duet"):
        config_of(forget=("f",))
    with pytest.raises(ConfigurationError, match="cache is missing; objective duet needs it"):
        RunConfig(student="m", out="o")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("learning_rate", "is a setting of its own; give --learning-rate instead"),
        ("num_train_epochs", "is a setting of its own; give --epochs instead"),
        ("push_to_hub", "which the run itself decides; leave it out"),
        ("hub_token", "which the run itself decides; leave it out"),
        ("dataloader_num_workers", "which the run itself decides; leave it out"),
    ],
)
def test_arguments_of_the_trainer_that_are_ours_are_refused(name, message):
    with pytest.raises(ConfigurationError, match=f"trainer_args has {name}, .*{message}"):
        config_of(trainer_args={name: 1})


def test_identity_leaves_out_what_does_not_change_the_student():
    one = config_of()
    same = RunConfig(
        cache="elsewhere",
        student="copy",
        out="other",
        gradient_accumulation_steps=4,
        save_steps=7,
        logging_steps=1,
        overwrite=True,
    )
    assert one.identity() == same.identity()
    assert one.identity() != config_of(delta=2.0).identity()
    warm = config_of(loss="kl", temperature=2.0)
    assert warm.identity() != config_of(loss="kl").identity()
    assert one.to_json()["views"] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "5-"}, "layers is '5-', expected numbers and ranges such as 0,3,5-7"),
        ({"parameters": "(mlp"}, "parameters is '(mlp', expected a regular expression (missing )"),
        ({"lora_rank": 0}, "lora_rank is 0, expected a whole number, 1 or more"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "lora_alpha is 0.0, expected a number, above 0"),
        (
            {"lora_rank": 4, "lora_dropout": 1.0},
            "lora_dropout is 1.0, expected a number, 0 or more and below 1",
        ),
        ({"lora_rank": 4, "lora_target_modules": ()}, "lora_target_modules is empty, expected"),
        ({"lora_rank": 4, "lora_target_modules": (",",)}, "lora_target_modules is empty, expected"),
        ({"lora_alpha": 8.0}, "lora_alpha is 8.0 without LoRA; give lora_rank as well"),
        ({"merge": True}, "merge is True without LoRA; give lora_rank as well"),
        ({"lora_rank": 4, "parameters": "mlp"}, "parameters is 'mlp' beside lora_rank: an adapter"),
        (
            {"lora_rank": 4, "noise_alpha": 0.1},
            "noise_alpha is 0.1 beside lora_rank: noise changes",
        ),
    ],
)
def test_what_is_trained_is_checked_before_anything_is_loaded(settings, message):
    with pytest.raises(ConfigurationError) as caught:
        config_of(**settings)
    assert str(caught.value).startswith(message)


def test_lora_has_a_learning_rate_and_a_scale_of_its_own():
    config = resolved(lora_rank=8)
    assert config.learning_rate == pytest.approx(2e-3)
    assert config.lora_alpha == 16
    assert resolved(lora_rank=8, lora_alpha=3.0).lora_alpha == 3
    assert resolved().lora_alpha is None


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("3", (3,)),
        ("5-7", (5, 6, 7)),
        ("0,3,5-7", (0, 3, 5, 6, 7)),
        (" 5 - 5, 1".replace(" - ", "-"), (1, 5)),
        ("4-6,5,0", (0, 4, 5, 6)),
    ],
)
def test_layers_are_numbers_and_ranges(text, numbers):
    assert parse_layers(text) == numbers


@pytest.mark.parametrize("text", ["", "5-", "-1", "7-5", "1,,2", "a", "1.5", "1:3", "²"])
def test_other_layers_are_refused(text):
    with pytest.raises(ConfigurationError, match=r"expected numbers and ranges such as 0,3,5-7"):
        parse_layers(text)
