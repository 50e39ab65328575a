#!/bin/bash
# real/run-real-native.sh [LIST] - the same programs on this machine, in a chroot of OUT/rootfs, on one CPU.
# Needs root.  The chroot gets a /dev of four harmless nodes and its own /tmp; no disk_* items.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "${OUT:-${BHYVE_GUESTS:-$here/../../guests}/bench}/rootfs" && pwd)
[ "${INSIDE:-}" ] || INSIDE=1 exec unshare -m --propagation private "$0" "$@"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/dev"
for n in null zero random urandom; do touch "$root/dev/$n" && mount --bind "/dev/$n" "$root/dev/$n"; done
exec taskset -c "${HOST_CPU:-0}" chroot "$root" /bench-real.sh "${1:-all}"
