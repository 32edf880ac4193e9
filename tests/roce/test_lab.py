#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of the lab itself, on which the tests of failover rely."""

import os
import signal
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.dont_write_bytecode = True
sys.path.insert(0, HERE)

import runner  # noqa: E402
from harness.process import Failure, expect  # noqa: E402
from roce_lab import HOSTS, RAILS, Lab, LabError, start_time, wait_until  # noqa: E402

CASES = []


def case(name):
    """Registers a test under the behaviour that it proves."""

    def register(function):
        CASES.append((name, function))
        return function

    return register


def sleeps(host):
    """Returns the number of sleep commands that run on a host."""
    return len(host.run("busybox", "pidof", "sleep").stdout.split())


# Traffic over a rail, observed on host a


def pings(host, rail, peer):
    done = host.run("busybox", "ping", "-c", "1", "-W", "1", peer.address(rail))
    return done.returncode == 0


def expect_pings(host, rail, peer, message):
    """Waits for an answered ping: a busy host may take seconds to answer."""
    try:
        wait_until("a ping is answered", 30, lambda: pings(host, rail, peer))
    except LabError:
        raise LabError(message) from None


def connects(host, address, port):
    """Returns whether a TCP connection is established within a second."""
    argv = ["socat", "-u", "OPEN:/dev/null", f"TCP:{address}:{port},connect-timeout=1"]
    return host.run(*argv).returncode == 0


def wait_listens(host, server, look):
    """Waits until the server listens. look: the command that lists listeners."""
    wait_until(
        f"{server.name} listens on host {host.name}",
        30,
        lambda: "LISTEN" in host.run(*look).stdout or not server.alive(),
    )


def rdma_works(lab, rail, seconds=20):
    """Returns whether b can connect over a rail and read a's memory, and the output of both
    programs."""
    options = ["-a", lab.b.address(rail), "-S", "4096", "-C", "3", "-v"]
    server = lab.b.popen("rping", "-s", *options)
    try:
        wait_listens(lab.b, server, ["rdma", "resource", "show", "cm_id"])
        done = lab.a.run("timeout", str(seconds), "rping", "-c", *options, timeout=seconds + 20)
    finally:
        server.kill()
    said = f"exit code {done.returncode}: {done.stdout}{done.stderr} server: {server.output()}"
    return done.returncode == 0 and done.stdout.count("ping data:") == 3, said


def expect_reads(lab, rail):
    works, said = rdma_works(lab, rail)
    expect(works, f"no RDMA READs over rail {rail}: {said}")


def expect_no_reads(lab, rail):
    works, said = rdma_works(lab, rail, seconds=3)
    expect(not works, f"RDMA READs still go over rail {rail}: {said}")


def read_lat(lab, rail):
    """Returns the typical latency of 4 KiB RDMA READs in microseconds."""
    # Without -R: with it, the server stops listening between two connections, and a client may be
    # faster.
    options = ["-x", "1", "-F", "-s", "4096", "-n", "200", "-d", f"rxe{rail}"]
    server = lab.b.popen("ib_read_lat", *options)
    try:
        wait_listens(lab.b, server, ["ss", "-Hltn", "sport", "=", ":18515"])
        done = lab.a.run("ib_read_lat", *options, lab.b.address(rail), check=True)
    finally:
        server.kill()
    figures = [line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["4096"]]
    expect(figures, f"ib_read_lat printed no figures: {done.stdout}{done.stderr}")
    return float(figures[0][4])


def port_state(host, rail):
    path = f"/sys/class/infiniband/rxe{rail}/ports/1/state"
    return host.run("cat", path).stdout.strip().partition(": ")[2]


def received(host, rail):
    path = f"/sys/class/net/eth{rail}/statistics/rx_packets"
    return int(host.run("cat", path, check=True).stdout)


def expect_whole(lab, rail):
    wait_until(f"rail {rail} carries again", 30, lambda: pings(lab.a, rail, lab.b))
    expect_reads(lab, rail)


