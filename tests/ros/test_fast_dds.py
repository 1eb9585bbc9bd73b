# SPDX-License-Identifier: Apache-2.0
import pytest

from virst_ros import fast_dds


@pytest.mark.parametrize(("distribution", "names"), [("", fast_dds.NAMES[:1]), ("humble", fast_dds.NAMES)])
def test_the_profile_is_used_under_the_name_of_the_release(monkeypatch, distribution, names):
    for name in fast_dds.NAMES:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("ROS_DISTRO", distribution)
    fast_dds.use_profile()
    assert [name for name in fast_dds.NAMES if fast_dds.os.environ[name]] == list(names)
    assert fast_dds.os.environ[names[0]] == str(fast_dds.profile_path())
    assert fast_dds.profile_path().is_file()


def test_the_users_own_profile_stays(monkeypatch):
    monkeypatch.setenv(fast_dds.NAMES[0], "mine.xml")
    fast_dds.use_profile()
    assert fast_dds.os.environ[fast_dds.NAMES[0]] == "mine.xml"


def test_without_a_profile_nothing_is_set(monkeypatch):
    for name in fast_dds.NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fast_dds, "profile_path", lambda: None)
    fast_dds.use_profile()
    assert not any(name in fast_dds.os.environ for name in fast_dds.NAMES)
