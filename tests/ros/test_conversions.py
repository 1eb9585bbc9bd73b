# SPDX-License-Identifier: Apache-2.0
from array import array

import cv2
import numpy as np
import pytest

pytest.importorskip("virst_msgs.msg")

from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header

from virst_engine.errors import BadFrame
from virst_engine.types import FrameResult, Goal, KnownObject, ObjectResult, ObjectState
from virst_ros import conversions

pytestmark = pytest.mark.ros

RGB = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10  # 3 wide, 2 high, every value different
STAMP_NS = 1_700_000_000_123_456_789


def header():
    message = Header(frame_id="camera_color_optical_frame")
    message.stamp = conversions.time_message(STAMP_NS)
    return message


def image(pixels, encoding, padding=0):
    """An Image made byte by byte, so that it does not depend on the code under test."""
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1).view(np.uint8)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=255)
    return Image(
        header=header(),
        height=height,
        width=width,
        encoding=encoding,
        step=rows.shape[1],
        data=array("B", rows.tobytes()),
    )


def alpha(pixels):
    return np.concatenate([pixels, np.full((2, 3, 1), 7, np.uint8)], axis=2)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(
    ("encoding", "pixels"),
    [
        ("rgb8", RGB),
        ("bgr8", np.ascontiguousarray(RGB[..., ::-1])),
        ("rgba8", alpha(RGB)),
        ("bgra8", alpha(RGB[..., ::-1])),
    ],
)
def test_colour_images_become_rgb(encoding, pixels, padding):
    frame = conversions.frame(image(pixels, encoding, padding), "front")
    np.testing.assert_array_equal(frame.image_rgb_u8, RGB)
    assert frame.image_rgb_u8.dtype == np.uint8
    assert frame.image_rgb_u8.flags.c_contiguous
    assert (frame.stamp_ns, frame.camera) == (STAMP_NS, "front")


def test_grey_becomes_grey_rgb():
    grey = RGB[..., 0]
    np.testing.assert_array_equal(conversions.image_rgb(image(grey, "mono8", 1)), np.stack([grey] * 3, axis=2))


def test_tight_rgb_is_not_copied():
    message = image(RGB, "rgb8")
    assert np.shares_memory(conversions.image_rgb(message), np.frombuffer(message.data, np.uint8))


def test_the_last_row_may_come_without_its_padding():
    message = image(RGB, "bgr8", padding=5)
    message.data = message.data[:-5]
    np.testing.assert_array_equal(conversions.image_rgb(message), RGB[..., ::-1])


def test_bytes_have_no_byte_order():
    message = image(RGB, "rgb8")
    message.is_bigendian = 1
    np.testing.assert_array_equal(conversions.image_rgb(message), RGB)


def changed(**fields):
    message = image(RGB, "rgb8")
    for name, value in fields.items():
        setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (changed(encoding="bayer_rggb8"), r"'bayer_rggb8' is not supported, only rgb8, bgr8, rgba8, bgra8, mono8"),
        (changed(encoding="yuv422_yuy2"), "not supported"),
        (changed(encoding="mono16"), "not supported"),
        (changed(encoding="16UC1"), "not supported"),
        (changed(encoding=""), "not supported"),
        (changed(step=8), "step 8, but a row needs 9 bytes"),
        (changed(step=0), "step 0"),
        (changed(step=12), "18 bytes of data, but 2 rows of step 12 need 21: it was cut short"),
        (changed(height=3), "18 bytes of data, but 3 rows of step 9 need 27: it was cut short"),
        (changed(height=1), "18 bytes of data, but 1 rows of step 9 are 9"),
        (changed(data=array("B", b"12")), "2 bytes of data"),
        (changed(data=array("B")), "0 bytes of data"),
        (changed(width=0, step=0), "0x2 rgb8 image has no pixels"),
        (changed(height=0, data=array("B")), "3x0 rgb8 image has no pixels"),
        (changed(height=2**32 - 1, width=2**32 - 1, step=2**32 - 1), "step"),
    ],
)
def test_what_cannot_be_an_image_says_why(message, says):
    with pytest.raises(BadFrame, match=says):
        conversions.image_rgb(message)