def expect_dead(lab, rail):
    expect(not pings(lab.a, rail, lab.b), f"rail {rail} still carries a's ping to b")
    expect(not pings(lab.b, rail, lab.a), f"rail {rail} still carries b's ping to a")
    other = 3 - rail
    expect_pings(lab.a, other, lab.b, f"the fault of rail {rail} has hit rail {other} as well")


# The hosts


@case("hosts-see-this-file-system-read-only-and-share-one-directory")
def files(lab):
    here = os.path.abspath(__file__)
    with open(here, "rb") as file:
        size = len(file.read())
    for host in lab.hosts:
        seen = host.run("wc", "-c", here, check=True).stdout.split()[0]
        expect(int(seen) == size, f"host {host.name} sees {seen} bytes of {here}, here it has {size}")
        refused = host.run("touch", f"{ROOT}/lab-was-here")
        expect(refused.returncode and "Read-only" in refused.stderr, f"host {host.name} can write to {ROOT}")
        host.run("sh", "-c", f"echo {host.name} >{lab.share}/from-{host.name}; echo >/tmp/mine", check=True)
        expect(not os.path.exists("/tmp/mine"), "the hosts' /tmp is this machine's")
    for name in HOSTS:
        with open(os.path.join(lab.share, f"from-{name}")) as file:
            expect(file.read() == f"{name}\n", f"the file that host {name} wrote to the share has other contents here")
    expect(lab.a.run("cat", f"{lab.share}/from-b").stdout == "b\n", "host a does not see b's file")


@case("commands-hand-over-input-output-and-exit-codes")
def commands(lab):
    done = lab.a.run("sh", "-c", "cat; echo error >&2; exit 7", input=b"input\n" * 20000)
    expect(done.returncode == 7, f"exit code 7 became {done.returncode}")
    expect(done.stdout == "input\n" * 20000, f"{len(done.stdout)} characters of 120000 came back")
    expect(done.stderr == "error\n", f"standard error became {done.stderr!r}")
    for number in (signal.SIGTERM, signal.SIGINT):
        killed = lab.b.run("sh", "-c", f"kill -{number} $$; echo lives")
        expect(killed.returncode == -number, f"signal {number}: exit code {killed.returncode} {killed.stdout}")
    try:
        lab.a.run("no-such-command")
    except LabError as error:
        expect("no-such-command" in str(error), f"the error does not name the command: {error}")
    else:
        raise Failure("a command that does not exist ran")


@case("commands-on-a-terminal-can-be-interrupted")
def terminal(lab):
    shell = lab.a.popen("bash", "--norc", tty=[33, 77])
    try:
        shell.write(b"stty size; sleep 1000; echo interrupted=$?\r")
        wait_until("the terminal has its size", 30, lambda: "33 77" in shell.output())
        wait_until("sleep runs", 30, lambda: sleeps(lab.a))
        shell.write(b"\x03")
        wait_until("Ctrl-C ends it", 30, lambda: not sleeps(lab.a))
        shell.write(b"exit 9\r")
        expect(shell.wait(10) == 9, f"the shell ended with {shell.exit_code()}, not 9")
    finally:
        shell.close()


@case("commands-end-with-their-session-unless-in-the-background")
def sessions(lab):
    for _ in range(30):  # more than a host has ports
        process = lab.a.popen("sh", "-c", "sleep 1000 & echo here; wait")
        wait_until("the command prints", 30, lambda running=process: running.output())
        process.close()
    lab.a.run("sh", "-c", "sleep 1000 >/dev/null 2>&1 &", check=True)
    wait_until("only the one in the background is left", 30, lambda: sleeps(lab.a) == 1)
    lab.a.run("busybox", "killall", "sleep", check=True)


@case("unix-sockets-of-a-host-can-be-reached")
def sockets(lab):
    server = lab.b.popen("socat", "UNIX-LISTEN:/run/echo", "EXEC:cat")
    try:
        wait_until("socat listens", 30, lambda: lab.b.run("test", "-S", "/run/echo").returncode == 0)
        with lab.b.connect("/run/echo") as connection:
            connection.settimeout(10)
            connection.sendall(b"hello" * 10000)
            got = b""
            while len(got) < 50000:
                piece = connection.recv(65536)
                expect(piece, f"the connection ended after {len(got)} of 50000 bytes")
                got += piece
            expect(got == b"hello" * 10000, "the received bytes differ from those sent")
    finally:
        server.kill()
    try:
        lab.b.connect("/run/no-such-socket")
    except FileNotFoundError:
        return
    raise Failure("a socket that does not exist could be connected to")


