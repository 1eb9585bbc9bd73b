# SPDX-License-Identifier: Apache-2.0
"""Video files, folders of images and bags as frames: order, times, colours, random access, errors."""

import sys

import cv2
import numpy as np
import pytest

from virst_engine.errors import VideoError
from virst_engine.video.recordings import StreamedVideo, open_recording, open_video_file
from virst_engine.video.video_file import open_video_writer

SIZE = (32, 48)  # height, width


def picture(number, size=SIZE):
    """Red grows with the number; green and blue tell the channels apart."""
    image = np.empty((*size, 3), np.uint8)
    image[:] = (10 * number, 200, 40)
    return image


def number_of(frame):
    red, green, blue = frame.image_rgb_u8.reshape(-1, 3).mean(axis=0)
    assert abs(green - 200) < 6
    assert abs(blue - 40) < 6
    return round(red / 10)


def write_video(path, count=12, rate_hz=20.0):
    write, close = open_video_writer(path, SIZE[1], SIZE[0], rate_hz)
    for number in range(count):
        write(picture(number))
    close()
    return path


def test_a_folder_is_read_in_the_order_of_the_numbers_in_its_names(tmp_path):
    for number in (0, 1, 2, 9, 10, 11):
        cv2.imwrite(str(tmp_path / f"frame{number}.png"), picture(number)[..., ::-1])
    (tmp_path / "notes.txt").write_text("no image")
    recording = open_recording(tmp_path, rate_hz=10.0)
    assert [number_of(frame) for frame in recording] == [0, 1, 2, 9, 10, 11]
    assert [frame.stamp_ns for frame in recording] == [100_000_000 * number for number in range(6)]
    assert recording.expected_frames == len(recording) == 6
    assert number_of(recording[3]) == 9


@pytest.mark.parametrize("is_h264", [True, False])
def test_a_video_file_has_its_own_times(tmp_path, monkeypatch, is_h264):
    if not is_h264:
        monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    else:
        pytest.importorskip("imageio_ffmpeg")
    recording = open_recording(write_video(tmp_path / "video.mp4"))
    assert recording.rate_hz == pytest.approx(20.0)
    assert recording.expected_frames == 12
    frames = list(recording)
    assert [number_of(frame) for frame in frames] == list(range(12))
    assert [frame.stamp_ns for frame in frames] == [50_000_000 * number for number in range(12)]


def test_a_streamed_video_may_be_indexed(tmp_path):
    opened = []
    file = open_video_file(write_video(tmp_path / "video.mp4"))

    def read():
        opened.append(True)
        return iter(file)

    video = StreamedVideo(read, rate_hz=20.0, expected_frames=None)
    assert len(video) == len(video) == 12
    assert [number_of(video[number]) for number in (0, 0, 4, 5, 11)] == [0, 0, 4, 5, 11]
    assert len(opened) == 2  # once to count, once forwards
    assert number_of(video[3]) == 3
    assert number_of(video[-1]) == 11
    assert len(opened) == 3
    with pytest.raises(IndexError):
        video[12]


def image_message(types, number, encoding="rgb8", stamp_ns=None, padding=0):
    rgb = picture(number)
    pixels = {
        "rgb8": rgb,
        "bgr8": rgb[..., ::-1],
        "rgba8": np.dstack((rgb, np.full(SIZE, 255, np.uint8))),
        "bgra8": np.dstack((rgb[..., ::-1], np.full(SIZE, 255, np.uint8))),
        "16UC1": np.zeros((*SIZE, 2), np.uint8),
    }[encoding]
    rows = pixels.reshape(SIZE[0], -1)
    rows = np.pad(rows, ((0, 0), (0, padding)))
    return types["sensor_msgs/msg/Image"](
        header=header(types, number, stamp_ns),
        height=SIZE[0],
        width=SIZE[1],
        encoding=encoding,
        is_bigendian=0,
        step=rows.shape[1],
        data=np.ascontiguousarray(rows).reshape(-1),
    )


def jpeg_message(types, number):
    data = cv2.imencode(".png", picture(number)[..., ::-1])[1].reshape(-1)
    return types["sensor_msgs/msg/CompressedImage"](header=header(types, number, None), format="png", data=data)


def header(types, number, stamp_ns):
    stamp_ns = 5_000_000_000 + 100_000_000 * number if stamp_ns is None else stamp_ns
    stamp = types["builtin_interfaces/msg/Time"](sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9)
    return types["std_msgs/msg/Header"](stamp=stamp, frame_id="camera")