@pytest.mark.parametrize("sec", [0, -1])
def test_an_image_without_a_time_is_refused_with_the_cause(sec):
    message = image(np.zeros((4, 6, 3), np.uint8), "rgb8")
    message.header.stamp.sec, message.header.stamp.nanosec = sec, 0
    with pytest.raises(BadFrame, match=r"no time stamp \(header.stamp is .*camera driver"):
        conversions.frame(message, "front")


def test_more_pixels_than_are_allowed_are_not_taken():
    message = image(RGB, "rgb8")
    assert conversions.frame(message, "front", most_pixels=6).image_rgb_u8.shape == (2, 3, 3)
    with pytest.raises(BadFrame, match=r"the image is 3x2, more than 5e-06 million pixels.*limits.image_megapixels"):
        conversions.frame(message, "front", most_pixels=5)
    depth = image(np.ones((2, 3), np.float32), "32FC1")
    conversions.check_depth(depth, most_pixels=6)
    with pytest.raises(BadFrame, match=r"the depth image is 3x2, more than"):
        conversions.check_depth(depth, most_pixels=5)


def test_sides_that_no_message_can_hold_are_told_before_anything_is_allocated():
    message = changed(height=2**32 - 1, width=2**32 - 1, step=2**32 - 1)
    with pytest.raises(BadFrame, match="4294967295x4294967295, more than 64 million pixels"):
        conversions.frame(message, "front")


@pytest.mark.parametrize("big_endian", [0, 1])
def test_depth_takes_its_unit_and_byte_order_from_the_message(big_endian):
    order = ">" if big_endian else "<"
    millimetres = np.array([[1500, 0, 250]], dtype=np.uint16)
    message = image(millimetres.astype(f"{order}u2"), "16UC1", padding=2)
    message.is_bigendian = big_endian
    np.testing.assert_allclose(conversions.depth_m(message), [[1.5, np.nan, 0.25]])
    metres = np.array([[0.5, np.nan, 0.0], [-1.0, 2.0, np.inf]], dtype=np.float32)
    message = image(metres.astype(f"{order}f4"), "32FC1")
    message.is_bigendian = big_endian
    np.testing.assert_allclose(conversions.depth_m(message), [[0.5, np.nan, np.nan], [np.nan, 2.0, np.inf]])


def test_depth_of_another_encoding_says_why():
    with pytest.raises(BadFrame, match=r"'rgb8' is not supported, only 32FC1 \(metres\) and 16UC1"):
        conversions.depth_m(image(RGB, "rgb8"))


def found(instance_id, mask, state=ObjectState.TRACKING, score=0.5):
    return ObjectResult(
        object_id=f"object {instance_id}",
        goal_id=f"goal {instance_id}",
        instance_id=instance_id,
        state=state,
        mask=mask,
        score=score if state is ObjectState.TRACKING else 0.0,
        prompt_age_s=float("inf"),
        reasoner_latency_s=float("nan"),
    )


def rectangle(y, x, height=4, width=6):
    mask = np.zeros((height, width), bool)
    mask[y, x] = True
    return mask


@pytest.mark.parametrize(
    ("pixels", "encoding", "step"),
    [
        (np.arange(6, dtype=np.uint8).reshape(2, 3), "mono8", 3),
        (RGB, "rgb8", 9),
        (RGB[:, ::-1], "rgb8", 9),
        (np.ones((2, 3), np.float32), "32FC1", 12),
    ],
)
def test_image_messages_are_tight_and_keep_the_header(pixels, encoding, step):
    message = conversions.image_message(header(), pixels, encoding)
    assert (message.width, message.height, message.encoding, message.step) == (3, 2, encoding, step)
    assert message.header == header()
    assert isinstance(message.data, array)
    back = np.frombuffer(message.data, pixels.dtype).reshape(pixels.shape)
    np.testing.assert_array_equal(back, pixels)


def test_an_object_has_its_box_centre_and_area():
    mask = rectangle(slice(1, 3), slice(2, 6))
    message = conversions.object_message(found(5, mask), "the cup")
    assert (message.goal, message.instance_id, message.state, message.area_px) == ("the cup", 5, message.TRACKING, 8)
    box = message.bbox
    assert (box.x_offset, box.y_offset, box.width, box.height) == (2, 1, 4, 2)
    assert (message.centroid_x_px, message.centroid_y_px) == (3.5, 1.5)
    assert message.prompt_age == float("inf")


