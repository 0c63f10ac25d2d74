"""Settings of relearning, checked when they are made."""

from collections.abc import Callable
from typing import TypeVar

from duet_unlearn.data.models.loading import Dtype
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.evaluation.config import GONE, ModelSpec, SubjectsConfig, refuse_empty
from duet_unlearn.settings import Count, Share, Whole, setting, settings

N = TypeVar("N", int, float)


@settings
class RelearnConfig(SubjectsConfig):
    """Settings of `duet-distill relearn`."""

    models: tuple[ModelSpec, ...] = setting(
        flag=None, help="Models that are fine-tuned, each from its own weights."
    )
    forget: tuple[str, ...] = setting(
        group="What to ask",
        metavar="FILE",
        help=f"{GONE} Those that a lesson teaches, or whose answer it teaches, are not asked. "
        "Repeatable.",
    )
    retain: tuple[str, ...] = setting(
        default=(),
        metavar="FILE",
        help="Queries with answers that should be kept, asked at the same steps. Repeatable.",
    )
    limit: Count | None = setting(
        default=None, help="Ask this many queries of each split, evenly spread.  [default: all]"
    )
    max_new_tokens: Count = setting(default=64, help="Longest answer in tokens.")
    teach: tuple[str, ...] = setting(
        default=(),
        group="What to teach",
        metavar="FILE",
        help="Queries with answers, or a text file, to fine-tune on; several are several lessons, "
        "each from the start. Repeatable.  [default: a share of each --forget]",
    )
    share: Share = setting(
        default=0.5,
        help="Of a file that --teach and --forget both name, this share of the queries is taught "
        "and the rest is asked, split by the seed.",
    )
    rates: str = setting(
        default="3e-5,1e-4,3e-4,1e-3",
        group="How to teach",
        metavar="NUMBER,...",
        help="Learning rates of AdamW, each tried from the start; the worst one counts.",
    )
    steps: str = setting(
        default="0,10,30,100",
        metavar="INTEGER,...",
        help="After so many optimizer steps the queries are asked.",
    )
    batch_size: Count = setting(default=16, help="Lessons of a step, and most queries of a pass.")
    lora_rank: Count | None = setting(
        default=None,
        help="Train a LoRA adapter of this rank instead of all weights; needs duet-unlearn[lora].",
    )
    seed: Whole = setting(default=0, help="Decides the split and the order of the lessons.")
    dtype: Dtype = setting(
        default="float32",
        help="Arithmetic, and what the weights are trained in; auto is as `eval` has it.",
    )

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        SubjectsConfig.__post_init__(self)
        refuse_empty(self, "forget")
        if any(rate <= 0 for rate in self.listed_rates):
            raise ConfigurationError(f"rates is {self.rates!r}, expected numbers above 0")
        if min(self.listed_steps) < 0 or max(self.listed_steps) == 0:
            raise ConfigurationError(
                f"steps is {self.steps!r}, expected whole numbers, 0 or more, at least one above 0"
            )

    @property
    def listed_rates(self) -> tuple[float, ...]:
        """The learning rates, each once."""
        return _numbers("rates", self.rates, float)

    @property
    def listed_steps(self) -> tuple[int, ...]:
        """The steps after which queries are asked, in order, each once."""
        return tuple(sorted(_numbers("steps", self.steps, int)))

    @property
    def lessons(self) -> tuple[str, ...]:
        """The sources of lessons, each once."""
        return tuple(dict.fromkeys(self.teach or self.forget))


def _numbers(name: str, text: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    try:
        found = tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise ConfigurationError(
            f"{name} is {text!r}, expected numbers with commas between them"
        ) from None
    if not all(abs(number) < float("inf") for number in found):
        raise ConfigurationError(f"{name} is {text!r}, expected finite numbers")
    return found
