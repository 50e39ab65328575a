# vm-bhyve: a FreeBSD guest prepared by bhyveload, several disks and adapters as functions of one slot.
bhyve -c 1 -m 512M -AHP -U 0d2f6a3e-6f1c-11ee-9a3c-589cfc10a3ff -u -s 0,hostbridge -s 31,lpc \
  -s 4:0,virtio-blk,/dev/zvol/zroot/vm/web/disk0,nodelete -s 4:1,ahci-hd,/vm/web/disk1.img,ser=WEB1,nmrr=1 \
  -s 5:0,virtio-net,tap0,mac=58:9c:fc:01:02:03 -s 5:1,virtio-net,tap1,mac=58:9c:fc:01:02:04,mtu=9000 \
  -l com1,/dev/nmdm-web.1A -l com2,/dev/nmdm-web.2A web
