//! Each device's form and the keys it becomes.

use super::*;

fn parsed(name: &str, conf: Option<&str>) -> Result<String, String> {
    let device = find(DEVICES, name).expect(name);
    let mut node = Node::new();
    (device.parse)(&mut node, conf).map_err(|error| error.to_string())?;
    Ok(node.dump().replace('\n', " ").trim_end().to_owned())
}

fn check(name: &str, conf: &str, expected: &str) {
    assert_eq!(parsed(name, Some(conf)).as_deref(), Ok(expected), "{name},{conf}");
}

fn refused(name: &str, conf: &str, expected: &str) {
    assert_eq!(parsed(name, Some(conf)).as_deref().map_err(String::as_str), Err(expected), "{name},{conf}");
}

#[test]
fn the_table_is_sorted_and_aliases_lead_to_devices() {
    assert!(DEVICES.windows(2).all(|pair| pair[0].name < pair[1].name));
    for device in DEVICES {
        let target = find(DEVICES, device.device()).unwrap();
        assert!(target.alias_of.is_none(), "{}", device.name);
    }
}

#[test]
fn help_lists_one_name_per_line() {
    let text = help(DEVICES);
    for name in [
        "ahci",
        "e1000",
        "fbuf",
        "hda",
        "hostbridge",
        "lpc",
        "nvme",
        "passthru",
        "uart",
        "virtio-9p",
        "virtio-blk",
        "virtio-console",
        "virtio-input",
        "virtio-net",
        "virtio-rnd",
        "virtio-scsi",
        "xhci",
        "ahci-cd",
        "ahci-hd",
        "amd_hostbridge",
    ] {
        assert!(text.lines().any(|line| line == name), "{name}");
    }
}

#[test]
fn no_configuration_gives_no_keys() {
    for device in DEVICES.iter().filter(|device| !["amd_hostbridge", "virtio-input"].contains(&device.name)) {
        assert_eq!(parsed(device.name, None).as_deref(), Ok(""), "{}", device.name);
    }
}

#[test]
fn plain_options() {
    check("hostbridge", "vendor=0x1275,devid=0x1275", "vendor=0x1275 devid=0x1275");
    check("hostbridge", "pcireg.vendor=0x8086", "pcireg.vendor=0x8086");
    check("hda", "play=/dev/dsp0,rec=/dev/dsp0", "play=/dev/dsp0 rec=/dev/dsp0");
    check("virtio-rnd", "flag,,a=b=c,", "flag=true a=b=c");
    refused("hda", "a=1,a.b=2", "Failed to create configuration node a.b: it is a child of existing variable a");
    refused("hda", "=1", "Invalid config node name '': a key needs at least one letter");
}

#[test]
fn disks() {
    check("virtio-blk", "/dev/zvol/tank/vm", "path=/dev/zvol/tank/vm");
    check(
        "virtio-blk",
        "/a=b.img,ro,nocache,sectorsize=512/4096,ser=X1",
        "path=/a=b.img ro=true nocache=true sectorsize=512/4096 ser=X1",
    );
    check("virtio-blk", ",ro", "ro=true");
    check("nvme", "./win10.img,maxq=4,bootindex=1", "path=./win10.img maxq=4 bootindex=1");
    check("nvme", "ram=64,sectsz=4096", "ram=64 sectsz=4096");
}

#[test]
fn ahci_drives() {
    check("ahci-cd", "x.iso,ro", "port.0.type=cd port.0.path=x.iso port.0.ro=true");
    check("ahci-hd", "/d.img,ser=A1,nmrr=1", "port.0.type=hd port.0.path=/d.img port.0.ser=A1 port.0.nmrr=1");
    check(
        "ahci",
        "hd:/a.img,ro,cd:/b.iso,hd:/c.img,nocache",
        "port.0.type=hd port.0.path=/a.img port.0.ro=true port.1.type=cd port.1.path=/b.iso \
         port.2.type=hd port.2.path=/c.img port.2.nocache=true",
    );
    check("ahci", "hd:,cd:/b.iso", "port.1.type=cd port.1.path=/b.iso");
    refused("ahci", "/a.img", "Missing or invalid type for port 0: \"/a.img\": put hd: or cd: before the path");
    let many = vec!["hd:/a"; 33].join(",");
    refused("ahci", &many, "ahci: more than 32 drives");
    refused(
        "ahci-hd",
        "/a,path.b=1",
        "Failed to create configuration node port.0.path.b: it is a child of existing variable port.0.path",
    );
}

