# SPDX-License-Identifier: Apache-2.0
"""Addresses, keys and bounded reception: what all ends of the ZeroMQ border share.

`ipc://PATH` is the default: a Unix socket that only its owner may open. Everybody may write to /tmp, so on a machine
with several users choose a path in a folder of your own, for example under $XDG_RUNTIME_DIR. `tcp://` is encrypted and
authenticated with CURVE keys, always: a peer without a known key is not heard at all.

A folder of keys holds pairs, NAME.key (public) and NAME.key_secret. `server` is the pair of whoever binds an address,
`reasoner` that of the reasoners that join a pool, `client` that of the robots. Who binds admits the public keys in its
folder, by their names: reasoner.key and reasoner-*.key to a pool's reasoners, all others to the robots.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from virst_engine.errors import EndpointError
from virst_engine.slow.wire import MAX_PARTS, MAX_TENSOR_BYTES

logger = logging.getLogger(__name__)

LONGEST_IPC_PATH = 107  # bytes, sockaddr_un.sun_path without its final zero
REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
ASK_AGAIN_S = 2.0  # after a refusal
HANDSHAKE_MS = 5000  # who has not proved its key by then is cut off
# A cable that is pulled sends no farewell. A pong waits behind a large request on a slow link, hence not less.
PING_MS, PONG_MS = 1000, 30_000


class Role(Enum):
    """What somebody may be to the process that binds; the value is the name of its key pair."""

    ROBOT = "client"
    REASONER = "reasoner"


def check_endpoint(endpoint: str, curve_keys: str) -> str:
    """The folder of keys to use for it: `curve_keys` for tcp://, none for ipc://, which its file protects.

    Raises EndpointError unless `endpoint` is ipc:// with a path, or tcp:// with a folder of CURVE keys.
    """
    transport, _, address = endpoint.partition("://")
    if transport == "ipc" and address.startswith("/"):
        if len(os.fsencode(address)) > LONGEST_IPC_PATH:
            raise EndpointError(f"{endpoint}: the path is longer than {LONGEST_IPC_PATH} bytes; choose a shorter one")
    elif transport == "tcp" and address:
        if not curve_keys:
            raise EndpointError(
                f"{endpoint}: tcp:// needs CURVE keys; make them with `virst-reasoner --make-curve-keys FOLDER`, copy "
                "to each machine what it needs (docs/security.md) and set --curve-keys and reasoner.curve_keys, or use "
                "ipc://"
            )
    else:
        raise EndpointError(f"{endpoint}: an address is ipc:///absolute/path or tcp://host:port")
    return curve_keys if transport == "tcp" else ""


def make_curve_keys(folder: Path) -> None:
    """Write the key pairs `server`, `client` and `reasoner` into a new or empty folder."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise EndpointError(f"{folder} is not empty; give a new folder, keys are never overwritten")
        for name in ("server", *(role.value for role in Role)):
            _make_pair(folder, name)
    except OSError as error:
        raise EndpointError(f"cannot write keys to {folder}: {error}; choose another folder") from error


def add_robot_keys(folder: Path, name: str) -> Path:
    """Make a key for one more robot: public in `folder`/NAME.key, and all that the robot needs in the folder returned.

    To shut that robot out again, delete NAME.key and restart the process that binds.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name) or _role_of(name) is not Role.ROBOT:
        raise EndpointError(
            f"{name[:80]!a} cannot name a robot: letters, digits, '_', '.', '-' can, 'server' and 'reasoner...' cannot"
        )
    _key(folder / "server.key")  # first: without it the new key is of no use
    of_robot, public = folder / name, folder / f"{name}.key"
    try:
        if public.exists():
            raise EndpointError(f"{public} exists; choose another name, keys are never overwritten")
        of_robot.mkdir(mode=0o700)
        _make_pair(of_robot, Role.ROBOT.value)
        shutil.copyfile(folder / "server.key", of_robot / "server.key")
        shutil.copyfile(of_robot / f"{Role.ROBOT.value}.key", public)
    except OSError as error:
        raise EndpointError(f"cannot write keys to {of_robot}: {error}; choose another name or folder") from error
    return of_robot


def use_own_keys(socket: zmq.Socket[bytes], curve_keys: str, role: Role) -> None:
    """Make `socket` speak CURVE with the folder's key pair of `role`, to the server of server.key."""
    socket.curve_publickey, socket.curve_secretkey = _key_pair(Path(curve_keys) / f"{role.value}.key_secret")
    socket.curve_serverkey, _ = _key(Path(curve_keys) / "server.key")


