# libvirt: SMBIOS strings, some with blanks.
bhyve -c 1 -m 512 -A -H -P -s 0:0,hostbridge -s 1:0,lpc -s 2:0,virtio-blk,/images/a.img \
  -o "bios.vendor=Some Vendor" -o bios.version=7.1 -o system.manufacturer=Maker -o "system.product_name=Big Machine" \
  -o system.serial_number=S-1 -o board.asset_tag=T-1 -o chassis.sku=K-1 smbios
