"""Settings of a membership test, checked when they are made."""

from typing import Literal

from duet_unlearn.data.models.loading import Dtype
from duet_unlearn.evaluation.config import GONE, ModelSpec, refuse_empty, refuse_same_labels
from duet_unlearn.settings import Count, Settings, setting, settings


@settings
class MembershipConfig(Settings):
    """Settings of `duet-distill membership`."""

    models: tuple[ModelSpec, ...] = setting(flag=None, help="Models side by side.")
    forget: tuple[str, ...] = setting(
        group="Which texts",
        metavar="FILE",
        help=f"{GONE} Repeatable.",
    )
    holdout: tuple[str, ...] = setting(
        metavar="FILE",
        help="Queries with answers of the same kind that no model was trained on, or a kit: the "
        "holdout that it has. Repeatable.",
    )
    form: Literal["answer", "chat", "plain"] = setting(
        default="answer",
        help="What is scored: the answer behind its query, both as the chat template has them, or "
        "both as plain text without it. The base tells which of them has power.",
    )
    limit: Count | None = setting(
        default=None, help="Take this many texts of each side, evenly spread.  [default: all]"
    )
    batch_size: Count = setting(default=32, help="Most texts of a forward pass.")
    dtype: Dtype = setting(
        default="auto",
        help="Arithmetic; auto is as stored where the processor has that fast, else float32.",
    )

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        refuse_empty(self, "models", "forget", "holdout")
        refuse_same_labels([spec.label for spec in self.models])
