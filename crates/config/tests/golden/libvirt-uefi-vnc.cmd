# libvirt: boot ROM with variables over QEMU's fw_cfg, VNC with password, tablet.
bhyve -c 2 -m 1024 -A -u -H -P -s 0:0,hostbridge \
  -l bootrom,/usr/local/share/uefi-firmware/BHYVE_UEFI_CODE.fd,/var/lib/libvirt/bhyve/nvram/gui_VARS.fd,fwcfg=qemu \
  -s 1:0,lpc -s 4:0,xhci,tablet -s 2:0,ahci,cd:/iso/live.iso,hd:/var/lib/libvirt/images/gui.img \
  -s 3:0,e1000,tap1,mac=52:54:00:aa:bb:02 -s 5:0,fbuf,tcp=127.0.0.1:5904,password=sesame,w=1280,h=1024,vga=io,wait gui
