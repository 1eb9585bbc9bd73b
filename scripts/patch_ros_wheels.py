# SPDX-License-Identifier: Apache-2.0
"""Makes the CMake files of the ROS 2 wheels usable here; run by scripts/setup with the Python of the environment.

The wheels' message packages name two folders of the machine that built the wheels: CPython's headers and NumPy's.
CMake refuses a target whose include folder does not exist, so both are replaced by this environment's.
"""

import re
import sys
import sysconfig
from pathlib import Path

import numpy as np

BUILD_NUMPY = re.compile(r"/opt/python/[^/;\"]+/lib/python[\d.]+/site-packages/numpy/_core/include")
BUILD_PYTHON = re.compile(r"/opt/python/[^/;\"]+/include/python[\d.]+t?")


def main() -> None:
    patched = 0
    for path in sorted((Path(sys.prefix) / "share").rglob("*.cmake")):
        text = path.read_text(encoding="utf-8")
        fixed = BUILD_NUMPY.sub(np.get_include(), text)
        fixed = BUILD_PYTHON.sub(sysconfig.get_path("include"), fixed)
        if fixed != text:
            path.write_text(fixed, encoding="utf-8")
            patched += 1
    print(f"{patched} CMake files now name {sysconfig.get_path('include')} and {np.get_include()}")


if __name__ == "__main__":
    main()
