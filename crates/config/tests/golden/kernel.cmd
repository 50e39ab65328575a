# Our own keys: a Linux kernel started directly, on the engine of choice.
bhyve -c2 -m1G -Hw -s 0,hostbridge -s 31,lpc -s 2,virtio-blk,disk.img -l com1,stdio -o kernel.image=vmlinuz \
  -o kernel.initrd=initrd.gz -o 'kernel.cmdline=console=ttyS0 root=/dev/vda ro' -o cpu.engine=soft linux
