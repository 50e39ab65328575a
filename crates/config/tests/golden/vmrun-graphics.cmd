# vmrun.sh with a screen: the frame buffer lies at slot 29.
bhyve -c 4,cores=2,sockets=2 -m 4G -H -A -P -w -s 0:0,hostbridge -s 1:0,lpc -s 2:0,e1000,tap0 -s 3:0,ahci-hd,/dev/zvol/tank/win \
  -s 29:0,fbuf,tcp=0.0.0.0:5900,w=800,h=600,vga=io -s 30:0,xhci,tablet -l com1,stdio \
  -l bootrom,/usr/local/share/uefi-firmware/BHYVE_UEFI.fd win
