# SPDX-License-Identifier: Apache-2.0
"""Clips on disk: shards of recorded scenes that training maps into memory, and a picture to look at them.

A shard is a folder of plain arrays: frames.npy (s, t, h, w, 3) and masks.npy (s, t, h, w), uint8; truth.npz with the
other arrays of Recording, padded to 7 objects, and `present` (s, t, 7), whether a pixel of an object shows;
scenes.json; and, where queries were asked for, queries.json: of each scene its sentences with their frame, targets, and
the frames of the whole clip that show them. It appears under its name only when it is complete.
"""

import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from virst_engine.errors import SceneError
from virst_engine.sim.expressions import KINDS_FULL, KINDS_PLAIN, WINDOW_FRAMES, sample_expressions
from virst_engine.sim.queries import TEMPORAL_KINDS, ask, ask_all_along
from virst_engine.sim.recording import TRUTH_ARRAYS, Recording
from virst_engine.sim.scenes import generate_scene_and_motion, is_long
from virst_engine.sim.spec import FAMILIES, MAX_OBJECTS, Family, SceneSpec

logger = logging.getLogger(__name__)

SHARD_SCENES = 50
QUERIES_FILE = "queries.json"
BAR_PX = 4  # height of the bar that tells when a target shows
FIRST_QUERY = WINDOW_FRAMES - 1  # the first frame whose window is full at 10 Hz
Progress = Callable[[int, int], None]


def record_scene(
    seed: int,
    family: Family,
    *,
    fps: float = 10.0,
    duration_s: float = 4.8,
    size: tuple[int, int] = (128, 128),
    depth: bool = False,
) -> Recording:
    """Generate and record the scene of a seed; `size` is (width, height).

    Raises:
        SceneError: no OpenGL, unknown family.
    """
    from virst_engine.sim.mujoco_world import record

    spec, trajectory = generate_scene_and_motion(seed, family, fps=fps, duration_s=duration_s)
    return record(
        spec, fps=fps, duration_s=duration_s, width=size[0], height=size[1], depth=depth, trajectory=trajectory
    )


def query_kinds(family: Family, duration_s: float) -> tuple[str, ...]:
    """The kinds of sentences that are asked about such scenes."""
    if is_long(family, duration_s):
        return TEMPORAL_KINDS
    return KINDS_FULL if family == "full" else KINDS_PLAIN


