#!/bin/bash
# run.sh ENGINE [SMP [LIST]] - boots the benchmark guest; "none" as LIST only boots.
# ENGINE: qemu (its software CPU), soft or kvm (bhyve with that engine).
# Prints what the guest says on its serial line from GUEST-INIT-UP on, then one line of measures:
#   RUN init_s=.. total_s=.. rss_init_kib=.. rss_peak_kib=.. rc=..
# The environment may set OUT (where "cargo xtask guest bench" puts the guest), MEM (MiB), APPEND (more
# kernel words), ARGS (more arguments of the program), KERNEL, INITRD, LOG (a file for the whole console),
# LIMIT (seconds of silence before giving up, 600); for QEMU also QEMU, MACHINE, CPU; for bhyve also BHYVE.
set -u
here=$(cd "$(dirname "$0")" && pwd)
engine=${1:?usage: run.sh qemu|soft|kvm [SMP [LIST]]} smp=${2:-1} list=${3:-all}
out=${OUT:-${BHYVE_GUESTS:-$here/../guests}/bench}
log=${LOG:-/dev/null}
kernel=${KERNEL:-$out/vmlinuz} initrd=${INITRD:-$out/initramfs.cpio.gz}
words="console=ttyS0 ${APPEND-quiet} bench=$list"
up= init_us= rss_init= rss_peak=

case $engine in
qemu)
	good=0
	command=("${QEMU:-qemu-system-x86_64}" -accel tcg -machine "${MACHINE:-q35}" -cpu "${CPU:-max}"
		-smp "$smp" -m "${MEM:-512}" -nodefaults -no-user-config -no-reboot -display none -serial stdio
		-kernel "$kernel" -initrd "$initrd" -append "$words" ${ARGS:-})
	;;
soft | kvm)
	good=1 # bhyve's status for "powered off"
	command=("${BHYVE:-$here/../target/release/bhyve}" -A -H -P -c "$smp" -m "${MEM:-512}M"
		-s 0,hostbridge -s 31,lpc -l com1,stdio -o "cpu.engine=$engine" -o "kernel.image=$kernel"
		-o "kernel.initrd=$initrd" -o "kernel.cmdline=$words" ${ARGS:-} "bench-$$")
	;;
*) echo "run.sh: unknown engine $engine: qemu, soft or kvm" >&2 && exit 2 ;;
esac

us() { local t=$EPOCHREALTIME; echo $((${t/[.,]/})); }
hwm() { awk '/^VmHWM/ { print $2 }' "/proc/$pid/status" 2>/dev/null; }

t0=$(us)
exec {con}< <(exec "${command[@]}" </dev/null 2>&1)
pid=$!
trap 'kill $pid 2>/dev/null' EXIT
trap 'exit 1' INT TERM
: >"$log"
while IFS= read -t "${LIMIT:-600}" -r line <&$con || { r=$?; false; }; do
	line=${line%$'\r'}
	echo "$line" >>"$log"
	case $line in
	*GUEST-INIT-UP*) init_us=$(us) rss_init=$(hwm) up=1 ;;
	*BENCH-DONE*) rss_peak=$(hwm) ;;
	esac
	[ -n "$up" ] && echo "$line"
done
[ "$r" -gt 128 ] && echo "RUN silent for ${LIMIT:-600} s" && kill $pid
wait $pid
rc=$?
trap - EXIT
t1=$(us)
sec() { [ -n "$1" ] && printf '%d.%03d' $((($1 - t0) / 1000000)) $((($1 - t0) / 1000 % 1000)) || printf -; }
echo "RUN smp=$smp init_s=$(sec "$init_us") total_s=$(sec "$t1") rss_init_kib=${rss_init:--} rss_peak_kib=${rss_peak:--} rc=$rc"
[ -n "$rss_peak" ] && [ $rc = $good ]
