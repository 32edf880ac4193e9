# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is disturbed: guests, engines, and the links between their hosts.

A cast has
  source, destination    the engines (harness.engine)
  lab, links             the links between their hosts
  uris()                 the paths, as `migrate` takes them
  pollers(engine)        what watches its monitor, one for each incarnation
  verify()               the whole guest is right, at the destination"""

import os
import re
import signal

from harness.engine import Engine
from harness.lab import Move
from harness.network import LINKS, run
from harness.process import expect, wait_for
from harness.vm import GuestSpec

from watch import Poller

HERE = os.path.dirname(os.path.abspath(__file__))
PORT, TCP_PORT = 4444, 4445
# A path's silence is noticed soon, and what was lost is tried again soon: the more recoveries there are in a minute.
SETTINGS = ("heartbeat-interval=20", "heartbeat-timeout=250", "probe-interval=100", "handshake-timeout=2000")
INCOMING = f"ofi:0.0.0.0:{PORT},tcp:0.0.0.0:{TCP_PORT}"
CLOSE_SECONDS = 20


def uri(host, link, scheme):
    return f"{scheme}:{host.address(link)}:{TCP_PORT if scheme == 'tcp' else PORT}"


class Links:
    """Those of harness.network."""

    def __init__(self, network):
        self.network = network

    def cut(self, link):
        self.network.link_down(link)

    def black_hole(self, link, sender=None):
        """sender: a host; what it sends is lost, the other one's is not."""
        self.network.black_hole(link, senders=sender and (sender,))

    def heal(self):
        """All links carry everything again."""
        for link in LINKS:
            for host in self.network.hosts:
                host.run("ip", "link", "set", f"link{link}", "up")
                host.run("ip", "neighbour", "flush", "dev", f"link{link}", "nud", "permanent")


class Workload:
    """The test guest, as a process of a host."""

    def __init__(self, lab, host, name, size_mb, pace_us, seed, incoming):
        self.name = name
        self.socket = lab.path(f"{name}.agent")
        argv = [lab.build_file("workload"), "--socket", self.socket, "--size", f"{size_mb}M", "--threads", "2"]
        argv += ["--pace", str(pace_us), "--seed", str(seed)]
        self.process = lab.start(name, host.command(argv + (["--incoming"] if incoming else [])))
        wait_for(f"{name} serves its socket", 20, lambda: os.path.exists(self.socket))

    def state(self):
        lines = re.findall(r"^(running|paused) verified=(\d+)", self.process.output(), re.M)
        return lines[-1] if lines else ("", "0")

    def wait_running(self):
        wait_for(f"{self.name} runs", 30, lambda: self.state()[0] == "running" and int(self.state()[1]) > 0)

    def verify(self):
        """Has it look at every page."""
        asked = len(re.findall(r"^(?:not )?verified", self.process.output(), re.M))
        os.kill(self.process.pid, signal.SIGUSR1)
        said = wait_for(
            f"{self.name} has looked at all its pages",
            60,
            lambda: re.findall(r"^(?:not )?verified.*$", self.process.output(), re.M)[asked:],
        )[-1]
        expect(said == "verified all corrupt=0 now=0", f"{self.name}: {said}: {self.process.output()[-2000:]}")


class Member:
    """One host's guest and engine of a chain."""

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
        """Both are asked to end, and have to be well."""
        self.engine.process.stop()
        code = self.engine.process.exit_code()
        expect(code in (0, -15), f"{self.engine.name} ended with {code}: {self.engine.process.output()[-2000:]}")
        self.pollers[-1].process.stop()


