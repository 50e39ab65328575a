//! Mistakes on the command line and in what it names: one clear line each, the exit code that front ends know, and
//! nothing left behind.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use e2e::kernel::READY;
use e2e::{Bhyve, Outcome, files, kernel};

/// A folder with what the mistakes need: a kernel, parts of a kernel, disks.
fn folder() -> tempfile::TempDir {
    let folder = files::scratch();
    let path = |name: &str| folder.path().join(name);
    kernel::write_to(folder.path());
    let debian = fs::read(files::guest_file("kernel-amd64/vmlinuz")).unwrap();
    fs::write(path("truncated"), &debian[..100_000]).unwrap();
    fs::write(path("header-only"), &debian[..0x300]).unwrap();
    symlink(files::guest_file("kernel-amd64/vmlinuz"), path("vmlinuz")).unwrap();
    fs::write(path("empty"), "").unwrap();
    fs::write(path("text"), "#!/bin/sh\n").unwrap();
    fs::write(path("bad.conf"), "cpus 4\n").unwrap();
    fs::File::create(path("disk")).unwrap().set_len(1 << 20).unwrap();
    fs::File::create(path("large")).unwrap().set_len(256 << 20).unwrap();
    folder
}

const HERE: &str = "kernel.image=kernel";

fn run(folder: &Path, args: &[&str]) -> Outcome {
    Bhyve::new(args).in_folder(folder).run()
}

/// Checks that `args` end with `code` and one line that has all `words`; nothing is left behind.
#[track_caller]
fn refused(folder: &Path, args: &[&str], code: i32, words: &[&str]) {
    let before = files::names_in(folder);
    let outcome = run(folder, args);
    let lines: Vec<_> = outcome.stderr.lines().collect();
    assert_eq!(outcome.status.code(), Some(code), "{args:?}: {outcome:?}");
    assert_eq!(lines.len(), 1, "{args:?}: {outcome:#?}");
    assert_eq!(outcome.stdout, "", "{args:?}");
    for word in words {
        assert!(lines[0].contains(word), "{args:?}: no {word:?} in {:?}", lines[0]);
    }
    assert!(!lines[0].contains("panicked"), "{args:?}: {:?}", lines[0]);
    assert_eq!(files::names_in(folder), before, "{args:?} left files behind");
}

#[test]
fn nothing_to_boot() {
    let folder = folder();
    refused(folder.path(), &["vm"], 4, &["bhyve: virtual machine cannot be booted", "bootrom", "kernel.image"]);
    refused(folder.path(), &["-s", "0,hostbridge", "-s", "31,lpc", "vm"], 4, &["virtual machine cannot be booted"]);
}

#[test]
fn processors_that_cannot_be_had() {
    let folder = folder();
    let soft = |key: &str| ["-o", "cpu.engine=soft", "-o", HERE, "-o", key, "vm"].map(str::to_owned);
    for (key, words) in [
        ("cpu.model=x86-64-v9", ["no such model", "host, x86-64-v2, x86-64-v3, x86-64-v4"]),
        ("cpu.features=-avx,+avx99", ["no feature \"avx99\"", " sse4_2 "]),
    ] {
        let args = soft(key);
        refused(folder.path(), &args.each_ref().map(String::as_str), 4, &words);
    }
}

#[test]
fn kernels_that_cannot_be_booted() {
    let folder = folder();
    let boot = |image: &str, words: &[&str]| {
        refused(folder.path(), &["-m", "256M", "-o", &format!("kernel.image={image}"), "vm"], 4, words);
    };
    boot("missing", &["kernel missing", "No such file"]);
    boot("truncated", &["kernel truncated is truncated", "100000"]);
    boot("header-only", &["kernel header-only is truncated"]);
    boot("empty", &["kernel empty is empty"]);
    boot("text", &["kernel text is of unknown format", "bzImage"]);
    boot(".", &["kernel . is not a regular file"]);
}

