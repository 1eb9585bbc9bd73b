# SPDX-License-Identifier: Apache-2.0
"""The demo: camera, reasoner and segmenter as processes of one ROS 2 graph, goals through the service, a report.

./scripts/demo [--seconds N] [--json FILE] [--goal "..."] [--interactive] [--view]
"""

import json
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from virst_engine.errors import VirstError
from virst_ros.demo.child_processes import ChildProcesses
from virst_ros.demo.ros_domain import free_ros_domain

DEMO_GOALS = (
    "the red ball",
    "the box left of the blue can",
    "the object moving to the left",
    "the thing that can roll",
    "the purple egg",  # there is none
)
START_S = 120.0  # for loading models on a slow machine
WINDOW_S = 2.3  # of frames that the reasoner looks at: the first goal should have them
TYPED_GOAL_S = 5.0  # at least, also when the next goal or the end is waiting: no fewer frames are worth a score
CALLED_FROM = "VIRST_CALLED_FROM"  # set by scripts/demo, which changes the folder
REPOSITORY = Path(__file__).resolve().parents[2]

# A pipe or a log file has no width of its own; the table needs this much.
console = Console(width=None if sys.stdout.isatty() else 120)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoSettings:
    seconds: float
    goals: tuple[str, ...]
    interactive: bool
    view: bool
    recorded: bool
    out: Path
    weights: str
    rate_hz: float


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """Start everything, set the goals, end everything; the figures. Raises VirstError when a part of it fails."""
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.signals import SignalHandlerOptions

    from virst_ros.demo.recorder import DemoRecorder
    from virst_ros.spinning import spin_until_shutdown

    with ExitStack() as stack:
        domain = int(os.environ["ROS_DOMAIN_ID"]) if os.environ.get("ROS_DOMAIN_ID") else None
        domain = stack.enter_context(free_ros_domain()) if domain is None else domain
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="virst_demo_")))
        children = stack.enter_context(ChildProcesses(settings.out / "logs"))
        endpoint = f"ipc://{folder}/reasoner"
        environment = _environment(domain)
        recorded = settings.recorded or not _can_render()
        camera = "recorded" if recorded else "simulated"
        if recorded and not settings.recorded:
            console.print(
                "[yellow]There is no OpenGL here, so the simulated camera cannot film: playing the recorded run that"
                " comes with the repository instead.[/yellow] Masks are still made live."
            )
        for name, command in _commands(settings, recorded, endpoint).items():
            children.start(name, command, environment)

        # Signals end the demo, which then shuts ROS down; rclpy's own handlers would do it under our feet.
        rclpy.init(domain_id=domain, signal_handler_options=SignalHandlerOptions.NO)
        stack.callback(rclpy.try_shutdown)
        recorder = DemoRecorder()
        stack.callback(recorder.destroy_node)
        executor = SingleThreadedExecutor()
        executor.add_node(recorder)
        spinning = threading.Thread(target=spin_until_shutdown, args=(executor,), daemon=True)
        spinning.start()
        stack.callback(spinning.join, 5.0)
        stack.callback(executor.shutdown)

        _wait_until_ready(recorder, endpoint, children)
        runs = _set_goals(recorder, children, settings, _spec(recorded))
        recorder.finish()
        children.check()
        children.end()
    return _report(runs, settings, camera)


def _commands(settings: DemoSettings, recorded: bool, endpoint: str) -> dict[str, list[str]]:
    module = [sys.executable, "-m"]
    rate = ["--ros-args", "-p", f"rate_hz:={settings.rate_hz:.1f}"]
    camera = [*module, "virst_ros.demo.recorded_camera", *rate]
    if not recorded:
        camera = [*module, "virst_ros.sim_camera_node", *rate, "-p", "family:=demo"]
    segmenter = [
        *module,
        "virst_ros.segmenter_node",
        "--ros-args",
        "-r",
        "image:=/camera/color/image_raw",
        "-r",
        "camera_info:=/camera/color/camera_info",
        "-p",
        f"reasoner.endpoint:={endpoint}",
    ]
    reasoner = [*module, "virst_engine.slow.zmq_server", "--endpoint", endpoint]
    if settings.weights:
        segmenter += ["-p", f"model.weights:={settings.weights}"]
        reasoner += ["--weights", settings.weights]
    return {"camera": camera, "reasoner": reasoner, "segmenter": segmenter}


