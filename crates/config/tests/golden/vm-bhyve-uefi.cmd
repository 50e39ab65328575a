# vm-bhyve: a UEFI guest with graphics and a null-modem console.
bhyve -c 4,sockets=1,cores=2,threads=2 -m 4G -AHPw \
  -l bootrom,/usr/local/share/uefi-firmware/BHYVE_UEFI.fd,/zroot/vm/desk/uefi-vars.fd \
  -U 30a1c1d2-6f1b-11ee-9a3c-589cfc10a3ff -u -s 0,hostbridge -s 31,lpc \
  -s 0:4:0,nvme,/zroot/vm/desk/disk0.img -s 0:5:0,e1000,tap3,mac=58:9c:fc:0a:1b:2c \
  -s 0:6:0,virtio-rnd -s 0:7:0,fbuf,tcp=0.0.0.0:5903,w=1600,h=900,vga=io,password=hidden,wait -s 0:8:0,xhci,tablet \
  -l com1,/dev/nmdm-desk.1A desk
