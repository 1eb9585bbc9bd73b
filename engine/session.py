# SPDX-License-Identifier: Apache-2.0
"""The public entry point: frames and sentences in, masks out, for one camera or several that share the models."""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch

from virst_engine.backends.base import Stages
from virst_engine.camera_stream import CameraStream
from virst_engine.config import EngineConfig
from virst_engine.errors import BadFrame, BadGoal, BadPrompt, Unanswered, UnknownGoal, VirstError
from virst_engine.fast.deadline import Deadline, levels, smaller_sizes
from virst_engine.fast.object_registry import ObjectRegistry
from virst_engine.fast.preprocess import check_image
from virst_engine.fast.tracker import Tracker, step_together, warm_up
from virst_engine.slow.goals import GoalBook, checked_sentence
from virst_engine.slow.question_book import Question
from virst_engine.slow.reasoner import NoReasoner, ReasonerClient
from virst_engine.timing import StageTimer
from virst_engine.types import ClickPrompt, Frame, FrameResult, Goal, KnownObject, MaskPrompt, ObjectState

logger = logging.getLogger(__name__)

ANY_CAMERA = ""
MOST_IDLE = 0.1  # of a step's time between two steps: with more, the frame did not wait, if nobody says so
# Of several cameras, what is told of a goal: where it is seen; else the best that one of them knows.
BEST_FIRST = (ObjectState.TRACKING, ObjectState.LOST, ObjectState.SEARCHING, ObjectState.NOT_FOUND)