#[test]
fn initrds_that_cannot_be_had() {
    let folder = folder();
    let boot = |initrd: &str, words: &[&str]| {
        let initrd = format!("kernel.initrd={initrd}");
        refused(folder.path(), &["-m", "128M", "-o", "kernel.image=vmlinuz", "-o", &initrd, "vm"], 4, words);
    };
    boot("missing", &["initrd missing", "No such file"]);
    boot("empty", &["initrd empty is empty"]);
    boot("large", &["no room for the initrd of 268435456 bytes", "134217728", "-m"]);
}

#[test]
fn memory_sizes_that_make_no_sense() {
    let folder = folder();
    let start = |size: &str, code, words: &[&str]| {
        refused(folder.path(), &["-m", size, "-o", HERE, "vm"], code, words);
    };
    start("0", 64, &["invalid memsize '0'"]);
    start("0G", 64, &["invalid memsize '0G'"]);
    start("", 64, &["invalid memsize ''"]);
    start("much", 64, &["invalid memsize 'much'"]);
    start("-1", 64, &["invalid memsize '-1'"]);
    start("4GG", 64, &["invalid memsize '4GG'"]);
    start("16E", 64, &["invalid memsize '16E'"]);
    start("99999999999999999999", 64, &["invalid memsize '99999999999999999999'"]);
    start("1E", 4, &["Unable to setup memory (1152921504606846976"]);
    // Too small for any kernel.
    refused(folder.path(), &["-m", "8", "-o", "kernel.image=vmlinuz", "vm"], 4, &["guest memory", "-m"]);
}

/// Possible on a host that grants all memory asked for; elsewhere refused. Never a crash.
#[test]
fn the_largest_memory_is_taken_or_refused() {
    let folder = folder();
    let mut vm = Bhyve::small(folder.path(), &["-m", "64T", "-l", "com1,stdio"]).start();
    if vm.shows(READY) {
        vm.send("p");
        vm.expect_exit(1);
    } else {
        vm.expect_exit(4);
        vm.wait_for_error("bhyve: Unable to setup memory (70368744177664 bytes)");
    }
}

#[test]
fn disks_that_cannot_be_had() {
    let folder = folder();
    let attach = |disk: &str, words: &[&str]| {
        let slot = format!("3:0,virtio-blk,{disk}");
        refused(folder.path(), &["-s", &slot, "-o", HERE, "vm"], 4, words);
    };
    attach("missing", &["pci slot 0:3:0", "Could not open backing file: missing", "No such file"]);
    attach(".", &["Could not open backing file: .", "directory"]);
    attach("", &["No \"path\""]);
    attach("disk,bogus", &["Invalid device option \"bogus\""]);
    attach("disk,sectorsize=100", &["Invalid sector size"]);
    attach("disk,iops=none", &["iops"]);
    attach("disk,bps=-1", &["bps"]);
    attach("disk,aio=native", &["aio", "io_uring", "threads"]);
    attach("disk,format=vmdk", &["format", "raw", "qcow2"]);
    attach("disk,format=qcow2", &["cannot use this qcow2 image", "format=raw"]);
    attach("missing.qcow2", &["Could not open backing file: missing.qcow2", "No such file"]);
    attach("nbd://localhost:0/x", &["Invalid NBD server \"nbd://localhost:0/x\": bad port"]);
    attach("nbds://localhost/x", &["TLS"]);
    attach("nbd+unix:///x", &["the socket is missing", "nbd+unix:///EXPORT?socket=PATH"]);
    attach("nbd+unix:///x?socket=gone", &["cannot use NBD server nbd+unix:///x?socket=gone", "No such file"]);
    attach("nbd+unix:///x?socket=disk", &["cannot use NBD server", "Connection refused"]);
    attach("nbd+unix:///x?socket=gone,format=qcow2", &["format=qcow2 is for files"]);
    refused(folder.path(), &["-s", "3,virtio-blk", "-o", HERE, "vm"], 4, &["No \"path\""]);
}

