# SPDX-License-Identifier: Apache-2.0
"""From a configuration to a running engine: weights, stages, the connection to the reasoner, the session."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np

from virst_engine import ClickPrompt, EngineConfig, Goal, MaskPrompt
from virst_engine.errors import BadPrompt, VirstError
from virst_engine.session import Session
from virst_engine.slow.reasoner import NoReasoner, ReasonerClient
from virst_engine.slow.zmq_client import ZmqReasonerClient
from virst_engine.weights import (
    answers_questions,
    load_goal_check,
    load_stages,
    reasoner_identity,
    understands_sentences,
    weights_path,
)
from virst_ros.diagnostics import LoadedModel
from virst_ros.prompts import PromptedObject


@dataclass(frozen=True)
class LoadedEngine:
    """What the node drives. The session owns the reasoner's connection and closes it."""

    session: Session
    reasoners: Mapping[str, ReasonerClient]  # by camera, "" for the only one; their status is asked by several threads
    model: LoadedModel
    check_goal: Callable[[str], None]  # raises BadGoal for a sentence that the model cannot read
    # An object that was pointed at in the image of that stamp (ns, 0 = the newest) and camera -> what tracks it. Raises
    # BadGoal. None: the engine takes sentences only.
    add_object: Callable[[PromptedObject, int, str], Goal] | None = None
    # A question, and the camera that it is about -> the answer in words. Raises as Session.ask. None: there are none.
    ask: Callable[[str, str], Future[str]] | None = None


class ToldToEnd(VirstError):
    """The node is to end while it loads: nothing is wrong with what it loads."""


def load_engine(
    config: EngineConfig, cameras: Sequence[str] = (), goes_on: Callable[[], bool] = lambda: True
) -> LoadedEngine:
    """Load what `config` names; takes seconds. The reasoner need not be there yet: it connects when it comes.

    Args:
        cameras: the names of several; none when there is one, whatever it is called.
        goes_on: asked every now and then; False ends it, so that a signal is heard before all is loaded.

    Raises:
        ToldToEnd: `goes_on` said so.
        WeightsError: the weights are missing, damaged, of another model, or do not run on the device.
        BackendError, ExportError: `engine.backend` cannot run here, or `engine.path` is no export of this model.
        EndpointError: the reasoner's address can never work.
    """

    def look_up() -> None:
        if not goes_on():
            raise ToldToEnd("told to end while the model was being loaded")

    path = weights_path(config.model)
    look_up()
    stages = load_stages(config.model, config.engine, config.memory)
    look_up()
    check_goal = load_goal_check(config.model, config.reasoner.method, config.reasoner.weights)
    reasoners = {camera: _reasoner(config) for camera in cameras or ("",)}
    session = Session(config, stages, reasoners)
    try:
        session.warm_up(look_up)  # no frame of a robot is late for what can be done now
    except BaseException:
        session.close()
        raise
    return LoadedEngine(
        session=session,
        reasoners=reasoners,
        model=LoadedModel(config.model.name, str(path), type(stages).__name__, config.model.device),
        check_goal=check_goal,
        add_object=partial(add_prompted, session),
        ask=session.ask if answers_questions(config.model, config.reasoner.method) else None,
    )


def _reasoner(config: EngineConfig) -> ReasonerClient:
    if not understands_sentences(config.model, config.reasoner.method):
        return NoReasoner()
    return ZmqReasonerClient(
        config.reasoner.endpoint,
        curve_keys=config.reasoner.curve_keys,
        model=reasoner_identity(config.model, config.reasoner.method, config.reasoner.weights),
    )


def add_prompted(session: Session, prompted: PromptedObject, stamp_ns: int, camera: str = "") -> Goal:
    """Track what was pointed at in the image of that stamp (0 = the newest); an object that exists is prompted again.

    `camera`: whose image it was; may be empty where there is one.

    Raises BadPrompt or BadGoal; nothing has changed then.
    """
    prompt: ClickPrompt | MaskPrompt
    try:
        if prompted.mask is not None:
            prompt = MaskPrompt(prompted.mask)
        else:
            points = np.array(prompted.points_px, np.float32).reshape(-1, 2)
            prompt = ClickPrompt(points, np.array(prompted.labels, np.int64), prompted.box_px)
    except ValueError as error:
        raise BadPrompt(f"{prompted.object_id[:40]!r}: {error}") from error
    at = stamp_ns or None
    known = (each.object_id for objects in session.known_objects().values() for each in objects)
    if prompted.object_id in known:
        return session.prompt_object(prompted.object_id, prompt, stamp_ns=at, camera=camera)
    return session.add_object(prompt, stamp_ns=at, camera=camera, object_id=prompted.object_id)
