# SPDX-License-Identifier: Apache-2.0
"""What went wrong according to the log of a process, read while it is written. No ROS in it."""

import re
from pathlib import Path

# rclpy: "[ERROR] [1700000000.5] [segmenter]: ...", the reasoner: "2026-01-31 12:00:00,000 ERROR name: ...", other
# programs of the engine: "CRITICAL name: ...", a crash of the interpreter: "Fatal Python error: Segmentation fault".
FAILURE = re.compile(
    r"^\s*Traceback \(most recent call last\)|^\[(?:ERROR|FATAL)\]|^(?:[\d-]+ [\d:,.]+ )?(?:ERROR|CRITICAL)\b"
    r"|^Fatal Python error\b"
)


class LogWatch:
    """New lines of a file that tell of a failure."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._rest = path, 0, ""

    def failures(self) -> list[str]:
        """Those since the last call; nothing while there is no file."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return []
        self._offset += len(new)
        *lines, self._rest = (self._rest + new.decode("utf-8", errors="replace")).split("\n")
        return [line for line in lines if FAILURE.search(line)]
