"""Settings of a probe, checked when they are made."""

from duet_unlearn.evaluation.config import GONE, SubjectsConfig, refuse_empty
from duet_unlearn.settings import Count, setting, settings


@settings
class ProbeConfig(SubjectsConfig):
    """Settings of `duet-distill probe`."""

    forget: tuple[str, ...] = setting(
        group="What to ask",
        metavar="FILE",
        help=f"{GONE} Repeatable.",
    )
    retain: tuple[str, ...] = setting(
        metavar="FILE",
        help="Queries with answers that are kept: the linear probe is trained on them. Repeatable.",
    )
    limit: Count = setting(
        default=256, help="Take at most this many queries of each split, evenly spread."
    )
    batch_size: Count = setting(default=32, help="Most queries of a forward pass.")

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        SubjectsConfig.__post_init__(self)
        refuse_empty(self, "forget", "retain")
