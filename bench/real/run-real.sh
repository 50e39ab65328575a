#!/bin/bash
# real/run-real.sh ENGINE [SMP [LIST]] - boots the real-programs guest with ../run.sh (same engines, environment
# and output), root.ext4 as a read-only virtio disk and a fresh sparse scratch disk.  CACHE: QEMU's cache=.
here=$(cd "$(dirname "$0")" && pwd)
out=$(cd "${OUT:-${BHYVE_GUESTS:-$here/../../guests}/bench}" && pwd)
scratch=$(mktemp "$out/scratch.XXXXXX")
trap 'rm -f "$scratch"' EXIT
truncate -s 128M "$scratch"
export OUT=$out INITRD=$out/real.cpio.gz
case ${1-} in
qemu)
	cache=${CACHE:-writeback}
	disks="-drive if=none,id=a,file=$out/root.ext4,format=raw,readonly=on,cache=$cache -device virtio-blk-pci,drive=a
		-drive if=none,id=b,file=$scratch,format=raw,cache=$cache -device virtio-blk-pci,drive=b"
	;;
*) disks="-s 4,virtio-blk,$out/root.ext4,ro -s 5,virtio-blk,$scratch" ;;
esac
export ARGS="$disks ${ARGS:-}"
"$here/../run.sh" "$@"
