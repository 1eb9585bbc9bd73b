# SPDX-License-Identifier: Apache-2.0
"""What the simulated camera saw, with the truth of every frame. Letters of shapes: t frames, n objects, h w pixels."""

import json
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Bool, Float, UInt8

from virst_engine.errors import SceneError
from virst_engine.sim.spec import Intrinsics, SceneSpec

# The truth of a frame, by the names that SimFrame and Recording share; one row per object.
TRUTH_ARRAYS = (
    "visible_fraction",
    "in_view_fraction",
    "area_fraction",
    "position_m",
    "quaternion_wxyz",
    "velocity_m_s",
    "centre_px",
)


@dataclass(frozen=True)
class SimFrame:
    """One frame of the simulated camera."""

    time_s: float
    image_rgb_u8: UInt8[np.ndarray, "h w 3"]
    depth_m: Float[np.ndarray, "h w"] | None  # along the optical axis; registered with the colour image
    instance_mask: UInt8[np.ndarray, "h w"]  # 0 background, k + 1 object k, 255 the arm
    visible_fraction: Float[np.ndarray, " n"]  # visible pixels / pixels it would have in the view if nothing hid it
    in_view_fraction: Float[np.ndarray, " n"]  # part of its outline inside the image, hidden or not
    area_fraction: Float[np.ndarray, " n"]  # of the image, as if nothing hid it
    position_m: Float[np.ndarray, "n 3"]
    quaternion_wxyz: Float[np.ndarray, "n 4"]
    velocity_m_s: Float[np.ndarray, "n 3"]
    centre_px: Float[np.ndarray, "n 2"]


def stretches(is_present: Bool[np.ndarray, " t"]) -> list[tuple[int, int]]:
    """The frames in which something is present, as (first, last) of each stretch."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_present, [False]]).astype(np.int8)))
    return [(int(first), int(end) - 1) for first, end in zip(edges[::2], edges[1::2], strict=True)]


@dataclass(frozen=True)
class Trajectory:
    """How the objects of a scene move, sampled at the times of the frames."""

    time_s: Float[np.ndarray, " t"]
    position_m: Float[np.ndarray, "t n 3"]
    quaternion_wxyz: Float[np.ndarray, "t n 4"]
    velocity_m_s: Float[np.ndarray, "t n 3"]


@dataclass(frozen=True)
class Recording:
    """A stretch of frames, stacked. Without images (all three None) it still decides what sentences mean."""

    spec: SceneSpec
    fps: float
    width: int
    height: int
    time_s: Float[np.ndarray, " t"]
    visible_fraction: Float[np.ndarray, "t n"]
    in_view_fraction: Float[np.ndarray, "t n"]
    area_fraction: Float[np.ndarray, "t n"]
    position_m: Float[np.ndarray, "t n 3"]
    quaternion_wxyz: Float[np.ndarray, "t n 4"]
    velocity_m_s: Float[np.ndarray, "t n 3"]
    centre_px: Float[np.ndarray, "t n 2"]
    image_rgb_u8: UInt8[np.ndarray, "t h w 3"] | None = None
    instance_mask: UInt8[np.ndarray, "t h w"] | None = None
    depth_m: Float[np.ndarray, "t h w"] | None = None

    def __len__(self) -> int:
        return len(self.time_s)

    @property
    def intrinsics(self) -> Intrinsics:
        return self.spec.camera.intrinsics(self.width, self.height)

    def without_images(self) -> "Recording":
        return replace(self, image_rgb_u8=None, instance_mask=None, depth_m=None)

    def target_mask(self, frame: int, target_ids: tuple[int, ...]) -> np.ndarray:
        """(h, w) bool: the visible pixels of all targets in one frame."""
        if self.instance_mask is None:
            raise SceneError("this recording has no images; record it with images or load its masks from the shard")
        return np.isin(self.instance_mask[frame], [k + 1 for k in target_ids])

    def presence(self, target_ids: tuple[int, ...]) -> Bool[np.ndarray, " t"]:
        """In which frames a pixel of a target shows: the truth to a query, frame by frame. Nothing is never there."""
        if self.instance_mask is None:
            raise SceneError("this recording has no images; record it with images or load its masks from the shard")
        return np.asarray(self._shown[:, [k + 1 for k in target_ids]].any(axis=1))

    @cached_property
    def _shown(self) -> Bool[np.ndarray, "t 256"]:
        """Which values the instance mask of each frame has."""
        assert self.instance_mask is not None
        return np.stack([np.bincount(mask.ravel(), minlength=256) > 0 for mask in self.instance_mask])

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by field name; absent images are left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    def save(self, path: str | Path) -> None:
        """Write a compressed .npz; the file appears only when it is complete."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"fps": self.fps, "width": self.width, "height": self.height, "spec": self.spec.to_json()}
        partial = path.with_name(path.name + ".partial.npz")
        arrays: dict[str, Any] = {"header": np.array(json.dumps(header)), **self.arrays()}
        np.savez_compressed(partial, **arrays)
        partial.replace(path)

    @staticmethod
    def load(path: str | Path) -> "Recording":
        """Read what `save` wrote.

        Raises:
            SceneError: no such file, or not a recording.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                header = json.loads(str(data["header"]))
                arrays = {name: data[name] for name in data.files if name != "header"}
            return Recording(spec=SceneSpec.from_json(header.pop("spec")), **header, **arrays)
        except (OSError, EOFError, KeyError, ValueError, TypeError, BadZipFile) as error:
            raise SceneError(
                f"cannot read the recording {path}: {error}; make it again with Recording.save or `virst scenes write`"
            ) from error