#[test]
fn scsi_disks_that_cannot_be_had() {
    let folder = folder();
    let attach = |disks: &str, words: &[&str]| {
        let slot = format!("3:0,virtio-scsi{disks}");
        refused(folder.path(), &["-s", &slot, "-o", HERE, "vm"], 4, words);
    };
    attach("", &["pci slot 0:3:0", "/dev/cam/ctl is FreeBSD's CAM target layer", "virtio-scsi,/vm/disk.img"]);
    attach(",/dev/cam/ctl1.2,iid=3", &["/dev/cam/ctl1.2 is FreeBSD's CAM target layer"]);
    attach(",./missing", &["Could not open backing file: ./missing"]);
    attach(",./disk,./missing", &["Could not open backing file: ./missing"]);
    attach(",./disk,./disk", &["./disk: in use by"]);
    attach(",./disk,bogus", &["Invalid device option \"bogus\""]);
    attach(",./disk,queues=99", &["queues"]);
}

#[test]
fn networks_that_cannot_be_had() {
    let folder = folder();
    let attach = |network: &str, words: &[&str]| {
        let slot = format!("3:0,virtio-net,{network}");
        refused(folder.path(), &["-s", &slot, "-o", HERE, "vm"], 4, words);
    };
    attach("bridge0", &["pci slot 0:3:0", "\"bridge0\" is no network", "slirp"]);
    attach("netgraph,path=br:,peerhook=a", &["netgraph exists only on FreeBSD"]);
    attach("netmap:eth0", &["netmap exists only on FreeBSD"]);
    attach("tap-with-a-long-name", &["tap-with-a-long-name", "15 characters"]);
    attach("tap0,mac=01:00:00:00:00:01", &["Invalid MAC 01:00:00:00:00:01"]);
    attach("tap0,mac=zz", &["Invalid MAC zz"]);
    attach("tap0,mtu=1", &["mtu", "68"]);
    attach("tap0,queues=0", &["queues"]);
    attach("slirp,hostfwd=tcp:localhost:1-:2", &["hostfwd", "\"localhost:1\" is no address and port"]);
    attach("slirp,open=perhaps", &["open", "perhaps"]);
    attach("slirp,dns=here", &["dns=\"here\"", "name server"]);
    attach("unix:missing.socket", &["cannot connect to missing.socket", "No such file"]);
    attach("unix:disk", &["cannot connect to disk"]);
    attach("vale0", &["vale0", "valeX:PORT"]);
    attach("vale0:a/b", &["vale0:a/b", "valeX:PORT"]);
    attach("unix:disk,listen", &["disk", "in use"]);
    attach("vhost-user:gone", &["cannot connect to the vhost-user back end at gone", "No such file"]);
    attach("vhost-user:disk", &["cannot connect to the vhost-user back end at disk", "Connection refused"]);
    attach("vhost-user:gone,memory", &["Invalid device option \"memory\""]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    attach(&format!("slirp,hostfwd=tcp:{address}-:22"), &["cannot listen on tcp", &address.to_string(), "in use"]);
    attach("tap0,colour=red", &["Invalid device option \"colour\""]);
}

#[test]
fn folders_that_cannot_be_shared() {
    let folder = folder();
    let attach = |device: &str, words: &[&str]| {
        let slot = format!("3:0,{device}");
        refused(folder.path(), &["-s", &slot, "-o", HERE, "vm"], 4, words);
    };
    attach("virtio-9p,tag=missing", &["pci slot 0:3:0", "missing", "the path must be absolute"]);
    attach("virtio-9p,tag=/missing/folder", &["/missing/folder", "No such file"]);
    attach(&format!("virtio-9p,tag={}", folder.path().join("disk").display()), &["disk", "it is not a folder"]);
    attach("virtio-9p", &["virtio-9p"]);
    attach("virtio-fs,tag", &["name a folder or the socket of a virtiofsd"]);
    attach("virtio-fs", &["the tag must have 1 to 36 bytes"]);
    attach("virtio-fs,tag,path=missing", &["cannot share the folder missing", "No such file"]);
    attach("virtio-fs,tag,path=disk", &["cannot share the folder disk", "directory"]);
    attach("virtio-fs,tag,path=.,virtiofsd=./disk", &["cannot start ./disk", "Permission denied"]);
    attach("virtio-fs,tag,path=.,virtiofsd=/bin/true", &["/bin/true has ended (exit status: 0)"]);
    attach("virtio-fs,tag,socket=missing", &["cannot connect to the vhost-user back end at missing"]);
    attach("virtio-fs,tag,socket=disk,queues=99", &["queues"]);
}

#[test]
fn channels_that_cannot_be_had() {
    let folder = folder();
    let attach = |device: &str, words: &[&str]| {
        let slot = format!("3:0,{device}");
        refused(folder.path(), &["-s", &slot, "-o", HERE, "vm"], 4, words);
    };
    attach("virtio-console,port=./disk", &["pci slot 0:3:0", "port", "disk", "in use"]);
    attach("virtio-console,port=./missing/socket", &["port", "missing/socket", "No such file"]);
    attach("virtio-console,port=tcp=localhost:1", &["port", "\"localhost\" is not an IP address"]);
    attach("virtio-console,port", &["port port requires a path"]);
    attach("virtio-vsock", &["virtio-vsock"]);
    attach("virtio-vsock,missing/socket", &["missing/socket", "No such file"]);
    attach("virtio-vsock,socket,cid=2", &["cid"]);
    attach("virtio-balloon,size=much", &["size", "much"]);
    attach("virtio-balloon,size=64G", &["leaves nothing"]);
    attach("virtio-balloon,control=missing/socket", &["control", "missing/socket", "No such file"]);
    attach("virtio-input", &["virtio-input: name the event device"]);
    attach("virtio-input,/dev/input/none", &["/dev/input/none", "No such file"]);
    attach("virtio-input,disk", &["disk"]);
    attach("virtio-input,unix:disk", &["unix:disk", "Connection refused"]);
}

#[test]
fn a_disk_is_not_given_to_two_vms() {
    let folder = folder();
    let disk = ["-s", "3,virtio-blk,disk", "-l", "com1,stdio"];
    let mut first = Bhyve::small(folder.path(), &disk).start();
    first.wait_for(READY);
    let words = ["disk: in use by process", "bhyve: small"];
    refused(folder.path(), &["-s", "3,virtio-blk,disk", "-o", HERE, "second"], 4, &words);
    first.send("p");
    first.expect_exit(1);
}

/// A disk that may only be read is attached read-only, as bhyve does, and that is said.
#[test]
fn a_disk_without_write_permission_is_read_only() {
    let folder = folder();
    let disk = folder.path().join("disk");
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o444)).unwrap();
    let mut bhyve = Bhyve::small(folder.path(), &["-s", "3,virtio-blk,disk", "-l", "com1,stdio"]);
    if rustix::process::geteuid().is_root() {
        // Nothing is forbidden to root. Another user may not be able to reach the program where it is.
        let program = folder.path().join("bhyve");
        // Another process makes the copy: a child that another test starts just now would inherit the file, open for
        // writing, and until it has let go of that nobody can run the copy.
        let copied = Command::new("cp").arg(files::program()).arg(&program).status().unwrap();
        assert!(copied.success(), "cp: {copied}");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        bhyve = bhyve.with_program(&program).as_user(65534);
    }
    let mut vm = bhyve.start();
    vm.wait_for(READY);
    vm.wait_for_error("disk");
    vm.wait_for_error("read-only disk");
    vm.send("p");
    vm.expect_exit(1);
    vm.check(!vm.stderr().contains("panicked"), "it panicked");
}

