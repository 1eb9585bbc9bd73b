# SPDX-License-Identifier: Apache-2.0
"""The program `virst-goal`: set, clear and list a segmenter's goals, and ask, from a shell, also without `ros2`."""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from virst_engine.errors import VirstError
from virst_engine.types import ObjectState


class NoAnswer(VirstError):
    """No segmenter has answered; the message says what to look at."""


class Refused(VirstError):
    """The segmenter has said no; the message is its own."""


class SegmenterServices:
    """The services of one segmenter, called one at a time and waited for.

    Args:
        node: an rclpy node that nobody spins.
        segmenter: the segmenter's full name, for example /robot/segmenter.
        timeout_s: how long a call waits, first for the service and then for the answer.
    """

    def __init__(self, node: Any, segmenter: str, timeout_s: float) -> None:
        self._node, self._segmenter, self._timeout_s = node, f"/{segmenter.strip('/')}", timeout_s

    def set_goal(
        self, sentence: str, *, object_id: str = "", camera: str = "", replace: bool = False, max_instances: int = 0
    ) -> Any:
        """The response of set_goal. Raises NoAnswer and Refused."""
        from virst_msgs.srv import SetGoal

        request = SetGoal.Request(
            goal=sentence, object_id=object_id, camera=camera, replace=replace, max_instances=max_instances
        )
        return self._accepted(self._call(SetGoal, "set_goal", request))

    def ask(self, question: str, *, camera: str = "") -> str:
        """The answer in words. Raises NoAnswer and Refused."""
        from virst_msgs.srv import Ask

        request = Ask.Request(question=question, camera=camera)
        return str(self._accepted(self._call(Ask, "ask", request)).answer)

    def clear_goal(self, goal_id: str) -> Any:
        """The response of clear_goal; an empty id means all. Raises NoAnswer and Refused."""
        from virst_msgs.srv import ClearGoal

        return self._accepted(self._call(ClearGoal, "clear_goal", ClearGoal.Request(goal_id=goal_id)))

    def goals(self) -> list[Any]:
        """The goals that are set (virst_msgs/Goal). Raises NoAnswer."""
        from virst_msgs.srv import ListGoals

        return list(self._call(ListGoals, "list_goals", ListGoals.Request()).goals)

    def _call(self, kind: type, service: str, request: Any) -> Any:
        from rclpy.executors import SingleThreadedExecutor

        name = f"{self._segmenter}/{service}"
        client = self._node.create_client(kind, name)
        executor = SingleThreadedExecutor(context=self._node.context)
        executor.add_node(self._node)
        try:
            if not client.wait_for_service(self._timeout_s):
                raise NoAnswer(self._why_absent(name))
            future = client.call_async(request)
            executor.spin_until_future_complete(future, self._timeout_s)
            if not future.done():
                raise NoAnswer(
                    f"{name} has not answered within {self._timeout_s:g} s: the segmenter is loading its model or "
                    "hangs; see /diagnostics, or wait longer with --timeout"
                )
            return future.result()
        finally:
            executor.shutdown()
            self._node.destroy_client(client)

    def _why_absent(self, name: str) -> str:
        others = [
            service.rpartition("/")[0]
            for service, kinds in self._node.get_service_names_and_types()
            if "virst_msgs/srv/SetGoal" in kinds and not service.startswith(f"{self._segmenter}/")  # our own client
        ]
        domain = os.environ.get("ROS_DOMAIN_ID") or "0"
        text = f"nobody offers {name} in ROS domain {domain} (waited {self._timeout_s:g} s): "
        if others:
            return f"{text}name the segmenter with --node; there is {', '.join(sorted(others))}"
        return f"{text}start the segmenter, or set ROS_DOMAIN_ID as it is set there"

    @staticmethod
    def _accepted(response: Any) -> Any:
        if not response.success:
            raise Refused(response.message)
        return response


app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command()
def _command(
    sentence: Annotated[str, typer.Argument(help="What to segment, for example 'the red ball'.")] = "",
    clear: Annotated[str, typer.Option(metavar="ID", help="Clear the goal of this id.")] = "",
    clear_all: Annotated[bool, typer.Option("--all", help="Clear all goals.")] = False,
    list_goals: Annotated[bool, typer.Option("--list", help="List the goals: id, state, sentence.")] = False,
    question: Annotated[
        str,
        typer.Option("--ask", metavar="QUESTION", help="Answer in words, for example to 'the thing that can roll'."),
    ] = "",
    node: Annotated[str, typer.Option(help="Full name of the segmenter.")] = "/segmenter",
    object_id: Annotated[str, typer.Option(help="Your name for the object; empty = that of the goal.")] = "",
    camera: Annotated[
        str, typer.Option(help="Of a sentence or a question: the only camera that it is about; empty = any.")
    ] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Clear all other goals first.")] = False,
    instances: Annotated[
        int,
        typer.Option(
            min=0,
            max=254,
            help="Split the goal into at most so many single objects; 1 = one object; 0 = as goal.split_plurals says.",
        ),
    ] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait, for the segmenter and its answer.")] = 10.0,
) -> None:
    """Tell a running segmenter what to segment, or ask what it sees. Prints the id of the new goal, or the answer."""
    chosen = [bool(sentence.strip()), bool(clear), clear_all, list_goals, bool(question.strip())]
    if sum(chosen) != 1:
        raise typer.BadParameter("give one of: a sentence, --clear ID, --all, --list, --ask QUESTION")
    if (object_id or replace or instances) and not chosen[0]:
        raise typer.BadParameter("--object-id, --replace and --instances belong to a sentence")
    if camera and not (chosen[0] or chosen[4]):
        raise typer.BadParameter("--camera belongs to a sentence or a question")

    def act(segmenter: SegmenterServices) -> None:
        if list_goals:
            for goal in segmenter.goals():
                states = ", ".join(ObjectState(state).name for state in goal.states)
                typer.echo(f"{goal.goal_id}  {states}  {goal.goal}")
        elif clear or clear_all:
            typer.echo(segmenter.clear_goal(clear).message)
        elif chosen[4]:
            typer.echo(segmenter.ask(question, camera=camera))
        else:
            answer = segmenter.set_goal(
                sentence, object_id=object_id, camera=camera, replace=replace, max_instances=instances
            )
            typer.echo(answer.goal_id)

    try:
        _with_segmenter(act, node, timeout)
    except VirstError as error:
        typer.echo(f"virst-goal: {error}", err=True)
        raise typer.Exit(1) from error


def _with_segmenter(act: Callable[[SegmenterServices], None], name: str, timeout_s: float) -> None:
    try:
        import rclpy
        import virst_msgs.srv  # noqa: F401 - better here than in the middle
    except ImportError as error:
        raise VirstError(
            f"no ROS 2 with virst_msgs in this Python ({error}): source your workspace's install/setup.bash, or "
            "scripts/env of virst_ros"
        ) from error
    from rclpy.exceptions import InvalidServiceNameException

    rclpy.init(args=[])
    try:
        node = rclpy.create_node(f"virst_goal_{os.getpid()}", start_parameter_services=False)
        try:
            act(SegmenterServices(node, name, timeout_s))
        except InvalidServiceNameException as error:
            raise VirstError(f"--node {name!r} is no node's name: {' '.join(str(error).split())}") from error
        finally:
            node.destroy_node()
    finally:
        rclpy.try_shutdown()


def main() -> int:
    """Run the program; see --help."""
    app(prog_name="virst-goal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
