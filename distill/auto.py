"""What the settings of a run become where they are `auto`, and why.

Measured: docs/decisions/0010-training-defaults.md.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duet_unlearn.distill.config import RunConfig

AUTO = "auto"
# Adam's step does not shrink with the width of a matrix, so the rate has to: 2e-4 at 256 wide.
LEARNING_RATE_TIMES_WIDTH = 0.0512
# To forget, all weights of a pretrained model, which is one from this width on, take less: at 896
# wide the 5.7e-5 of the rule cost general facts, and 1e-5 did not.
PRETRAINED_WIDTH, MOST_RATE = 512, 1e-5
# An adapter starts from zero and is small: it takes, and needs, larger steps than the weights.
LORA_TIMES = 10
# How far a run goes follows from the steps that were enough where it was measured.
STEPS, LORA_STEPS, MOST_PASSES = 300, 70, 20
# With views a query is two sequences, and every pass draws another view of it.
BATCH, LORA_BATCH_IN_VIEWS = 16, 8
LORA_STEPS_IN_VIEWS, LORA_PASSES_IN_VIEWS = 120, 2


def resolve_auto(
    config: "RunConfig",
    *,
    hidden_size: int,
    stored_dtype: str,
    fast_dtype: str,
    rows: int,
    views: int,
    forgets: bool,
) -> "RunConfig":
    """Return a run's settings with every `auto` replaced but that of `precision`.

    Args:
        config: As the user gave it.
        hidden_size: Width of the student.
        stored_dtype: Of the student's weights.
        fast_dtype: The dtype in which this machine computes it fastest.
        rows: Queries of an epoch.
        views: In how many views queries are also trained.
        forgets: Whether there are queries to forget.
    """
    lora, rank = config.lora_rank is not None, config.lora_rank or 0
    rate, batch = config.learning_rate, config.batch_size
    epochs, steps = config.epochs, config.max_steps
    if rate == AUTO:
        rate = (LORA_TIMES if lora else 1) * LEARNING_RATE_TIMES_WIDTH / hidden_size
        if forgets and hidden_size >= PRETRAINED_WIDTH and not lora:
            rate = min(rate, MOST_RATE)
    if batch == AUTO:
        batch = LORA_BATCH_IN_VIEWS if lora and views else BATCH
    steps_per_epoch = -(-rows // int(batch))
    if epochs == AUTO:
        wanted = LORA_STEPS if lora else STEPS
        if lora and views:
            wanted = max(LORA_STEPS_IN_VIEWS, LORA_PASSES_IN_VIEWS * steps_per_epoch)
        steps = steps or min(max(wanted, steps_per_epoch), MOST_PASSES * steps_per_epoch)
        epochs = -(-steps // steps_per_epoch)
    elif steps:
        steps = min(steps, int(epochs) * steps_per_epoch)  # steps alone would decide
    halved = lora and fast_dtype == "bfloat16" and config.precision in (AUTO, "bf16")
    return config.replaced(
        learning_rate=rate,
        epochs=epochs,
        max_steps=steps,
        batch_size=batch,
        lora_alpha=2.0 * rank if lora and config.lora_alpha is None else config.lora_alpha,
        dtype=("bfloat16" if halved else "float32") if config.dtype == AUTO else config.dtype,
        save_dtype=stored_dtype if config.save_dtype == AUTO else config.save_dtype,
    )
