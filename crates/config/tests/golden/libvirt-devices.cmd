# libvirt: NVMe with an identifier, SCSI target, guest agent, user-mode network, sound, folder, host device, TCP serial.
bhyve -c 2 -m 4096 -S -A -u -H -P -s 0:0,hostbridge -s 1:0,lpc -s 2:0,nvme,/images/a.img,eui64=0x589cfc2000000001 \
  -s 2:1,virtio-scsi,/dev/cam/ctl1.2 -s 3:0,virtio-console,org.qemu.guest_agent.0=/var/run/libvirt/bhyve/agent.sock \
  -s 4:0,virtio-net,slirp,mac=52:54:00:aa:bb:03,open -s 5:0,hda,play=/dev/dsp0,rec=/dev/dsp0 \
  -s 6:0,virtio-9p,shared=/srv/shared,ro -s 7:0,passthru,3/0/0 -s 8:0,virtio-rnd \
  -l com1,/dev/nmdm1A -l com2,tcp=127.0.0.1:12345 devices
