"""duet-unlearn: make a language model forget by distilling a prompt-steered teacher.

The five packages stand at the top of the repository and import one way:
``cli -> distill -> teacher_cache -> evaluation -> data``.
"""

from duet_unlearn.errors import (
    CacheError,
    ConfigurationError,
    CorruptCacheError,
    DataError,
    DuetError,
    MismatchError,
)

__version__ = "0.1.0"

__all__ = [
    "CacheError",
    "ConfigurationError",
    "CorruptCacheError",
    "DataError",
    "DuetError",
    "MismatchError",
    "__version__",
]