#[test]
fn network_adapters() {
    check("virtio-net", "tap0", "backend=tap0");
    check("virtio-net", "tap0,mac=58:9c:fc:00:00:01,mtu=1500", "backend=tap0 mac=58:9c:fc:00:00:01 mtu=1500");
    check("e1000", "valeA:p1", "backend=valeA:p1");
    check("e1000", "netgraph,path=br0:,peerhook=link2", "backend=netgraph path=br0: peerhook=link2");
    check(
        "virtio-net",
        "slirp,hostfwd=tcp:127.0.0.1:2222-:22;udp::53-:53,open",
        "backend=slirp hostfwd=tcp:127.0.0.1:2222-:22;udp::53-:53 open=true",
    );
    check("virtio-net", "mac=58:9c:fc:00:00:01", "mac=58:9c:fc:00:00:01");
}

#[test]
fn other_virtio_devices() {
    check("virtio-9p", "share=/export,ro", "sharename=share path=/export ro=true");
    refused("virtio-9p", "a=/a,b=/b", "virtio-9p: more than one share name given");
    check(
        "virtio-console",
        "org.qemu.guest_agent.0=/run/ga.sock,two=/run/b.sock",
        "port.0.name=org.qemu.guest_agent.0 port.0.path=/run/ga.sock port.1.name=two port.1.path=/run/b.sock",
    );
    refused("virtio-console", "lonely", "vtcon: port lonely requires a path");
    let many: Vec<String> = (0..17).map(|n| format!("p{n}=/s{n}")).collect();
    refused("virtio-console", &many.join(","), "vtcon: too many ports");
    check("virtio-input", "/dev/input/event3", "path=/dev/input/event3");
    check("virtio-input", "path=/dev/input/event3", "path=/dev/input/event3");
    assert!(parsed("virtio-input", None).is_err());
    check("virtio-scsi", "/dev/cam/ctl1.2,iid=3", "dev=/dev/cam/ctl1.2 iid=3");
    check("virtio-scsi", "dev=/d,bootindex=2", "dev=/d bootindex=2");
    check(
        "virtio-scsi",
        "/a.img,ro,/b.img,nbd://h/x,sectorsize=512/4096",
        "dev=/a.img ro=true sectorsize=512/4096 lun.1.path=/b.img lun.2.path=nbd://h/x",
    );
}

#[test]
fn frame_buffer() {
    check("fbuf", "tcp=0.0.0.0:5900,w=1280,h=720,wait", "rfb=0.0.0.0:5900 w=1280 h=720 wait=true");
    check("fbuf", "rfb=[::1]:5901,vga=off,password=secret", "rfb=[::1]:5901 vga=off password=secret");
    check("fbuf", "password=", "password=");
    let error = parsed("fbuf", Some("tcp=1,zoom=2")).unwrap_err();
    assert!(error.starts_with("Invalid fbuf emulation option \"zoom=2\"\nfbuf: "), "{error}");
}

#[test]
fn usb() {
    check("xhci", "tablet", "slot.1.device=tablet");
    check("xhci", "tablet,tablet=port=2", "slot.1.device=tablet slot.2.device=tablet slot.2.port=2");
}

#[test]
fn host_devices() {
    check("passthru", "2/0/1", "bus=2 slot=0 func=1");
    check("passthru", "pci2:0:1,rom=/r.bin", "bus=2 slot=0 func=1 rom=/r.bin");
    check("passthru", "pci0:2:0:1", "bus=2 slot=0 func=1");
    check("passthru", "ppt4,bootindex=1", "pptdev=ppt4 bootindex=1");
    for conf in ["2/0", "2/0/1/1", "pci1:2:0:1", "pci", "2:0:1", "2/32/0", "2/0/8", "-1/0/0", ""] {
        refused("passthru", conf, &format!("passthru: invalid options \"{conf}\""));
    }
}

#[test]
fn serial_port_and_host_bridge() {
    check("uart", "tcp=127.0.0.1:1234", "path=tcp=127.0.0.1:1234");
    check("uart", "stdio", "path=stdio");
    assert_eq!(parsed("amd_hostbridge", None).as_deref(), Ok("pcireg.vendor=0x1022 pcireg.device=0x7432"));
}