def write_bag(path, topics, storage="MCAP"):
    """`topics`: name -> messages, made from the types of ROS 2 Jazzy."""
    pytest.importorskip("rosbags", reason="pip install rosbags")
    from rosbags.rosbag2 import StoragePlugin, Writer
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    with Writer(path, version=9, storage_plugin=getattr(StoragePlugin, storage)) as writer:
        for topic, make in topics.items():
            messages = make(store.types)
            connection = writer.add_connection(topic, type(messages[0]).__msgtype__, typestore=store)
            for number, message in enumerate(messages):
                data = store.serialize_cdr(message, message.__msgtype__)
                writer.write(connection, 6_000_000_000 + 100_000_000 * number, data)
    return path


@pytest.mark.parametrize("storage", ["MCAP", "SQLITE3"])
@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8"])
def test_a_bag_gives_images_with_the_times_of_their_capture(tmp_path, storage, encoding):
    images = {"/camera": lambda types: [image_message(types, number, encoding, padding=5) for number in range(6)]}
    recording = open_recording(write_bag(tmp_path / "bag", images, storage))
    frames = list(recording)
    assert [number_of(frame) for frame in frames] == list(range(6))
    assert [frame.stamp_ns for frame in frames] == [5_000_000_000 + 100_000_000 * number for number in range(6)]
    assert recording.expected_frames == len(recording) == 6
    assert recording.rate_hz == pytest.approx(10.0, rel=0.01)
    assert number_of(recording[2]) == 2


def test_a_single_mcap_file_is_a_bag_too(tmp_path):
    bag = write_bag(tmp_path / "bag", {"/camera": lambda types: [image_message(types, number) for number in range(3)]})
    (file,) = bag.glob("*.mcap")
    assert [number_of(frame) for frame in open_recording(file)] == [0, 1, 2]


def test_raw_images_are_preferred_to_compressed_ones_and_a_topic_chooses(tmp_path):
    bag = write_bag(
        tmp_path / "bag",
        {
            "/camera/compressed": lambda types: [jpeg_message(types, number) for number in range(4)],
            "/camera": lambda types: [image_message(types, number) for number in range(2)],
        },
    )
    assert len(open_recording(bag)) == 2
    assert [number_of(frame) for frame in open_recording(bag, topic="/camera/compressed")] == [0, 1, 2, 3]
    with pytest.raises(VideoError, match=r"no topic '/depth' of images; there are: /camera, /camera/compressed"):
        open_recording(bag, topic="/depth")


def test_two_cameras_need_a_topic(tmp_path):
    images = lambda types: [image_message(types, 1)]  # noqa: E731
    bag = write_bag(tmp_path / "bag", {"/left": images, "/right": images})
    with pytest.raises(VideoError, match="say which topic; topics of images: /left, /right"):
        open_recording(bag)


def test_what_is_not_newer_is_left_out_and_counted(tmp_path, caplog):
    stamps_ns = (10**9, 2 * 10**9, 2 * 10**9, 10**9, 3 * 10**9)
    images = {"/c": lambda types: [image_message(types, i, stamp_ns=stamp) for i, stamp in enumerate(stamps_ns)]}
    frames = list(open_recording(write_bag(tmp_path / "bag", images)))
    assert [number_of(frame) for frame in frames] == [0, 1, 4]
    assert "left out 2 images" in caplog.text


def test_an_image_without_a_time_has_that_of_its_recording(tmp_path):
    images = {"/c": lambda types: [image_message(types, number, stamp_ns=0) for number in range(2)]}
    frames = list(open_recording(write_bag(tmp_path / "bag", images)))
    assert [frame.stamp_ns for frame in frames] == [6_000_000_000, 6_100_000_000]


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video" * 100)
    bag = tmp_path / "broken.mcap"
    bag.write_bytes(b"no bag" * 100)
    depth = write_bag(tmp_path / "depth", {"/d": lambda types: [image_message(types, 0, "16UC1")]})
    images = tmp_path / "images"
    images.mkdir()
    (images / "0.png").write_bytes(b"no image")
    for said, make in (
        ("there is no", lambda: open_recording(tmp_path / "gone.mp4")),
        ("holds no images", lambda: open_recording(empty)),
        ("no video that OpenCV can decode", lambda: open_recording(broken)),
        ("cannot be read as a bag", lambda: open_recording(bag)),
        ("has no topic '/t'", lambda: open_recording(images, topic="/t")),
        ("encoding '16UC1'", lambda: list(open_recording(depth))),
        ("is no image that can be read", lambda: list(open_recording(images))),
    ):
        with pytest.raises(VideoError, match=said):
            make()
    monkeypatch.setitem(sys.modules, "rosbags.highlevel", None)
    with pytest.raises(VideoError, match="pip install rosbags"):
        open_recording(depth)
