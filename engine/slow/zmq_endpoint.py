# SPDX-License-Identifier: Apache-2.0
"""Addresses, keys and bounded reception: what both ends of the ZeroMQ border share.

`ipc://PATH` is the default: a Unix socket that only its owner may open. Everybody may write to /tmp, so on a machine
with several users choose a path in a folder of your own, for example under $XDG_RUNTIME_DIR. `tcp://` is encrypted and
authenticated with CURVE keys, always: a peer without a known key is not heard at all.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq
import zmq.auth

from virst_engine.errors import EndpointError
from virst_engine.slow.wire import MAX_PARTS, MAX_TENSOR_BYTES

LONGEST_IPC_PATH = 107  # bytes, sockaddr_un.sun_path without its final zero


def check_endpoint(endpoint: str, curve_keys: str) -> None:
    """Raise EndpointError unless `endpoint` is ipc:// with a path, or tcp:// with a folder of CURVE keys."""
    transport, _, address = endpoint.partition("://")
    if transport == "ipc" and address.startswith("/"):
        if len(os.fsencode(address)) > LONGEST_IPC_PATH:
            raise EndpointError(f"{endpoint}: the path is longer than {LONGEST_IPC_PATH} bytes; choose a shorter one")
    elif transport == "tcp" and address:
        if not curve_keys:
            raise EndpointError(
                f"{endpoint}: tcp:// needs CURVE keys; make them with `virst-reasoner --make-curve-keys FOLDER`, copy "
                "the folder to both machines and set --curve-keys and reasoner.curve_keys, or use ipc://"
            )
    else:
        raise EndpointError(f"{endpoint}: an address is ipc:///absolute/path or tcp://host:port")


def make_curve_keys(folder: Path) -> None:
    """Write the key pairs `server` and `client` (*.key public, *.key_secret private) into a new or empty folder."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise EndpointError(f"{folder} is not empty; give a new folder, keys are never overwritten")
        for name in ("server", "client"):
            zmq.auth.create_certificates(folder, name)
            (folder / f"{name}.key_secret").chmod(0o600)
    except OSError as error:
        raise EndpointError(f"cannot write keys to {folder}: {error}; choose another folder") from error


def use_client_keys(socket: zmq.Socket[bytes], curve_keys: str) -> None:
    """Make `socket` speak CURVE with the folder's client.key_secret, to the server of server.key."""
    socket.curve_publickey, socket.curve_secretkey = _key_pair(Path(curve_keys) / "client.key_secret")
    socket.curve_serverkey, _ = _key(Path(curve_keys) / "server.key")


def use_server_keys(socket: zmq.Socket[bytes], curve_keys: str) -> None:
    """Make `socket` accept CURVE only, with the folder's server.key_secret."""
    socket.curve_publickey, socket.curve_secretkey = _key_pair(Path(curve_keys) / "server.key_secret")
    socket.curve_server = True


def bound_memory(socket: zmq.Socket[bytes], messages: int) -> None:
    """Cap what ZeroMQ itself buffers: parts larger than any tensor end the connection, queues hold `messages`."""
    socket.maxmsgsize = MAX_TENSOR_BYTES
    socket.sndhwm = socket.rcvhwm = messages
    socket.linger = 0


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
