"""Where one sequence became another by a single insertion: on text and on token ids.

Inserting X into S at p gives S[:p] + X + S[p:]. The place is often not unique: "a" + "ba" + "b"
and "ab" + "ab" are the same text, so every place is a range of them, and X turns along with it.
"""

from collections.abc import Sequence


def insertion_places(before: Sequence[object], after: Sequence[object]) -> range:
    """All p for which `after` is `before` with one run of elements inserted at p.

    Returns:
        A range of places in `before`, empty where `after` is anything else.
    """
    if len(after) < len(before):
        return range(0)
    head = common_head(before, after)
    tail = common_head(before[::-1], after[::-1])
    # Head and tail together must cover `before`; where they overlap, the place can move.
    return range(len(before) - tail, head + 1)


def common_head(first: Sequence[object], second: Sequence[object]) -> int:
    """The number of elements that two sequences share at their start, in a few slices."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