def _environment(domain: int) -> dict[str, str]:
    """For the children; what the middleware reads is set for this process too."""
    profile = REPOSITORY / "launch" / "fastdds_profile.xml"
    if profile.is_file():
        for name in ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"):  # the latter up to Jazzy
            os.environ.setdefault(name, str(profile))
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    environment = {**os.environ, "ROS_DOMAIN_ID": str(domain), "PYTHONUNBUFFERED": "1"}
    environment.setdefault("LP_NUM_THREADS", "1")  # software OpenGL must not take the segmenter's core
    return environment


def _can_render() -> bool:
    """Tried in a process of its own: an OpenGL library that is half there may take the whole process with it."""
    code = (
        "from virst_engine.sim.live import LiveTabletop, demo_scene\n"
        "with LiveTabletop(spec=demo_scene()) as tabletop: tabletop.render(depth=False)"
    )
    try:
        tried = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return False
    if tried.returncode:
        logger.info("no rendering: %s", tried.stderr.decode(errors="replace")[-500:])
    return tried.returncode == 0


def _spec(recorded: bool) -> Any:
    if recorded:
        from virst_ros.demo.recorded_run import load_recording

        return load_recording().spec
    from virst_engine.sim.live import demo_scene

    return demo_scene()


def _wait_until_ready(recorder: Any, endpoint: str, children: ChildProcesses) -> None:
    """Until images and masks come and the reasoner answers. Raises VirstError when that takes too long."""
    from virst_engine.slow.zmq_client import ZmqReasonerClient

    reasoner = ZmqReasonerClient(endpoint)
    deadline_s = time.monotonic() + START_S
    try:
        with console.status("starting camera, reasoner and segmenter") as status:
            while True:
                children.check()
                moment, trouble = recorder.moment(), reasoner.status()
                waiting = [
                    what
                    for what, is_there in (
                        ("images", moment.images > 0),
                        ("masks", moment.masks > 0),
                        ("the goal service", recorder.service_is_ready()),
                        ("the reasoner", not trouble),
                    )
                    if not is_there
                ]
                if not waiting:
                    break
                if time.monotonic() > deadline_s:
                    raise VirstError(f"still no {', no '.join(waiting)} after {START_S:g} s; see {children.log_folder}")
                status.update(f"waiting for {', '.join(waiting)}")
                time.sleep(0.1)
            status.update("letting the reasoner's window fill")
            time.sleep(WINDOW_S)
    finally:
        reasoner.close()


def _set_goals(recorder: Any, children: ChildProcesses, settings: DemoSettings, spec: Any) -> list[Any]:
    from virst_ros.demo.display import Display, LiveTable, PlainLines, Window

    window = Window.open() if settings.view else None
    if isinstance(window, str):
        console.print(f"no window: {window}")
        window = None
    is_live = console.is_terminal and not settings.interactive
    display: Display = LiveTable(console) if is_live else PlainLines(console)
    runs = []
    try:
        for sentence, left in _goals(settings, children):
            targets = _meaning(recorder.window(spec), sentence)
            try:
                run = recorder.set_goal(sentence)
            except VirstError as error:
                children.check()
                if not settings.interactive:
                    raise
                console.print(f"[red]{error}[/red]")
                continue
            run.target_ids = targets
            runs.append(run)
            console.print(f"[bold]{sentence}[/bold]", highlight=False)
            _watch(recorder, children, run, left, display, window)
    except KeyboardInterrupt:
        console.print("stopped")
        if not runs:
            raise
    finally:
        display.close()
        if window is not None:
            window.close()
    return runs


def _goals(settings: DemoSettings, children: ChildProcesses) -> Iterator[tuple[str, Callable[[float], float]]]:
    """Each goal with a function of its elapsed seconds: how many are left."""
    if settings.interactive:
        yield from _typed_goals(settings, children)
        return
    each_s = settings.seconds / len(settings.goals)
    for sentence in settings.goals:
        yield sentence, lambda elapsed_s: each_s - elapsed_s


def _typed_goals(settings: DemoSettings, children: ChildProcesses) -> Iterator[tuple[str, Callable[[float], float]]]:
    """The goals of the command line, then the typed ones; each lasts until the next line, TYPED_GOAL_S at least."""
    typed: queue.SimpleQueue[str] = queue.SimpleQueue()  # an empty sentence is the end
    for sentence in settings.goals:
        typed.put(sentence)

    def read() -> None:
        try:
            for line in sys.stdin:
                typed.put(line.strip())
        finally:
            typed.put("")

    def left_s(elapsed_s: float) -> float:
        return math.nan if typed.empty() else TYPED_GOAL_S - elapsed_s

    threading.Thread(target=read, daemon=True).start()
    console.print("Type a goal and press Enter; an empty line or Ctrl-D ends the demo.")
    while sentence := _next_typed(typed, children):
        yield sentence, left_s


