"""What goes into a build: the set of queries, and their prompts rendered to token ids."""

import logging
from collections.abc import Container, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from duet_unlearn.data.prompts import PromptRenderer
from duet_unlearn.data.queries import Query, load_queries
from duet_unlearn.data.shapes import Shape, load_shapes
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.teacher_cache.build.config import BuildConfig
from duet_unlearn.teacher_cache.format.schema import SPLITS

logger = logging.getLogger(__name__)

TokenIds = npt.NDArray[np.int32]


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
    queries = list(unique.values())
    return queries + [
        query.in_view(view)
        for view in _load_views(config.views)
        for query in queries
        if query.split == "retain"
    ]


def _load_views(sources: Sequence[str]) -> list[Shape]:
    """Return the shapes in which the plain base answers the retain queries too.

    Raises:
        ConfigurationError: A name is unknown, two shapes share one, or a shape shows answers.
        DataError: A file is missing or malformed.
    """
    views: dict[str, Shape] = {}
    for view in (view for source in sources for view in load_shapes(source)):
        if view.needs_answers:
            raise ConfigurationError(
                f"view {view.name}: shows reference answers, which never enter a cache; leave it "
                "to evaluations"
            )
        if views.setdefault(view.name, view).text != view.text:
            raise ConfigurationError(f"two views are named {view.name}; rename one")
    return list(views.values())


class RenderedPrompts:
    """The prompts of a planned cache: those of all its queries are checked, some are kept."""

    def __init__(
        self,
        shards: Sequence[Sequence[Query]],
        kept: Mapping[int, Container[int]],
        renderer: PromptRenderer,
        *,
        retain_prefix: bool,
    ) -> None:
        """Render.

        Args:
            shards: The queries of every shard. All are rendered, so that the length of the longest
                prompt, and with it the engine's settings, do not depend on what is left to do.
            kept: For some shards, the numbers of the queries whose prompts are kept.
            renderer: Makes the prompts.
            retain_prefix: Whether the prefix stands in front of retain queries too.
        """
        self.student: dict[tuple[int, int], TokenIds] = {}
        """The student's prompts by shard and number, each `[P]`."""
        self.teacher: dict[tuple[int, int], TokenIds] = {}
        """The teacher's prompts."""
        self.longest = 0
        """Length of the teacher's longest prompt in tokens."""
        self._longest_query = shards[0][0]
        self._warn_of_control_tokens(shards, renderer)
        places = [(i, n, query) for i, shard in enumerate(shards) for n, query in enumerate(shard)]
        for index, number, query in tqdm(
            places, desc="prompts", unit=" queries", disable=None, leave=False
        ):
            if query.view is not None:
                # In a shape, what counts is what the plain base says.
                student = teacher = query.view.render(query.messages, renderer)
            else:
                steered = query.split == "forget" or retain_prefix
                student = renderer.student_ids(query.messages)
                teacher = renderer.teacher_ids(query.messages) if steered else student
            if len(teacher) > self.longest:
                self.longest, self._longest_query = len(teacher), query
            if number in kept.get(index, ()):
                self.student[index, number] = np.array(student, np.int32)
                self.teacher[index, number] = np.array(teacher, np.int32)

    def _warn_of_control_tokens(
        self, shards: Sequence[Sequence[Query]], renderer: PromptRenderer
    ) -> None:
        """Log queries whose text spells tokens that structure a prompt: they are read as such."""
        typed = [
            (query, token)
            for shard in shards
            for query in shard
            if (token := renderer.control_token_in(query.messages)) is not None
        ]
        if typed:
            logger.warning(
                "%d queries spell a control token, such as %s in %s; teacher and student read it "
                "as that token, as they would in a chat; give --plain-text if it is meant as text",
                len(typed),
                typed[0][1],
                typed[0][0].query_id,
            )

    def check_length(self, context: int | None, positions: int) -> None:
        """Check that every prompt fits the model's context.

        Raises:
            ConfigurationError: One does not; the message names its query.
        """
        needed, query = self.longest + positions, self._longest_query
        if context is not None and needed > context:
            raise ConfigurationError(
                f"{query.split} query {query.query_id} ({query.text[:40]!r}...) needs {needed} "
                f"tokens with prefix and {positions} positions, but the teacher reads {context}; "
                "shorten or remove it"
            )
