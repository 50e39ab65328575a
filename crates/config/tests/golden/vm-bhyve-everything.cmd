# vm-bhyve: all kinds of devices, a second bus (hence -Y), host devices (hence -S).
bhyve -c 8,sockets=1,cores=8 -m 16G -AHPw -l bootrom,/usr/local/share/uefi-firmware/BHYVE_UEFI.fd -p 0:2 -p 1:3 \
  -S -U 9a2f53d8-6f1c-11ee-9a3c-589cfc10a3ff -Y -s 0,hostbridge -s 31,lpc \
  -s 0:4:0,ahci,hd:/vm/big/d0.img,nocache,hd:/vm/big/d1.img,cd:/iso/tools.iso -s 0:5:0,virtio-scsi,/dev/cam/ctl1.2,iid=1 \
  -s 0:6:0,virtio-net,valeprivate:big,mac=58:9c:fc:00:00:10 \
  -s 0:6:1,virtio-net,netgraph,path=bridge0:,peerhook=link7,socket=vmbig -s 0:7:0,virtio-rnd \
  -s 0:8:0,passthru,4/0/0 -s 0:8:1,passthru,4/0/1,rom=/vm/big/gpu.rom \
  -s 0:9:0,fbuf,tcp=127.0.0.1:5910,vga=off -s 0:10:0,xhci,tablet -s 0:11:0,hda,play=/dev/dsp0,rec=/dev/dsp0 \
  -s 0:12:0,virtio-console,control=/vm/big/vtcon.control,log=/vm/big/vtcon.log -s 1:0:0,virtio-9p,src=/usr/src,ro \
  -s 1:1:0,virtio-input,/dev/input/event4 -s 1:2:0,uart,/dev/nmdm-big.9A big
