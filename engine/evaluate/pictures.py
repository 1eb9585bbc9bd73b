# SPDX-License-Identifier: Apache-2.0
"""Example pictures of an evaluation: the best, the median and the worst answer of each kind, over the truth."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from virst_engine.evaluate.cases import Case, load_case
from virst_engine.evaluate.runner import Answered
from virst_engine.evaluate.settings import EvaluationSettings
from virst_engine.types import Frame, FrameResult, ObjectResult, ObjectState
from virst_engine.visualize import draw_overlay

PUBLISHED_ID, TRUTH_ID = 6, 3  # choose the colours: vermilion and green


def pick_examples(answered: Sequence[Answered]) -> list[tuple[str, str, Answered]]:
    """(kind, rank, answer): the best, median and worst J&F of each kind, kinds in alphabetical order."""
    picked = []
    for kind in sorted({each.score.kind for each in answered}):
        ranked = sorted((each for each in answered if each.score.kind == kind), key=lambda each: -each.score.score.jf)
        rows = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}
        picked += [(kind, rank, ranked[row]) for rank, row in rows.items()]
    return picked


def write_pictures(
    answered: Sequence[Answered],
    settings: EvaluationSettings,
    folder: Path,
    *,
    case_of: Callable[[EvaluationSettings, int], Case] = load_case,
) -> list[dict[str, Any]]:
    """Write one JPEG per example; what `summary.markdown` needs to show them, paths relative to the folder's parent."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for kind, rank, example in pick_examples(answered):
        score = example.score
        strip = draw_example(case_of(settings, score.scene), example)
        file = folder / f"{kind}_{rank}.jpg"
        cv2.imwrite(str(file), strip[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])
        pictures.append(
            {
                "kind": kind,
                "rank": rank,
                "scene": score.scene,
                "sentence": score.sentence,
                "JF": round(100 * score.score.jf, 2),
                "file": f"{folder.name}/{file.name}",
            }
        )
    return pictures


def draw_example(case: Case, example: Answered) -> UInt8[np.ndarray, "height width 3"]:
    """Frames side by side: what was published above, the truth below."""
    columns = []
    for t, packed in zip(example.picture_frames, example.picture_masks, strict=True):
        frame = case.frames[t]
        height, width = frame.image_rgb_u8.shape[:2]
        published = np.unpackbits(packed, count=height * width).reshape(height, width).astype(bool)
        truth = np.isin(case.instance_mask[t], [k + 1 for k in example.target_ids])
        rows = (
            _overlay(frame, published, PUBLISHED_ID, example.score.sentence),
            _overlay(frame, truth, TRUTH_ID, "truth"),
        )
        columns.append(np.vstack(rows))
    return np.hstack(columns)


def _overlay(
    frame: Frame, mask: Bool[np.ndarray, "height width"], instance_id: int, caption: str
) -> UInt8[np.ndarray, "height width 3"]:
    state = ObjectState.TRACKING if mask.any() else ObjectState.NOT_FOUND
    found = ObjectResult("example", "example", instance_id, state, mask, float(mask.any()), math.inf, math.nan)
    result = FrameResult(frame.stamp_ns, 0, frame.camera, (found,), {})
    return draw_overlay(frame.image_rgb_u8, result, {"example": caption})
