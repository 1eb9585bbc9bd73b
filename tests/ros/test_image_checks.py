# SPDX-License-Identifier: Apache-2.0
"""Pictures that show nothing are recognised, and no others. Needs no ROS."""

import numpy as np
import pytest

from virst_ros.image_checks import why_blank


def plain(*rgb):
    return np.full((48, 64, 3), rgb, np.uint8)


@pytest.mark.parametrize(
    ("picture", "word"),
    [
        (plain(0, 0, 0), "black"),
        (plain(2, 1, 0), "black"),
        (plain(255, 255, 255), "saturated"),
        (plain(127, 127, 127), "one colour"),
        (plain(200, 10, 10), "one colour"),
    ],
)
def test_a_picture_of_one_colour_shows_nothing(picture, word):
    assert word in why_blank(picture)


def test_noise_of_a_dark_sensor_is_still_black():
    noise = np.random.default_rng(0).integers(0, 3, (480, 640, 3), dtype=np.uint8)
    assert "black" in why_blank(noise)


def test_a_dark_picture_with_something_in_it_is_not_blank():
    picture = plain(0, 0, 0)
    picture[20:30, 20:30] = 40
    assert why_blank(picture) == ""


def test_a_tiny_picture_is_not_judged():
    assert why_blank(np.zeros((1, 1, 3), np.uint8)) == ""
