# SPDX-License-Identifier: GPL-2.0-or-later
"""Peers that must not get a connection to a destination: their epoch is over, or belongs to another
migration.

The test records the real source's HELLO on the network. It can then send that HELLO again when its
epoch is over, with the same migration and secret."""

import os
import struct

from move import PORT, expect, wait_for

# Prints, in hexadecimal, the first message that is sent to a port over a network device.
RECORDER = """
import socket, struct, sys
tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
tap.bind((sys.argv[1], 0))
print("listening", flush=True)
port, pieces, wanted = int(sys.argv[2]), {}, None
while True:
    packet = tap.recv(65536)
    if packet[12:14] != b"\\x08\\x00" or packet[23] != 6:
        continue
    segment = packet[14 + (packet[14] & 15) * 4 : 14 + struct.unpack_from(">H", packet, 16)[0]]
    source, destination, sequence = struct.unpack_from(">HHI", segment)
    data = segment[(segment[12] >> 4) * 4 :]
    if destination != port or not data:
        continue
    pieces[sequence] = data
    stream = b"".join(pieces[at] for at in sorted(pieces))
    if len(stream) >= 8 and len(stream) >= 8 + struct.unpack_from(">I", stream, 4)[0]:
        print(stream[: 8 + struct.unpack_from(">I", stream, 4)[0]].hex(), flush=True)
        break
"""

# Sends each message over a connection of its own. Prints the answer, until the peer closes.
HELLO_SENDER = """
import socket, sys
for message in sys.argv[3:]:
    peer = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
    peer.sendall(bytes.fromhex(message))
    peer.settimeout(20)
    said = b""
    try:
        while piece := peer.recv(4096):
            said += piece
    except ConnectionError:
        pass
    print(said.hex())
"""

HELLO, HELLO_ACK, REFUSED, RESUME_ASKED = 1, 2, 2, 1
UUID = slice(8 + 7, 8 + 7 + 16)  # of a HELLO: header, magic, version and role come before
EPOCH_AT = UUID.stop
RESUME_AT = EPOCH_AT + 8
REASON_AT = 8 + 4 + 2 + 4 + 8 + 2 + 40  # of a HELLO_ACK


class HelloRecorder:
    """Records on a host the next HELLO that is sent over a rail."""

    def __init__(self, host, rail):
        self.process = host.popen("python3", "-c", RECORDER, f"eth{rail}", str(PORT))
        wait_for("the recorder listens", 20, lambda: "listening" in self.process.output("out"))

    def hello(self):
        self.process.wait(20)
        hello = bytes.fromhex(self.process.output("out").split()[-1])
        kind, _, length = struct.unpack_from(">HHI", hello)
        expect(kind == HELLO and length == len(hello) - 8, f"recorded {hello[:16].hex()}…, which is no HELLO")
        return hello


def of_another_migration(hello):
    return hello[: UUID.start] + bytes(byte ^ 0xFF for byte in hello[UUID]) + hello[UUID.stop :]


def of_a_recovery(hello):
    """Returns a HELLO of the same epoch that resumes the migration."""
    return hello[:RESUME_AT] + bytes([RESUME_ASKED]) + hello[RESUME_AT + 1 :]


def epoch_of(hello):
    return struct.unpack_from(">Q", hello, EPOCH_AT)[0]


def send_hellos(host, address, *hellos):
    """Sends each HELLO to a destination. Returns the reasons of the refusals."""
    argv = ["python3", "-c", HELLO_SENDER, address, PORT, *(hello.hex() for hello in hellos)]
    answers = host.run(*argv, check=True).stdout.splitlines()
    return [reason_of(bytes.fromhex(answer)) for answer in answers]


def reason_of(answer):
    """Returns the reason that a HELLO_ACK has for a refusal."""
    kind, _, length = struct.unpack_from(">HHI", answer) if len(answer) >= 8 else (0, 0, 0)
    expect(kind == HELLO_ACK, f"the stranger got {answer[:64].hex()}, no HELLO_ACK")
    status = struct.unpack_from(">I", answer, 8 + 4 + 2)[0]
    reason = answer[REASON_AT + 2 : 8 + length].decode(errors="replace")
    expect(status == REFUSED, f"the stranger was not refused: status {status} {reason}")
    return reason


class StrangersQueuePair:
    """A peer that knows the address at which the destination listens for queue pairs, but no
    secret."""

    def __init__(self, host, build, uri, timeout_ms):
        self.process = host.popen(os.path.join(build, "tests", "roce", "rdma-pair"))
        self.process.write(f"begin source {uri}\nopen 1 {timeout_ms}\n".encode())

    def answers(self):
        return self.process.output("out").splitlines()[1:]

    def expect_refused(self, *words, seconds=40):
        answer = wait_for("the stranger's queue pair is refused", seconds, self.answers)[0]
        expect(answer.startswith("error "), f"the stranger's queue pair was admitted: {answer}")
        for word in words:
            expect(word in answer, f"the answer should contain {word!r}: {answer}")
        self.process.write(b"")
        self.process.wait(20)
        return answer
