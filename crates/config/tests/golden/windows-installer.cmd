# The Windows installer of the talk "FreeBSD bhyve intro" (linux.conf.au 2020): no host bridge, -l after -s.
bhyve -c 2 -s 3,ahci-cd,/images/win10.iso -s 5,ahci-cd,./virtio-win.iso \
  -s 11,fbuf,tcp=0.0.0.0:5900,w=1280,h=720,wait -s 12,xhci,tablet -s 18,virtio-net,tap0 \
  -s 20,nvme,./win10.img -s 31,lpc -l bootrom,./BHYVE_UEFI.fd -m 2G -H -w windows