#[test]
fn options_that_do_not_exist() {
    let folder = folder();
    for (args, first) in [
        (&["-z", "vm"][..], "bhyve: illegal option -- z"),
        (&["-AHz", "vm"], "bhyve: illegal option -- z"),
        (&["-m"], "bhyve: option requires an argument -- m"),
        (&["one", "two"], "Usage: bhyve [-"),
        (&[], "Usage: bhyve [-"),
        (&[""], "Usage: bhyve [-"),
    ] {
        let outcome = run(folder.path(), args);
        assert_eq!(outcome.status.code(), Some(1), "{args:?}: {outcome:?}");
        assert!(outcome.stderr.starts_with(first), "{args:?}: {outcome:?}");
        assert!(outcome.stderr.contains("Usage: bhyve [-") && outcome.stdout.is_empty(), "{args:?}: {outcome:?}");
    }
    refused(folder.path(), &["-o", "no-value", "vm"], 64, &["bhyve: invalid configuration option 'no-value'"]);
    refused(folder.path(), &["-k", "missing", "vm"], 4, &["Failed to open configuration file missing"]);
    refused(folder.path(), &["-k", "bad.conf", "vm"], 4, &["bad.conf line 1", "cpus 4"]);
    refused(folder.path(), &["-U", "12345", "-o", HERE, "vm"], 4, &["-U: \"12345\""]);
}

