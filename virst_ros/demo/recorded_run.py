# SPDX-License-Identifier: Apache-2.0
"""The recorded run of the demo's scene that ships with the package: images, truth, and how it was made. No ROS in it.

python -m virst_ros.demo.recorded_run FILE    films it anew (needs OpenGL)
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from virst_engine.errors import SceneError
from virst_engine.sim.recording import TRUTH_ARRAYS
from virst_engine.sim.spec import SceneSpec

RECORDING = Path(__file__).with_name("recording.npz")
RATE_HZ, SECONDS = 20.0, 20.0


@dataclass(frozen=True)
class RecordedRun:
    """A stretch of the simulated camera's frames. `numbers` are the truth's arrays, one row per frame."""

    spec: SceneSpec
    rate_hz: float
    images_rgb_u8: np.ndarray  # t h w 3
    instance_masks: np.ndarray  # t h w
    numbers: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.images_rgb_u8)


def write_recording(path: Path, rate_hz: float = RATE_HZ, seconds: float = SECONDS) -> None:
    """Film the demo's scene. Images are stored as one H.264 video (needs imageio-ffmpeg), masks without loss.

    Raises:
        SceneError: no OpenGL.
    """
    import imageio_ffmpeg

    from virst_engine.sim.live import LiveTabletop, demo_scene

    frames = []
    with LiveTabletop(spec=demo_scene()) as tabletop:
        for _ in range(round(rate_hz * seconds)):
            tabletop.advance(1 / rate_hz)
            frames.append(tabletop.render(depth=False))
    height, width = frames[0].image_rgb_u8.shape[:2]
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "images.mp4"
        stream = imageio_ffmpeg.write_frames(
            str(video), (width, height), fps=rate_hz, codec="libx264", quality=8, ffmpeg_log_level="error"
        )
        stream.send(None)
        for frame in frames:
            stream.send(np.ascontiguousarray(frame.image_rgb_u8))
        stream.close()
        encoded = np.frombuffer(video.read_bytes(), np.uint8)
    masks = [bytes(cv2.imencode(".png", frame.instance_mask)[1]) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        header=np.array(json.dumps({"rate_hz": rate_hz, "spec": tabletop.spec.to_json()})),
        video=encoded,
        masks=np.frombuffer(b"".join(masks), np.uint8),
        mask_bytes=np.array([len(mask) for mask in masks]),
        **{name: np.stack([getattr(frame, name) for frame in frames]).astype(np.float32) for name in TRUTH_ARRAYS},
    )


def load_recording(path: Path = RECORDING) -> RecordedRun:
    """Read what `write_recording` wrote.

    Raises:
        SceneError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            header = json.loads(str(data["header"]))
            ends = np.cumsum(data["mask_bytes"])
            packed = data["masks"]
            masks = [
                cv2.imdecode(packed[end - size : end], cv2.IMREAD_UNCHANGED)
                for end, size in zip(ends, data["mask_bytes"], strict=True)
            ]
            images = _decode_video(data["video"].tobytes())
            numbers = {name: data[name] for name in TRUTH_ARRAYS}
            spec = SceneSpec.from_json(header["spec"])
    except (OSError, KeyError, ValueError, cv2.error) as error:
        raise SceneError(
            f"the recorded run {path} cannot be read ({error}); write it again on a machine with OpenGL:"
            " python -m virst_ros.demo.recorded_run FILE"
        ) from error
    if len(images) != len(masks):
        raise SceneError(f"the recorded run {path} is damaged: {len(images)} images, {len(masks)} masks; reinstall it")
    return RecordedRun(spec, header["rate_hz"], np.stack(images), np.stack(masks), numbers)


def _decode_video(encoded: bytes) -> list[np.ndarray]:
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(encoded)
        file.flush()
        video = cv2.VideoCapture(file.name)
        images = []
        while True:
            is_there, image = video.read()
            if not is_there:
                break
            images.append(np.ascontiguousarray(image[..., ::-1]))
        video.release()
    return images


def main() -> int:
    """Film the demo's scene into the file that is named."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m virst_ros.demo.recorded_run FILE", file=sys.stderr)
        return 2
    write_recording(Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
