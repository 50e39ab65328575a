# libvirt: a plain guest with a virtio disk, a tap interface and a serial console.
bhyve -c 1 -m 214 -A -I -u -H -P -s 0:0,hostbridge -s 1:0,lpc -s 2:0,virtio-blk,/var/lib/libvirt/images/fbsd.img \
  -s 3:0,virtio-net,tap0,mac=52:54:00:aa:bb:01 -l com1,/dev/nmdm0A fbsd
