# SPDX-License-Identifier: Apache-2.0
import logging

from virst_ros.log_bridge import LogBridge


class RosLogger:
    """Takes what an rclpy logger takes."""

    def __init__(self):
        self.lines = []

    def is_enabled_for(self, _):
        return True

    def __getattr__(self, severity):
        return lambda text: self.lines.append((severity, text))


def test_records_come_with_their_severity_and_source_while_it_is_entered():
    ros, source = RosLogger(), logging.getLogger("virst_engine.somewhere")
    with LogBridge(ros):
        source.debug("a %d", 1)
        source.info("b")
        source.warning("c")
        source.error("d")
        source.critical("e")
        logging.getLogger("another").error("not ours")
    source.error("too late")
    severities = ["debug", "info", "warning", "error", "fatal"]
    assert [severity for severity, _ in ros.lines] == severities
    assert ros.lines[0][1] == "virst_engine.somewhere: a 1"


def test_the_level_is_put_back():
    logger = logging.getLogger("virst_engine")
    before = logger.level
    with LogBridge(RosLogger()):
        assert logger.level == logging.DEBUG
    assert logger.level == before


def test_tracebacks_come_along():
    ros = RosLogger()
    with LogBridge(ros, "virst_ros"):
        try:
            raise ValueError("boom")
        except ValueError:
            logging.getLogger("virst_ros.x").exception("failed")
    assert "ValueError: boom" in ros.lines[0][1]
