"""Hostile programs that call out: none reaches a socket, in any form of the sandbox."""

import contextlib
import os
import socket
import uuid

from tests.sandbox_tools import TRY_CALLS, linux_only

pytest_plugins = ["tests.sandbox_fixtures"]
pytestmark = linux_only

CALL = """
import socket
def tcp():
    with socket.create_connection(("127.0.0.1", {port}), 1) as s: s.send(b"tcp")
def udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendto(b"udp", ("127.0.0.1", {port}))
def unix():
    with socket.socket(socket.AF_UNIX) as s: s.connect({path!r})
def abstract():
    with socket.socket(socket.AF_UNIX) as s: s.connect("\\0" + {name!r})
def pair():
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    a.sendto(b"pair", {path!r} + ".d")
def listen():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); s.listen()
calls = dict(tcp=tcp, udp=udp, unix=unix, abstract=abstract, pair=pair, listen=listen)
"""


def listening_sockets(stack, path, name):
    """({kind: socket}, port): what the attack above tries to reach."""
    kinds = {
        "tcp": (socket.AF_INET, socket.SOCK_STREAM),
        "udp": (socket.AF_INET, socket.SOCK_DGRAM),
        "unix": (socket.AF_UNIX, socket.SOCK_STREAM),
        "abstract": (socket.AF_UNIX, socket.SOCK_STREAM),
        "pair": (socket.AF_UNIX, socket.SOCK_DGRAM),
    }
    sockets = {}
    for kind, arguments in kinds.items():
        sockets[kind] = stack.enter_context(socket.socket(*arguments))
    sockets["tcp"].bind(("127.0.0.1", 0))
    port = sockets["tcp"].getsockname()[1]
    sockets["udp"].bind(("127.0.0.1", port))
    sockets["unix"].bind(path)
    sockets["abstract"].bind("\0" + name)
    sockets["pair"].bind(path + ".d")
    os.chmod(path, 0o777)
    os.chmod(path + ".d", 0o777)
    for kind, each in sockets.items():
        each.settimeout(0.05)
        if kind in ("tcp", "unix", "abstract"):
            each.listen()
    return sockets, port


def reached(sockets):
    """How many of them something came to."""
    count = 0
    for each in sockets.values():
        with contextlib.suppress(TimeoutError):
            if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                each.accept()[0].close()
            else:
                each.recv(10)
            count += 1
    return count


def test_sockets(jail, open_folder):
    path, name = str(open_folder / "s"), uuid.uuid4().hex
    with contextlib.ExitStack() as stack:
        sockets, port = listening_sockets(stack, path, name)
        calls = CALL.format(port=port, path=path, name=name) + TRY_CALLS
        assert len(jail.result_outside(calls)) == 6 and reached(sockets) == 5
        jail.needs("the network, signals")
        assert jail.result(calls) == [] and reached(sockets) == 0