class Session:
    """Segments what sentences mean in the streams of one or several cameras.

    One thread owns the models and calls `step` or `step_together`; everything else may be called from any thread and
    takes effect with the next frame. Answers of the reasoner are taken within a step, which never waits for them.

    Several cameras share the models, the goals and the ids: an object of all cameras has the same ids in each. What is
    remembered and what is seen are each camera's own.
    """

    def __init__(
        self,
        config: EngineConfig,
        stages: Stages,
        reasoner: ReasonerClient | Mapping[str, ReasonerClient],
        *,
        device: torch.device | str | None = None,
        clock_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        """The session closes the reasoner's clients.

        Args:
            reasoner: a client; the session then sees one camera, that of its first frame. For several cameras: a client
                of its own for each of them, by the camera's name.
            device: where the stages are; default: config.model.device.
            clock_s: a steady clock, seconds, for `tracking.deadline_ms`.
        """
        clients = reasoner if isinstance(reasoner, Mapping) else {ANY_CAMERA: reasoner}
        if not clients:
            raise ValueError("a session needs at least one camera")
        self._device = torch.device(config.model.device if device is None else device)
        # On a GPU that is shared with the reasoner, a frame's kernels go first.
        self._urgent = torch.cuda.Stream(self._device, priority=-1) if self._device.type == "cuda" else None
        self._is_closed = False
        self._lock = threading.Lock()  # guards what follows; never held while a model runs
        self._config = config
        self._book = GoalBook(config.goal, config.tracking.max_objects)
        self._registry = ObjectRegistry(config.tracking.max_objects, tuple(clients))
        self._streams = {
            camera: CameraStream(config, stages, client, self._lock, self._registry, device=self._device, camera=camera)
            for camera, client in clients.items()
        }
        self._clock_s = clock_s
        smaller = {size: stages.at_image_size(size) for size in smaller_sizes(stages.sizes.image_size)}
        self._stages = {0: stages} | {size: found for size, found in smaller.items() if found is not None}
        self._levels = levels(
            stages.sizes.image_size,
            fewer_memories=stages.takes_fewer_memories,
            smaller=[size for size in self._stages if size],
        )
        self._deadline = Deadline(self._levels)
        self._level = self._levels[0]  # as the streams have it
        self._step_end_s = clock_s()
        self._is_asked_to_skip = False
        self._waited: bool | None = None  # a frame that was asked about since the last step; None: nobody said

    @classmethod
    def open(
        cls,
        config: EngineConfig | None = None,
        reasoner: ReasonerClient | None = None,
        *,
        cameras: Sequence[str] = (),
    ) -> "Session":
        """A session with the weights and the reasoner that the configuration names.

        Args:
            reasoner: a client to use in place of the configuration's; for one camera only.
            cameras: their names, when there are several; a session without names sees one.

        Raises:
            WeightsError: the weights are missing, damaged or made for another model.
            BackendError, ExportError: `config.engine` asks for what does not run here, or is no export of this model.
            EndpointError: the reasoner's address can never work. An absent reasoner is no error: it may come later.
        """
        # Imported here: a session with other stages or another client needs neither.
        from virst_engine.weights import load_stages, reasoner_identity, understands_sentences

        config = EngineConfig() if config is None else config
        if reasoner is not None and cameras:
            raise ValueError("one client serves one camera: leave out `reasoner`, or give a Session one for each")
        stages = load_stages(config.model, config.engine, config.memory)
        if reasoner is not None:
            return cls(config, stages, reasoner)

        def client() -> ReasonerClient:
            if not understands_sentences(config.model, config.reasoner.method):
                return NoReasoner()
            from virst_engine.slow.zmq_client import ZmqReasonerClient

            return ZmqReasonerClient(
                config.reasoner.endpoint,
                curve_keys=config.reasoner.curve_keys,
                model=reasoner_identity(config.model, config.reasoner.method, config.reasoner.weights),
            )

        return cls(config, stages, {camera: client() for camera in cameras or (ANY_CAMERA,)})

    @property
    def cameras(self) -> tuple[str, ...]:
        """Those that have names; none when the session sees a single one, whatever it is called."""
        return tuple(camera for camera in self._streams if camera != ANY_CAMERA)

    def set_goal(
        self,
        sentence: str,
        *,
        goal_id: str = "",
        object_id: str = "",
        camera: str = "",
        replace: bool = False,
        max_instances: int = 0,
    ) -> Goal:
        """Start looking for what the sentence means; returns at once. Empty ids are filled in.

        With `replace`, every other goal is cleared first. `camera`: the only one to look at; empty: all of them.

        A goal that is split has, beside its object, the union of all that the sentence means, up to `max_instances`
        single objects in each camera. They are found as parts of the union that are seen apart, named
        "<object_id>.1", "<object_id>.2", ..., and tracked each by a memory of its own. 1: it is not split; 0: it is
        when `goal.split_plurals` is on and the sentence is in the plural.

        Raises:
            BadGoal: it cannot be set; nothing has changed.
        """
        with self._lock:
            self._check_camera(camera, BadGoal)
            goal = self._book.prepare(
                sentence,
                goal_id=goal_id,
                object_id=object_id,
                camera=camera,
                replace=replace,
                max_instances=max_instances,
            )
            if replace:
                for old in self._book.goals():
                    self._clear(old.goal_id)
            goal = self._follow(goal)
        logger.info("goal %s: %s", goal.goal_id, goal.sentence)
        return goal

    def add_object(
        self,
        prompt: ClickPrompt | MaskPrompt,
        *,
        stamp_ns: int | None = None,
        camera: str = "",
        goal_id: str = "",
        object_id: str = "",
    ) -> Goal:
        """Track what a box, points or a mask show, without a sentence; returns at once. Empty ids are filled in.

        The frames since the prompt's own are replayed, a few with each new one. `clear_goal` ends it.

        Args:
            stamp_ns: the frame that the prompt belongs to; None: the newest one. It has to be cached still.
            camera: the camera of that frame; may be empty when there is only one. The object is tracked there only.

        Raises:
            BadPrompt: there is no such frame (any more), or the prompt does not fit its image; nothing has changed.
            BadGoal: an id is in use, or all objects are; nothing has changed.
        """
        with self._lock:
            stream = self._prompted_stream(camera)
            step = stream.check_prompt(prompt, stamp_ns)
            goal = self._book.prepare(
                "", goal_id=goal_id, object_id=object_id, camera=camera if self.cameras else "", is_pointed_out=True
            )
            goal = self._follow(goal)
            stream.prompt(goal.goal_id, goal.object_id, step, prompt)
        logger.info("goal %s: pointed out", goal.goal_id)
        return goal

    def prompt_object(
        self, object_id: str, prompt: ClickPrompt | MaskPrompt, *, stamp_ns: int | None = None, camera: str = ""
    ) -> Goal:
        """Show an object that is set already (by a sentence or a prompt), or an instance, once more; its ids stay.

        The prompt becomes an anchor, and settles the object in that camera, as an answer to a full window that others
        have confirmed (`tracking.keep_answers`). Arguments and errors as of `add_object`; UnknownGoal when no goal has
        this object there.
        """
        with self._lock:
            stream = self._prompted_stream(camera)
            there = [goal for goal in self._book.goals() if stream.follows(goal.goal_id)]
            found = self._registry.find(object_id)
            is_there = found is not None and (not found.part_of or stream.instance_state(object_id) is not None)
            owner = (found.part_of or object_id) if found is not None and is_there else ""
            goal = next((goal for goal in there if goal.object_id == owner), None)
            if goal is None:
                known = ", ".join(repr(goal.object_id) for goal in there) or "none"
                raise UnknownGoal(f"there is no object {object_id[:128]!r} to prompt; objects that are set: {known}")
            stream.prompt(goal.goal_id, object_id, stream.check_prompt(prompt, stamp_ns), prompt)
        return goal

    def ask(self, question: str, camera: str = "") -> Future[str]:
        """Ask in words about what a camera sees; returns at once, whoever calls. Goals go on as they do.

        The next frame takes the question up, and the answer comes with one of the frames after it. `result` of the
        future waits for it, so the thread that steps must not call that. Until the question is taken up, `cancel` of
        the future takes it back.

        Args:
            question: in the language of goals.
            camera: the one that it is about; may be empty when there is only one.

        Raises:
            BadGoal: it is no question, or it is not said which of several cameras it is about.
            Unanswered: there is no frame yet, no reasoner, or there are too many open questions. From the future:
                the reasoner has no answer, or is not there, or was silent for `reasoner.ttl_s`; or the session was
                reset or closed, or the camera's clock went back.
        """
        with self._lock:
            if self._is_closed:
                raise Unanswered("the session is closed; open a new one")
            stream = self._only_stream(camera, BadGoal, "which camera the question is about")
            return stream.ask(checked_sentence(question, self._config.goal.max_length)).answer

    def clear_goal(self, goal_id: str) -> Goal:
        """Stop tracking its object. Raises UnknownGoal."""
        with self._lock:
            return self._clear(goal_id)

    def remove_object(self, object_id: str) -> None:
        """Stop showing an object. An instance goes alone, and does not come back; any other takes its goal with it.

        Raises UnknownGoal.
        """
        with self._lock:
            found = self._registry.find(object_id)
            if found is None:
                known = ", ".join(repr(goal.object_id) for goal in self._book.goals()) or "none"
                raise UnknownGoal(f"there is no object {object_id[:128]!r}; objects that are set: {known}")
            if not found.part_of:
                self._clear(next(goal.goal_id for goal in self._book.goals() if goal.object_id == object_id))
                return
            self._registry.hide(object_id)
            for stream in self._streams.values():
                stream.remove_instance(object_id)

    def known_objects(self) -> dict[str, tuple[KnownObject, ...]]:
        """Goal id -> its object, and then the instances that were found of it in all cameras."""
        states = self.goal_states()
        with self._lock:
            return {
                goal.goal_id: (
                    KnownObject(goal.object_id, goal.instance_id, states.get(goal.goal_id, ObjectState.SEARCHING)),
                    *(
                        KnownObject(
                            each.object_id, each.instance_id, self._instance_state(each.object_id), goal.object_id
                        )
                        for each in self._registry.instances(goal.object_id)
                    ),
                )
                for goal in self._book.goals()
            }

    def _instance_state(self, object_id: str) -> ObjectState:
        """Under the lock. Of one that was found in the frame that is under way: TRACKING."""
        known = (stream.instance_state(object_id) for stream in self._streams.values())
        return next((state for state in known if state is not None), ObjectState.TRACKING)

    def goals(self) -> tuple[Goal, ...]:
        """In the order in which they were set."""
        with self._lock:
            return self._book.goals()

    def goal_states(self, camera: str = "") -> dict[str, ObjectState]:
        """Goal id -> its object's state in the newest frame; SEARCHING for a goal that no frame has met yet.

        With several cameras, the best that one of them knows, or what that `camera` does.
        """
        with self._lock:
            states = {}
            for goal in self._book.goals():
                known = {
                    stream.state(goal.goal_id)
                    for name, stream in self._streams.items()
                    if stream.follows(goal.goal_id) and camera in ("", name)
                }
                if known:
                    states[goal.goal_id] = min(known, key=BEST_FIRST.index)
            return states

    def reset(self, camera: str = "") -> None:
        """Forget all that was seen, by that camera or by all; goals stay and are asked about anew.

        Answers on their way are dropped, and so are questions. What was pointed out stays as a goal, too, but has to be
        pointed out again: `prompt_object`.
        """
        with self._lock:
            streams = [stream for name, stream in self._streams.items() if camera in ("", name)]
            dropped = [question for stream in streams for question in stream.reset()]
        _fail(dropped, "the session was reset: what was seen is forgotten; ask again")

    def reconfigure(self, config: EngineConfig) -> None:
        """Use other parameters from the next frame on.

        Raises:
            ValueError: one that is not marked `live` differs; nothing has changed.
        """
        with self._lock:
            for group in dataclasses.fields(config):
                old, new = getattr(self._config, group.name), getattr(config, group.name)
                for f in dataclasses.fields(new):
                    if getattr(old, f.name) != getattr(new, f.name) and not f.metadata.get("live"):
                        raise ValueError(f"{group.name}.{f.name} cannot change while the session runs; open a new one")
            self._config = config
            self._book.reconfigure(config.goal)
            for stream in self._streams.values():
                stream.reconfigure(config)

    def warm_up(self, between: Callable[[], None] = lambda: None) -> None:
        """Do now what the first frames would spend time and memory on: allocate, compile, fill caches.

        Takes as long as a few frames with all objects; with `engine.compiled`, minutes. Nothing is seen or remembered.
        With `tracking.deadline_ms`, what frames need that come late is done, too, so that they are not later still; a
        deadline that is set afterwards pays for it when it is first missed.

        Args:
            between: called every now and then; what it raises ends the warming up, and the session is to be closed.
        """
        with self._lock:
            config = self._config
        with self._before_others():
            warm_up([stream.tracker for stream in self._streams.values()], between)
            if config.tracking.deadline_ms > 0:
                self._warm_up_levels(config, between)

    def _warm_up_levels(self, config: EngineConfig, between: Callable[[], None]) -> None:
        """With trackers of their own, which are gone at the end: those of the streams stay as they are."""
        memory = dataclasses.replace(config.memory, ring_steps=2)
        for recall, size in dict.fromkeys((level.recall, level.image_size) for level in self._levels[1:]):
            if recall is None and not size:
                continue  # frames are skipped, that is all
            tracker = Tracker(self._stages[size], memory, config.tracking, device=self._device)
            tracker.memory.recall_at_most(recall)
            warm_up([tracker] * len(self._streams), between)

    def close(self) -> None:
        """Give back the reasoner's connections. Open questions get no answer. May be called twice."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
            dropped = [question for stream in self._streams.values() for question in stream.drop_questions()]
        if not was_closed:
            for stream in self._streams.values():
                stream.close()
        _fail(dropped, "the session was closed")

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, frame: Frame) -> FrameResult:
        """Segment one new frame. A stamp older than the camera's last one (a bag that starts again) resets it first.

        Raises:
            BadFrame: the image cannot be used, or comes from another camera; nothing has changed.
        """
        return self.step_together([frame])[0]

    @torch.inference_mode()
    def step_together(self, frames: Sequence[Frame]) -> list[FrameResult]:
        """`step` for the new frames of several cameras, at most one of each, with one call of each stage.

        The times per stage in each result are those of all frames together. Raises BadFrame as `step` does, for the
        first one that cannot be used: `check_frame` tells before.
        """
        for frame in frames:
            self.check_frame(frame)
        streams = [self._stream(frame.camera) for frame in frames]
        if len(set(map(id, streams))) < len(streams):
            raise BadFrame("two frames of one camera in one step; hand them over one after the other")
        with self._before_others():
            return self._step(streams, frames)

    def _step(self, streams: Sequence[CameraStream], frames: Sequence[Frame]) -> list[FrameResult]:
        begin_s = self._clock_s()
        self._use_level()
        for stream, frame in zip(streams, frames, strict=True):
            stream.begin(frame)
        timer = StageTimer(self._device, self._clock_s)
        tracked = step_together([stream.tracker for stream in streams], frames, timer)
        objects = [
            stream.finish(frame, seen, timer) for stream, frame, seen in zip(streams, frames, tracked, strict=True)
        ]
        timings_ms = timer.ms()
        self._note_time(begin_s, timings_ms, tracked[0].step, [frame.camera for frame in frames])
        return [
            FrameResult(frame.stamp_ns, seen.step, frame.camera, found, timings_ms, self._deadline.words)
            for frame, seen, found in zip(frames, tracked, objects, strict=True)
        ]

    def skips(self, frame: Frame, *, waited: bool | None = None) -> bool:
        """Whether to leave this frame out, so that `tracking.deadline_ms` is kept; it is counted in `skipped` then.

        To be asked once for each frame of a live camera, before its step, by the thread that steps. Who does not ask
        loses no frame.

        Args:
            waited: the frame was there already when the thread came for it. Frames are left out only where they wait.
                None: taken from the time since the last step, in which there should be little else then.

        Raises:
            BadFrame: this session does not see the frame's camera.
        """
        is_skipped = self._stream(frame.camera).skips(self._deadline.level.takes_every)
        self._is_asked_to_skip = True
        if waited is not None and not is_skipped:
            self._waited = waited or bool(self._waited)
        return is_skipped

    @property
    def skipped(self) -> int:
        """Frames that were left out so far."""
        return sum(stream.skipped for stream in self._streams.values())

    def check_frame(self, frame: Frame) -> None:
        """Whether a step takes this frame. Raises BadFrame."""
        if self._is_closed:
            raise VirstError("the session is closed; open a new one")
        check_image(frame.image_rgb_u8)
        seen = self._stream(frame.camera).camera
        if seen not in ("", frame.camera):
            raise BadFrame(
                f"this session sees camera {seen!r}, got a frame of {frame.camera!r}; name all cameras when you open it"
            )

    def _before_others(self) -> AbstractContextManager[object]:
        return nullcontext() if self._urgent is None else torch.cuda.stream(self._urgent)

    def _use_level(self) -> None:
        """Let all cameras leave out what the deadline asks for."""
        before, level = self._level, self._deadline.level
        if level is before:
            return
        for stream in self._streams.values():
            stream.tracker.memory.recall_at_most(level.recall)
            if level.image_size != before.image_size:
                stream.use_stages(self._stages[level.image_size])
        self._level = level

    def _note_time(self, begin_s: float, timings_ms: Mapping[str, float], step: int, cameras: Sequence[str]) -> None:
        """Tell the deadline what this step took, without what comes and goes with an answer of the reasoner."""
        with self._lock:
            deadline_s = self._config.tracking.deadline_ms / 1e3
        end_s = self._clock_s()
        passing_s = (timings_ms.get("anchors", 0.0) + timings_ms.get("replay", 0.0)) / 1e3
        step_s = end_s - begin_s - passing_s
        waited, self._waited = self._waited, None
        if waited is None:
            waited = begin_s - self._step_end_s <= MOST_IDLE * step_s
        self._step_end_s = end_s
        has_news = self._deadline.note(
            step_s, deadline_s, step, cameras=cameras, waited=waited, may_skip=self._is_asked_to_skip
        )
        if has_news and self._deadline.words:
            logger.warning("%s", self._deadline.words)
        elif has_news:
            logger.info("frames are on time: nothing is left out since step %d", step)

    def _stream(self, camera: str) -> CameraStream:
        stream = self._streams.get(camera) or self._streams.get(ANY_CAMERA)
        if stream is None:
            raise BadFrame(f"this session sees cameras {', '.join(self.cameras)}, got a frame of {camera[:40]!r}")
        return stream

    def _check_camera(self, camera: str, error: type[VirstError]) -> None:
        """Raises `error` for a name that no camera has. Empty is one, and so is any where cameras have no names."""
        if self.cameras and camera and camera not in self.cameras:
            raise error(f"there is no camera {camera[:40]!r}; there are: {', '.join(self.cameras)}")

    def _only_stream(self, camera: str, error: type[VirstError], which: str) -> CameraStream:
        """That of one camera, whose name may be empty where there is only one. Under the lock. Raises `error`."""
        self._check_camera(camera, error)
        if not camera and len(self._streams) > 1:
            raise error(f"say {which}; there are: {', '.join(self.cameras)}")
        return self._stream(camera) if self.cameras and camera else next(iter(self._streams.values()))

    def _prompted_stream(self, camera: str) -> CameraStream:
        """Under the lock. Raises BadPrompt."""
        return self._only_stream(camera, BadPrompt, "in which camera's image it is")

    def _follow(self, goal: Goal) -> Goal:
        """Give the goal ids of an object, and set it in its cameras. Under the lock."""
        cameras = [camera for camera in self._streams if not self.cameras or goal.camera in ("", camera)]
        assignment = self._registry.assign(goal.object_id, cameras)
        goal = dataclasses.replace(goal, instance_id=assignment.instance_id)
        self._book.put(goal)
        for camera in cameras:
            self._streams[camera].follow(goal, assignment.slots[camera])
        return goal

    def _clear(self, goal_id: str) -> Goal:
        """Under the lock."""
        goal = self._book.clear(goal_id)
        known = (*self._registry.instances(goal.object_id, hidden=True), self._registry.find(goal.object_id))
        released = [self._registry.release(each.object_id) for each in known if each is not None]
        for camera, stream in self._streams.items():
            if stream.follows(goal_id):
                stream.unfollow(goal_id, [each.slots[camera] for each in released if camera in each.slots])
        return goal


def _fail(questions: Iterable[Question], reason: str) -> None:
    """Without the session's lock."""
    for question in questions:
        question.fail(Unanswered(reason))
