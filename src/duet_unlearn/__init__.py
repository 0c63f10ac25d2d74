"""duet-unlearn: make a language model forget by distilling a prompt-steered teacher.

The five packages stand at the top of the repository and import one way:
``cli -> distill -> teacher_cache -> evaluation -> data``.
"""

from typing import TYPE_CHECKING

from duet_unlearn.api import build_cache, evaluate, open_cache
from duet_unlearn.errors import (
    CacheError,
    ConfigurationError,
    CorruptCacheError,
    DataError,
    DuetError,
    MismatchError,
    RequirementError,
)

if TYPE_CHECKING:
    from duet_unlearn.api import distill
else:
    from duet_unlearn import distill  # the folder's package, which can be called

__version__ = "0.1.0"

__all__ = [
    "build_cache",
    "distill",
    "evaluate",
    "open_cache",
    "CacheError",
    "ConfigurationError",
    "CorruptCacheError",
    "DataError",
    "DuetError",
    "MismatchError",
    "RequirementError",
    "__version__",
]
