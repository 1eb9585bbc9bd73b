# SPDX-License-Identifier: Apache-2.0
"""Which anchors a frame attends to in VIRST's published, non-causal inference: two rules that differ (Virst7bConfig).

Where all anchors are of the past both give the same, so that a stream needs neither: there the nearest are the newest.
"""

from collections.abc import Sequence

from virst_engine.model.virst_7b_config import ANCHOR_RULES


def choose_anchors(anchors: Sequence[int], step: int, count: int, rule: str) -> list[int]:
    """At most `count` of the steps `anchors`, ascending, for frame `step`.

    nearest: by distance in time (the paper's algorithm 2). bracketing: the nearest before, the nearest at or after,
    then by distance (SAM 2's select_closest_cond_frames, the released code). Of two as far away the earlier comes
    first. Raises ValueError for another rule, and a count that is not positive.
    """
    if rule not in ANCHOR_RULES:
        raise ValueError(f"the rule must be one of {', '.join(ANCHOR_RULES)}, got {rule!r}")
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    ordered = sorted(set(anchors), key=lambda anchor: (abs(anchor - step), anchor))
    if rule == "bracketing":
        before = [anchor for anchor in ordered if anchor < step][:1]
        after = [anchor for anchor in ordered if anchor >= step][:1]
        first = before + after
        ordered = first + [anchor for anchor in ordered if anchor not in first]
    return sorted(ordered[:count])
