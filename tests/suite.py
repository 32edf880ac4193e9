# SPDX-License-Identifier: GPL-2.0-or-later
"""Fetches packages of other Debian suites and unpacks them into a cache.

The mirror is that of the machine's apt. The apt that fetches the packages has its own state, so
that nothing of the machine changes. It verifies the packages with the machine's keyring.

A tree of unpacked packages stays in the cache until its recipe changes. It is never incomplete: it
is unpacked under another name, and then renamed. A lock makes other processes wait meanwhile."""

import contextlib
import fcntl
import glob
import hashlib
import os
import re
import shutil
import subprocess
import tempfile

SYSTEM_CACHE = "/var/cache/postroad-tests"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
ARCHITECTURE = "amd64"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
MERGED = ("bin", "sbin", "lib", "lib64")  # symbolic links into /usr
STABLE = ("stable", "oldstable", "oldoldstable")
FORMAT = "1"  # of the trees; after a change, every tree is fetched again


class SuiteError(Exception):
    """A tree is not available. The message has the reason."""


def cache_directory():
    """Returns POSTROAD_CACHE, or a directory that all check-outs on this machine share."""
    chosen = os.environ.get("POSTROAD_CACHE")
    if chosen:
        return os.path.abspath(chosen)
    if os.geteuid() == 0:
        return SYSTEM_CACHE
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(home, "postroad-tests")


def run(argv, what, **kind):
    """Runs a program that must succeed, and returns its output. what: starts an error message."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **kind)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        said = [line for line in lines if line.startswith("E:")] or lines[-3:]
        raise SuiteError(f"{what}: {'; '.join(said) or done.returncode}")
    return done.stdout


def mirrors():
    """Returns the mirrors from which the machine's apt gets its own release. A mirror of another
    distribution would fail at the signature."""
    with open("/etc/os-release") as file:
        release = dict(line.strip().split("=", 1) for line in file if "=" in line)
    wanted = (release.get("VERSION_CODENAME", "").strip('"'), *STABLE)
    with tempfile.TemporaryDirectory() as nothing:  # if lists exist, apt prints only the new files
        listed = run(
            ["apt-get", "-o", f"Dir::State::lists={nothing}", "update", "--print-uris"], "apt's sources"
        )
    found = []
    for mirror, suite in re.findall(r"^'(\S+)/dists/(\S+)/InRelease'", listed, re.M):
        if suite in wanted and mirror not in found:
            found.append(mirror)
    if not found:
        raise SuiteError(f"apt's sources have none of these suites: {', '.join(filter(None, wanted))}")
    return found


def apt_configuration(directory):
    """Returns a configuration with the machine's settings for access to its mirror, for example
    proxies. It has none of the machine's other settings, such as pins and hooks."""
    reach = [
        line
        for line in run(["apt-config", "dump"], "apt-config").splitlines()
        if line.startswith("Acquire::") and not line.startswith("Acquire::IndexTargets")
    ]
    ours = {
        "Dir::Etc::Main": "/dev/null",
        "Dir::Etc::Parts": "/dev/null",
        "Dir::Etc::Preferences": "/dev/null",
        "Dir::Etc::PreferencesParts": "/dev/null",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::Etc::SourceList": f"{directory}/list.sources",
        "Dir::State": f"{directory}/state",
        "Dir::State::Status": f"{directory}/status",
        "Dir::Cache": f"{directory}/cache",
        "APT::Architecture": ARCHITECTURE,
        "APT::Sandbox::User": "root",  # another user may not write here
        "APT::Install-Recommends": "false",
        "Debug::NoLocking": "true",  # locked() has a lock of its own
    }
    return "\n".join(reach + [f'{name} "{value}";' for name, value in ours.items()]) + "\n"