class Chain:
    """A guest that moves on from host to host: each engine is a destination once, then a source."""

    def __init__(self, lab, options, number, tls):
        self.lab = lab
        self.network, self.links = lab.network, Links(lab.network)
        self.options = options
        self.number = number
        self.members = []
        self.certs = make_certificates(lab, number) if tls else None
        self._add(self.network.source, incoming=False)

    def _add(self, host, incoming):
        number = f"{self.number}{chr(ord('a') + len(self.members))}"
        self.members.append(Member(self.lab, host, number, self.options, self.certs, incoming))

    def next_round(self):
        """The guest is to move on to the other host."""
        here = self.members[-1].host
        self._add(self.network.destination if here is self.network.source else self.network.source, incoming=True)
        self.members[-2].guest.wait_running()

    @property
    def source(self):
        return self.members[-2].engine

    @property
    def destination(self):
        return self.members[-1].engine

    @property
    def role_of_source(self):
        """An engine that has been a destination may hold more."""
        return "source" if len(self.members) == 2 else "source that was a destination"

    def host(self, side):
        return self.members[-1 if side == "destination" else -2].host

    def pollers(self, engine):
        """All that have watched its incarnations, the present one's last."""
        return next(member.pollers for member in self.members if member.engine is engine)

    def uris(self, scheme):
        host = self.members[-1].host
        schemes = {"both": ("ofi", "tcp")}.get(scheme, (scheme, scheme))
        return [uri(host, link, each) for link, each in zip(LINKS, schemes)]

    def knock(self, kind):
        """A stranger of this kind comes to the destination's port."""
        return knock(self.lab, self.members[-2].host, self.members[-1].host.address(2), kind)

    def watch(self, engine):
        """An engine has come back."""
        self.pollers(engine).append(Poller(self.lab, engine))

    def signal(self, engine, number):
        os.kill(engine.process.pid, number)

    def expect_source_runs(self):
        self.members[-2].guest.wait_running()

    def verify(self):
        self.members[-1].guest.verify()
        # It tells once a second.
        wait_for(
            "the guest does not run at the source any more", 30, lambda: self.members[-2].guest.state()[0] == "paused"
        )

    def leave_source(self):
        """The source is of no use any more."""
        old = self.members[-2]
        old.end()
        old.guest.process.kill()

    def end(self):
        last = self.members[-1]
        last.end()
        last.guest.process.popen.terminate()
        expect(last.guest.process.wait(CLOSE_SECONDS) == 0, f"the guest ended: {last.guest.process.output()[-1000:]}")


class Machines:
    """A stock QEMU with the Linux test guest; it moves once."""

    role_of_source = "source"

    def __init__(self, lab, options, number, tls):
        del options, number
        self.move = Move(lab, spec=GuestSpec(), incoming=INCOMING, settings=SETTINGS, tls=tls)
        self.lab, self.network, self.links = lab, lab.network, Links(lab.network)
        self.source, self.destination = self.move.engines
        self.watching = {engine.name: [Poller(lab, engine)] for engine in self.move.engines}

    def next_round(self):
        pass

    def host(self, side):
        return getattr(self.network, side)

    def pollers(self, engine):
        return self.watching[engine.name]

    def uris(self, scheme):
        schemes = {"both": ("ofi", "tcp")}.get(scheme, (scheme, scheme))
        return [uri(self.network.destination, link, each) for link, each in zip(LINKS, schemes)]

    def knock(self, kind):
        return knock(self.lab, self.network.source, self.network.destination.address(2), kind)

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
            expect(engine.process.exit_code() in (0, -15), f"{engine.name} ended with {engine.process.exit_code()}")


def knock(lab, host, address, kind):
    argv = [os.path.join(HERE, "stranger"), address, str(PORT), kind]
    return lab.start(f"stranger-{kind}", host.command(argv), gently=False)


def make_certificates(lab, number):
    """For engines that are both: one directory has all."""
    directory = lab.path(f"tls-{number}")
    make_certs = os.path.join(HERE, "..", "tls", "make-certs")
    addresses = [host.address(link) for host in lab.network.hosts for link in LINKS]
    run([make_certs, directory, "ca"])
    run([make_certs, directory, "client", "engine"])
    run([make_certs, directory, "server", *addresses])
    os.unlink(os.path.join(directory, "ca-key.pem"))
    return directory