def _next_typed(typed: "queue.SimpleQueue[str]", children: ChildProcesses) -> str:
    """Wait for the next line. Raises ChildFailed when a process ends meanwhile."""
    while True:
        children.check()
        with suppress(queue.Empty):
            return typed.get(timeout=0.2)


def _watch(
    recorder: Any, children: ChildProcesses, run: Any, left: Callable[[float], float], display: Any, window: Any
) -> None:
    """Show one goal for as long as `left` says. Raises ChildFailed when a process ends meanwhile."""
    from virst_ros.demo.display import Shown

    begin_s = time.monotonic()
    while not (left_s := left(time.monotonic() - begin_s)) <= 0:
        children.check()
        moment = recorder.moment()
        display.show(
            Shown(
                run.sentence,
                left_s,
                moment.images,
                moment.masks,
                moment.age_ms,
                moment.state.name,
                moment.score,
                moment.reasoner_latency_s,
                moment.message,
            )
        )
        if window is not None:
            window.show(run, run.frames[-1] if run.frames else None)
        time.sleep(0.1 if window is None else 0.04)


def _meaning(window: Any, sentence: str) -> tuple[int, ...] | None:
    """What the sentence means on the simulated table now; None when its grammar has no such sentence."""
    from virst_engine.sim.expressions import find_meaning

    if window is None:
        return None
    found = find_meaning(window, sentence, query_frame=len(window) - 1)
    return None if found is None else found.target_ids


def _report(runs: list[Any], settings: DemoSettings, camera: str) -> dict[str, Any]:
    from virst_engine.evaluate.provenance import device_description, versions
    from virst_ros.demo.report import summary, table, write_picture, write_video

    with console.status("scoring masks, drawing video and picture"):
        result = {
            **summary(runs),
            "camera": camera,
            "rate_hz": settings.rate_hz,
            "versions": versions(),
            "device": device_description(),
            "command": " ".join(["./scripts/demo", *sys.argv[1:]]),
        }
        written = [
            path
            for path, write in (
                (settings.out / "demo.mp4", write_video),
                (settings.out / "demo.png", write_picture),
            )
            if write(path, runs)
        ]
    console.print(table(result))
    age = result["age_ms"]
    if age is not None:
        console.print(
            f"{result['fps_out']:.1f} masks/s from {result['fps_in']:.1f} images/s, frame age p50/p95/p99"
            f" {age['p50']:.0f}/{age['p95']:.0f}/{age['p99']:.0f} ms, camera {camera}",
            highlight=False,
        )
    console.print("wrote " + ", ".join(map(_as_typed, [*written, settings.out / "logs"])), highlight=False)
    return result


def _called_from() -> Path:
    return Path(os.environ.get(CALLED_FROM) or Path.cwd())


def _as_typed(path: Path) -> str:
    """A path as one would type it in the folder where the demo was called."""
    return str(path.relative_to(_called_from()) if path.is_relative_to(_called_from()) else path)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does, so that no child is left behind."""

    def stop(number: int, _: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    earlier = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(min=1, help="Length of the run, shared by the goals.")] = 40.0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    goal: Annotated[list[str] | None, typer.Option(help="A sentence of your own; may be given several times.")] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="Type goals while it runs.")] = False,
    view: Annotated[bool, typer.Option("--view", help="Show a window, if there is a display.")] = False,
    recorded: Annotated[
        bool, typer.Option("--recorded", help="Play the recorded run in place of the simulator.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="For video, picture and logs; default: out/ of the repository."),
    ] = None,
    weights: Annotated[str, typer.Option(help="safetensors file; empty = the shipped one.")] = "",
    rate: Annotated[float, typer.Option(min=1, max=60, help="Frames per second of the camera.")] = 20.0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log of what happens inside.")] = False,
) -> None:
    """Say it in a sentence, get its mask, live: a simulated robot camera, a reasoner and a segmenter over ROS 2."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    goals = tuple(goal or (() if interactive else DEMO_GOALS))
    folder = _called_from() / out if out is not None else Path.cwd() / "out"
    weights = str(_called_from() / weights) if weights else ""
    settings = DemoSettings(seconds, goals, interactive, view, recorded, folder, weights, rate)
    with _ended_by_signals():
        try:
            result = run_demo(settings)
        except VirstError as error:
            typer.echo(f"demo: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
    if json_file is not None:
        json_file = _called_from() / json_file
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Console entry point."""
    app()
