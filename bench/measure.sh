#!/bin/bash
# measure.sh [N [ENGINE...]] - the whole comparison: N (3) rounds natively and with each engine (qemu soft; see
# run.sh) in turn, micro and real, then with two CPUs once, five boots, and the tables.
# Results stay in OUT/results.  About 5 minutes a round and engine.
set -u
here=$(cd "$(dirname "$0")" && pwd)
export OUT=${OUT:-${BHYVE_GUESTS:-$here/../guests}/bench}
n=${1:-3} res=$OUT/results
shift
engines=${*:-qemu soft}
mkdir -p "$res" && rm -f "$res"/*
steal() { awk '/^cpu / { print $9 }' /proc/stat; }
columns() { # columns PREFIX [native]: arguments for table.py
	local e
	for e in ${2-} $engines; do echo "$e=$(ls "$res/$1-$e".* | paste -sd,)"; done
}

s0=$(steal)
for i in $(seq "$n"); do
	"$OUT/bench" >"$res/micro-native.$i"
	for e in $engines; do "$here/run.sh" "$e" 1 all >"$res/micro-$e.$i"; done
	[ -e "$OUT/root.ext4" ] || continue
	"$here/real/run-real-native.sh" >"$res/real-native.$i"
	for e in $engines; do "$here/real/run-real.sh" "$e" 1 all >"$res/real-$e.$i"; done
done
for e in $engines; do
	"$here/run.sh" "$e" 2 all >"$res/smp2-$e.1"
	for i in 1 2 3 4 5; do
		"$here/run.sh" "$e" 1 none >"$res/boot-$e.$i"
		"$here/run.sh" "$e" 2 none >"$res/boot2-$e.$i"
	done
done
echo "host steal ticks during the run: $(($(steal) - s0))"
for kind in micro real smp2 boot boot2; do
	ls "$res/$kind"-* >/dev/null 2>&1 || continue
	echo "== $kind"
	case $kind in
	micro | real) "$here/table.py" $(columns $kind native) ;;
	*) "$here/table.py" $(columns $kind) ;;
	esac
done
