"""Settings of a training run: the one place where a flag of `duet-distill run` is declared."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic

from duet_unlearn.distill.auto import (
    AUTO,
    BATCH,
    LORA_BATCH_IN_VIEWS,
    LORA_PASSES_IN_VIEWS,
    LORA_STEPS,
    LORA_STEPS_IN_VIEWS,
    MOST_PASSES,
    STEPS,
)
from duet_unlearn.distill.model.trainable import check_trained
from duet_unlearn.distill.objectives import OBJECTIVES
from duet_unlearn.distill.training.arguments import check_trainer_args
from duet_unlearn.errors import ConfigurationError, MissingSettingError
from duet_unlearn.settings import (
    Count,
    NotNegative,
    Positive,
    Settings,
    Share,
    Whole,
    setting,
    settings,
)

Auto = Literal["auto"]
# The losses with the one setting that each takes.
LOSS_OPTIONS: dict[str, str | None] = {
    **{"huber": "delta", "mse": None, "kl": "temperature"},
    **{"kl-tail": None, "reverse-kl": "temperature", "jsd": None},
}

_ASKED = ("eval_forget", "eval_retain", "eval_attacks")
_OF_ANSWERS = (*_ASKED, "eval_max_new_tokens", "eval_retain_drop")
_OF_EVALUATIONS = ("eval_cache", "eval_limit", "checkpoint_selection", "early_stopping_patience")
# Refused unless another setting is given.
_GOES_WITH = dict.fromkeys((*_OF_ANSWERS, *_OF_EVALUATIONS), "eval_steps")
_GOES_WITH["noise_beta"] = "noise_alpha"


@settings
class RunConfig(Settings):
    """Settings of `duet-distill run`."""

    cache: str | None = setting(
        default=None,
        flag="CACHE",
        group="Where from, where to",
        decides=False,
        help="The teacher cache: a folder or a URL, with or without `@sha256:DIGEST` behind it.",
    )
    student: str = setting(
        metavar="MODEL",
        decides=False,
        aliases=("model", "model-name-or-path"),
        help="Model folder or hub id to start from.",
    )
    out: str = setting(
        metavar="DIR",
        decides=False,
        aliases=("output-dir", "output"),
        help="Folder of the finished student.",
    )
    overwrite: bool = setting(
        default=False,
        decides=False,
        aliases=("overwrite-output-dir", "force"),
        help="Replace the student or unfinished run at --out.",
    )
    objective: Literal[*OBJECTIVES] = setting(  # type: ignore[valid-type]
        default="duet",
        group="What it learns",
        aliases=("method",),
        help="duet fits the signals of CACHE; gradient-difference needs no cache: it lowers the "
        "likelihood of the answers of --forget and raises that of --retain.",
    )
    forget: tuple[str, ...] = setting(
        default=(),
        metavar="FILE",
        decides=False,
        help="For objectives without a cache: queries with answers to forget. Repeatable.",
    )
    retain: tuple[str, ...] = setting(
        default=(), metavar="FILE", decides=False, help="The same, to keep. Repeatable."
    )
    replay: tuple[str, ...] = setting(
        default=(),
        metavar="CACHE",
        decides=False,
        help="Also train on the forget queries of this cache of an earlier request. Repeatable.",
    )
    views: tuple[str, ...] = setting(
        default=(),
        flag="--view",
        metavar="FILE|@NAME[=WEIGHT]",
        decides=False,
        help="Also train each query in one of these shapes: a text file, one per line with {query} "
        "in it, or built-in ones; =3 draws them three times as often as others; none trains plain "
        "queries alone. Repeatable.  [default: those that CACHE holds]",
    )
    loss: Literal[*LOSS_OPTIONS] = setting(  # type: ignore[valid-type]
        default="huber", help="Distance between the student's and the teacher's logits."
    )
    delta: Positive = setting(
        default=1.0, help="Huber delta, in logits: the loss is linear beyond it."
    )
    temperature: Positive = setting(
        default=1.0, help="Divides the logits before their softmax; for kl and reverse-kl."
    )
    ce_weight: Share = setting(
        default=0.0,
        help="Share of cross-entropy on the tokens, given or decoded; --loss has the rest.",
    )
    select_entropy: Annotated[float, pydantic.Field(gt=0, le=1)] = setting(
        default=1.0,
        metavar="SHARE",
        help="Of rows of the split train, take --loss at this share of their positions only, where "
        "the teacher's entropy is highest.",
    )
    top_k: Count | None = setting(
        default=None,
        help="Train on the strongest K of the cached tokens.  [default: the cache's K]",
    )
    positions: Count | None = setting(
        default=None, help="Train on the first N cached positions.  [default: all of them]"
    )
    noise_alpha: Share = setting(
        default=0.0,
        help="Replace this share of the weights by noise before training; relearning recovers "
        "less.",
    )
    noise_beta: NotNegative = setting(default=0.1, help="Scale of the noise, in Xavier draws.")
    layers: str | None = setting(
        default=None,
        group="Trainable parameters",
        metavar="NUMBERS",
        help="Train these layers only, counted from 0: 5-7 or 0,3,5-7.  [default: everything]",
    )
    parameters: str | None = setting(
        default=None,
        metavar="REGEX",
        help="Train the parameters whose names match only; with --layers, those of them.",
    )
    lora_rank: Count | None = setting(
        default=None,
        aliases=("lora-r", "lora", "use-peft"),
        help="Train a LoRA adapter of this rank; needs duet-unlearn[lora].",
    )
    lora_alpha: Positive | None = setting(default=None, help="LoRA alpha.  [default: 2 * rank]")
    lora_dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = setting(
        default=0.0, help="Dropout on the adapter's inputs."
    )
    lora_extrapolation: Positive = setting(
        default=1.0,
        metavar="FACTOR",
        aliases=("extrapolation",),
        help="Save the adapter this many times as strong as training made it (model "
        "extrapolation).",
    )
    lora_target_modules: tuple[str, ...] = setting(
        default=("all-linear",),
        metavar="NAME,...",
        help="Linear modules that get an adapter, such as q_proj,v_proj.  [default: all-linear, "
        "all but the head]",
    )
    merge: bool = setting(
        default=False,
        flag="--merge/--no-merge",
        help="Save a whole model with the adapter merged in, not the adapter.",
    )
    learning_rate: Positive | Auto = setting(
        default=AUTO,
        group="Optimization",
        aliases=("lr", "rate"),
        help="Peak learning rate; auto is 0.0512 / hidden size, with LoRA ten times that; to "
        "forget without LoRA at most 1e-5 from 512 wide on.",
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = setting(
        default="cosine",
        aliases=("scheduler", "lr-scheduler"),
        help="Learning rate schedule.",
    )
    warmup_steps: NotNegative = setting(
        default=0.1,
        aliases=("warmup-ratio", "warmup"),
        help="Warmup steps; below 1, a fraction of all steps.",
    )
    epochs: Count | Auto = setting(
        default=AUTO,
        aliases=("num-train-epochs", "num-epochs"),
        overrules=("max_steps",),
        help=f"Passes over the queries; auto: {STEPS} steps, with LoRA {LORA_STEPS}, "
        f"{LORA_STEPS_IN_VIEWS} with views, but 1 to {MOST_PASSES} passes, "
        f"{LORA_PASSES_IN_VIEWS} or more for LoRA with views.",
    )
    max_steps: Count | None = setting(
        default=None,
        overrules=("epochs",),
        help="Stop after this many optimizer steps, also within --epochs; of the two in a file, "
        "neither counts beside the other on the command line.",
    )
    batch_size: Count | Auto = setting(
        default=AUTO,
        aliases=("per-device-train-batch-size", "train-batch-size"),
        help="Queries per optimizer step, over all processes and micro-batches; auto is "
        f"{BATCH}, with LoRA and views {LORA_BATCH_IN_VIEWS}.",
    )
    weight_decay: NotNegative = setting(default=0.0, help="AdamW's weight decay.")
    max_grad_norm: NotNegative = setting(
        default=1.0,
        aliases=("gradient-clipping",),
        help="Clip gradients to this norm; 0 does not.",
    )
    seed: Whole = setting(
        default=0, help="Random seed: the order of queries, the draws of views and noise."
    )
    trainer_args: Mapping[str, Any] = setting(
        default_factory=dict,
        flag="--trainer-arg",
        metavar="KEY=VALUE",
        help="Any other field of transformers' TrainingArguments, such as adam_beta2=0.95. "
        "Repeatable.",
    )
    gradient_accumulation_steps: Count = setting(
        default=1,
        group="Memory and precision",
        decides=False,
        help="Micro-batches that a step is split into: less memory, the same result.",
    )
    gradient_checkpointing: bool = setting(
        default=False,
        flag="--gradient-checkpointing/--no-gradient-checkpointing",
        decides=False,
        help="Recompute activations in the backward pass: less memory, more time.",
    )
    precision: Literal["auto", "float32", "bf16", "fp16"] = setting(
        default=AUTO,
        aliases=("bf16", "fp16", "mixed-precision"),
        help="Compute dtype of the forward pass; auto is bf16 where the GPU has it and for LoRA on "
        "weights in bfloat16, else float32.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        default=AUTO,
        aliases=("torch-dtype",),
        help="Dtype of the weights in training; bfloat16 halves memory and loses small updates. "
        "auto is bfloat16 for LoRA where model, machine and --precision have it, else float32.",
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        default=AUTO, help="Dtype of the saved student; auto is that of MODEL."
    )
    eval_steps: Whole = setting(
        default=0,
        group="Evaluation on held-out queries",
        aliases=("eval-every",),
        help="Steps between two evaluations; 0 makes none.",
    )
    eval_forget: tuple[str, ...] = setting(
        default=(),
        metavar="FILE",
        decides=False,
        help="Held-out queries with answers that should be gone. Repeatable.",
    )
    eval_retain: tuple[str, ...] = setting(
        default=(),
        metavar="FILE",
        decides=False,
        help="Held-out queries with answers that should be kept. Repeatable.",
    )
    eval_cache: str | None = setting(
        default=None,
        metavar="CACHE",
        decides=False,
        help="In place of queries: a cache of held-out rows, on which the loss is taken.",
    )
    eval_attacks: tuple[str, ...] = setting(
        default=(),
        metavar="FILE|@NAME",
        decides=False,
        help="Also ask them in each of these shapes, as attacks; the worst counts. Repeatable.",
    )
    eval_limit: Count | None = setting(
        default=None,
        help="Ask this many queries of each file, or rows of CACHE, evenly spread.  [default: all]",
    )
    eval_max_new_tokens: Count = setting(default=64, help="Longest generated answer, in tokens.")
    eval_retain_drop: NotNegative = setting(
        default=3.0,
        help="Points of retain recall that the best checkpoint may lose against the base.",
    )
    checkpoint_selection: Literal["best", "last"] = setting(
        default="best",
        aliases=("keep", "load-best-model-at-end"),
        help="Which weights the student has: of the evaluated step that forgets most and keeps "
        "enough, or has the lowest loss on --eval-cache, or of the last.",
    )
    early_stopping_patience: Count | None = setting(
        default=None,
        metavar="N",
        aliases=("early-stop", "patience"),
        help="Stop after N evaluations in a row without a lower forget recall, or loss.",
    )
    logging_steps: Count = setting(
        default=10, group="Logs and checkpoints", decides=False, help="Steps between two log lines."
    )
    save_steps: Whole = setting(
        default=500, decides=False, help="Steps between two checkpoints; 0: only when stopped."
    )
    report_to: Literal["none", "tensorboard", "wandb"] = setting(
        default="none", decides=False, help="Also send the logs there."
    )

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            ConfigurationError: Some do.
        """
        self._check_objective()
        for name in ("delta", "temperature"):
            self._check_loss_takes(name)
        self._check_evaluation()
        for name, other in _GOES_WITH.items():
            if not self.is_default(name) and not getattr(self, other):
                value = getattr(self, name)
                raise ConfigurationError(f"{name} is {value!r} without {other}; give {other} too")
        check_trained(self)
        check_trainer_args(self.trainer_args)
        # Of `auto` it is known later, and checked then.
        if self.batch_size != AUTO and self.gradient_accumulation_steps > int(self.batch_size):
            raise ConfigurationError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, expected at "
                f"most batch_size ({self.batch_size}): a micro-batch needs at least one query"
            )

    def _check_objective(self) -> None:
        kind = OBJECTIVES[self.objective]
        for name in kind.inputs:
            if not getattr(self, name):
                raise MissingSettingError(
                    f"{name} is missing; objective {self.objective} needs it", setting=name
                )
        of_others = {n for other in OBJECTIVES.values() for n in (*other.inputs, *other.settings)}
        for name in sorted(of_others - {*kind.inputs, *kind.settings}):
            if not self.is_default(name):
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)!r}, but objective {self.objective} takes "
                    "none; leave it out"
                )

    def _check_loss_takes(self, name: str) -> None:
        if self.is_default(name) or LOSS_OPTIONS[self.loss] == name:
            return
        takers = " or ".join(loss for loss, option in LOSS_OPTIONS.items() if option == name)
        reason = f"loss {self.loss} has none"
        if name == "temperature" and self.loss in ("kl-tail", "jsd"):
            reason = f"loss {self.loss} needs the logsumexp, which is cached at temperature 1"
        raise ConfigurationError(
            f"{name} is {getattr(self, name)!r}, but {reason}; leave it out, or choose loss "
            f"{takers}"
        )

    def _check_evaluation(self) -> None:
        for name in _OF_ANSWERS:
            if self.eval_cache and not self.is_default(name):
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)!r} beside eval_cache ({self.eval_cache}); "
                    "give one of them: a student is judged by its answers or by its loss"
                )
        for name in ("eval_forget", "eval_retain"):
            if self.eval_steps and not self.eval_cache and not getattr(self, name):
                raise ConfigurationError(
                    f"{name} is empty, expected held-out queries to ask every {self.eval_steps} "
                    "steps; a cache to take the loss on goes with eval_cache"
                )
