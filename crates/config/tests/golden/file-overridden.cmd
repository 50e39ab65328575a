# A file changed by what follows it, and changing what precedes it.
bhyve -m 4G -o cpus=8 -k tests/golden/base.cfg -c 4 -s 31,lpc -o x86.mptable=off clone