@case("clocks-of-both-hosts-are-ours")
def clocks(lab):
    for host in lab.hosts:
        offset, error = host.clock_offset()
        # The clock was set at boot. A busy emulated host's drifts: 35 ms were seen after minutes.
        expect(abs(offset) <= 0.2 + error, f"host {host.name} is {offset:.3f} s off (+/- {error:.3f} s)")


@case("stock-qemu-with-the-boot-sector-guest-runs-on-a-host")
def nested(lab):
    image = os.path.join(lab.share, "guest.img")
    memory = "/dev/shm/guest-memory"
    subprocess.run([os.path.join(HERE, "bootguest", "build"), image, str(1 << 20)], check=True)
    argv = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-accel", "tcg"]
    argv += ["-object", f"memory-backend-file,id=ram,size=16M,share=on,mem-path={memory}"]
    argv += ["-machine", "pc,memory-backend=ram", "-m", "16", "-serial", "stdio"]
    guest = lab.a.popen(*argv, "-drive", f"file={image},format=raw,if=ide,snapshot=on")
    try:
        said = "after 5 rounds, the guest has printed what is in its output"
        wait_until(said, 60, lambda: guest.output("out").count(".") >= 5 or not guest.alive())
        expect(guest.output("out").startswith("B....."), f"the guest printed {guest.output()!r}")
        # Changes one byte of the guest, repeatedly: the guest may overwrite it before it verifies.
        change = f"printf Z | dd of={memory} bs=1 seek={0x180000} conv=notrunc"

        def noticed():
            lab.a.run("sh", "-c", change, check=True)
            return "BAD 0018" in guest.output("out")

        wait_until("the guest finds the changed byte", 30, noticed)
    finally:
        guest.kill()


# The rails


@case("both-rails-carry-pings-and-rdma-reads")
def rails(lab):
    for rail in RAILS:
        expect_pings(lab.a, rail, lab.b, f"no answer to a ping over rail {rail}")
        expect_reads(lab, rail)
        typical = read_lat(lab, rail)
        # A TCP socket between the hosts would add delays of 40 ms.
        expect(typical < 30000, f"a 4 KiB READ takes {typical} us over rail {rail}")


@case("cut-takes-the-carrier-of-both-ends")
def cut(lab):
    lab.cut(1)
    for host in lab.hosts:
        wait_until(f"port on host {host.name} is down", 30, lambda at=host: port_state(at, 1) == "DOWN")
    expect_dead(lab, 1)
    lab.mend(1)
    expect_whole(lab, 1)


@case("cut-of-one-end-is-not-seen-at-the-other")
def cut_one_end(lab):
    lab.cut(2, "a")
    wait_until("the port on host a is down", 30, lambda: port_state(lab.a, 2) == "DOWN")
    expect_dead(lab, 2)
    expect(port_state(lab.b, 2) == "ACTIVE", f"b's port should not show the cut, but is {port_state(lab.b, 2)}")
    lab.mend(2)
    expect_whole(lab, 2)


@case("blackhole-is-silent-and-drops-rdma-too")
def blackhole(lab):
    lab.inject("blackhole", 1)
    expect_dead(lab, 1)
    for host in lab.hosts:
        state = port_state(host, 1)
        expect(state == "ACTIVE", f"the port of host {host.name} should not show the fault, but is {state}")
    expect_no_reads(lab, 1)
    lab.undo("blackhole", 1)
    expect_whole(lab, 1)


