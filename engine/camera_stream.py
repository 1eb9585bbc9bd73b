# SPDX-License-Identifier: Apache-2.0
"""What is known of the objects in the stream of one camera. Joins the fast path (every frame) and the slow one.

A `Session` owns the streams of its cameras. Its one thread that owns the models steps them; what other threads want of
a stream is left as commands, under the session's lock.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from virst_engine.backends.base import Stages
from virst_engine.config import EngineConfig
from virst_engine.errors import BadPrompt, Unanswered, VirstError
from virst_engine.fast.object_registry import ONLY_CAMERA, ObjectRegistry
from virst_engine.fast.postprocess import empty_mask, mask_at_size
from virst_engine.fast.preprocess import fit_image, resize_image
from virst_engine.fast.prompts import check_prompt
from virst_engine.fast.tracker import DecodedAnchors, Sighting, TrackedFrame, Tracker
from virst_engine.instance_tracks import InstanceTracks
from virst_engine.slow.anchors import (
    Action,
    AnchorEvidence,
    Claim,
    Decision,
    Dispute,
    Situation,
    anchor_count,
    anchor_steps,
    decide,
    nearest_prompt,
    select_anchors,
)
from virst_engine.slow.frame_window import FrameWindow
from virst_engine.slow.question_book import Question, QuestionBook
from virst_engine.slow.reasoner import NoReasoner, ReasonerClient, refusal
from virst_engine.slow.request_book import OpenRequest, RequestBook
from virst_engine.timing import StageTimer
from virst_engine.types import (
    ClickPrompt,
    Frame,
    Goal,
    MaskPrompt,
    ObjectResult,
    ObjectState,
    Prompt,
    ReasonerRequest,
)

logger = logging.getLogger(__name__)

TOO_LATE = (
    "the reasoner answered too late: what came after its frames is gone, so the answer was not used; raise "
    "memory.ring_steps"
)
USERS_WORD = 1 << 30  # confirmations by a user who pointed the object out
NEW_MEANING = (
    "the sentence has come to mean another object, this one is kept (tracking.keep_answers); clear the goal and set it "
    "again to follow the other"
)
NO_FEATURES = np.zeros((1, 1, 1), np.float16)  # for reasoners that read none
WEAK_ANCHOR_SCORE = 0.5  # factor on the score of an object known only by an anchor that could not be replayed


@dataclass
class _Track:
    """What the fast path knows of one goal's object."""

    goal: Goal
    slot: int
    state: ObjectState = ObjectState.SEARCHING
    absent_steps: int = 0
    is_doubted: bool = False  # nothing is tracked, and the newest answer was not sure enough to begin with it
    is_settled: bool = False  # by an answer that saw a full window
    confirmations: int = 0  # later answers that agreed, since it is settled; USERS_WORD: of a user
    is_weak: bool = False  # known only by an anchor whose frame was evicted
    dispute: Dispute = field(default_factory=Dispute)
    claim: Claim | None = None  # what the newest answer of the dispute points at, unless that is absence
    seen_dispute: Dispute = field(default_factory=Dispute)  # both as they were when it was lost
    seen_claim: Claim | None = None
    pinned_steps: list[int] = field(default_factory=list)  # of the newest request
    newest_anchor_ns: int | None = None
    replay_anchor_ns: int | None = None  # becomes the newest anchor when the replay is through
    replay_is_settled: bool = False
    replay_confirmations: int = 0
    latency_s: float = float("nan")
    problem: str = ""  # what was wrong with the newest answer
    instances: InstanceTracks | None = None  # of a goal that is split


@dataclass(frozen=True)
class _Prompted:
    goal_id: str
    object_id: str
    step: int
    prompt: ClickPrompt | MaskPrompt


@dataclass(frozen=True)
class _Command:
    """Left by any thread, carried out at the start of the next frame by the thread that owns the models."""

    add: _Track | None = None
    remove: _Track | None = None
    leaving: tuple[int, ...] = ()  # slots of what is removed, its instances included
    prompt: _Prompted | None = None
    remove_instance: str = ""  # object id
    reset: bool = False
    config: EngineConfig | None = None

    def prompts(self, goal_id: str) -> bool:
        return self.prompt is not None and self.prompt.goal_id == goal_id


