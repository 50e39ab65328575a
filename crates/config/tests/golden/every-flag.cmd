# All flags, monitor mode, TPM, firmware items, test device.
bhyve -aACDeHIMPSuWwxY -K de_noacc -l tpm,passthru,/dev/tpm0,intf=crb -l pc-testdev -l COM3,tcp=4000 \
  -l bootrom,fw.fd,fwcfg=qemu -f opt/org.example/greeting,string=hello -s 31:0,lpc flags
