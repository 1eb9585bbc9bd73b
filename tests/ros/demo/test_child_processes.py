# SPDX-License-Identifier: Apache-2.0
"""Children end with their parent, whatever happens, and say why when they end alone."""

import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from virst_ros.demo.child_processes import ChildFailed, ChildProcesses
from virst_ros.demo.ros_domain import free_ros_domain

SLEEP = "import time\nprint('up', flush=True)\ntime.sleep(600)"
STUBBORN = (
    "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('up', flush=True)\ntime.sleep(600)"
)
WITH_GRANDCHILD = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print(child.pid, flush=True)\ntime.sleep(600)"
)


def python(code):
    return [sys.executable, "-c", code]


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, timeout_s=20.0):
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.02)


def said(tmp_path, name):
    wait_for(lambda: (tmp_path / f"{name}.log").read_text().strip())
    return (tmp_path / f"{name}.log").read_text().strip()


def pids_of(children):
    return [child.process.pid for child in children._children]


def test_leaving_ends_every_child(tmp_path):
    with ChildProcesses(tmp_path) as children:
        children.start("a", python(SLEEP))
        children.start("b", python(SLEEP))
        children.check()
        pids = pids_of(children)
        assert said(tmp_path, "a") == "up"
    assert not any(is_running(pid) for pid in pids)


def test_an_exception_ends_them_too(tmp_path):
    pids = []

    def fail_while_one_runs():
        with ChildProcesses(tmp_path) as children:
            children.start("a", python(SLEEP))
            pids.extend(pids_of(children))
            raise RuntimeError("oops")

    with pytest.raises(RuntimeError, match="oops"):
        fail_while_one_runs()
    assert pids
    assert not any(is_running(pid) for pid in pids)


def test_what_children_started_is_ended(tmp_path):
    with ChildProcesses(tmp_path) as children:
        children.start("parent", python(WITH_GRANDCHILD))
        grandchild = int(said(tmp_path, "parent"))
        assert is_running(grandchild)
    wait_for(lambda: not is_running(grandchild))


def test_a_child_that_ignores_requests_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("virst_ros.demo.child_processes.POLITE_S", 0.2)
    monkeypatch.setattr("virst_ros.demo.child_processes.FIRM_S", 0.2)
    with ChildProcesses(tmp_path) as children:
        children.start("stubborn", python(STUBBORN))
        said(tmp_path, "stubborn")
        (pid,) = pids_of(children)
    assert not is_running(pid)


def test_a_child_that_ends_alone_shows_its_last_words(tmp_path):
    with ChildProcesses(tmp_path) as children:
        children.start("camera", python("import sys; print('no OpenGL'); sys.exit(3)"))
        wait_for(lambda: children._children[0].process.poll() is not None)
        with pytest.raises(ChildFailed, match=r"(?s)camera ended with status 3.*no OpenGL"):
            children.check()


def test_a_command_that_does_not_exist(tmp_path):
    with ChildProcesses(tmp_path) as children, pytest.raises(ChildFailed, match="reasoner cannot be started"):
        children.start("reasoner", [str(tmp_path / "nowhere")])


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is signalled on Linux only")
def test_children_do_not_outlive_a_killed_parent(tmp_path):
    program = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from virst_ros.demo.child_processes import ChildProcesses
        children = ChildProcesses(Path({str(tmp_path)!r}))
        children.start("orphan", [sys.executable, "-c", {SLEEP!r}])
        print(children._children[0].process.pid, flush=True)
        time.sleep(600)
    """)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    said(tmp_path, "orphan")
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    wait_for(lambda: not is_running(pid))


def test_two_users_never_share_a_domain():
    with free_ros_domain() as one, free_ros_domain() as other:
        assert one != other
        assert 1 <= one <= 100