class CameraStream:
    """One camera's objects, frame after frame.

    Methods that say "under the lock" may be called by any thread that holds the session's; the others belong to the
    thread that owns the models.
    """

    def __init__(
        self,
        config: EngineConfig,
        stages: Stages,
        reasoner: ReasonerClient,
        lock: threading.Lock,
        registry: ObjectRegistry,
        *,
        device: torch.device,
        camera: str = ONLY_CAMERA,
    ) -> None:
        """`camera`: the only one whose frames are taken; empty: that of the first frame."""
        self._registry, self._registered_as = registry, camera
        self._config, self._reasoner = config, reasoner
        self._device = device
        self._sizes = stages.sizes  # of the model's own image size; the tracker may use another
        self._has_reasoner = not isinstance(reasoner, NoReasoner)
        self._ring_steps = config.memory.ring_steps
        self.tracker = Tracker(
            stages,
            config.memory,
            config.tracking,
            device=device,
            pins=2 * anchor_count(config.reasoner.frames_asked) if self._has_reasoner else 1,
        )
        self._window = FrameWindow(
            config.reasoner.frames_asked, config.reasoner.spacing_asked_s, on_grid=config.clips_on_grid
        )
        self._tracks: dict[str, _Track] = {}  # by goal id
        self.camera = camera
        self._newest_ns: int | None = None
        self._trouble = ""  # the reasoner's status
        self._left_out = 0  # frames in a row
        self.skipped = 0  # frames so far

        self._lock = lock  # guards what follows; never held while a model runs
        self._requests = RequestBook(config.reasoner)
        self._questions = QuestionBook()
        self._commands: list[_Command] = []
        self._pending: dict[str, _Track] = {}  # every goal that is set, the newest included
        self._states: dict[str, ObjectState] = {}  # by goal id
        self._instance_states: dict[str, ObjectState] = {}  # by object id
        self._cached: dict[int, tuple[int, tuple[int, int]]] = {}  # stamp -> step, height and width; oldest first

    def close(self) -> None:
        """Give back the reasoner's connection."""
        self._reasoner.close()

    # For any thread, under the lock; they take effect with the next frame

    def follow(self, goal: Goal, slot: int) -> None:
        """Look for the goal's object from the next frame on. Under the lock."""
        self._requests.add(goal)
        track = self._new_track(goal, slot)
        self._pending[goal.goal_id] = track
        self._commands.append(_Command(add=track))

    def unfollow(self, goal_id: str, slots: Sequence[int]) -> None:
        """Forget the goal, and what is in these slots, which its objects had. Under the lock.

        Nothing is left of one that no frame has met: however fast goals come and go, the next frame has no more to
        carry out than objects fit, and what is set and cleared while no camera sends does not pile up.
        """
        self._requests.remove(goal_id)
        track = self._pending.pop(goal_id)
        if any(command.add is track for command in self._commands):
            self._commands = [each for each in self._commands if each.add is not track and not each.prompts(goal_id)]
            return
        self._registry.leave(self._registered_as, slots)
        self._commands.append(_Command(remove=track, leaving=tuple(slots)))

    def follows(self, goal_id: str) -> bool:
        """Under the lock."""
        return goal_id in self._pending

    def prompt(self, goal_id: str, object_id: str, step: int, prompt: ClickPrompt | MaskPrompt) -> None:
        """A prompt that `check_prompt` allowed, for the goal's object or an instance. Under the lock."""
        self._commands.append(_Command(prompt=_Prompted(goal_id, object_id, step, prompt)))

    def remove_instance(self, object_id: str) -> None:
        """Under the lock."""
        self._commands.append(_Command(remove_instance=object_id))

    def check_prompt(self, prompt: ClickPrompt | MaskPrompt, stamp_ns: int | None) -> int:
        """The step of the prompt's frame. Under the lock. Raises BadPrompt."""
        if not self._cached:
            raise BadPrompt("no frame has been seen yet; prompt again when one has")
        newest_ns, oldest_ns = next(reversed(self._cached)), next(iter(self._cached))
        found = self._cached.get(newest_ns if stamp_ns is None else stamp_ns)
        if found is None:
            raise BadPrompt(
                f"the frame with stamp {stamp_ns} ns is not cached; those from {oldest_ns} to {newest_ns} ns are: "
                "prompt one of them, or raise memory.ring_steps"
            )
        step, image_size = found
        check_prompt(prompt, image_size, self._sizes.prompt_tokens)
        return step

    def ask(self, sentence: str) -> Question:
        """A question about the clip that ends at the next frame. Under the lock. Raises Unanswered."""
        if not self._has_reasoner:
            raise Unanswered("this model has no reasoner, so it has no words either; ask tabletop-tiny or virst-7b")
        if not self._cached:
            raise Unanswered("no frame has been seen yet; ask again when one has")
        return self._questions.add(sentence)

    def drop_questions(self) -> list[Question]:
        """Those that are open and get no answer any more. Under the lock; to be failed without it."""
        return self._questions.drop_all()

    def state(self, goal_id: str) -> ObjectState:
        """In the newest frame; SEARCHING for a goal that no frame has met yet. Under the lock."""
        return self._states.get(goal_id, ObjectState.SEARCHING)

    def instance_state(self, object_id: str) -> ObjectState | None:
        """In the newest frame; None where this camera has no such instance. Under the lock."""
        return self._instance_states.get(object_id)

    def reset(self) -> list[Question]:
        """Questions that get no answer any more. Under the lock; they are to be failed without it."""
        self._requests.new_epoch()
        self._cached.clear()
        if not (self._commands and self._commands[-1].reset):
            self._commands.append(_Command(reset=True))
        return self.drop_questions()

    def reconfigure(self, config: EngineConfig) -> None:
        """Under the lock."""
        self._commands.append(_Command(config=config))

    # For the thread that owns the models

    def use_stages(self, stages: Stages) -> None:
        """Go on with the same model at another image size."""
        self.tracker.use_stages(stages)
        for track in self._tracks.values():
            track.claim = _resized(track.claim, stages.sizes.mask)
            track.seen_claim = _resized(track.seen_claim, stages.sizes.mask)

    def skips(self, takes_every: int) -> bool:
        """Whether the next frame is to be left out, of which one in so many is to be taken; it is counted."""
        is_skipped = self._left_out + 1 < takes_every
        self._left_out = self._left_out + 1 if is_skipped else 0
        self.skipped += is_skipped
        return is_skipped

    def begin(self, frame: Frame) -> None:
        """Prepare for a frame, which the tracker is to see next."""
        if self._newest_ns is not None and frame.stamp_ns < self._newest_ns:
            logger.warning(
                "%s: the clock went back by %.3f s: starting over",
                frame.camera,
                (self._newest_ns - frame.stamp_ns) / 1e9,
            )
            with self._lock:
                dropped = self.reset()
            for question in dropped:
                question.fail(Unanswered("the camera's clock went back: what was seen is forgotten; ask again"))
        self._carry_out_commands()
        self.camera, self._newest_ns = frame.camera, frame.stamp_ns

    def finish(self, frame: Frame, tracked: TrackedFrame, timer: StageTimer) -> tuple[ObjectResult, ...]:
        """What is known of every object, now that the tracker has seen the frame."""
        with timer.stage("window"):
            if self._has_reasoner:
                self._remember_for_reasoner(frame, tracked)
        for track in self._tracks.values():
            self._note_sighting(track)
        with timer.stage("anchors"):
            self._listen(frame)
            if self._has_reasoner:
                has_recovered = self._look_after_reasoner()
                self._ask(frame, has_recovered=has_recovered)
                if self._questions:
                    self._ask_in_words(frame, has_recovered=has_recovered)
                self._listen(frame)  # a reasoner in this process has answered already
        with timer.stage("replay"):
            for slot in self.tracker.catch_up():
                self._note_takeover(slot)
        with timer.stage("instances"):
            self._split(frame, tracked.step)
        with timer.stage("postprocess"):
            height, width = frame.image_rgb_u8.shape[:2]
            objects = []
            for track in self._tracks.values():
                if track.goal.camera in ("", frame.camera):
                    union = self._result(track, frame.stamp_ns, height, width)
                    objects.append(union)
                    if track.instances is not None:
                        objects += track.instances.results(union, frame.stamp_ns, height, width)
        with self._lock:
            self._states = {goal_id: track.state for goal_id, track in self._tracks.items()}
            split = [track.instances for track in self._tracks.values() if track.instances is not None]
            self._instance_states = {name: state for each in split for name, state in each.states().items()}
            if not any(command.reset for command in self._commands):
                self._cached.pop(frame.stamp_ns, None)
                self._cached[frame.stamp_ns] = (tracked.step, (height, width))
            gone = tracked.step - self._ring_steps
            for stamp_ns in [stamp_ns for stamp_ns, (step, _) in self._cached.items() if step <= gone]:
                del self._cached[stamp_ns]
        return tuple(objects)

    def _new_track(self, goal: Goal, slot: int) -> _Track:
        instances = None
        if goal.max_instances > 1:
            instances = InstanceTracks(
                goal,
                self.tracker,
                self._registry,
                self._lock,
                self._config.tracking,
                camera=self._registered_as,
                image_size=self._sizes.image_size,
            )
        return _Track(goal, slot, instances=instances)

    def _carry_out_commands(self) -> None:
        with self._lock:
            commands, self._commands = self._commands, []
        for command in commands:
            if command.remove is not None:
                goal_id = command.remove.goal.goal_id
                self._tracks.pop(goal_id, None)
                if command.remove.instances is not None:
                    command.remove.instances.clear()
                for slot in command.leaving:
                    self.tracker.forget(slot)
                with self._lock:
                    self._registry.has_left(self._registered_as, command.leaving)
                self._reasoner.cancel(goal_id)
            if command.add is not None:
                self._tracks[command.add.goal.goal_id] = command.add
            if command.prompt is not None and command.prompt.goal_id in self._tracks:
                self._apply_prompt(self._tracks[command.prompt.goal_id], command.prompt)
            if command.remove_instance:
                for track in self._tracks.values():
                    if track.instances is not None:
                        track.instances.remove(command.remove_instance)
            if command.config is not None:
                self._config = command.config
                for track in self._tracks.values():
                    if track.instances is not None:
                        track.instances.reconfigure(self._config.tracking)
                self.tracker.reconfigure(self._config.memory, self._config.tracking)
                with self._lock:
                    self._requests.reconfigure(self._config.reasoner)
            if command.reset:
                for track in self._tracks.values():
                    if track.instances is not None:
                        track.instances.release()
                self.tracker.restart()
                self._window.clear()
                with self._lock:
                    self._cached.clear()
                self._tracks = {
                    goal_id: _Track(track.goal, track.slot, instances=track.instances)
                    for goal_id, track in self._tracks.items()
                }
                with self._lock:
                    self._requests.new_epoch()  # once more: since `reset` this thread may have asked about an old clip
                for goal_id in self._tracks:
                    self._reasoner.cancel(goal_id)

    def _apply_prompt(self, track: _Track, prompted: _Prompted) -> None:
        if prompted.object_id != track.goal.object_id:
            if track.instances is not None:
                track.instances.prompt(prompted.object_id, prompted.step, prompted.prompt)
            return
        stamp_ns = self.tracker.ring.stamp_ns(prompted.step)
        try:
            sighting = self.tracker.prompt(track.slot, prompted.step, prompted.prompt)
        except VirstError as error:  # its frame was evicted, or the session was reset, since it was accepted
            track.problem = str(error)
            return
        if not sighting.is_present and isinstance(prompted.prompt, ClickPrompt):
            track.problem = "nothing was found where it was pointed out; point at its middle, or give a box"
            return
        with self._lock:
            self._requests.drop_requests(track.goal.goal_id, self._newest_ns or 0)
        self._reasoner.cancel(track.goal.goal_id)
        track.problem, track.dispute, track.claim = "", Dispute(), None
        if self.tracker.is_replaying(track.slot):
            track.replay_anchor_ns, track.replay_is_settled = stamp_ns, True
            track.replay_confirmations = USERS_WORD
        else:
            track.newest_anchor_ns, track.is_settled, track.is_weak = stamp_ns, True, False
            track.confirmations = USERS_WORD
            track.state = ObjectState.TRACKING if sighting.is_present else ObjectState.LOST
            track.absent_steps = 0

    def _remember_for_reasoner(self, frame: Frame, tracked: TrackedFrame) -> None:
        if len(self._window) == 0:
            self._window.clear(frame.camera)
        if self._config.reasoner.method == "grounding":  # a detector wants pixels, and reads no features of ours
            seen_rgb_u8 = fit_image(frame.image_rgb_u8, self._config.reasoner.detector_side)
            self._window.push(tracked.step, frame.stamp_ns, seen_rgb_u8, NO_FEATURES)
            return
        small_rgb_u8, size = tracked.square_rgb_u8, self._sizes.video_size
        if small_rgb_u8.shape[0] != size:
            small_rgb_u8 = resize_image(frame.image_rgb_u8, size)
        if not self._config.reasoner.reads_features:
            self._window.push(tracked.step, frame.stamp_ns, small_rgb_u8, NO_FEATURES)
            return
        fusion, seen_size = tracked.features.fusion, tracked.square_rgb_u8.shape[0]
        if seen_size != self._sizes.image_size:  # the reasoner reads one size, that of the model's own input
            side = fusion.shape[-1] * self._sizes.image_size // seen_size
            fusion = F.interpolate(fusion.float(), size=(side, side), mode="bilinear", align_corners=False)
        self._window.push(tracked.step, frame.stamp_ns, small_rgb_u8, fusion[0].to(torch.float16).cpu().numpy())

    def _note_sighting(self, track: _Track) -> None:
        """TRACKING while the object is seen, LOST once it has not been for a few frames; memory finds it again."""
        sighting = self.tracker.sighting(track.slot)
        if sighting is None:
            return
        if sighting.is_present:
            if track.state is ObjectState.LOST:  # its memory found it: what was said against it meanwhile is void
                track.dispute, track.claim = track.seen_dispute, track.seen_claim
            track.state, track.absent_steps = ObjectState.TRACKING, 0
            return
        track.absent_steps += 1
        if track.state is not ObjectState.LOST and track.absent_steps >= self._config.tracking.lost_after_steps:
            track.state = ObjectState.LOST
            track.seen_dispute, track.seen_claim = track.dispute, track.claim
            if self._is_kept(track):  # what was said while it was seen must not take it at once
                track.dispute, track.claim = Dispute(), None

    def _note_takeover(self, slot: int) -> None:
        track = next((track for track in self._tracks.values() if track.slot == slot), None)
        if track is None:
            return  # an instance, whose sighting says all
        if track.instances is not None:
            track.instances.union_was_replaced()
        sighting = self.tracker.sighting(slot)
        is_present = sighting is not None and sighting.is_present
        track.state = ObjectState.TRACKING if is_present else ObjectState.LOST
        track.absent_steps = 0 if is_present else self._config.tracking.lost_after_steps
        track.newest_anchor_ns, track.is_settled = track.replay_anchor_ns, track.replay_is_settled
        track.confirmations, track.is_weak = track.replay_confirmations, False
        track.dispute, track.claim = Dispute(), None
        track.seen_dispute, track.seen_claim = Dispute(), None

    def _look_after_reasoner(self) -> bool:
        """Whether it listens again, having been in trouble."""
        was_in_trouble = bool(self._trouble)
        self._trouble = self._reasoner.status()
        return was_in_trouble and not self._trouble

    def _ask(self, frame: Frame, *, has_recovered: bool) -> None:
        """Hand the reasoner the newest clip for every goal that is due."""
        requests = []
        with self._lock:
            for goal in self._requests.give_up(frame.stamp_ns, everything=has_recovered):
                if not has_recovered and goal.goal_id in self._tracks:
                    self._tracks[
                        goal.goal_id
                    ].problem = f"no answer of the reasoner for {self._config.reasoner.ttl_s:g} s, asked again"
            if self._trouble:  # nobody listens: goals stay due and get the newest clip when somebody does
                return
            due = [track for track in self._tracks.values() if self._is_due(track, frame)]
            if due:
                clip = self._window.clip()
                is_full = self._window.is_full(clip)
                requests = [
                    (track, self._requests.open_request(track.goal.goal_id, clip, is_full_window=is_full))
                    for track in due
                ]
        for track, request in requests:
            # With those of the request before: one that was given up may still be answered.
            before, track.pinned_steps = track.pinned_steps, anchor_steps(request.clip.steps.tolist())
            self.tracker.pin(track.slot, sorted({*before, *track.pinned_steps}))
            try:
                self._reasoner.submit(request)
            except VirstError as error:  # the stream goes on; the request is given up when its time is over
                track.problem = str(error)

    def _ask_in_words(self, frame: Frame, *, has_recovered: bool) -> None:
        """Hand the reasoner the next question with the newest clip, and fail those that get no answer."""
        request: ReasonerRequest | None = None
        ttl_s = self._config.reasoner.ttl_s
        with self._lock:
            if has_recovered:
                self._questions.ask_again()
            late = self._questions.meet(frame.stamp_ns, ttl_s)
            waiting = self._questions.drop_waiting() if self._trouble else []
            question = None if self._trouble else self._questions.next()
            if question is not None:
                request = self._questions.request(question, self._requests.new_request_id(), self._window.clip())
            worthless = self._questions.take_worthless()
        for question_id in worthless:
            self._reasoner.cancel(question_id)
        for question in late:
            why = self._trouble or "ask again, or raise reasoner.ttl_s"
            question.fail(Unanswered(f"no answer of the reasoner for {ttl_s:g} s: {why}"))
        for question in waiting:
            question.fail(Unanswered(self._trouble))
        if request is not None:
            self._submit_question(request)

    def _submit_question(self, request: ReasonerRequest) -> None:
        try:
            self._reasoner.submit(request)
        except VirstError as error:
            with self._lock:
                question = self._questions.take_answer(refusal(request, str(error)))
            if question is not None:
                question.fail(Unanswered(str(error)))

    def _is_due(self, track: _Track, frame: Frame) -> bool:
        # A goal that was cleared or set anew by another thread has a new track from the next frame on.
        if not self._is_same_goal(track):
            return False
        if not track.goal.sentence:  # the user pointed it out: the reasoner knows nothing of it
            return False
        if track.goal.camera not in ("", frame.camera) or self.tracker.is_replaying(track.slot):
            return False
        # Hidden, but settled: memory finds it again, and clips that share most frames are not several witnesses.
        is_safe = (track.state is ObjectState.TRACKING and self._is_confident(track)) or (
            track.state is ObjectState.LOST and track.is_settled
        )
        return self._requests.is_due(track.goal.goal_id, frame.stamp_ns, is_tracked=is_safe)

    def _is_same_goal(self, track: _Track) -> bool:
        pending = self._pending.get(track.goal.goal_id)
        return pending is not None and pending.goal == track.goal

    def _is_confident(self, track: _Track) -> bool:
        sighting = self.tracker.sighting(track.slot)
        return sighting is not None and sighting.is_remembered and not track.is_weak

    def _listen(self, frame: Frame) -> None:
        for answer in self._reasoner.poll():
            with self._lock:
                question = self._questions.take_answer(answer)
                request = self._requests.take_answer(answer)
                track = self._tracks.get(answer.goal_id)
                is_current = track is not None and self._is_same_goal(track)
            if question is not None:
                question.settle(answer)
                continue
            if request is None or track is None or not is_current:
                logger.debug("goal %a: dropped an answer that nobody waits for", answer.goal_id)
                continue
            track.latency_s = (frame.stamp_ns - request.asked_ns) / 1e9
            track.problem = answer.error or self._what_is_wrong(answer.prompts)
            if not track.problem:
                self._apply(track, answer.prompts, request)

    def _what_is_wrong(self, prompts: tuple[Prompt, ...]) -> str:
        if not prompts:
            return "the reasoner's answer has no prompts; restart it with this version"
        if not all(0.0 <= prompt.confidence <= 1.0 for prompt in prompts):  # False for NaN
            return "the reasoner's confidences are not within 0 and 1; check its weights"
        boxes = [prompt.boxes for prompt in prompts if prompt.boxes is not None]
        if (len(boxes) == len(prompts)) != (self._config.reasoner.method == "grounding"):
            is_told = f"reasoner.method is {self._config.reasoner.method}"
            return f"the reasoner answers by another method than was asked for: {is_told}, start it with that --method"
        if boxes:
            are_boxes = all(each.ndim == 2 and each.size and np.isfinite(each).all() for each in boxes)
            is_one_shape = len({each.shape for each in boxes}) == 1 and boxes[0].shape[1] == 4
            return (
                "" if are_boxes and is_one_shape else "the reasoner's boxes make no sense; restart it with this version"
            )
        shapes = {prompt.embeddings.shape for prompt in prompts}
        if len(shapes) > 1 or next(iter(shapes))[1] != self._sizes.channels:
            return (
                f"the reasoner's prompts have shapes {sorted(shapes)}, this model needs n x {self._sizes.channels}; "
                "start it with the same model"
            )
        if not all(np.isfinite(prompt.embeddings).all() for prompt in prompts):
            return "the reasoner's prompts are not finite numbers; check its weights"
        return ""

    def _apply(self, track: _Track, prompts: tuple[Prompt, ...], request: OpenRequest) -> None:
        """Decode the answer's anchors on their own frames, decide what they mean, act."""
        if self._config.reasoner.chooses_frames:
            selected = sorted(prompts, key=lambda prompt: prompt.step)
        else:
            selected = select_anchors(prompts)
        anchors = self._decode(track, selected)
        confidences = {prompt.step: prompt.confidence for prompt in selected}
        decision = self._decide(track, anchors, confidences, repeats=self._repeats_claim(track, prompts))
        track.dispute = decision.dispute
        track.is_doubted = decision.action is Action.HOLD and track.newest_anchor_ns is None
        self._note_claim(track, decision, anchors, prompts)
        logger.debug("goal %s: %s", track.goal.goal_id, decision.action.name)

        if decision.action is Action.ASK_AGAIN or anchors is None:
            track.problem = TOO_LATE
            self._ask_again(track)
            return
        stamps_ns = {prompt.step: prompt.stamp_ns for prompt in selected}
        newest_ns = stamps_ns[anchors.steps[decision.chosen[-1]]] if decision.chosen else None
        if decision.action is Action.INSERT:
            self.tracker.add_anchors(track.slot, anchors, decision.chosen)
            if newest_ns is not None:  # an older anchor may join alone
                track.newest_anchor_ns = max(newest_ns, track.newest_anchor_ns or newest_ns)
            if track.is_settled and request.is_full_window and anchors.agreement[decision.chosen[-1]] is not None:
                track.confirmations += 1
            track.is_settled = track.is_settled or request.is_full_window
            track.is_weak = False
        elif decision.action is Action.START_OVER:
            self.tracker.start_over(track.slot, anchors, decision.chosen)
            track.replay_anchor_ns, track.replay_is_settled = newest_ns, request.is_full_window
            track.replay_confirmations = 0
        elif decision.action is Action.DECLARE_ABSENT:
            self.tracker.forget(track.slot)
            track.state, track.newest_anchor_ns, track.is_settled = ObjectState.NOT_FOUND, None, False
            track.confirmations = 0
            if track.instances is not None:
                track.instances.release()
        elif decision.action is Action.JUMP:
            self.tracker.jump(track.slot, anchors, decision.chosen[-1])
            if track.instances is not None:
                track.instances.union_was_replaced()
            track.newest_anchor_ns, track.is_settled, track.is_weak = newest_ns, False, True
            track.confirmations = 0
            self._ask_again(track)

    def _split(self, frame: Frame, step: int) -> None:
        """Look at the instances of the goals that are split."""
        height, width = frame.image_rgb_u8.shape[:2]
        for track in self._tracks.values():
            if track.instances is None or track.goal.camera not in ("", frame.camera):
                continue
            union = self.tracker.sighting(track.slot)
            is_sure = track.state is ObjectState.TRACKING and self._is_confident(track)
            is_sure = is_sure and track.newest_anchor_ns is not None and not self.tracker.is_replaying(track.slot)
            track.instances.watch(union if is_sure else None, step, frame.stamp_ns, height, width)

    def _decode(self, track: _Track, prompts: Sequence[Prompt]) -> DecodedAnchors | None:
        steps = [prompt.step for prompt in prompts]
        boxes = [prompt.boxes for prompt in prompts if prompt.boxes is not None]
        if boxes:
            return self.tracker.decode_anchors(track.slot, steps, None, np.stack(boxes))
        embeddings = torch.from_numpy(np.stack([prompt.embeddings for prompt in prompts]).astype(np.float32))
        return self.tracker.decode_anchors(track.slot, steps, embeddings)

    def _repeats_claim(self, track: _Track, prompts: tuple[Prompt, ...]) -> bool:
        """Whether the answer points at what the dispute is about, judged in the frame nearest in time."""
        if track.claim is None:
            return False
        prompt = nearest_prompt(prompts, track.claim.stamp_ns)
        decoded = self._decode(track, [prompt])
        if decoded is None or not decoded.is_present[0]:
            return False
        mask = (decoded.prediction.mask_logits[0] > 0).cpu().numpy()
        return track.claim.is_repeated_by(mask, prompt.stamp_ns, self._config.tracking.agree_iou)

    @staticmethod
    def _note_claim(
        track: _Track, decision: Decision, anchors: DecodedAnchors | None, prompts: tuple[Prompt, ...]
    ) -> None:
        if decision.dispute.answers == 0 or decision.dispute.says_absent:
            track.claim = None
        elif decision.claimed is not None and anchors is not None:
            step = anchors.steps[decision.claimed]
            stamp_ns = next(prompt.stamp_ns for prompt in prompts if prompt.step == step)
            track.claim = Claim(stamp_ns, (anchors.prediction.mask_logits[decision.claimed] > 0).cpu().numpy())

    def _decide(
        self, track: _Track, anchors: DecodedAnchors | None, confidences: dict[int, float], *, repeats: bool
    ) -> Decision:
        """`confidences`: the reasoner's own, by step."""
        tracking = self._config.tracking
        evidence = []
        if anchors is not None:
            believed = [confidences[step] for step in anchors.steps]
            rows = zip(
                anchors.is_cached, anchors.is_present, anchors.agreement, anchors.sightings, believed, strict=True
            )
            evidence = [
                AnchorEvidence(
                    is_cached,
                    is_present,
                    agreement,
                    is_sure=min(sighting.presence, confidence) >= self._config.start_presence,
                    is_believed=confidence > 0.5,
                )
                for is_cached, is_present, agreement, sighting, confidence in rows
            ]
        sighting = self.tracker.sighting(track.slot)
        situation = Situation(
            state=track.state,
            is_visible=sighting is not None and sighting.is_present,
            is_confident=self._is_confident(track),
            is_settled=track.is_settled,
            dispute=track.dispute,
            is_kept=self._is_kept(track),
        )
        return decide(
            evidence,
            situation,
            agree_iou=tracking.agree_iou,
            overrule_answers=tracking.overrule_answers,
            confirm_answers=tracking.confirm_answers,
            repeats=repeats,
        )

    def _is_kept(self, track: _Track) -> bool:
        """Whether it stays what it is while it is seen. What a plural means may grow: it goes on with the answers."""
        is_confirmed = 0 < self._config.tracking.keep_answers <= track.confirmations
        return is_confirmed and track.instances is None

    def _ask_again(self, track: _Track) -> None:
        with self._lock:
            self._requests.ask_again(track.goal.goal_id)

    def _result(self, track: _Track, stamp_ns: int, height: int, width: int) -> ObjectResult:
        sighting = self.tracker.sighting(track.slot)
        is_visible = track.state is ObjectState.TRACKING and sighting is not None and sighting.is_present
        mask = empty_mask(height, width)
        score = 0.0
        if is_visible and sighting is not None:
            mask = mask_at_size(sighting.host_logits, height, width)
            score = self._score(track, sighting)
        anchor_ns = track.newest_anchor_ns
        return ObjectResult(
            object_id=track.goal.object_id,
            goal_id=track.goal.goal_id,
            instance_id=track.goal.instance_id,
            state=track.state,
            mask=mask,
            score=score,
            prompt_age_s=float("inf") if anchor_ns is None else (stamp_ns - anchor_ns) / 1e9,
            reasoner_latency_s=track.latency_s,
            message=self._message(track),
            sentence=track.goal.sentence,
        )

    def _score(self, track: _Track, sighting: Sighting) -> float:
        score = min(max(sighting.iou, 0.0), 1.0) * sighting.presence
        return score * WEAK_ANCHOR_SCORE if track.is_weak else score

    def _message(self, track: _Track) -> str:
        if track.problem:
            return track.problem
        if track.state is ObjectState.TRACKING:
            if self._is_kept(track) and track.claim and track.dispute.answers >= self._config.tracking.overrule_answers:
                return NEW_MEANING
            return track.instances.message if track.instances is not None else ""
        if self._trouble and track.goal.sentence:
            return self._trouble
        if not self._has_reasoner and track.goal.sentence:
            return "this model understands no sentences; point the object out with a box, points or a mask"
        if self.tracker.is_replaying(track.slot):
            return "found in an earlier frame, catching up"
        if track.is_doubted and track.state is not ObjectState.LOST:
            return "something may fit the sentence, but not surely (tracking.start_presence); asked again"
        if not track.goal.sentence and track.state is ObjectState.SEARCHING:
            return "it was pointed out in a frame that is gone; point it out again"
        return {
            ObjectState.SEARCHING: "waiting for the reasoner's first answer",
            ObjectState.LOST: "not visible at the moment; it is found again when it comes back",
            ObjectState.NOT_FOUND: "the reasoner sees nothing that fits the sentence",
        }[track.state]


def _resized(claim: Claim | None, mask_side: int) -> Claim | None:
    if claim is None:
        return None
    mask = cv2.resize(claim.mask.view(np.uint8), (mask_side, mask_side), interpolation=cv2.INTER_NEAREST)
    return replace(claim, mask=mask.view(np.bool_))
