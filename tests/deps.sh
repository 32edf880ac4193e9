#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Installs the Debian 12 packages that the build, the tests and the demos need. If none is missing,
# the script is quick and needs no network.
set -eu

packages="
gcc ccache libc6-dev make meson ninja-build pkg-config
libglib2.0-dev libjson-glib-dev libfabric-dev libibverbs-dev librdmacm-dev libzstd-dev
libxxhash-dev libcmocka-dev libseccomp-dev libcap-ng-dev
glib-networking openssl
clang-format clang-14 libclang-rt-14-dev
python3 qemu-system-x86 seabios ipxe-qemu ovmf busybox-static cpio gzip xz-utils iproute2 socat
util-linux
gnuplot-nox
kmod binutils perftest ibverbs-utils rdmacm-utils
"

missing=""
for package in $packages; do
	dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed ||
		missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
	echo "Packages are missing. Install them as root, then try again:" >&2
	echo "  apt-get update && apt-get install --no-install-recommends$missing" >&2
	exit 1
fi
echo "Installing:$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get -q update
# shellcheck disable=SC2086 # a list of words
apt-get -q -y install --no-install-recommends $missing
