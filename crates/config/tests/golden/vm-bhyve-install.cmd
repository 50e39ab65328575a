# vm-bhyve: an installation in the foreground on an AMD host; flags repeat, -S is given twice.
bhyve -c 2 -m 1024M -AHPww -S -l bootrom,/usr/local/share/uefi-firmware/BHYVE_UEFI.fd -S \
  -U 5f0b8a54-6f1c-11ee-9a3c-589cfc10a3ff -s 0,amd_hostbridge -s 31,lpc -s 0:4:0,virtio-blk,/vm/obsd/disk0.img \
  -s 0:5:0,virtio-net,tap2,mac=58:9c:fc:0c:0d:0e -s 3:0,ahci-cd,/iso/install75.iso,ro -l com1,stdio obsd
