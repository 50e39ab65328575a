#!/bin/sh
# real/build-real.sh - the real-programs guest: OUT/{rootfs/,root.ext4,real.cpio.gz,vmlinuz}.
# Run "cargo xtask guest bench" before: it brings kernel, modules and busybox.  OUT is where it puts its guest.
# Needs root, network, mmdebstrap, mke2fs (e2fsprogs), cpio.  SUITE, MIRROR, SIZE may be set.
# An existing OUT/rootfs is used again (remove it to fetch the packages anew).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
guests=${BHYVE_GUESTS:-$here/../../guests}
out=${OUT:-$guests/bench} modules=$guests/kernel-amd64/modules busybox=$guests/busybox-amd64/busybox
mkdir -p "$out"
out=$(cd "$out" && pwd)
root=$out/rootfs ir=$out/real-initramfs

if [ ! -e "$root/etc/debian_version" ]; then
	rm -rf "$root"
	mmdebstrap --mode=root --variant=minbase --aptopt='Acquire::Languages "none"' \
		--include=python3,sqlite3,openssl,xz-utils,zstd,perl,busybox-static \
		--customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*.bin' \
		"${SUITE:-bookworm}" "$root" ${MIRROR:-}
	chroot "$root" dpkg-query -W >"$out/packages.txt"
fi
install -m 755 "$here/bench-init" "$here/bench-real.sh" "$root/"
rm -f "$out/root.ext4"
mke2fs -q -t ext4 -L bench-root -d "$root" "$out/root.ext4" "${SIZE:-1500M}"

rm -rf "$ir"
mkdir -p "$ir/bin" "$ir/dev" "$ir/proc" "$ir/root" "$ir/modules"
cp "$busybox" "$ir/bin/busybox"
for a in sh mount umount insmod sleep switch_root poweroff; do ln -s busybox "$ir/bin/$a"; done
install -m 755 "$here/init" "$ir/init"
cp "$modules"/* "$ir/modules/"
find "$ir" -exec touch -h -d @0 {} +
(cd "$ir" && find . | LC_ALL=C sort | cpio -o -H newc -R 0:0 --reproducible --quiet) | gzip -9n >"$out/real.cpio.gz"
du -sh "$root" "$out/root.ext4" "$out/real.cpio.gz"