@case("blackhole-of-one-host-lets-the-other-direction-through")
def blackhole_one_way(lab):
    lab.inject("blackhole", 1, "a")
    # a loses b's answers to its pings and to its ARP requests.
    lab.b.run("ip", "neighbour", "flush", "dev", "eth1", check=True)
    before = received(lab.b, 1)
    expect(not pings(lab.a, 1, lab.b), "the answer came despite a's black hole")
    expect(received(lab.b, 1) > before, "no packet of a has arrived at b")
    lab.undo("blackhole", 1, "a")
    expect_whole(lab, 1)


@case("blackhole-of-rdma-or-of-tcp-leaves-the-other-alone")
def blackhole_of_one_kind(lab):
    server = lab.b.popen("socat", "TCP-LISTEN:7000,fork,reuseaddr", "OPEN:/dev/null")
    try:
        wait_listens(lab.b, server, ["ss", "-Hltn", "sport", "=", ":7000"])
        for dead, rdma, tcp in (("blackhole-rdma", False, True), ("blackhole-tcp", True, False)):
            lab.inject(dead, 1)
            expect(connects(lab.a, lab.b.address(1), 7000) == tcp, f"{dead}: TCP {'does not go' if tcp else 'goes'}")
            (expect_reads if rdma else expect_no_reads)(lab, 1)
            lab.undo(dead, 1)
        expect(connects(lab.a, lab.b.address(1), 7000), "TCP does not go when both are undone")
    finally:
        server.kill()
    expect_whole(lab, 1)


@case("link-down-inside-is-a-port-error-there")
def link_down(lab):
    lab.inject("link-down", 1, "b")
    expect(port_state(lab.b, 1) == "DOWN", f"b's port is {port_state(lab.b, 1)}")
    expect_dead(lab, 1)
    lab.undo("link-down", 1, "b")
    expect_whole(lab, 1)


@case("removed-address-takes-its-gid-along")
def address_del(lab):
    def gids():
        # The table has a thousand entries; the first ones are used first.
        return lab.b.run("sh", "-c", "cat /sys/class/infiniband/rxe1/ports/1/gids/?").stdout

    mine = "ffff:0a58:0102"
    expect(mine in gids(), f"no GID of 10.88.1.2 on host b: {gids()}")
    lab.inject("address-del", 1, "b")
    wait_until("the GID of 10.88.1.2 is gone", 30, lambda: mine not in gids())
    expect_dead(lab, 1)
    lab.undo("address-del", 1, "b")
    wait_until("the GID of 10.88.1.2 is back", 30, lambda: mine in gids())
    expect_whole(lab, 1)


@case("removed-rdma-device-leaves-the-network-alone")
def rdma_del(lab):
    lab.inject("rdma-del", 1, "a")
    expect(port_state(lab.a, 1) == "", "host a still has rxe1")
    expect_pings(lab.a, 1, lab.b, "the network device has gone along with the RDMA device")
    expect_no_reads(lab, 1)
    lab.undo("rdma-del", 1, "a")
    expect_whole(lab, 1)


@case("removed-rdma-device-is-dead-although-a-program-has-it-open")
def rdma_del_in_use(lab):
    options = ["-a", lab.b.address(1), "-S", "4096", "-v"]
    server = lab.b.popen("rping", "-s", *options)
    wait_listens(lab.b, server, ["rdma", "resource", "show", "cm_id"])
    client = lab.a.popen("rping", "-c", *options)
    watch = lab.a.popen("ibv_asyncwatch", "-d", "rxe1")
    try:
        wait_until("RDMA READs go", 30, lambda: client.output().count("ping data:") > 3)
        lab.inject("rdma-del", 1, "a")
        expect(watch.alive(), "the program that holds the device has ended")
        expect_pings(lab.a, 1, lab.b, "the network device has gone along with the RDMA device")
        client.kill()
        expect_no_reads(lab, 1)
    finally:
        for process in (client, server, watch):
            process.kill()
    lab.undo("rdma-del", 1, "a")
    expect_whole(lab, 1)


@case("restore-undoes-everything-at-once")
def restore(lab):
    lab.cut(2)
    for fault in ("blackhole", "blackhole-tcp", "rdma-del", "address-del", "link-down"):
        lab.inject(fault, 2)
    lab.restore(2)
    expect_whole(lab, 2)


