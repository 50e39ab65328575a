# libvirt: two memory domains.
bhyve -c 4 -n id=0,size=1024M,cpus=0-1 -n id=1,size=1024M,cpus=2-3,domain_policy=prefer:1 -m 2048 -A -H -P \
  -s 0:0,hostbridge -l bootrom,/usr/local/share/uefi-firmware/BHYVE_UEFI.fd -s 1:0,lpc numa
