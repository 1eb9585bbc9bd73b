# SPDX-License-Identifier: Apache-2.0
"""Loading the shipped model, and ending while it is loaded."""

import numpy as np
import pytest

pytest.importorskip("rclpy")

from tests.engine.model.small_virst_7b import write_converted
from virst_engine import EngineConfig, Frame
from virst_engine.config import MemoryParameters, ModelParameters, ReasonerParameters
from virst_engine.errors import BadGoal
from virst_ros import loading
from virst_ros.loading import ToldToEnd, load_engine


@pytest.mark.parametrize("after", range(6))
def test_it_ends_where_it_is_told_to(monkeypatch, after):
    answers, sessions = [], []

    class Watched(loading.Session):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.is_open = True
            sessions.append(self)

        def close(self):
            super().close()
            self.is_open = False

    def goes_on():
        answers.append(len(answers) < after)
        return answers[-1]

    monkeypatch.setattr(loading, "Session", Watched)
    with pytest.raises(ToldToEnd, match="while the model was being loaded"):
        load_engine(EngineConfig(), goes_on=goes_on)
    assert len(answers) == after + 1  # nobody goes on after the first no
    assert len(sessions) == (after >= 2)  # what it had opened is closed
    assert not any(session.is_open for session in sessions)


def test_it_is_asked_as_long_as_it_warms_up():
    asked = []
    engine = load_engine(EngineConfig(), goes_on=lambda: asked.append(1) or True)
    engine.session.close()
    assert len(asked) >= 6
    assert engine.model.name == "tabletop-tiny"


def test_virst_at_full_size_is_loaded_from_its_folder(tmp_path):
    folder = write_converted(tmp_path / "weights")
    config = EngineConfig(
        model=ModelParameters(name="virst-7b", weights=str(folder)),
        memory=MemoryParameters(ring_steps=16),
        reasoner=ReasonerParameters(endpoint=f"ipc://{tmp_path}/reasoner"),
    )
    loaded = load_engine(config)
    try:
        assert (loaded.model.name, loaded.model.weights) == ("virst-7b", str(folder))
        assert loaded.ask is not None
        loaded.check_goal("whatever is about to fall")
        with pytest.raises(BadGoal, match="no word"):
            loaded.check_goal(" ")
        loaded.session.set_goal("whatever is about to fall")
        (found,) = loaded.session.step(Frame(np.zeros((48, 64, 3), np.uint8), 0)).objects
        assert "no reasoner answers" in found.message
    finally:
        loaded.session.close()
