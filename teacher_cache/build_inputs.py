"""What goes into a build: the set of queries, and their prompts rendered to token ids."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from duet_unlearn.data.errors import ConfigurationError
from duet_unlearn.data.prompts import PromptRenderer
from duet_unlearn.data.queries import Query, load_queries
from duet_unlearn.teacher_cache.build_config import BuildConfig
from duet_unlearn.teacher_cache.schema import SPLITS

logger = logging.getLogger(__name__)


def load_query_set(config: BuildConfig) -> list[Query]:
    """Load the forget and the retain queries of all sources, each query once.

    Raises:
        DataError: A source is unusable.
        ConfigurationError: One id stands for two different queries of a split.
    """
    sources = {"forget": config.forget, "retain": config.retain}
    queries = [
        query
        for split, names in sources.items()
        for name in names
        for query in load_queries(name, split=split)
    ]
    unique: dict[tuple[str, str], Query] = {}
    for query in queries:
        known = unique.setdefault((query.split, query.query_id), query)
        if known.text != query.text:
            raise ConfigurationError(
                f"{query.split} files: id {query.query_id} stands for two different queries; "
                "give each its own id"
            )
    both = {q.text for q in unique.values() if q.split == "forget"} & {
        q.text for q in unique.values() if q.split == "retain"
    }
    if both:
        logger.warning(
            "%d queries are in the forget and the retain set, for example %r",
            len(both),
            min(both)[:80],
        )
    for split in SPLITS:
        if not any(query.split == split for query in unique.values()):
            logger.warning(
                "no %s queries: a student trained from this cache alone %s",
                split,
                "forgets nothing" if split == "forget" else "will lose general ability",
            )
    return list(unique.values())


class RenderedPrompts:
    """The student's and the teacher's prompts of some queries, as compact arrays."""

    def __init__(
        self, queries: Sequence[Query], renderer: PromptRenderer, *, retain_prefix: bool
    ) -> None:
        self.queries = queries
        self.student: list[npt.NDArray[np.int32]] = []
        """The student's prompts in order, each `[P]`."""
        self._teacher: list[npt.NDArray[np.int32]] = []
        for query in tqdm(queries, desc="prompts", unit=" queries", disable=None, leave=False):
            student = np.array(renderer.student_ids(query.messages), np.int32)
            steered = query.split == "forget" or retain_prefix
            self.student.append(student)
            self._teacher.append(
                np.array(renderer.teacher_ids(query.messages), np.int32) if steered else student
            )
        self.longest = max(len(ids) for ids in self._teacher)
        """Length of the teacher's longest prompt in tokens."""

    @property
    def teacher(self) -> Iterator[list[int]]:
        """The teacher's prompts in order."""
        return (ids.tolist() for ids in self._teacher)

    def check_length(self, context: int | None, positions: int) -> None:
        """Check that every prompt fits the model's context.

        Raises:
            ConfigurationError: One does not; the message names its query.
        """
        needed = self.longest + positions
        if context is not None and needed > context:
            longest = max(range(len(self.queries)), key=lambda i: len(self._teacher[i]))
            query = self.queries[longest]
            raise ConfigurationError(
                f"{query.split} query {query.query_id} ({query.text[:40]!r}...) needs {needed} "
                f"tokens with prefix and {positions} positions, but the teacher reads {context}; "
                "shorten or remove it"
            )
