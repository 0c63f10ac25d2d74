"""Settings of `duet-distill plan`: a run, and how much of it to try."""

from duet_unlearn.distill.config import RunConfig
from duet_unlearn.settings import Whole, setting, settings


@settings
class PlanConfig(RunConfig):
    """Settings of `duet-distill plan`: those of the run, and how much of it to try."""

    out: str = setting(
        default="student",
        metavar="DIR",
        decides=False,
        help="Accepted so that a `run` command can be planned as it is; nothing is written.",
    )
    measure: Whole = setting(
        default=3,
        group="What to measure",
        metavar="N",
        decides=False,
        help="Training steps to time in a temporary folder, after two to warm up; 0 tries none.",
    )
