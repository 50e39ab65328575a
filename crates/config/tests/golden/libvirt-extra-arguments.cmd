# libvirt: local time, no ACPI flag, the user's own arguments before the name.
bhyve -c 1 -m 256 -H -P -s 0:0,hostbridge -s 1:0,lpc -s 2:0,ahci,cd:/iso/rescue.iso -G 127.0.0.1:6000 -o keyboard.layout=fr \
  -s 30:0,hda extra
