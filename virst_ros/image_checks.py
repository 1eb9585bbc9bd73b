# SPDX-License-Identifier: Apache-2.0
"""What can be said of an image at a glance, without a model. A few microseconds whatever its size."""

import numpy as np

SAMPLES = 32  # rows and columns that are looked at
BLANK_LEVELS = 2  # of 255: a picture that varies by no more shows nothing


def why_blank(image_rgb_u8: np.ndarray) -> str:
    """Why nothing can be seen in a picture (height, width, 3) of one colour; empty for others, and for tiny ones."""
    height, width = image_rgb_u8.shape[:2]
    if min(height, width) < SAMPLES:
        return ""
    few = image_rgb_u8[:: height // SAMPLES, :: width // SAMPLES].reshape(-1, 3)
    darkest, brightest = few.min(axis=0), few.max(axis=0)
    if int((brightest - darkest).max()) > BLANK_LEVELS:
        return ""
    if brightest.max() <= BLANK_LEVELS:
        return "the image is black: is the lens covered, the light off, or the exposure too short?"
    if darkest.min() >= 255 - BLANK_LEVELS:
        return "the image is saturated (white): is the exposure too long, or a lamp in view?"
    return "the image has one colour only: is the lens covered, or does the driver send a test picture?"
