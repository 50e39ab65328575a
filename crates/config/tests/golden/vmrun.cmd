# vmrun.sh of FreeBSD's examples: devices from slot 2, an installation medium, waiting for a debugger.
bhyve -c 1 -m 512M -H -A -P -G w1234 -s 0:0,hostbridge -s 1:0,lpc -s 2:0,virtio-net,tap0 -s 3:0,virtio-net,tap1 \
  -s 4:0,virtio-blk,./diskdev -s 31:0,ahci-cd,./release.iso -l com1,stdio vm0