@pytest.mark.parametrize("state", [ObjectState.SEARCHING, ObjectState.LOST, ObjectState.NOT_FOUND])
def test_an_object_that_is_not_tracked_has_no_place(state):
    message = conversions.object_message(found(5, np.zeros((4, 6), bool), state), "")
    assert (message.state, message.area_px, message.bbox.width) == (state.value, 0, 0)
    assert np.isnan(message.centroid_x_px)


def test_states_are_those_of_the_message():
    from virst_msgs.msg import SegmentedObject

    assert {state.name: state.value for state in ObjectState} == {
        name: getattr(SegmentedObject, name) for name in ("SEARCHING", "TRACKING", "LOST", "NOT_FOUND")
    }


def test_objects_come_in_order_with_timings_and_the_header():
    mask = rectangle(slice(0, 1), slice(0, 1))
    result = FrameResult(
        STAMP_NS, 42, "camera", (found(9, mask), found(2, mask)), {"image_encoder": 3.0, "replay": 1.5}
    )
    message = conversions.objects_message(
        header(), result, {"goal 2": "the ball"}, 12.5, frames_in=10, frames_dropped=1
    )
    assert message.header == header()
    assert message.step == 42
    assert [(each.instance_id, each.goal) for each in message.objects] == [(2, "the ball"), (9, "")]
    assert list(message.timings.stage) == ["image_encoder", "replay"]
    assert list(message.timings.duration_ms) == [3.0, 1.5]
    assert (message.timings.age_ms, message.timings.frames_in, message.timings.frames_dropped) == (12.5, 10, 1)


def test_camera_info_is_paired_with_the_frame_and_the_original_stays():
    info = CameraInfo(width=6, height=4, k=[float(n) for n in range(9)])
    info.header.stamp.sec = 1
    paired = conversions.camera_info_message(header(), info)
    assert paired.header == header()
    np.testing.assert_array_equal(paired.k, info.k)
    assert info.header.stamp.sec == 1


def test_a_goal_becomes_its_message():
    goal = Goal("g1", "cups", "the cups", instance_id=4)
    known = [KnownObject("cups", 4, ObjectState.LOST), KnownObject("cups.1", 7, ObjectState.TRACKING, part_of="cups")]
    message = conversions.goal_message(goal, known, STAMP_NS)
    assert (message.goal_id, message.goal, list(message.object_ids)) == ("g1", "the cups", ["cups", "cups.1"])
    assert (list(message.instance_ids), list(message.states)) == ([4, 7], [2, 1])
    assert conversions.stamp_ns(message.set_at) == STAMP_NS


def compressed(pixels, form=".png"):
    message = CompressedImage(header=header(), format=f"rgb8; {form[1:]} compressed bgr8")
    message.data = cv2.imencode(form, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()
    return message


def test_a_png_becomes_its_pixels():
    frame = conversions.compressed_frame(compressed(RGB), "front")
    np.testing.assert_array_equal(frame.image_rgb_u8, RGB)
    assert (frame.stamp_ns, frame.camera) == (STAMP_NS, "front")


def test_a_picture_that_claims_to_be_huge_is_not_decoded(monkeypatch):
    monkeypatch.setattr(conversions.cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadFrame, match=r"the picture in \d+ bytes of .* is 3x2, more than 5e-06 million pixels"):
        conversions.compressed_frame(compressed(RGB), "front", most_pixels=5)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: b"", "no picture"),
        (lambda data: b"not a picture" * 10, "no picture"),
        (lambda data: data[:40], "cut short or damaged|no picture"),
    ],
)
def test_compressed_data_that_is_no_picture_is_named(spoil, says):
    message = compressed(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    message.data = spoil(bytes(message.data))
    with pytest.raises(BadFrame, match=says):
        conversions.compressed_frame(message, "front")


def test_a_compressed_image_needs_a_time_too():
    message = compressed(RGB)
    message.header = Header()
    with pytest.raises(BadFrame, match="no time stamp"):
        conversions.compressed_frame(message, "front")