def use_server_keys(socket: zmq.Socket[bytes], curve_keys: str, role: Role) -> None:
    """Make `socket` accept only peers that `authenticate` admits to `role`, with the folder's server.key_secret."""
    socket.curve_publickey, socket.curve_secretkey = _key_pair(Path(curve_keys) / "server.key_secret")
    socket.curve_server = True
    socket.zap_domain = role.value.encode()
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody comes in when the authenticator is not there
    if not _admitted(Path(curve_keys), role):
        raise EndpointError(
            f"{curve_keys} holds no public key of a {role.name.lower()}, so nobody could connect; "
            "see virst-reasoner --make-curve-keys"
        )


@contextmanager
def authenticate(context: zmq.Context[zmq.Socket[bytes]], curve_keys: str) -> Iterator[None]:
    """Decide who may talk to the sockets of `context`, meanwhile. They must be closed before this ends.

    The folder is read for each new connection: a key that was added is good at once.
    """
    authenticator = ThreadAuthenticator(context, log=logging.getLogger("zmq.auth"))
    for role in Role:
        authenticator.configure_curve_callback(role.value, _Gate(Path(curve_keys), role))
    authenticator.start()
    try:
        yield
    finally:
        authenticator.stop()


class _Gate:
    """pyzmq's credentials provider."""

    def __init__(self, folder: Path, role: Role) -> None:
        self._folder, self._role = folder, role

    def callback(self, domain: str, key: bytes) -> bool:
        """Must not raise: that would end the thread of the authenticator, and nobody could connect any more."""
        name = _admitted(self._folder, self._role).get(key)
        if name is not None:
            logger.info("admitted a %s with the key %s.key", self._role.name.lower(), name)
        return name is not None


def _admitted(folder: Path, role: Role) -> dict[bytes, str]:
    """Public key -> its name."""
    admitted = {}
    for path in folder.glob("*.key"):
        if _role_of(path.stem) is role:
            try:
                admitted[_key(path)[0]] = path.stem
            except EndpointError as error:  # not a key, or out of file descriptors
                logger.warning("a key was left out: %s", error)
    return admitted


def _role_of(name: str) -> Role | None:
    if name == "server":
        return None
    return Role.REASONER if name == Role.REASONER.value or name.startswith("reasoner-") else Role.ROBOT


def _make_pair(folder: Path, name: str) -> None:
    earlier = os.umask(0o077)
    try:
        zmq.auth.create_certificates(folder, name)
    finally:
        os.umask(earlier)


def bound_memory(socket: zmq.Socket[bytes], messages: int) -> None:
    """Cap what ZeroMQ itself buffers: parts larger than any tensor end the connection, queues hold `messages`."""
    socket.maxmsgsize = MAX_TENSOR_BYTES
    socket.sndhwm = socket.rcvhwm = messages
    socket.linger = 0


