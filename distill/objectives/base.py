"""What an objective gives to the trainer."""

import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.model.student import Student
from duet_unlearn.distill.objectives import OBJECTIVES
from duet_unlearn.teacher_cache.format.schema import SPLITS

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from duet_unlearn.data.prompts import PromptRenderer

IN_VIEW = len(SPLITS)
"""In place of a split's code: never drawn by itself; the target of a retain row in a view, say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What the sampler needs to know of the rows."""

    splits: npt.NDArray[np.uint8]
    """Split of every row, `[N]`, its place in `SPLITS`; `IN_VIEW` rows are never drawn."""
    row_groups: Sequence[range]
    """Rows that are read together; rows are mixed within windows of these."""
    num_views: int = 0
    """How many views a row can be drawn behind."""
    view_weights: Sequence[float] | None = None
    """How often each is drawn against the others; None is equally often."""
    view_mask: npt.NDArray[np.bool_] | None = None
    """Which views a row can be drawn behind, `[N, num_views]`; None is all of them."""

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each split; of `train`, where there are some."""
        counts = {split: int((self.splits == code).sum()) for code, split in enumerate(SPLITS)}
        return {split: n for split, n in counts.items() if n or split != "train"}

    @property
    def num_sequences(self) -> int:
        """Sequences of an epoch: each row, and again behind a view if there is one for it."""
        drawn = self.splits != IN_VIEW
        if self.num_views and self.view_mask is not None:
            return int(drawn.sum() + (drawn & self.view_mask.any(axis=1)).sum())
        return int(drawn.sum()) * (2 if self.num_views else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """What a student's card says of how it was trained."""

    summary: str
    """A sentence or two; Markdown."""
    tags: Sequence[str]
    """What hubs find it by; a student with `unlearning` among them gets the card's caution."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further rows of the card's table."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What goes into `duet_run.json` beside settings and result."""


class Objective(Protocol):
    """Examples, their collation, and a loss for each row.

    The trainer asks for examples by `Draw` (a row, a view, a weight), has them collated into one
    batch a micro-batch, and sums `row_losses` weighted by the draws. Nothing here depends on how
    many processes take part. An objective that needs more than the student finds room in `attach`:

    - a frozen reference model (NPO): load it there from `student.folder`, or with LoRA run the
      student under `disable_adapter()`; `row_losses` calls it under `no_grad`;
    - hidden states (RMU): register hooks there, or call the model with `output_hidden_states=True`.
    """

    order: Order
    identity: Mapping[str, Any]
    """What its inputs are, by content: a run resumes, and a student is found, where it is equal."""
    settings: Mapping[str, Any]
    """Settings that its inputs resolve, such as the cache's K for `top_k`."""

    def prepare(self, renderer: "PromptRenderer", queries: set[str] | None = None) -> None:
        """Check that its examples fit the student, before any weight is loaded.

        Rows of a cache are tokens already, and their lengths are seen when they are drawn.

        Args:
            renderer: The student's tokenizer and chat template.
            queries: Held-out ones, to warn of those that are trained on.

        Raises:
            DataError: An example that the student tokenizes is too long for it.
            MismatchError: The examples belong to another tokenizer.
        """

    def attach(self, model: "nn.Module") -> None:
        """Take hold of the student's weights, not yet wrapped for several processes."""

    @property
    def dataset(self) -> "Dataset[Any]":
        """Examples by their `Draw`; after `prepare`."""

    def collate(self, examples: Sequence[Any]) -> dict[str, Any]:
        """Return one batch: `weight` `[B]` and `split` `[B]` of the draws, `names`, and its own."""

    def row_losses(self, model: "nn.Module", batch: Mapping[str, Any]) -> "Tensor":
        """Return one loss a row, `[B]` float32, differentiable."""

    def story(self) -> Story:
        """Return what the student's card says of it."""


def open_objective(config: RunConfig, student: Student) -> Objective:
    """Open the inputs of the objective that the run names; nothing heavy is read.

    Raises:
        ConfigurationError: A setting does not fit the inputs.
        DuetError: An input is missing, unreadable or malformed.
    """
    found = pkgutil.resolve_name(f"{__package__}.{OBJECTIVES[config.objective].name}")
    return cast("Objective", found(config, student))