def write_clips(
    out_dir: str | Path,
    seeds: range,
    family: Family,
    *,
    fps: float = 10.0,
    duration_s: float = 4.8,
    size: tuple[int, int] = (128, 128),
    queries: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Record the scenes of `seeds` into shards below `out_dir`; complete shards that are there already are kept.

    Args:
        size: (width, height) of the frames.
        queries: sentences per scene, all along it, of its family's kinds in turns; of long scenes the temporal ones.
        workers: processes; one per CPU core when None, 1 records in this process.
        progress: called with (scenes done, scenes in all).

    Returns:
        The folders of the shards, in the order of their seeds.

    Raises:
        SceneError: no OpenGL, unknown family, or `out_dir` holds clips of other settings.
    """
    if family not in FAMILIES:
        raise SceneError(f"unknown scene family {family!r}; use one of {', '.join(FAMILIES)}")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    groups = [seeds[first : first + SHARD_SCENES] for first in range(0, len(seeds), SHARD_SCENES)]
    jobs = {_shard_path(out_dir, family, group): group for group in groups}
    done = 0
    waiting = {}
    for path, group in jobs.items():
        if path.exists():
            _check_settings(path, group, fps, duration_s, size, queries)
            done += len(group)
        else:
            waiting[path] = group
    if progress:
        progress(done, len(seeds))
    workers = min(len(waiting), workers or os.cpu_count() or 1)
    if workers <= 1:
        for path, group in waiting.items():
            for scenes in _write_shard_steps(path, group, family, fps, duration_s, size, queries):
                if progress:
                    progress(done + scenes, len(seeds))
            done += len(group)
        return list(jobs)
    context = multiprocessing.get_context("spawn")  # a forked OpenGL context is a broken one
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {
            pool.submit(_write_shard, path, group, family, fps, duration_s, size, queries): group
            for path, group in waiting.items()
        }
        for future in as_completed(futures):
            future.result()
            done += len(futures[future])
            if progress:
                progress(done, len(seeds))
    return list(jobs)


def _shard_path(out_dir: Path, family: str, seeds: range) -> Path:
    return out_dir / f"{family}-{seeds[0]:08d}-{seeds[-1]:08d}"


def _check_settings(
    path: Path, seeds: range, fps: float, duration_s: float, size: tuple[int, int], queries: int
) -> None:
    shard = ClipShard(path)
    wanted = (len(seeds), round(fps * duration_s), size[1], size[0], 3)
    if shard.frames.shape != wanted or shard.fps != fps:
        raise SceneError(
            f"{path} holds clips of shape {shard.frames.shape} at {shard.fps} Hz, asked for {wanted} at {fps} Hz;"
            " choose another folder or delete this one"
        )
    if queries and not (path / QUERIES_FILE).exists():
        raise SceneError(f"{path} holds clips without queries; choose another folder or delete this one")


def _write_shard(
    path: Path, seeds: range, family: Family, fps: float, duration_s: float, size: tuple[int, int], queries: int
) -> None:
    for _ in _write_shard_steps(path, seeds, family, fps, duration_s, size, queries):
        pass


def _write_shard_steps(
    path: Path, seeds: range, family: Family, fps: float, duration_s: float, size: tuple[int, int], queries: int
) -> Iterator[int]:
    """Record one shard; yields the number of its scenes done so far."""
    width, height = size
    frames_per_clip = round(fps * duration_s)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shape = (len(seeds), frames_per_clip, height, width)
    frames = np.lib.format.open_memmap(partial / "frames.npy", "w+", np.uint8, (*shape, 3))
    masks = np.lib.format.open_memmap(partial / "masks.npy", "w+", np.uint8, shape)
    truth: dict[str, np.ndarray] = {}
    specs = []
    present = np.zeros((len(seeds), frames_per_clip, MAX_OBJECTS), bool)
    asked: list[list[dict[str, Any]]] = []
    for row, seed in enumerate(seeds):
        recording = record_scene(seed, family, fps=fps, duration_s=duration_s, size=size)
        assert recording.image_rgb_u8 is not None
        assert recording.instance_mask is not None
        frames[row], masks[row] = recording.image_rgb_u8, recording.instance_mask
        for name in TRUTH_ARRAYS:
            values = getattr(recording, name)
            if name not in truth:
                truth[name] = np.zeros((len(seeds), frames_per_clip, MAX_OBJECTS, *values.shape[2:]), np.float32)
            truth[name][row, :, : values.shape[1]] = values
        for k in range(len(recording.spec.objects)):
            present[row, :, k] = recording.presence((k,))
        if queries:
            rng = np.random.default_rng([seed, 3])
            found = ask_all_along(recording, queries, query_kinds(family, duration_s), rng=rng, first_frame=FIRST_QUERY)
            asked.append([query.to_json() for query in found])
        specs.append(recording.spec.to_json())
        yield row + 1
    frames.flush()
    masks.flush()
    del frames, masks
    time_s = np.arange(frames_per_clip) / fps
    arrays: dict[str, Any] = {"time_s": time_s, "present": present, **truth}
    np.savez(partial / "truth.npz", **arrays)
    header = {"fps": fps, "width": width, "height": height, "seeds": list(seeds), "specs": specs}
    if queries:
        (partial / QUERIES_FILE).write_text(json.dumps(asked))
    (partial / "scenes.json").write_text(json.dumps(header))
    try:
        partial.rename(path)
    except OSError:
        if not (path / "scenes.json").exists():
            raise
        shutil.rmtree(partial)
        _check_settings(
            path, seeds, fps, duration_s, size, queries
        )  # another process has written the same clips meanwhile


class ClipShard:
    """A shard on disk; frames and masks are mapped, not read, until they are used.

    Raises:
        SceneError: on the first use of a part that is missing or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __len__(self) -> int:
        return len(self._header["seeds"])

    @cached_property
    def _header(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / "scenes.json").read_text())
        except (OSError, EOFError, ValueError) as error:
            raise self._damaged(error) from error

    @cached_property
    def _truth(self) -> dict[str, np.ndarray]:
        try:
            with np.load(self.path / "truth.npz", allow_pickle=False) as data:
                return {name: data[name] for name in data.files}
        except (OSError, EOFError, ValueError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> SceneError:
        return SceneError(
            f"cannot read the clips in {self.path}: {error}; delete the folder and run `virst scenes write`"
        )

    def _map(self, name: str) -> np.ndarray:
        try:
            return np.load(self.path / name, mmap_mode="r")
        except (OSError, EOFError, ValueError) as error:
            raise self._damaged(error) from error

    @property
    def fps(self) -> float:
        return self._header["fps"]

    @property
    def seeds(self) -> list[int]:
        return self._header["seeds"]

    @cached_property
    def frames(self) -> UInt8[np.ndarray, "s t h w 3"]:
        return self._map("frames.npy")

    @cached_property
    def masks(self) -> UInt8[np.ndarray, "s t h w"]:
        return self._map("masks.npy")

    @cached_property
    def specs(self) -> list[SceneSpec]:
        return [SceneSpec.from_json(spec) for spec in self._header["specs"]]

    def presence(self, scene: int, target_ids: tuple[int, ...]) -> Bool[np.ndarray, " t"]:
        """In which frames of a scene a pixel of a target shows; read off the masks where no truth was written of it."""
        if "present" in self._truth:
            return np.asarray(self._truth["present"][scene][:, list(target_ids)].any(axis=1))
        return self.recording(scene, images=True).presence(target_ids)

    def queries(self, scene: int) -> list[dict[str, Any]]:
        """The queries of a scene as they were written (`Query.to_json`).

        Raises:
            SceneError: none were asked for, or the file is damaged.
        """
        try:
            return list(json.loads((self.path / QUERIES_FILE).read_text())[scene])
        except (OSError, EOFError, ValueError) as error:
            raise SceneError(
                f"no queries in {self.path} ({error}); write the clips with `virst scenes write --queries N`"
            ) from error

    def recording(self, scene: int, *, images: bool = False) -> Recording:
        """One scene's recording; its images are views of the mapped arrays if asked for, else None."""
        spec = self.specs[scene]
        n = len(spec.objects)
        return Recording(
            spec=spec,
            fps=self.fps,
            width=self._header["width"],
            height=self._header["height"],
            time_s=self._truth["time_s"],
            image_rgb_u8=self.frames[scene] if images else None,
            instance_mask=self.masks[scene] if images else None,
            **{name: self._truth[name][scene, :, :n] for name in TRUTH_ARRAYS},
        )


def open_clips(out_dir: str | Path, family: Family | None = None) -> list[ClipShard]:
    """The complete shards below a folder, in the order of their seeds.

    Raises:
        SceneError: there is none.
    """
    pattern = f"{family or '*'}-*"
    paths = sorted(p for p in Path(out_dir).glob(pattern) if (p / "scenes.json").exists() and ".partial" not in p.name)
    if not paths:
        raise SceneError(f"no clips below {out_dir}; write some with `virst scenes write`")
    return [ClipShard(path) for path in paths]


def contact_sheet(
    out_png: str | Path,
    seeds: range,
    family: Family,
    *,
    sentences: int = 3,
    phrasings: str = "train",
    size: tuple[int, int] = (320, 240),
    query_frame: int | None = None,
    duration_s: float = 4.8,
) -> Path:
    """A picture with a row per scene: three moments of it, then a picture per sentence with its target outlined.

    A bar below each sentence tells over the whole recording when its target shows; the black line is the sentence's
    frame. Sentences of long scenes are temporal ones.

    Raises:
        SceneError: no OpenGL, unknown family.
    """
    rows = [_sheet_row(seed, family, sentences, phrasings, size, query_frame, duration_s) for seed in seeds]
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    sheet = np.concatenate(rows, axis=0)
    if out_png.suffix.lower() != ".png" or not cv2.imwrite(str(out_png), sheet[..., ::-1]):
        raise SceneError(f"cannot write the picture {out_png}; give a path that ends in .png and can be written")
    return out_png


def _sheet_row(
    seed: int,
    family: Family,
    sentences: int,
    phrasings: str,
    size: tuple[int, int],
    query_frame: int | None,
    duration_s: float,
) -> UInt8[np.ndarray, "h w 3"]:
    recording = record_scene(seed, family, duration_s=duration_s, size=size)
    assert recording.image_rgb_u8 is not None
    rng = np.random.default_rng([seed, 7])
    query = int(rng.integers(21, len(recording))) if query_frame is None else query_frame
    kinds = query_kinds(family, duration_s)
    if is_long(family, duration_s):
        query = _frame_with_sentences(recording, query, kinds)
    chosen = sample_expressions(recording, rng, sentences, query, split=phrasings, kinds=kinds)
    cells = []
    for frame in (query - 21, query - 10, query):
        frame = max(0, frame)
        cells.append(_captioned(recording.image_rgb_u8[frame], [f"seed {seed} frame {frame}"], None))
    for expression in chosen:
        mask = recording.target_mask(query, expression.target_ids)
        caption = [expression.text, f"{expression.kind} {expression.template_id}: {expression.answer}"]
        cell = _captioned(recording.image_rgb_u8[query], caption, mask)
        _draw_presence(cell, recording.presence(expression.target_ids), query)
        cells.append(cell)
    return np.concatenate(cells, axis=1)


def _frame_with_sentences(recording: Recording, query: int, kinds: tuple[str, ...]) -> int:
    """The frame from `query` on, and then from the start, in which most of the kinds have a clear sentence."""
    later = [*range(query, len(recording)), *range(FIRST_QUERY, query)][::3]
    rng = np.random.default_rng(0)
    return max(later, key=lambda frame: len(ask(recording, frame, kinds, rng=rng)))


def _draw_presence(cell: UInt8[np.ndarray, "h w 3"], is_present: Bool[np.ndarray, " t"], query: int) -> None:
    """In the lowest rows: green where the target shows, grey where not, over the whole recording."""
    frame_of_column = (np.arange(cell.shape[1] - 1) * len(is_present)) // (cell.shape[1] - 1)
    cell[-BAR_PX:, :-1] = np.where(is_present[frame_of_column, None], (0, 150, 90), (190, 190, 190))
    cell[-BAR_PX:, np.flatnonzero(frame_of_column == query)] = 0


def _captioned(image: np.ndarray, lines: list[str], mask: np.ndarray | None) -> UInt8[np.ndarray, "h w 3"]:
    picture = image.copy()
    if mask is not None:
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, (0, 255, 255), 2)
    footer = np.full((36, image.shape[1], 3), 255 if mask is None or mask.any() else 225, np.uint8)
    for row, line in enumerate(lines):
        scale = min(0.42, 0.42 * 46 / max(len(line), 1))
        cv2.putText(footer, line, (3, 14 + 16 * row), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)
    picture = np.concatenate([picture, footer])
    picture[:, -1] = 128
    return picture
