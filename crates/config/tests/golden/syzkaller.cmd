# syzkaller: a small machine on standard input and output.
bhyve -H -A -P -c 2 -m 1024M -s 0:0,hostbridge -s 1:0,lpc -s 2:0,virtio-net,tap0 -s 3:0,virtio-blk,/tmp/syz/image.img \
  -l com1,stdio syz-0
