# SPDX-License-Identifier: GPL-2.0-or-later
# Short names for meson and the test scripts, which can also be used directly (HACKING.md).
MESON_FLAGS = --werror
PREFIX ?= /usr/local

# A PREFIX on the command line also changes an existing build.
all: build/build.ninja
	$(if $(filter-out file,$(origin PREFIX)),meson configure build --prefix=$(PREFIX))
	meson compile -C build

build/build.ninja: | deps
	meson setup build --prefix=$(PREFIX) $(MESON_FLAGS)

# Installs the packages that are needed (Debian 12), if any is missing.
deps:
	@tests/deps.sh

# All tests, under the sanitizers as well. Ends with "N passed, N failed, N skipped".
check: deps
	@tests/run

# libFuzzer on every decoder, and as the peer of both engines, for FUZZ_SECONDS each.
FUZZ_SECONDS ?= 60
fuzz: deps
	@tests/fuzz/run --seconds $(FUZZ_SECONDS)

# Migrations with random faults, for a night. SEED decides the order (default: a random one). The
# run ends after RECOVERIES recoveries, SECONDS or ROUNDS. More options: tests/chaos/run --help.
RECOVERIES ?= $(if $(SECONDS)$(ROUNDS),,1000)
chaos: all
	@tests/chaos/run --build build $(if $(SEED),--seed $(SEED)) \
		$(if $(SECONDS),--seconds $(SECONDS)) $(if $(ROUNDS),--rounds $(ROUNDS)) \
		$(if $(RECOVERIES),--recoveries $(RECOVERIES))

# Shows on the terminal, in a minute, a guest that migrates, loses its path, and recovers.
# QEMU=PROGRAM chooses a QEMU (tests/qemu-versions lists them).
demo: all linux-guest
	@tests/demo.py --build build

# The same between two emulated hosts with RoCE rails: real verbs, and an automatic recovery.
demo-roce: all
	@tests/demo-roce.py --build build

# Only the tests on these hosts: the lab, the data path, and whole migrations over rdma:.
check-roce: all
	@tests/roce/run --build build

# A build with Debian 13's compiler and libraries, and its unit tests.
check-debian13: deps
	@tests/debian13

# The speed of rdma: compared with perftest, and the duration of a failover.
bench-roce: all
	@tests/roce/bench --build build

# The benchmarks, in half an hour at most: the machine's floors, the engine alone, many threads,
# each knob, the bandwidth limit, the costs that grow with the guest's size, and a comparison with
# QEMU's own postcopy and its preempt mode. tests/bench/run --help and tests/bench/against-qemu
# --help describe how to run a part, or longer.
bench: all linux-guest
	@tests/bench/run --build build

# Checks in two minutes that the benchmarks work; their figures mean nothing.
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

.PHONY: all deps check check-roce check-debian13 chaos fuzz demo demo-roce bench bench-smoke \
	bench-roce linux-guest install format clean
