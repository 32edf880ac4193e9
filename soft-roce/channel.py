# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions with a lab host's agent (vm/agent), each over a virtio-serial port of its own.

A port is a unix socket of the host's QEMU. Each line is a JSON message. The lab's side sends

    {"request": "run", "id", "argv", "env", "cwd", "tty": null or [rows, columns]}
    {"request": "connect", "id", "path"}         connects to a unix socket on the host
    {"request": "time", "id"}                    asks for the host's clock, in ns
    {"request": "shift-time", "id", "by"}        sets that clock forward, by ns
    {"in": base64}        input; an empty one is its end
    {"signal": number}    to the command's process group
    {"size": [rows, columns]}

and the agent answers {"id", "pid"} or {"id", "error", "errno"}, then {"out": base64}, {"err":
base64} in their order and {"exit": code} (minus the number of the signal that killed the command).
Messages on the port before the answer with the request's id belong to an earlier session, and are
skipped."""

import base64
import fcntl
import json
import os
import socket
import threading
import time

PORTS = 24  # of each host, which limits its concurrent sessions
CHUNK = 32768


class LabError(Exception):
    """A fault of the lab or of a request. The text is for the user of the lab."""


class HostGone(LabError):
    """The host's QEMU has ended."""


def encode(data):
    return base64.b64encode(data).decode()


class Port:
    """A free port of a host, locked until it is closed or this process ends."""

    def __init__(self, directory, host, seconds):
        self.host = host
        self.buffer = b""
        self.lock = self._lock_free_port(directory)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.settimeout(seconds)
            self.socket.connect(os.path.join(directory, f"{host}.{self.number}"))
        except OSError as error:
            self.close()
            raise HostGone(
                f"host {host} cannot be reached ({error.strerror}): is the lab up?"
            ) from None

    def _lock_free_port(self, directory):
        for self.number in range(1, PORTS + 1):
            path = os.path.join(directory, f"{self.host}.{self.number}.lock")
            try:
                lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                raise LabError(f"there is no lab in {directory}: start it with 'lab up'") from None
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError:
                os.close(lock)
        raise LabError(f"host {self.host} runs {PORTS} commands already; end some of them")

    def send(self, **message):
        try:
            self.socket.sendall(b"\n" + json.dumps(message).encode() + b"\n")
        except OSError:
            raise HostGone(f"host {self.host} has ended") from None

    def receive(self):
        """The next message."""
        while True:
            while b"\n" not in self.buffer:
                try:
                    data = self.socket.recv(CHUNK)
                except TimeoutError:
                    raise
                except OSError:
                    data = b""
                if not data:
                    raise HostGone(f"host {self.host} has ended")
                self.buffer += data
            line, self.buffer = self.buffer.split(b"\n", 1)
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if isinstance(message, dict):
                return message

    def ask(self, request, seconds, **arguments):
        """Sends a request and returns the answer that carries its id."""
        tag = os.urandom(8).hex()
        deadline = time.monotonic() + seconds
        try:
            self.send(request=request, id=tag, **arguments)
            while True:
                self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
                answer = self.receive()
                if answer.get("id") == tag:
                    self.socket.settimeout(None)
                    return answer
        except TimeoutError:
            raise LabError(f"host {self.host} does not answer within {seconds} s") from None

    def hang_up(self):
        """Ends the session. A thread that waits in receive() gets HostGone."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self):
        self.socket.close()
        os.close(self.lock)


class Process:
    """A command on a host. close() and the end of this process kill it."""

    def __init__(self, port, argv, env=None, cwd="/", tty=None, out=None, err=None, seconds=30):
        """out, err: called with each piece of output, from a thread. Without them, use output()."""
        self.name = os.path.basename(argv[0])
        self.host = port.host
        self._port = port
        self._lock = threading.Lock()  # protects _outputs
        self._outputs = {"out": bytearray(), "err": bytearray(), "both": bytearray()}
        self._sinks = {"out": out, "err": err}
        self._code = None  # the exit code; set before _ended
        self._gone = None  # HostGone if the host ended first; set before _ended
        self._ended = threading.Event()
        answer = port.ask("run", seconds, argv=list(argv), env=env or {}, cwd=cwd, tty=tty)
        if "error" in answer:
            port.close()
            raise LabError(f"{argv[0]} on host {port.host}: {answer['error']}")
        self.pid = answer["pid"]
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        try:
            while self._code is None:
                message = self._port.receive()
                self._code = message.get("exit")
                for name in ("out", "err"):
                    if name in message:
                        self._add_output(name, base64.b64decode(message[name]))
        except HostGone as gone:
            self._gone = gone
        finally:
            self._port.close()
            self._ended.set()

    def _add_output(self, name, data):
        if self._sinks[name]:
            self._sinks[name](data)
            return
        with self._lock:
            self._outputs[name] += data
            self._outputs["both"] += data

    def write(self, data):
        """Writes input for the command. Empty data ends the input."""
        for start in range(0, max(len(data), 1), CHUNK):
            self._send(**{"in": encode(data[start : start + CHUNK])})

    def signal(self, number):
        """Sends a signal to the command's process group."""
        self._send(signal=int(number))

    def resize(self, rows, columns):
        self._send(size=[rows, columns])

    def _send(self, **message):
        if self._ended.is_set():
            return
        try:
            self._port.send(**message)
        except HostGone:
            pass  # _read() reports it

    def alive(self):
        return not self._ended.is_set()

    def exit_code(self):
        """None while the command runs; then its exit code, as in subprocess."""
        return self._code if self._ended.is_set() else None

    def wait(self, seconds=10):
        if not self._ended.wait(seconds):
            raise LabError(
                f"{self.name} on host {self.host} (pid {self.pid}) still runs after {seconds} s"
            )
        if self._gone:
            raise self._gone
        return self._code

    def stop(self, seconds=5):
        """Sends SIGTERM, and SIGKILL after a while."""
        self.signal(15)
        if not self._ended.wait(seconds):
            self.kill()

    def kill(self):
        self.signal(9)
        if not self._ended.wait(10):
            self.close()

    def close(self):
        """Closes the session. The agent kills the command if it still runs."""
        if self.alive():
            self._port.hang_up()
        self._reader.join()

    def output(self, name="both"):
        """The output so far: "out", "err", or "both" in their order."""
        with self._lock:
            return self._outputs[name].decode(errors="replace")


class Connection:
    """A connection to a unix socket on the host, forwarded to the lab's side as .socket."""

    def __init__(self, port, path, seconds=30):
        answer = port.ask("connect", seconds, path=path)
        if "error" in answer:
            port.close()
            raise OSError(answer["errno"], answer["error"], f"{port.host}:{path}")
        self.socket, self._inner = socket.socketpair()
        self._port = port
        for pump in (self._from_host, self._to_host):
            threading.Thread(target=pump, daemon=True).start()

    def _from_host(self):
        try:
            while "exit" not in (message := self._port.receive()):
                self._inner.sendall(base64.b64decode(message.get("out", "")))
        except (HostGone, OSError):
            pass
        self._port.close()
        self._inner.shutdown(socket.SHUT_RDWR)

    def _to_host(self):
        try:
            while data := self._inner.recv(CHUNK):
                self._port.send(**{"in": encode(data)})
        except (HostGone, OSError):
            pass
        self._port.hang_up()
