# SPDX-License-Identifier: Apache-2.0
"""Where the package's Fast DDS profile is, without which large images get lost between processes."""

import os
from pathlib import Path

NAMES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")  # the second up to Jazzy


def profile_path() -> Path | None:
    """launch/fastdds_profile.xml of the checkout or of the installed package; None when there is neither."""
    folders = [Path(__file__).parents[1]]
    try:
        from ament_index_python.packages import PackageNotFoundError, get_package_share_directory

        folders.append(Path(get_package_share_directory("virst_ros")))
    except (ImportError, PackageNotFoundError):
        pass
    candidates = [folder / "launch" / "fastdds_profile.xml" for folder in folders]
    return next((path for path in candidates if path.is_file()), None)


def use_profile() -> None:
    """For this process and its children, unless the user has chosen one. Call it before the first node is made."""
    path = profile_path()
    if path is not None and not any(os.environ.get(name) for name in NAMES):
        for name in NAMES if os.environ.get("ROS_DISTRO") in ("humble", "iron", "jazzy") else NAMES[:1]:
            os.environ[name] = str(path)
