# SPDX-License-Identifier: Apache-2.0
"""Python's logging, which the engine uses, shown as ROS log messages."""

import logging
from types import TracebackType
from typing import Any


class LogBridge(logging.Handler):
    """While entered, forwards records of the logger `source` (and those below it) to an rclpy logger."""

    def __init__(self, ros_logger: Any, source: str = "virst_engine") -> None:
        super().__init__()
        self._ros_logger = ros_logger
        self._source = logging.getLogger(source)
        self._level_before = self._source.level

    def __enter__(self) -> "LogBridge":
        self._level_before = self._source.level
        self._source.addHandler(self)
        # The rclpy logger decides what is shown; Python's default of WARNING would hide the engine's info from it.
        self._source.setLevel(logging.DEBUG if self._ros_logger.is_enabled_for(10) else logging.INFO)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._source.removeHandler(self)
        self._source.setLevel(self._level_before)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # One line per severity: rclpy refuses a call site that changes its severity.
            text = f"{record.name}: {self.format(record)}"
            if record.levelno >= logging.CRITICAL:
                self._ros_logger.fatal(text)
            elif record.levelno >= logging.ERROR:
                self._ros_logger.error(text)
            elif record.levelno >= logging.WARNING:
                self._ros_logger.warning(text)
            elif record.levelno >= logging.INFO:
                self._ros_logger.info(text)
            else:
                self._ros_logger.debug(text)
        except Exception:  # the same promise as every logging handler: a failed log line never stops the program
            self.handleError(record)
