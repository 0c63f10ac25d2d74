"""Settings of a searched attack, checked when they are made."""

from duet_unlearn.errors import ConfigurationError
from duet_unlearn.evaluation.config import GONE, SubjectsConfig, refuse_empty
from duet_unlearn.settings import Count, Positive, Share, Whole, setting, settings


@settings
class AttackConfig(SubjectsConfig):
    """Settings of `duet-distill attack`."""

    forget: tuple[str, ...] = setting(
        group="What to ask",
        metavar="FILE",
        help=f"{GONE} Those that an attack is trained on, or whose answer it is trained on, are "
        "not asked. Repeatable.",
    )
    retain: tuple[str, ...] = setting(
        default=(),
        metavar="FILE",
        help="Queries with answers that should be kept, asked in the same way: whether an attack "
        "merely breaks the model. Repeatable.",
    )
    limit: Count = setting(
        default=64, help="Ask at most this many queries of each split, evenly spread."
    )
    max_new_tokens: Count = setting(default=64, help="Longest answer in tokens.")
    train: tuple[str, ...] = setting(
        default=(),
        group="What to train on",
        metavar="FILE",
        help="Queries with answers that the attacks are trained on. Repeatable.  "
        "[default: a share of --forget]",
    )
    share: Share = setting(
        default=0.5, help="Without --train, this share of the forget queries, split by the seed."
    )
    suffix_steps: Whole = setting(
        default=30, group="How hard to try", help="Steps of the suffix search; 0 leaves it out."
    )
    suffix_tokens: Count = setting(default=10, help="Length of the suffix, about.")
    suffix_queries: Count = setting(
        default=4, help="Training queries of a step, drawn anew for each."
    )
    candidates: Count = setting(default=32, help="Suffixes that a step tries.")
    soft_steps: Whole = setting(
        default=60, help="Steps of Adam on the soft prompt; 0 leaves it out."
    )
    soft_tokens: Count = setting(default=8, help="Vectors of the soft prompt.")
    soft_rate: Positive = setting(
        default=0.1,
        help="Its learning rate, over the root mean square of what the embedding puts out.",
    )
    batch_size: Count = setting(
        default=16, help="Training queries of a soft prompt's step, and most queries of a pass."
    )
    seed: Whole = setting(default=0, help="Decides the split, and all that is drawn.")

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        SubjectsConfig.__post_init__(self)
        refuse_empty(self, "forget")
        if not self.suffix_steps and not self.soft_steps:
            raise ConfigurationError(
                "suffix_steps and soft_steps are both 0, expected at least one above 0"
            )