# Several labs, and their end


def machines_of(directory):
    return [machine.pid for machine in Lab.attach(directory).machines]


@case("second-lab-by-hand-does-not-meet-the-first")
def by_hand(lab):
    program = os.path.join(ROOT, "soft-roce", "lab")
    with tempfile.TemporaryDirectory(prefix="postroad-lab-") as directory:

        def call(*words):
            argv = [program, "--dir", directory, *words]
            return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=400)

        pids = []
        try:
            up = call("up", "--build", lab.spec.build, "--accel", lab.accel, "--memory", "512")
            expect(up.returncode == 0, f"lab up: {up.stderr}")
            pids = machines_of(directory)
            again = call("up", "--build", lab.spec.build)
            expect("already" in again.stderr, f"a second lab in one directory: {again.stderr or 'started'}")
            lab.cut(1)
            done = call("run", "a", "--", "sh", "-c", "busybox ping -c 1 10.88.1.2; exit 5")
            expect(done.returncode == 5, f"exit code 5 became {done.returncode}: {done.stderr}")
            expect(" 0% packet loss" in done.stdout, f"the first lab's cut has hit the second: {done.stdout}")
            lab.mend(1)
        finally:
            down = call("down")
        expect(down.returncode == 0, f"lab down: {down.stderr}")
        expect(not any(map(start_time, pids)), f"lab down left a QEMU of {pids} behind")
        expect(not os.path.exists(os.path.join(directory, "lab.json")), "lab down left its files behind")


def started(directory):
    """Returns the process IDs of both machines, or None until both have started."""
    try:
        pids = machines_of(directory)
    except LabError:
        return None
    return pids if len(pids) == len(HOSTS) else None


@case("lab-of-a-killed-test-ends-with-it")
def killed(lab):
    """Kills the program that started the lab; its machines need not have booted."""
    code = (
        f"import sys; sys.path.insert(0, {ROOT + '/soft-roce'!r})\n"
        "from roce_lab import Lab\n"
        "Lab(sys.argv[1], build=sys.argv[2], accel=sys.argv[3]).start()"
    )
    with tempfile.TemporaryDirectory(prefix="postroad-lab-") as directory:
        owner = subprocess.Popen([sys.executable, "-B", "-c", code, directory, lab.spec.build, lab.accel])
        try:
            pids = wait_until("two machines run", 120, lambda: started(directory))
            expect(all(map(start_time, pids)), f"of the machines {pids}, one has ended")
        finally:
            owner.send_signal(signal.SIGKILL)
            owner.wait()
        wait_until("its machines have ended", 30, lambda: not any(map(start_time, pids)))


@case("lab-that-is-booting-ends-with-a-test-run-that-is-terminated")
def terminated(lab):
    """`lab up` starts machines that live on after it. The supervisor of the test run ends them
    nevertheless."""
    with tempfile.TemporaryDirectory(prefix="postroad-lab-") as directory:
        argv = [os.path.join(ROOT, "soft-roce", "lab"), "--dir", directory]
        argv += ["up", "--build", lab.spec.build, "--accel", lab.accel, "--memory", "512"]
        code = (
            f"import subprocess, sys; sys.path.insert(0, {HERE!r})\n"
            "import runner\n"
            "runner.exit_on_signals()\n"
            f"runner.supervise([lambda: subprocess.run({argv!r})])"
        )
        run = subprocess.Popen([sys.executable, "-B", "-c", code])
        try:
            pids = wait_until("two machines run", 120, lambda: started(directory))
        finally:
            run.send_signal(signal.SIGTERM)
            run.wait(60)
        expect(run.returncode == 128 + signal.SIGTERM, f"the test run ended with {run.returncode}")
        left = [pid for pid in pids if start_time(pid)]
        expect(not left, f"the test run has ended, and the machines {left} run")


GROUP = runner.Group("lab", CASES, lambda lab, test, _notes: test(lab), subject=lambda lab, _build: lab)

if __name__ == "__main__":
    sys.exit(runner.main([GROUP], __doc__))
