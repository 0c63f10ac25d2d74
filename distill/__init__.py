"""The student: batches, losses, objectives, trainer.

Importing any module of this package makes it the attribute `duet_unlearn.distill`, which is also
the name of the public function: so the package itself can be called.
"""

import sys
import types
from typing import TYPE_CHECKING, Any

from duet_unlearn import api

if TYPE_CHECKING:
    from duet_unlearn.distill.job import RunResult


class _Callable(types.ModuleType):
    def __call__(self, *args: Any, **settings: Any) -> "RunResult":
        return api.distill(*args, **settings)


__wrapped__ = api.distill  # for `inspect.signature`
sys.modules[__name__].__class__ = _Callable