#[test]
fn slots_and_devices() {
    let folder = folder();
    let start = |slots: &[&str], words: &[&str]| {
        let mut args: Vec<_> = slots.iter().flat_map(|slot| ["-s", slot]).collect();
        args.extend(["-o", HERE, "vm"]);
        refused(folder.path(), &args, 4, words);
    };
    start(&["3,virtio-rnd", "0:3:0,virtio-rnd"], &["pci slot 0:3:0 already occupied!"]);
    start(&["32,virtio-rnd"], &["Invalid PCI slot info field \"32,virtio-rnd\""]);
    start(&["3:8,virtio-rnd"], &["Invalid PCI slot info field"]);
    start(&["3"], &["Invalid PCI slot info field \"3\""]);
    start(&["3,ne2k"], &["pci slot 0:3:0: unknown device \"ne2k\""]);
    start(&["30,lpc", "31,lpc"], &["Only one LPC bridge is allowed."]);
}

#[test]
fn what_is_known_but_not_built_is_said_in_one_line() {
    let folder = folder();
    let start = |option: &[&str], what: &str| {
        let args = [option, &["-o", HERE, "vm"]].concat();
        refused(folder.path(), &args, 4, &[what, "not available in this build yet"]);
    };
    for device in [
        "ahci,hd:disk",
        "ahci-cd,disk",
        "e1000,tap0",
        "fbuf",
        "hda",
        "nvme,disk",
        "passthru,1/2/3",
        "uart,stdio",
        "xhci,tablet",
    ] {
        let name = device.split(',').next().unwrap_or(device).trim_end_matches("-cd");
        start(&["-s", &format!("3,{device}")], &format!("pci slot 0:3:0: {name}"));
    }
    start(&["-G", "1234"], "-G");
    start(&["-M"], "-M");
    refused(folder.path(), &["-r", "checkpoint", "-o", HERE, "vm"], 1, &["checkpoint", "snapshots"]);
}

