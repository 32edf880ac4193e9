# SPDX-License-Identifier: GPL-2.0-or-later
"""Two network namespaces joined by two links.

The namespaces have no names. Each belongs to a process that holds it, and is gone with that
process. So several runs do not disturb each other, and nothing remains of them.

    source                          destination
    10.77.1.1  link1 ────── link1   10.77.1.2
    10.77.2.1  link2 ────── link2   10.77.2.2
"""

import json
import os
import subprocess

from .process import LONG, Failure, Skip, die_with_parent, wait_for

LINKS = (1, 2)


def run(argv):
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"{' '.join(argv)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def require_namespaces():
    """Skips the test where network namespaces and links can't be made."""
    if os.geteuid() != 0:
        raise Skip("network namespaces need root")
    for module in (["unshare", "--net", "true"], ["unshare", "--net", "ip", "link", "add", "type", "veth"]):
        done = subprocess.run(module, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Skip(f"{' '.join(module)}: {done.stderr.strip()}")


class Host:
    """One network namespace, and the processes started in it."""

    def __init__(self, name, number):
        self.name = name
        self.number = number
        self.holder = subprocess.Popen(
            ["unshare", "--net", "cat"], stdin=subprocess.PIPE, preexec_fn=die_with_parent
        )
        wait_for(
            f"a network namespace for {name}",
            LONG,
            lambda: self._namespace(self.holder.pid) != self._namespace(os.getpid()),
        )

    @staticmethod
    def _namespace(pid):
        return os.readlink(f"/proc/{pid}/ns/net")

    def command(self, argv):
        """Returns the command that runs argv on this host. It execs argv, so the pid is argv's."""
        return ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net", "--"] + list(argv)

    def run(self, *argv):
        return run(self.command(argv))

    def address(self, link):
        return f"10.77.{link}.{self.number}"

    def close(self):
        self.holder.stdin.close()
        self.holder.kill()
        self.holder.wait()


class Network:
    """The two hosts and their links."""

    def __init__(self):
        self.source = Host("source", 1)
        self.destination = Host("destination", 2)
        self.hosts = (self.source, self.destination)
        for link in LINKS:
            run(
                ["ip", "link", "add", f"link{link}", "netns", str(self.source.holder.pid), "type", "veth"]
                + ["peer", "name", f"link{link}", "netns", str(self.destination.holder.pid)]
            )
        for host in self.hosts:
            host.run("ip", "link", "set", "lo", "up")
            for link in LINKS:
                host.run("ip", "address", "add", f"{host.address(link)}/24", "dev", f"link{link}")
                host.run("ip", "link", "set", f"link{link}", "up")

    def link_down(self, link):
        """Takes a link down, as if its cable was pulled."""
        self.source.run("ip", "link", "set", f"link{link}", "down")

    def link_up(self, link):
        self.source.run("ip", "link", "set", f"link{link}", "up")

    def black_hole(self, link, senders=None):
        """Loses all frames of a link, with both ends up: they are sent to a MAC address that no
        host has. senders: only their frames are lost (default: both hosts')."""
        for host, peer in (self.hosts, self.hosts[::-1]):
            if senders and host not in senders:
                continue
            host.run(
                *("ip", "neighbour", "replace", peer.address(link), "lladdr", "02:00:00:00:00:66"),
                *("dev", f"link{link}", "nud", "permanent"),
            )

    def end_black_hole(self, link):
        for host, peer in (self.hosts, self.hosts[::-1]):
            host.run("ip", "neighbour", "del", peer.address(link), "dev", f"link{link}")

    def limit_rate(self, link, mbit):
        """Limits the rate at which the source can send over this link."""
        self.source.run(
            *("tc", "qdisc", "replace", "dev", f"link{link}", "root", "tbf"),
            *("rate", f"{mbit}mbit", "burst", "128kb", "latency", "50ms"),
        )

    def received(self, link):
        """Returns the bytes that the destination has received over this link."""
        shown = self.destination.run("ip", "-s", "-j", "link", "show", "dev", f"link{link}")
        return json.loads(shown)[0]["stats64"]["rx"]["bytes"]

    def close(self):
        for host in self.hosts:
            host.close()