class Connection:
    """Connects a socket, tells what becomes of it, and tries again where ZeroMQ does not: after a refusal.

    Raises EndpointError for an address that ZeroMQ cannot read.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], endpoint: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._socket, self._endpoint, self._clock = socket, endpoint, clock
        self._again_s: float | None = None
        socket.immediate = True  # no queue for a peer that is not there: it would get outdated messages
        socket.reconnect_ivl, socket.reconnect_ivl_max = 100, 1000
        if endpoint.startswith("tcp:"):  # notice that the other machine is gone, and let it notice that this one is
            socket.heartbeat_ivl, socket.heartbeat_timeout, socket.heartbeat_ttl = PING_MS, PONG_MS, PONG_MS
        self._events = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | REFUSED)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise EndpointError(f"{endpoint} is no address: {error}; set another one") from error

    def events(self) -> Iterator[int]:
        """What has happened since the last call: EVENT_HANDSHAKE_SUCCEEDED, EVENT_DISCONNECTED, or one of REFUSED."""
        while self._events.poll(0):
            event: int = parse_monitor_message(self._events.recv_multipart())["event"]
            if event & REFUSED:
                self._again_s = self._clock() + ASK_AGAIN_S
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._again_s = None
            yield event
        if self._again_s is not None and self._clock() >= self._again_s:  # our key may be known by now
            self._again_s = None
            with contextlib.suppress(zmq.ZMQError):  # ZeroMQ may have let go of it already
                self._socket.disconnect(self._endpoint)
            self._socket.connect(self._endpoint)

    def close(self) -> None:
        """Stop telling; the socket stays open."""
        self._socket.disable_monitor()
        self._events.close()


def receive(socket: zmq.Socket[bytes], envelope: int = 0) -> list[memoryview]:
    """The parts of the next message, without copying; one more than any valid message has where it has too many.

    Raises:
        zmq.Again: no message is there.
    """
    parts: list[memoryview] = []
    while True:
        frame = socket.recv(zmq.NOBLOCK, copy=False)
        if len(parts) <= envelope + MAX_PARTS:
            parts.append(frame.buffer)
        if not frame.more:
            return parts


@contextmanager
def sole_owner(endpoint: str) -> Iterator[None]:
    """Hold the right to bind `endpoint`; EndpointError when another process has it.

    ZeroMQ replaces the file of an ipc address without asking, even that of a running reasoner. So a lock decides: the
    kernel frees it when its holder dies, however it dies, and a socket file without a holder is stale.
    """
    transport, _, address = endpoint.partition("://")
    if transport != "ipc":  # binding a taken tcp port fails by itself
        yield
        return
    lock = _lock(Path(f"{address}.lock"), endpoint)
    try:
        _remove_socket(Path(address))  # of a holder that was killed
        yield
        _remove_socket(Path(address))  # ZeroMQ leaves it
    finally:
        os.close(lock)  # the file stays: removing it would let two processes lock different files of that name


def bind(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Bind; an ipc socket is made for its owner only. EndpointError when the address cannot be bound."""
    transport, _, address = endpoint.partition("://")
    socket.handshake_ivl = HANDSHAKE_MS
    earlier = os.umask(0o177)
    try:
        socket.bind(endpoint)
        if transport == "ipc":
            Path(address).chmod(0o600)
    except (zmq.ZMQError, OSError) as error:
        if error.errno == errno.EADDRINUSE:
            raise EndpointError(f"{endpoint} is in use; stop the process that has it or choose another one") from error
        raise EndpointError(f"{endpoint} cannot be bound: {error}; choose another address") from error
    finally:
        os.umask(earlier)


def _lock(path: Path, endpoint: str) -> int:
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileNotFoundError as error:
        raise EndpointError(f"{endpoint}: there is no folder {path.parent}; make it or choose another path") from error
    except OSError as error:
        raise EndpointError(f"{endpoint}: cannot open {path} ({error.strerror}); choose a path of your own") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise EndpointError(
            f"{endpoint} is served already, by process {holder}; stop it or choose another endpoint"
        ) from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _remove_socket(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise EndpointError(f"{path} exists and is not a socket; it was left alone, choose another endpoint")
        path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise EndpointError(
            f"the old socket {path} cannot be removed: {error.strerror}; choose another path"
        ) from error


def _key(path: Path) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise EndpointError(
            f"no usable CURVE key in {path}: {error}; see `virst-reasoner --make-curve-keys`"
        ) from error


def _key_pair(path: Path) -> tuple[bytes, bytes]:
    public, secret = _key(path)
    if secret is None:
        raise EndpointError(f"{path} holds no secret key; see virst-reasoner --make-curve-keys")
    return public, secret
