# SPDX-License-Identifier: GPL-2.0-or-later
"""The setups that are disturbed: guests, engines, and the links between their hosts.

A setup has
  source, destination    the engines (harness.engine)
  lab, links             the links between their hosts
  uris()                 the paths, as `migrate` takes them
  pollers(engine)        the pollers of its monitor, one for each process of a restarted engine
  verify()               checks that the whole guest is right at the destination"""

import os
import re
import signal

from harness.engine import Engine
from harness.lab import Move
from harness.network import LINKS, run
from harness.process import expect, wait_for
from harness.vm import GuestSpec

from checks import Poller

HERE = os.path.dirname(os.path.abspath(__file__))
PORT, TCP_PORT = 4444, 4445
# Short timers: a lost path is noticed and probed again soon, so a minute has many recoveries.
SETTINGS = (
    "heartbeat-interval=20",
    "heartbeat-timeout=250",
    "probe-interval=100",
    "handshake-timeout=2000",
)
INCOMING = f"ofi:0.0.0.0:{PORT},tcp:0.0.0.0:{TCP_PORT}"
CLOSE_SECONDS = 20


def uri(host, link, scheme):
    return f"{scheme}:{host.address(link)}:{TCP_PORT if scheme == 'tcp' else PORT}"


class Links:
    """The links of harness.network."""

    def __init__(self, network):
        self.network = network

    def cut(self, link):
        self.network.link_down(link)

    def black_hole(self, link, sender=None):
        """sender: only the packets of this host are dropped."""
        self.network.black_hole(link, senders=sender and (sender,))

    def heal(self):
        """Restores all links."""
        for link in LINKS:
            for host in self.network.hosts:
                host.run("ip", "link", "set", f"link{link}", "up")
                host.run("ip", "neighbour", "flush", "dev", f"link{link}", "nud", "permanent")


class Workload:
    """The test guest, a process on a host."""

    def __init__(self, lab, host, name, size_mb, pace_us, seed, incoming):
        self.name = name
        self.socket = lab.path(f"{name}.agent")
        argv = [
            lab.build_file("workload"),
            "--socket",
            self.socket,
            "--size",
            f"{size_mb}M",
            "--threads",
            "2",
        ]
        argv += ["--pace", str(pace_us), "--seed", str(seed)]
        self.process = lab.start(name, host.command(argv + (["--incoming"] if incoming else [])))
        wait_for(f"{name} serves its socket", 20, lambda: os.path.exists(self.socket))

    def state(self):
        lines = re.findall(r"^(running|paused) verified=(\d+)", self.process.output(), re.M)
        return lines[-1] if lines else ("", "0")

    def wait_running(self):
        wait_for(
            f"{self.name} runs",
            30,
            lambda: self.state()[0] == "running" and int(self.state()[1]) > 0,
        )

    def verify(self):
        """Makes the guest check every page."""
        asked = len(re.findall(r"^(?:not )?verified", self.process.output(), re.M))
        os.kill(self.process.pid, signal.SIGUSR1)
        said = wait_for(
            f"{self.name} has checked all its pages",
            60,
            lambda: re.findall(r"^(?:not )?verified.*$", self.process.output(), re.M)[asked:],
        )[-1]
        expect(
            said == "verified all corrupt=0 now=0",
            f"{self.name}: {said}: {self.process.output()[-2000:]}",
        )


class Node:
    """The guest and the engine on one host of a chain."""

    def __init__(self, lab, host, number, options, tls, incoming):
        self.host = host
        self.guest = Workload(
            lab, host, f"guest-{number}", options.size, options.pace, seed=1, incoming=incoming
        )
        self.engine = Engine(
            lab,
            host,
            f"agent:{self.guest.socket}",
            INCOMING if incoming else None,
            name=f"postroad-{number}-{host.name}",
            settings=SETTINGS,
            tls=tls,
        )
        self.pollers = [Poller(lab, self.engine)]

    def end(self):
        """Ends the engine and its poller. The engine must not have failed."""
        self.engine.process.stop()
        code = self.engine.process.exit_code()
        expect(
            code in (0, -15),
            f"{self.engine.name} ended with {code}: {self.engine.process.output()[-2000:]}",
        )
        self.pollers[-1].process.stop()


