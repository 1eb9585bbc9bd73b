# SPDX-License-Identifier: Apache-2.0
"""Masks drawn over their image, for people."""

from collections.abc import Mapping

import cv2
import numpy as np
from jaxtyping import UInt8

from virst_engine.types import FrameResult, ObjectResult, ObjectState

# Colours that differ from each other and from a tabletop's, also for most colour-blind people (Okabe and Ito, 2008).
PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
FILL = 0.4  # share of the colour inside a mask
LABEL_BACKGROUND = 0.35  # brightness that is left under text
FONT, WHITE, GREY = cv2.FONT_HERSHEY_SIMPLEX, (255, 255, 255), (190, 190, 190)


def colour_of(instance_id: int) -> tuple[int, int, int]:
    """RGB of an instance; the same in every frame."""
    return PALETTE[(instance_id - 1) % len(PALETTE)]


def caption_of(found: ObjectResult, captions: Mapping[str, str]) -> str:
    """What to call an object for people: its goal's caption (by goal id), an instance with its number."""
    name = captions.get(found.goal_id)
    if name is None:
        return found.object_id
    return f"{name} {found.object_id.removeprefix(found.part_of).lstrip('.')}" if found.part_of else name


def draw_overlay(
    image_rgb_u8: UInt8[np.ndarray, "height width 3"],
    result: FrameResult,
    captions: Mapping[str, str] | None = None,
    *,
    scale: int = 1,
) -> UInt8[np.ndarray, "tall wide 3"]:
    """A new image, `scale` times as large: masks, their outlines, and a line of text per object.

    Args:
        captions: goal id -> sentence; the object id where there is none. Characters that the built-in font lacks are
            shown as question marks.
    """
    height, width = image_rgb_u8.shape[0] * scale, image_rgb_u8.shape[1] * scale
    canvas = image_rgb_u8.copy()
    if scale > 1:
        canvas = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_LINEAR)
    for found in result.objects:
        mask = found.mask
        for part in result.objects:  # of a union, what is no instance
            if part.part_of == found.object_id and part.goal_id == found.goal_id:
                mask = mask & ~part.mask
        if mask.any():
            _draw_mask(canvas, mask, colour_of(found.instance_id))
    lines = [(_text(found, captions or {}), colour_of(found.instance_id), found.state) for found in result.objects]
    _draw_labels(canvas, lines)
    return canvas


def _draw_mask(canvas: np.ndarray, small_mask: np.ndarray, colour: tuple[int, int, int]) -> None:
    height, width = canvas.shape[:2]
    mask = cv2.resize(small_mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    inside = mask.astype(bool)
    canvas[inside] = ((1 - FILL) * canvas[inside] + FILL * np.array(colour, dtype=np.float32)).astype(np.uint8)
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    line = max(2, round(height / 240))
    cv2.drawContours(canvas, outlines, -1, (0, 0, 0), line + 1, cv2.LINE_AA)  # stands out from its own colour too
    cv2.drawContours(canvas, outlines, -1, colour, line, cv2.LINE_AA)


def _text(found: ObjectResult, captions: Mapping[str, str]) -> str:
    name = caption_of(found, captions)
    ascii_name = "".join(c if " " <= c <= "~" else "?" for c in name)
    state = found.state.name.lower().replace("_", " ")
    return f"{ascii_name}: {found.score:.2f}" if found.state is ObjectState.TRACKING else f"{ascii_name}: {state}"


def _draw_labels(canvas: np.ndarray, lines: list[tuple[str, tuple[int, int, int], ObjectState]]) -> None:
    """Lines of text from the top left down, each with its object's colour in front; long ones are cut in the middle."""
    height, width = canvas.shape[:2]
    size = max(0.35, height / 600)
    line_px, thickness = round(32 * size) + 2, max(1, round(1.5 * size))
    for number, (text, colour, state) in enumerate(lines):
        top = number * line_px
        if top + line_px > height:
            return
        text = _shortened(text, size, thickness, width - line_px - 8)
        text_px = cv2.getTextSize(text, FONT, size, thickness)[0][0]
        box = canvas[top : top + line_px, : line_px + text_px + 6]
        box[:] = (box * LABEL_BACKGROUND).astype(np.uint8)
        margin = max(2, line_px // 5)
        corners = (margin, top + margin), (line_px - margin, top + line_px - margin)
        is_tracking = state is ObjectState.TRACKING
        cv2.rectangle(canvas, *corners, colour, -1 if is_tracking else thickness)
        at = (line_px + 2, top + round(0.72 * line_px))
        cv2.putText(canvas, text, at, FONT, size, WHITE if is_tracking else GREY, thickness, cv2.LINE_AA)


def _shortened(text: str, size: float, thickness: int, room_px: int) -> str:
    """The end is kept: it is the score or the state."""
    name, _, end = text.rpartition(": ")
    while name and cv2.getTextSize(f"{name}: {end}", FONT, size, thickness)[0][0] > room_px:
        name = name.rstrip(".")[:-1].rstrip() + ".." if len(name.rstrip(".")) > 1 else ""
    return f"{name}: {end}"
