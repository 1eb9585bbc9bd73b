# SPDX-License-Identifier: Apache-2.0
"""From a configuration to a running engine: weights, stages, the connection to the reasoner, the session."""

from collections.abc import Callable
from dataclasses import dataclass

from virst_engine import EngineConfig, Goal
from virst_engine.session import Session
from virst_engine.slow.reasoner import ReasonerClient
from virst_engine.slow.zmq_client import ZmqReasonerClient
from virst_engine.weights import load_goal_check, load_stages, weights_identity, weights_path
from virst_ros.diagnostics import LoadedModel
from virst_ros.prompts import PromptedObject


@dataclass(frozen=True)
class LoadedEngine:
    """What the node drives. The session owns the reasoner's connection and closes it."""

    session: Session
    reasoner: ReasonerClient  # its status is asked by several threads
    model: LoadedModel
    check_goal: Callable[[str], None]  # raises BadGoal for a sentence that the model cannot read
    # An object that was pointed at in the image of that stamp (ns, 0 = the newest) -> what tracks it. Raises BadGoal.
    # None: the engine takes sentences only.
    add_object: Callable[[PromptedObject, int], Goal] | None = None
    ask: Callable[[str], str] | None = None  # a question -> the answer in words; None: the method has none


def load_engine(config: EngineConfig) -> LoadedEngine:
    """Load what `config` names; takes seconds. The reasoner need not be there yet: it connects when it comes.

    Raises:
        WeightsError: the weights are missing, damaged, of another model, or do not run on the device.
        EndpointError: the reasoner's address can never work.
    """
    path = weights_path(config.model)
    stages, check_goal = load_stages(config.model), load_goal_check(config.model)
    reasoner = ZmqReasonerClient(
        config.reasoner.endpoint, curve_keys=config.reasoner.curve_keys, model=weights_identity(config.model)
    )
    session = Session(config, stages, reasoner)
    return LoadedEngine(
        session=session,
        reasoner=reasoner,
        model=LoadedModel(config.model.name, str(path), type(stages).__name__, config.model.device),
        check_goal=check_goal,
    )