class Chain:
    """A guest that migrates several times. Each engine is a destination once, then a source."""

    def __init__(self, lab, options, number, tls):
        self.lab = lab
        self.network, self.links = lab.network, Links(lab.network)
        self.options = options
        self.number = number
        self.nodes = []
        self.certs = make_certificates(lab, number) if tls else None
        self._add(self.network.source, incoming=False)

    def _add(self, host, incoming):
        number = f"{self.number}{chr(ord('a') + len(self.nodes))}"
        self.nodes.append(Node(self.lab, host, number, self.options, self.certs, incoming))

    def next_round(self):
        """Prepares the next migration, to the other host."""
        here = self.nodes[-1].host
        self._add(
            self.network.destination if here is self.network.source else self.network.source,
            incoming=True,
        )
        self.nodes[-2].guest.wait_running()

    @property
    def source(self):
        return self.nodes[-2].engine

    @property
    def destination(self):
        return self.nodes[-1].engine

    @property
    def role_of_source(self):
        """The role for the leak check: an engine that was a destination before may hold more."""
        return "source" if len(self.nodes) == 2 else "source that was a destination"

    def host(self, side):
        return self.nodes[-1 if side == "destination" else -2].host

    def pollers(self, engine):
        """The pollers of an engine and of its predecessors that were killed; the last one is in
        use."""
        return next(node.pollers for node in self.nodes if node.engine is engine)

    def uris(self, scheme):
        host = self.nodes[-1].host
        schemes = {"both": ("ofi", "tcp")}.get(scheme, (scheme, scheme))
        return [uri(host, link, each) for link, each in zip(LINKS, schemes)]

    def start_stranger(self, kind):
        """Lets a stranger of this kind connect to the destination's port."""
        return start_stranger(self.lab, self.nodes[-2].host, self.nodes[-1].host.address(2), kind)

    def watch(self, engine):
        """Starts a poller for an engine that was restarted."""
        self.pollers(engine).append(Poller(self.lab, engine))

    def signal(self, engine, number):
        os.kill(engine.process.pid, number)

    def expect_source_runs(self):
        self.nodes[-2].guest.wait_running()

    def verify(self):
        self.nodes[-1].guest.verify()
        # The guest reports its state once a second.
        wait_for(
            "the guest is paused at the source",
            30,
            lambda: self.nodes[-2].guest.state()[0] == "paused",
        )

    def leave_source(self):
        """Ends the source of a completed migration."""
        old = self.nodes[-2]
        old.end()
        old.guest.process.kill()

    def end(self):
        last = self.nodes[-1]
        last.end()
        last.guest.process.popen.terminate()
        expect(
            last.guest.process.wait(CLOSE_SECONDS) == 0,
            f"the guest ended: {last.guest.process.output()[-1000:]}",
        )


class QemuPair:
    """A stock QEMU with the Linux test guest, which migrates once."""

    role_of_source = "source"

    def __init__(self, lab, options, number, tls):
        del options, number
        self.move = Move(lab, spec=GuestSpec(), incoming=INCOMING, settings=SETTINGS, tls=tls)
        self.lab, self.network, self.links = lab, lab.network, Links(lab.network)
        self.source, self.destination = self.move.engines
        self.all_pollers = {engine.name: [Poller(lab, engine)] for engine in self.move.engines}

    def next_round(self):
        pass

    def host(self, side):
        return getattr(self.network, side)

    def pollers(self, engine):
        return self.all_pollers[engine.name]

    def uris(self, scheme):
        schemes = {"both": ("ofi", "tcp")}.get(scheme, (scheme, scheme))
        return [uri(self.network.destination, link, each) for link, each in zip(LINKS, schemes)]

    def start_stranger(self, kind):
        return start_stranger(
            self.lab, self.network.source, self.network.destination.address(2), kind
        )

    def watch(self, engine):
        self.pollers(engine).append(Poller(self.lab, engine))

    def signal(self, engine, number):
        os.kill(engine.process.pid, number)

    def expect_source_runs(self):
        self.move.expect_source_runs()

    def verify(self):
        self.move.expect_guest_sound()

    def leave_source(self):
        self.source.process.stop()

    def end(self):
        self.destination.process.stop()
        for engine in self.move.engines:
            expect(
                engine.process.exit_code() in (0, -15),
                f"{engine.name} ended with {engine.process.exit_code()}",
            )


def start_stranger(lab, host, address, kind):
    argv = [os.path.join(HERE, "stranger"), address, str(PORT), kind]
    return lab.start(f"stranger-{kind}", host.command(argv), gently=False)


def make_certificates(lab, number):
    """One directory with client and server certificates, for engines that have both roles in
    turn."""
    directory = lab.path(f"tls-{number}")
    make_certs = os.path.join(HERE, "..", "rigs", "make-certs")
    addresses = [host.address(link) for host in lab.network.hosts for link in LINKS]
    run([make_certs, directory, "ca"])
    run([make_certs, directory, "client", "engine"])
    run([make_certs, directory, "server", *addresses])
    os.unlink(os.path.join(directory, "ca-key.pem"))
    return directory
