"""What a training run is told: one frozen dataclass, checked when it is made."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

from duet_unlearn.distill.layer_numbers import parse_layers
from duet_unlearn.errors import ConfigurationError

AUTO = "auto"
# The losses with the one setting that each takes; `distill.losses` computes them.
LOSS_OPTIONS = {
    "huber": "delta",
    "mse": None,
    "kl": "temperature",
    "kl-tail": None,
    "reverse-kl": "temperature",
    "jsd": None,
}
LOSS_NAMES = tuple(LOSS_OPTIONS)
PRECISIONS = (AUTO, "float32", "bf16", "fp16")
TRAIN_DTYPES = ("float32", "bfloat16")
SAVE_DTYPES = (AUTO, "float32", "bfloat16", "float16")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
KEPT = ("best", "last")
TRACKERS = ("none", "tensorboard", "wandb")

# Adam's step does not shrink with the width of a matrix, so the rate has to: 2e-4 at 256 wide,
# 2e-5 at 2,560. Measured: docs/decisions/0010-training-defaults.md.
AUTO_LEARNING_RATE_TIMES_WIDTH = 0.0512
# An adapter starts from zero and is small: it takes, and needs, larger steps than the weights.
AUTO_LORA_TIMES = 10

# Names of inputs whose content counts instead, how a step is cut, how a run is watched and kept.
_OUTSIDE_IDENTITY = (
    "cache",
    "student",
    "out",
    "views",
    "eval_forget",
    "eval_retain",
    "eval_attacks",
    "gradient_accumulation_steps",
    "logging_steps",
    "save_steps",
    "report_to",
    "overwrite",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Settings of `duet-distill run`."""

    cache: str
    """The teacher cache: a folder or a URL, with or without `@sha256:DIGEST` behind it."""
    student: str
    """The model the student starts from: a folder or a hub id."""
    out: str
    """Folder of the finished student; it appears when training has finished."""
    loss: str = "huber"
    """Distance between the student's and the teacher's logits; `docs/method.md` compares them."""
    delta: float = 1.0
    """Huber's delta in logits: errors beyond it pull with constant force."""
    temperature: float = 1.0
    """Divides the logits before their softmax, for `kl` and `reverse-kl`; the loss is multiplied
    by its square."""
    top_k: int | None = None
    """Train on the strongest K of the cached tokens; None takes all of them."""
    positions: int | None = None
    """Train on the first N cached positions; None takes all of them."""
    views: tuple[str, ...] = ()
    """Shape files or `@NAME`s, `=WEIGHT` behind them: each query is also trained behind one of
    them, drawn anew every epoch, toward the same signal."""
    noise_alpha: float = 0.0
    """Share of the student's weights given up to noise before training, as in UNDO; 0 is none."""
    noise_beta: float = 0.1
    """Scale of that noise, as a multiple of a Xavier-uniform draw."""
    layers: str | None = None
    """Layers to train, counted from 0, such as `0,3,5-7`; None trains all of them and what stands
    outside of layers. With LoRA, the layers that get an adapter."""
    parameters: str | None = None
    """Train the parameters whose names match this regular expression; with `layers`, those of the
    chosen layers that match."""
    lora_rank: int | None = None
    """Train a LoRA adapter of this rank instead of the weights."""
    lora_alpha: float | None = None
    """LoRA's scale: the adapter's output counts alpha / rank times; None is twice the rank."""
    lora_dropout: float = 0.0
    """Share of the adapter's inputs that are dropped in training."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the linear modules that get an adapter; `all-linear` is all but the head."""
    merge: bool = False
    """Save a whole model with the adapter merged into it, not the adapter."""
    learning_rate: float | str = AUTO
    """Peak learning rate; `auto` is 0.0512 / hidden size, with LoRA ten times that."""
    lr_scheduler_type: str = "cosine"
    """How the learning rate falls from its peak."""
    warmup_steps: float = 0.1
    """Steps over which the rate rises to its peak; below 1 a share of all steps."""
    epochs: int = 20
    """Passes over the cache."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    batch_size: int = 16
    """Queries an optimizer step, over all processes and accumulation steps together."""
    gradient_accumulation_steps: int = 1
    """Forward and backward passes a process that one optimizer step is split into."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns that off."""
    precision: str = AUTO
    """Arithmetic of the forward pass: `auto` is bf16 where the GPU has it, float32 elsewhere."""
    dtype: str = "float32"
    """How the trained weights are held: float32 keeps small updates, bfloat16 halves memory."""
    save_dtype: str = AUTO
    """How the student is stored: `auto` is as the model it starts from is stored."""
    seed: int = 0
    """Decides the order of queries and the draw of views."""
    eval_every: int = 0
    """Optimizer steps between two evaluations on held-out queries; 0 makes none."""
    eval_forget: tuple[str, ...] = ()
    """Held-out queries with answers that the student should no longer give."""
    eval_retain: tuple[str, ...] = ()
    """Held-out queries with answers that it should still give."""
    eval_attacks: tuple[str, ...] = ()
    """Shape files or `@NAME`s: both are also asked behind each of them, and the worst counts."""
    eval_limit: int | None = None
    """Ask this many queries of each file, evenly spread over it; None asks all."""
    eval_max_new_tokens: int = 64
    """Longest answer in tokens."""
    eval_retain_drop: float = 3.0
    """Points of held-out retain recall that the best step may lie below the base."""
    keep: str = "best"
    """With evaluations, whether the student is the `best` evaluated step or the `last`."""
    early_stop: int | None = None
    """Stop after this many evaluations in a row without less being told of what to forget."""
    logging_steps: int = 10
    """Optimizer steps between two log lines."""
    save_steps: int = 500
    """Optimizer steps between two checkpoints; 0 makes none but when interrupted."""
    report_to: str = "none"
    """Where transformers' Trainer also sends the logs."""
    overwrite: bool = False
    """Replace whatever is at `out`, a finished student too."""

    def __post_init__(self) -> None:
        for name, allowed in {
            "loss": LOSS_NAMES,
            "lr_scheduler_type": SCHEDULES,
            "precision": PRECISIONS,
            "dtype": TRAIN_DTYPES,
            "save_dtype": SAVE_DTYPES,
            "keep": KEPT,
            "report_to": TRACKERS,
        }.items():
            if getattr(self, name) not in allowed:
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
                )
        for name in (
            "epochs",
            "batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "eval_max_new_tokens",
        ):
            self._check_whole(name, at_least=1)
        for name in ("top_k", "positions", "max_steps", "lora_rank", "eval_limit", "early_stop"):
            if getattr(self, name) is not None:
                self._check_whole(name, at_least=1)
        self._check_whole("seed", at_least=0)
        for name in ("save_steps", "eval_every"):
            self._check_whole(name, at_least=0)
        for name in ("delta", "temperature"):
            self._check_number(name, zero_allowed=False)
            self._check_loss_takes(name)
        for name in ("weight_decay", "max_grad_norm", "warmup_steps", "noise_alpha", "noise_beta"):
            self._check_number(name)
        if self.noise_alpha > 1:
            raise ConfigurationError(
                f"noise_alpha is {self.noise_alpha!r}, expected a share, 0 to 1"
            )
        if self.learning_rate != AUTO:
            self._check_number("learning_rate", zero_allowed=False)
        self._check_number("eval_retain_drop")
        self._check_evaluation()
        self._check_trained()
        if self.gradient_accumulation_steps > self.batch_size:
            raise ConfigurationError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, expected at "
                f"most batch_size ({self.batch_size}): a pass needs at least one query"
            )

    def resolved_learning_rate(self, hidden_size: int) -> float:
        """Return the peak learning rate for a student of this hidden size."""
        if isinstance(self.learning_rate, str):
            times = 1 if self.lora_rank is None else AUTO_LORA_TIMES
            return times * AUTO_LEARNING_RATE_TIMES_WIDTH / hidden_size
        return self.learning_rate

    def resolved_lora_alpha(self) -> float | None:
        """Return LoRA's scale, or None without LoRA."""
        if self.lora_rank is None or self.lora_alpha is not None:
            return self.lora_alpha
        return 2.0 * self.lora_rank

    def to_json(self) -> dict[str, Any]:
        """Return every setting as JSON values."""
        settings = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in settings.items()
        }

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the student, beside cache, base and views' texts."""
        return {k: v for k, v in self.to_json().items() if k not in _OUTSIDE_IDENTITY}

    def _check_loss_takes(self, name: str) -> None:
        value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
        if value == default or LOSS_OPTIONS[self.loss] == name:
            return
        takers = " or ".join(loss for loss, option in LOSS_OPTIONS.items() if option == name)
        reason = f"loss {self.loss} has none"
        if name == "temperature" and self.loss in ("kl-tail", "jsd"):
            reason = f"loss {self.loss} needs the logsumexp, which is cached at temperature 1"
        raise ConfigurationError(
            f"{name} is {value!r}, but {reason}; leave it out, or choose loss {takers}"
        )

    def _check_evaluation(self) -> None:
        for name in ("eval_forget", "eval_retain"):
            if self.eval_every and not getattr(self, name):
                raise ConfigurationError(
                    f"{name} is empty, expected held-out queries to ask every {self.eval_every} "
                    "steps"
                )
        for name in ("eval_forget", "eval_retain", "eval_attacks", "early_stop"):
            if getattr(self, name) and not self.eval_every:
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)!r} without evaluations; give eval_every too"
                )

    def _check_trained(self) -> None:
        if self.layers is not None:
            parse_layers(self.layers)
        if self.parameters is not None:
            try:
                re.compile(self.parameters)
            except re.error as error:
                raise ConfigurationError(
                    f"parameters is {self.parameters!r}, expected a regular expression ({error})"
                ) from error
        if self.lora_alpha is not None:
            self._check_number("lora_alpha", zero_allowed=False)
        self._check_number("lora_dropout")
        if self.lora_dropout >= 1:
            raise ConfigurationError(
                f"lora_dropout is {self.lora_dropout!r}, expected a share below 1"
            )
        if self.lora_rank is None:
            self._refuse_lora_settings()
            return
        if not any(self.lora_target_modules):
            raise ConfigurationError("lora_target_modules is empty, expected at least one name")
        if self.parameters is not None:
            raise ConfigurationError(
                f"parameters is {self.parameters!r} beside lora_rank: an adapter is chosen by "
                "lora_target_modules and layers; leave one of the two out"
            )
        if self.noise_alpha:
            raise ConfigurationError(
                f"noise_alpha is {self.noise_alpha!r} beside lora_rank: noise changes the weights "
                "that an adapter leaves alone; leave one of the two out"
            )

    def _refuse_lora_settings(self) -> None:
        for name in ("lora_alpha", "lora_dropout", "lora_target_modules", "merge"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)!r} without LoRA; give lora_rank as well"
                )

    def _check_whole(self, name: str, *, at_least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise ConfigurationError(
                f"{name} is {value!r}, expected a whole number, {at_least} or more"
            )

    def _check_number(self, name: str, *, zero_allowed: bool = True) -> None:
        value = getattr(self, name)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if (
            not numeric
            or not math.isfinite(value)
            or value < 0
            or (value == 0 and not zero_allowed)
        ):
            allowed = "0 or more" if zero_allowed else "above 0"
            raise ConfigurationError(f"{name} is {value!r}, expected a number, {allowed}")
