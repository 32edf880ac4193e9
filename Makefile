# SPDX-License-Identifier: GPL-2.0-or-later
# A thin cover over meson: everything here can be done by hand, too (HACKING.md).
MESON_FLAGS = --werror
PREFIX ?= /usr/local

# A PREFIX that is given counts for a build that is there already, too.
all: build/build.ninja
	$(if $(filter-out file,$(origin PREFIX)),meson configure build --prefix=$(PREFIX))
	meson compile -C build

build/build.ninja: | deps
	meson setup build --prefix=$(PREFIX) $(MESON_FLAGS)

# What has to be installed (Debian 12); quick when it is.
deps:
	@tests/deps.sh

# All tests, under the sanitizers as well. Ends with "N passed, N failed, N skipped".
check: deps
	@tests/run

# libFuzzer on every decoder and on both engines as their peers, for so many seconds each.
FUZZ_SECONDS ?= 60
fuzz: deps
	@tests/fuzz/run --seconds $(FUZZ_SECONDS)

# A night's worth of everything that can go wrong, in an order that SEED decides (a random one):
# RECOVERIES of them, or as many as come in SECONDS or ROUNDS. More options: tests/chaos/run --help.
RECOVERIES ?= $(if $(SECONDS)$(ROUNDS),,1000)
chaos: all
	@tests/chaos/run --build build $(if $(SEED),--seed $(SEED)) $(if $(SECONDS),--seconds $(SECONDS)) \
		$(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(RECOVERIES),--recoveries $(RECOVERIES))

# A guest moves, loses its path, and recovers: told on the terminal in a minute. QEMU=PROGRAM: with
# that one (tests/qemu-versions tells which there are).
demo: all linux-guest
	@tests/demo.py --build build

# The same between two emulated hosts with RoCE rails: real verbs, and nobody asks for the recovery.
demo-roce: all
	@tests/demo-roce.py --build build

# The tests on these hosts alone: the lab, the data path, and whole migrations over rdma:.
check-roce: all
	@tests/roce/run --build build

# A build with Debian 13's compiler and libraries, and its unit tests there.
check-debian13: deps
	@tests/debian13

# rdma: beside perftest, and how long a failover takes.
bench-roce: all
	@tests/roce/bench --build build

# The machine's floors, the engine beside them, each knob, many threads, the bandwidth limit, what
# grows with the guest's size, and Postroad against QEMU's own postcopy and its preempt mode: half
# an hour at most. Parts, or more of them: tests/bench/run --help, tests/bench/against-qemu --help.
bench: all linux-guest
	@tests/bench/run --build build

# Whether the benchmarks work, in two minutes; their figures mean nothing.
bench-smoke: all linux-guest
	@tests/bench/run --build build --quick

# The Linux guest that the demo and the end-to-end tests move.
linux-guest: deps
	@tests/guest/linux/build-initramfs build/linux-guest

install: all
	meson install -C build

format: deps
	git ls-files '*.c' '*.h' | xargs clang-format -i

clean:
	rm -rf build build-asan build-tsan build-fuzz build-debian13

.PHONY: all deps check check-roce check-debian13 chaos fuzz demo demo-roce bench bench-smoke bench-roce linux-guest install format clean