#[test]
fn numa_domains_that_cannot_be() {
    let folder = folder();
    let start = |domains: &[&str], code, word: &str| {
        let domains: Vec<_> = domains.iter().flat_map(|domain| ["-n", domain]).collect();
        refused(folder.path(), &[&domains[..], &["-c", "2", "-o", HERE, "vm"]].concat(), code, &[word]);
    };
    start(&["id=1,size=16M,cpus=0"], 64, "domain 1 is given but domain 0 is not");
    start(&["id=0,size=16M"], 4, "domains.0.cpus is not set");
    start(&["id=0,size=lots,cpus=0"], 64, "invalid memsize 'lots'");
    start(&["id=0,size=16M,cpus=0-2"], 64, "vCPU 2 cannot be in NUMA domain 0: there are 2 vCPUs");
    start(&["id=0,size=16M,cpus=0", "id=1,size=16M,cpus=0-1"], 64, "vCPU 0 cannot be in NUMA domain 1");
    start(&["id=0,size=16M,cpus=0,domain_policy=near"], 64, "failed to parse domain policy 'near'");
    start(&["id=0,size=16M,cpus=0,domain_policy=prefer:4000"], 64, "the host has no memory on NUMA node 4000");
    start(&["id=0,size=15E,cpus=0", "id=1,size=15E,cpus=1"], 64, "add up to more");
    refused(folder.path(), &["-n", "id=0,size=16M,cpus=0", "vm"], 64, &["NUMA emulation requires a boot ROM"]);
}

#[test]
fn boot_roms_that_cannot_be() {
    let folder = folder();
    let file = |name: &str, size| fs::File::create(folder.path().join(name)).unwrap().set_len(size).unwrap();
    file("rom.fd", 0x2000);
    file("odd.fd", 0x2001);
    file("large.fd", (16 << 20) + 0x1000);
    file("vars.fd", 0x1000);
    let rom = |bootrom: &str, words: &[&str]| {
        refused(folder.path(), &["-l", &format!("bootrom,{bootrom}"), "vm"], 4, words);
    };
    rom("nowhere.fd", &["Error opening bootrom \"nowhere.fd\"", "No such file"]);
    rom("empty", &["Invalid bootrom size 0"]);
    rom("odd.fd", &["odd.fd", "Invalid bootrom size 8193"]);
    rom("large.fd", &["Invalid bootrom size"]);
    rom("rom.fd,nowhere.fd", &["Error opening bootvars \"nowhere.fd\"", "No such file"]);
    rom("rom.fd,odd.fd", &["Invalid bootvars size 8193"]);
    rom("rom.fd,large.fd", &["Invalid bootvars size"]);
    rom("rom.fd,.", &["Error opening bootvars \".\""]);
    rom("rom.fd,vars.fd,fwcfg=uefi", &["lpc.fwcfg", "qemu"]);
    let long = format!("{},string=x", "n".repeat(56));
    let outcome = run(folder.path(), &["-l", "bootrom,rom.fd", "-f", &long, "vm"]);
    assert_eq!(outcome.status.code(), Some(64), "{outcome:?}");
    assert!(outcome.stderr.contains("fw_cfg name too long"), "{outcome:?}");
    if !rustix::process::geteuid().is_root() {
        // Root may write to it.
        fs::set_permissions(folder.path().join("vars.fd"), fs::Permissions::from_mode(0o444)).unwrap();
        rom("rom.fd,vars.fd", &["Error opening bootvars \"vars.fd\"", "Permission denied"]);
    }
}

#[test]
fn topologies() {
    let folder = folder();
    let start = |topology: &str, code, words: &[&str]| {
        refused(folder.path(), &["-c", topology, "-o", HERE, "vm"], code, words);
    };
    start("4,cores=2", 4, &["Topology (4 sockets, 2 cores, 1 threads) does not match 4 vCPUs"]);
    start("lanes=2", 64, &["bhyve: invalid cpu topology 'lanes=2'"]);
    start("0", 4, &["cpus", "'0'"]);
    start("two", 4, &["cpus", "'two'"]);
    start("65536", 4, &["cpus", "'65536'"]);
    start("1000", 4, &["1000 vCPUs requested but only 254 available"]);
}

