# SPDX-License-Identifier: Apache-2.0
"""Loading the shipped model, and ending while it is loaded."""

import pytest

pytest.importorskip("rclpy")

from virst_engine import EngineConfig
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
