"""Several caches in one run: a new request, and the forget queries of earlier ones beside it."""

import itertools
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from duet_unlearn.distill.objectives.base import IN_VIEW
from duet_unlearn.errors import MismatchError
from duet_unlearn.teacher_cache.format.row_group import Identity
from duet_unlearn.teacher_cache.format.schema import SPLITS
from duet_unlearn.teacher_cache.reader import CachedRow, CacheReader

logger = logging.getLogger(__name__)


class JoinedRows:
    """The rows of some caches, one cache behind the other.

    Args:
        readers: The caches; their recipes may differ.
    """

    def __init__(self, readers: Sequence[CacheReader]) -> None:
        self._readers = tuple(readers)
        self._starts = np.cumsum([0, *(reader.num_rows for reader in readers)]).tolist()
        self.num_rows: int = self._starts[-1]
        self.row_groups = tuple(
            range(start + group.start, start + group.stop)
            for reader, start in zip(readers, self._starts[:-1], strict=True)
            for group in reader.row_groups
        )
        """Rows that are decoded together."""

    def row(self, index: int) -> CachedRow:
        """Return one row; errors are those of `CacheReader.row`."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._readers[number].row(index - self._starts[number])

    def identities(self) -> Iterator[Identity]:
        """Yield `(query_id, split, query)` of every row; decodes no signals."""
        return itertools.chain.from_iterable(reader.identities() for reader in self._readers)


def drawn_rows(
    splits: npt.NDArray[np.uint8], cache: CacheReader, replayed: Sequence[CacheReader]
) -> npt.NDArray[np.uint8]:
    """Return the split of every row of all caches, `IN_VIEW` for those that are never drawn.

    Of an earlier cache only forget rows are: what it retains a later request may forget. And a
    retain row of the new cache is left out if an earlier one forgets its query.

    Args:
        splits: Of the new cache's rows, `[N]`.
        cache: The new cache.
        replayed: The earlier ones.

    Raises:
        MismatchError: An earlier cache forgets nothing.
    """
    if not replayed:
        return splits
    forget, retain = (SPLITS.index(split) for split in ("forget", "retain"))
    texts = [text for _, _, text in cache.identities()]
    known = {text for text, code in zip(texts, splits, strict=True) if code == forget}
    earlier: set[str] = set()
    parts = [splits.copy()]
    for reader in replayed:
        if not reader.manifest.splits["forget"].rows:
            raise MismatchError(
                f"--replay {reader.folder}: no forget queries in this cache; leave it out"
            )
        codes = np.full(reader.num_rows, IN_VIEW, np.uint8)
        for row, (_, split, text) in enumerate(reader.identities()):
            if split == "forget" and text not in known and text not in earlier:
                codes[row] = forget
                earlier.add(text)
        parts.append(codes)
    left = [r for r, text in enumerate(texts) if splits[r] == retain and text in earlier]
    parts[0][left] = IN_VIEW
    logger.info("replays %d forget queries of %d earlier caches", len(earlier), len(replayed))
    if left:
        logger.warning(
            "%d retain queries of %s are left out: an earlier cache forgets them",
            len(left),
            cache.folder,
        )
    return np.concatenate(parts)