class Apt:
    """An apt for one suite, with its state in a directory of its own. It only fetches packages."""

    def __init__(self, directory, suite, keyring):
        self.suite = suite
        self.keyring = keyring
        self.directory = directory
        for part in ("state/lists/partial", "cache/archives/partial"):
            os.makedirs(os.path.join(directory, part))
        self._write("status", "")
        self._write("apt.conf", apt_configuration(directory))
        self.environment = {**os.environ, "APT_CONFIG": os.path.join(directory, "apt.conf"), "LC_ALL": "C"}

    def _write(self, name, text):
        with open(os.path.join(self.directory, name), "w") as file:
            file.write(text)

    def _run(self, *words):
        return run(["apt-get", "-q", "-y", *words], f"{self.suite}: apt-get {words[0]}", env=self.environment)

    def update(self):
        """Fetches the suite's list of packages from the first mirror that has it."""
        failures = []
        for mirror in mirrors():
            self._write(
                "list.sources",
                f"Types: deb\nURIs: {mirror}\nSuites: {self.suite}\nComponents: main\n"
                f"Architectures: {ARCHITECTURE}\nSigned-By: {self.keyring}\n",
            )
            try:
                self._run("update", "--error-on=any")
                return
            except SuiteError as failure:
                failures.append(str(failure))
        raise SuiteError("; ".join(failures))

    def download(self, packages):
        """Fetches these packages and all their dependencies. Returns the names of the files."""
        self._run("install", "--download-only", *packages)
        return sorted(glob.glob(os.path.join(self.directory, "cache", "archives", "*.deb")))


def unpack(files, root):
    """Unpacks packages like dpkg, but runs none of their scripts."""
    for name in MERGED:
        os.makedirs(os.path.join(root, "usr", name))
        os.symlink(f"usr/{name}", os.path.join(root, name))
    for file in files:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", file], stdout=subprocess.PIPE) as package:
            tar = ["tar", "-x", "-C", root, "--keep-directory-symlink", "--no-same-owner"]
            done = subprocess.run(tar, stdin=package.stdout, capture_output=True, text=True, check=False)
        if done.returncode or package.returncode:
            raise SuiteError(f"{os.path.basename(file)} can't be unpacked: {done.stderr.strip()}")


@contextlib.contextmanager
def locked(cache):
    try:
        os.makedirs(cache, exist_ok=True)
        lock = open(os.path.join(cache, "lock"), "w")
    except OSError as error:
        raise SuiteError(f"{error}; name another directory in POSTROAD_CACHE") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Tree:
    """Packages of a suite and all their dependencies, unpacked into one root folder. finish(new,
    root) completes the tree: `new` is its folder at that time, `root` its final path."""

    def __init__(self, name, suite, packages, finish, keyring=KEYRING):
        recipe = hashlib.sha256(" ".join([FORMAT, suite, *packages]).encode()).hexdigest()[:8]
        self.suite, self.packages, self.finish, self.keyring = suite, packages, finish, keyring
        self.cache = cache_directory()
        self.path = os.path.join(self.cache, f"{name}-{recipe}")

    def missing(self):
        return not os.path.isdir(self.path)

    def provide(self, say, refresh=False):
        """Returns the tree's path. Fetches the tree if it is missing, or with `refresh`."""
        if refresh or self.missing():
            with locked(self.cache):
                if refresh or self.missing():
                    self._make(say)
        return self.path

    def _make(self, say):
        for left_over in glob.glob(f"{self.path}.*"):  # left by a process that was killed
            shutil.rmtree(left_over)
        say(f"fetching {self.suite}: {' '.join(self.packages[:3])}{' …' if len(self.packages) > 3 else ''}")
        work, new, old = (f"{self.path}.{kind}" for kind in ("apt", "new", "old"))
        try:
            apt = Apt(work, self.suite, self.keyring)
            apt.update()
            files = apt.download(self.packages)
            size = sum(map(os.path.getsize, files)) / 1e6
            say(f"unpacking {len(files)} packages, {size:.0f} MB, to {self.path}")
            unpack(files, new)
            self.finish(new, self.path)
            if not self.missing():
                os.rename(self.path, old)
            os.rename(new, self.path)
        except OSError as error:
            raise SuiteError(str(error)) from None
        finally:
            for directory in (work, new, old):
                shutil.rmtree(directory, ignore_errors=True)
