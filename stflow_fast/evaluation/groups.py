"""Groups of training slides that are left out in turn, to choose or to calibrate what training slides alone decide."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..slides import Slide

Split = tuple[list[Slide], list[Slide]]
"""The slides that are kept, and those that are left out."""


def left_out_groups(slides: Sequence[Slide], seed: int = 0, most: int = 5) -> list[Split]:
    """Every spot is left out once, and nothing of it is kept then.

    Each slide by itself where there are ``most`` or fewer. Of more, ``most`` groups with about equal numbers of spots:
    the largest first, each into the group with the fewest spots so far. A slide alone is cut at the median x and y of
    its spots into regions, four unless some are empty.

    Args:
        slides: the training slides; within a group they keep this order.
        seed: decides the order of slides with equally many spots.
        most: groups of slides.

    Returns:
        (kept slides, left-out slides) of each group; none where there is nothing to keep or to leave out (no slide, or
        one whose spots lie in one region).
    """
    if len(slides) == 1:
        return _regions(slides[0])
    group = _dealt([slide.n_spots for slide in slides], seed, most)
    chosen = [[number == own for own in group] for number in sorted(set(group))]
    splits = [
        (
            [slide for slide, out in zip(slides, left, strict=True) if not out],
            [slide for slide, out in zip(slides, left, strict=True) if out],
        )
        for left in chosen
    ]
    return [(kept, left) for kept, left in splits if kept]


def _dealt(sizes: Sequence[int], seed: int, most: int) -> list[int]:
    """The group of each slide by its number of spots."""
    if len(sizes) <= most:
        return list(range(len(sizes)))
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    filled, group = [0] * most, [0] * len(sizes)
    for slide in sorted(shuffled.tolist(), key=lambda index: -sizes[index]):
        group[slide] = filled.index(min(filled))
        filled[group[slide]] += sizes[slide]
    return group


def _regions(slide: Slide) -> list[Split]:
    right, below = (slide.coords > np.median(slide.coords, axis=0)).T
    inside = [(right == x) & (below == y) for y in (False, True) for x in (False, True)]
    return [([slide.subset(~part)], [slide.subset(part)]) for part in inside if part.any() and not part.all()]
