# CBSD: memory in bytes, full topology, hostbridge and lpc by bus:slot:function.
bhyve -c cpus=2,sockets=1,cores=2,threads=1 -m 4294967296 -H -A -P -w -S -U c7a7a8b0-6f1d-11ee-9a3c-589cfc10a3ff \
  -s 0:0:0,hostbridge -s 0:4:0,virtio-blk,/usr/cbsd/vm/deb/dsk1.vhd,sectorsize=512/512 \
  -s 0:5:0,virtio-net,tap5,mac=00:a0:98:12:34:56 -s 0:6:0,virtio-9p,cbsd=/usr/cbsd/jails-data/deb-data \
  -s 0:30:0,fbuf,tcp=127.0.0.1:5905,w=1024,h=768,vga=off,password=cbsd -s 0:29:0,xhci,tablet -s 0:31:0,lpc \
  -l com1,/dev/nmdm5A -l bootrom,/usr/local/cbsd/upgrade/patch/efi.fd -G 0.0.0.0:4400 deb
