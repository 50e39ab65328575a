# libvirt: CPU topology and tuning, wired memory, unknown MSRs ignored.
bhyve -c cpus=4,sockets=2,cores=1,threads=2 -p 0:4 -p 0:5 -p 1:6 -p 3:7 -m 2048 -S -A -w -u -H -P \
  -s 0:0,hostbridge -s 2:0,ahci,hd:/var/lib/libvirt/images/tuned.img -s 1:0,lpc tuned
