# SPDX-License-Identifier: GPL-2.0-or-later
"""A QMP client, for QEMU's monitor and Postroad's."""

import json
import socket
import time

from .process import LONG, Failure, wait_for


class QmpError(Failure):
    """The server answered with an error."""


class Qmp:
    def __init__(self, path, seconds=LONG):
        self.path = path
        self.events = []  # all since the connection was made
        self.buffer = b""
        self.socket = wait_for(f"monitor {path} accepts connections", seconds, self._connect)
        self._receive(seconds, lambda message: "QMP" in message)
        self.command("qmp_capabilities")

    def _connect(self):
        candidate = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            candidate.connect(self.path)
        except OSError:
            candidate.close()
            return None
        return candidate

    def _line(self, deadline):
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.socket.settimeout(left)
            self.buffer += self._read()
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def _read(self):
        try:
            data = self.socket.recv(65536)
        except ConnectionError as error:
            raise Failure(f"monitor {self.path}: {error}; its process has ended") from None
        if not data:
            raise Failure(f"monitor {self.path}: closed; its process has ended")
        return data

    def _receive(self, seconds, wanted):
        deadline = time.monotonic() + seconds
        while True:
            try:
                message = self._line(deadline)
            except (TimeoutError, socket.timeout):
                return None
            if wanted(message):
                return message
            if "event" in message:
                self.events.append(message)

    def send(self, name, **arguments):
        request = {"execute": name}
        if arguments:
            request["arguments"] = arguments
        self.socket.sendall(json.dumps(request).encode() + b"\n")

    def answer(self, seconds):
        """Returns the answer to what was sent, or None if there is none within that time."""
        return self._receive(seconds, lambda message: "return" in message or "error" in message)

    def command(self, name, /, **arguments):
        self.send(name, **arguments)
        message = self.answer(LONG)
        if message is None:
            raise Failure(f"monitor {self.path}: no answer to {name}")
        if "error" in message:
            raise QmpError(message["error"].get("desc", "no description"))
        return message["return"]

    def pass_descriptor(self, name, fd):
        """Gives QEMU a file descriptor under a name (getfd)."""
        request = json.dumps({"execute": "getfd", "arguments": {"fdname": name}})
        socket.send_fds(self.socket, [request.encode() + b"\n"], [fd])
        message = self.answer(LONG)
        if message is None or "error" in message:
            raise QmpError(f"monitor {self.path}: getfd was answered with {message}")

    def drain_events(self):
        """Returns all events that have arrived so far."""
        self._receive(0.05, lambda message: False)
        return self.events

    def close(self):
        self.socket.close()