#[test]
fn names() {
    let folder = folder();
    let start = |name: &str, words: &[&str]| refused(folder.path(), &["-o", HERE, name], 4, words);
    start("a/b", &["\"a/b\" cannot be the name of a VM", "slash"]);
    start(&"n".repeat(230), &["cannot be the name of a VM", "longer than 229"]);
    // The longest is fine.
    let mut vm = Bhyve::new(["-m", "16M", "-s", "31,lpc", "-l", "com1,stdio", "-o", HERE, &"n".repeat(229)])
        .in_folder(folder.path())
        .start();
    vm.wait_for(READY);
    vm.send("p");
    vm.expect_exit(1);
}

#[test]
fn serial_ports() {
    let folder = folder();
    let start = |backend: &str, code, words: &[&str]| {
        refused(folder.path(), &["-s", "31,lpc", "-l", backend, "-o", HERE, "vm"], code, words);
    };
    start("com5,stdio", 64, &["bhyve: invalid lpc device configuration 'com5,stdio'"]);
    start("com1", 64, &["bhyve: invalid lpc device configuration 'com1'"]);
    start("com1,missing", 4, &["com1", "missing"]);
    start("com2,/dev/nmdm0", 4, &["com2", "/dev/nmdm0", "null-modem"]);
    start("com1,./disk", 4, &["com1", "disk"]);
    start("com1,file:missing/log", 4, &["com1", "missing/log", "No such file"]);
    start("com1,unix:missing/socket", 4, &["com1", "missing/socket", "No such file"]);
    start("com1,unix:disk", 4, &["com1", "disk", "in use"]);
    start("com1,pty:disk", 4, &["com1", "disk", "exists"]);
    start("com1,/dev/null/x", 4, &["com1", "/dev/null/x"]);
    start("com1,tcp=localhost:x", 4, &["com1", "tcp="]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    start(&format!("com1,tcp={port}"), 4, &["com1", &port.to_string(), "in use"]);
    let args = ["-s", "31,lpc", "-l", "com1,stdio", "-l", "com2,stdio", "-o", HERE, "vm"];
    refused(folder.path(), &args, 4, &["com2", "stdio"]);
}

/// What libvirt runs at its start: it looks at standard error, and expects an end at once, without a signal.
#[test]
fn capability_probes_of_libvirt() {
    let folder = folder();
    let probe = |args: &[&str]| {
        let outcome = run(folder.path(), args);
        assert!(outcome.status.code().is_some(), "{args:?} died: {outcome:?}");
        outcome
    };
    let help = probe(&["-h"]);
    assert_eq!((help.status.code(), help.stdout.as_str()), (Some(0), ""));
    assert!(help.stderr.contains("-u:") && !help.stderr.contains("-c vcpus"), "{help:?}");
    for device in ["ahci", "e1000", "fbuf", "xhci", "hda", "virtio-rnd", "virtio-9p"] {
        let outcome = probe(&["-s", &format!("0,{device}")]);
        assert_eq!(outcome.status.code(), Some(1));
        assert!(!outcome.stderr.contains("unknown device"), "{outcome:?}");
    }
    assert!(probe(&["-s", "0,ne2k"]).stderr.contains("pci slot 0:0:0: unknown device \"ne2k\""));
    let rom = probe(&["-l", "bootrom"]);
    assert!(!rom.stderr.contains("bhyve: invalid lpc device configuration 'bootrom'"), "{rom:?}");
    let password = probe(&["-s", "0,fbuf,password="]);
    assert!(!password.stderr.contains("Invalid fbuf emulation \"password\""), "{password:?}");
}

#[test]
fn lists_go_to_standard_output() {
    let folder = folder();
    for (args, name) in [(["-s", "help"], "virtio-blk"), (["-l", "help"], "com1"), (["-s", "h"], "hostbridge")] {
        let outcome = run(folder.path(), &args);
        assert_eq!((outcome.status.code(), outcome.stderr.as_str()), (Some(0), ""), "{args:?}");
        assert!(outcome.stdout.lines().any(|line| line.contains(name)), "{args:?}: {outcome:?}");
    }
}
