//! Every option, the order in which they act, and how mistakes end.

use std::os::unix::ffi::OsStringExt;
use std::sync::{Arc, Mutex};

use super::*;
use crate::store::NoWarnings;

fn run(words: &[&str]) -> Result<Config, Exit> {
    parse_command_line(words.iter().map(OsString::from), legacy::DEVICES, NoWarnings)
}

/// The tree without what is there from the start.
fn tree(words: &[&str]) -> String {
    let words: Vec<&str> = words.iter().copied().chain(["vm0"]).collect();
    let config = run(&words).unwrap_or_else(|exit| panic!("{words:?}: {exit:?}"));
    let defaults = Config::with_defaults(NoWarnings).dump();
    let fresh = config.dump();
    let mut lines: Vec<&str> = fresh.lines().filter(|line| !defaults.lines().any(|old| old == *line)).collect();
    assert_eq!(lines.pop(), Some("name=vm0"));
    lines.join(" ")
}

fn failure(words: &[&str]) -> (u8, String) {
    let exit = run(words).expect_err("must end");
    assert!(exit.stdout.is_empty(), "{exit:?}");
    (exit.code, exit.stderr)
}

fn is_usage((code, text): &(u8, String), expected: u8) {
    assert_eq!(*code, expected);
    assert!(text.contains("Usage: bhyve [-aCDeHhPSuWwxY]\n"), "{text}");
}

#[test]
fn each_flag_stores_its_key() {
    for (flag, keys) in [
        ("-a", "x86.x2apic=false"),
        ("-A", ""),
        ("-C", "memory.guest_in_core=true"),
        ("-D", "destroy_on_poweroff=true"),
        ("-e", "x86.strictio=true"),
        ("-H", "x86.vmexit_on_hlt=true"),
        ("-I", ""),
        ("-M", "monitor=true"),
        ("-P", "x86.vmexit_on_pause=true"),
        ("-S", "memory.wired=true"),
        ("-u", "rtc.use_localtime=false"),
        ("-W", "virtio_msix=false"),
        ("-w", "x86.strictmsr=false"),
        ("-ww", "x86.strictmsr=false"),
        ("-x", "x86.x2apic=true"),
        ("-Y", "x86.mptable=false"),
    ] {
        assert_eq!(tree(&[flag]), keys, "{flag}");
    }
}

#[test]
fn options_with_arguments_store_their_keys() {
    for (words, keys) in [
        (&["-m", "2G"][..], "memory.size=2G"),
        (&["-m512"], "memory.size=512"),
        (&["-K", "de_noacc"], "keyboard.layout=de_noacc"),
        (&["-U", "6b6a3d1b-6a67-4f0a-9b0e-7f3f4f0c9d11"], "uuid=6b6a3d1b-6a67-4f0a-9b0e-7f3f4f0c9d11"),
        (&["-o", "a.b=c=d"], "a.b=c=d"),
        (&["-o", "kernel.cmdline=console=ttyS0 quiet"], "kernel.cmdline=console=ttyS0 quiet"),
        (&["-o", "cpu.engine=soft"], "cpu.engine=soft"),
    ] {
        assert_eq!(tree(words), keys, "{words:?}");
    }
}

#[test]
fn topology_option() {
    for (argument, keys) in [
        ("2", "cpus=2"),
        ("cpus=4,sockets=2,cores=2", "cpus=4 sockets=2 cores=2"),
        ("threads=2,8,cores=0x4", "threads=2 cpus=8 cores=0x4"),
        ("2,cpus=3,4", "cpus=4"),
        ("", "sockets=1 cores=1 threads=1 cpus=1"),
    ] {
        assert_eq!(tree(&["-c", argument]), keys, "{argument}");
    }
    let expected = (64, "bhyve: invalid cpu topology '2,clusters=1'\n".to_owned());
    assert_eq!(failure(&["-c", "2,clusters=1", "vm0"]), expected);
}

#[test]
fn pinning_accumulates() {
    assert_eq!(tree(&["-p", "0:2", "-p", "1:3", "-p", "0:4"]), "vcpu.0.cpuset=2,4 vcpu.1.cpuset=3");
    assert_eq!(tree(&["-p", "0-1:4-5"]), "vcpu.0.cpuset=4 vcpu.1.cpuset=5");
    for argument in ["", "1", "a:1", "1:a", "-1:0", "0:1024", "65536:0", "0:-1", "1:2:3", "0-1:3", "0-1:3-5", "1-0:3-2"]
    {
        let (code, text) = failure(&["-p", argument, "vm0"]);
        assert_eq!(code, 64, "{argument}");
        let last = format!("bhyve: invalid vcpu pinning configuration '{argument}'\n");
        assert!(text.ends_with(&last), "{text}");
    }
    let (_, text) = failure(&["-p", "0:1024", "vm0"]);
    assert!(text.starts_with("hostcpu '1024' outside valid range from 0 to 1023\n"), "{text}");
}

#[test]
fn numa_domains() {
    assert_eq!(
        tree(&["-n", "id=0,size=1G,cpus=0-1", "-n", "cpus=2,3,id=0x1,domain_policy=prefer:1"]),
        "domains.0.size=1G domains.0.cpus=0-1 domains.1.cpus=2,3 domains.1.domain_policy=prefer:1"
    );
    let (code, text) = failure(&["-n", "size=1G,cpus=0", "vm0"]);
    assert_eq!(code, 64);
    assert_eq!(
        text,
        "Missing NUMA domain ID in 'size=1G,cpus=0'\nbhyve: invalid NUMA configuration 'size=1G,cpus=0'\n"
    );
    for argument in ["", "id=0,memory=1G", "id=0,3"] {
        assert_eq!(failure(&["-n", argument, "vm0"]).0, 64, "{argument}");
    }
    for argument in ["id=256", "id=-1", "id=x", "id="] {
        let (code, text) = failure(&["-n", argument, "vm0"]);
        assert_eq!(code, 4);
        assert!(text.starts_with("bhyve: Invalid value for id: '"), "{text}");
    }
    let (code, text) = failure(&["-o", "acpi_tables=false", "-n", "id=0", "vm0"]);
    assert_eq!((code, text.as_str()), (64, "bhyve: NUMA emulation requires ACPI\n"));
}

#[test]
fn debug_server() {
    for (argument, keys) in [
        ("1234", "gdb.port=1234"),
        ("w1234", "gdb.wait=true gdb.port=1234"),
        ("w127.0.0.1:1234", "gdb.wait=true gdb.address=127.0.0.1 gdb.port=1234"),
        ("[::1]:1234", "gdb.address=[::1] gdb.port=1234"),
        ("w", "gdb.wait=true"),
    ] {
        assert_eq!(tree(&["-G", argument]), keys, "{argument}");
    }
}

#[test]
fn fwcfg_items() {
    let config = run(&["-f", "opt/a,string=Hello", "-f", "name=opt/b,string=", "vm0"]).unwrap();
    let items: Vec<(&str, &[u8])> = config.fwcfg_items().iter().map(|i| (i.name.as_str(), &i.data[..])).collect();
    assert_eq!(items, [("opt/a", &b"Hello\0"[..]), ("opt/b", b"\0")]);

    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let config = run(&["-f", &format!("opt/c,file={file}"), "vm0"]).unwrap();
    assert_eq!(config.fwcfg_items()[0].data, std::fs::read(file).unwrap());

    let long = format!("{},string=x", "n".repeat(56));
    for argument in ["", "a", "a,b", "a,text=b", ",string=x", "a,file=/nonexistent", "a,file=/dev/zero", &long] {
        let (code, text) = failure(&["-f", argument, "vm0"]);
        assert_eq!(code, 64, "{argument}");
        assert!(text.ends_with(&format!("bhyve: invalid fwcfg item '{argument}'\n")), "{text}");
    }
    let longest = format!("{},string=x", "n".repeat(55));
    assert_eq!(run(&["-f", &longest, "vm0"]).unwrap().fwcfg_items().len(), 1);
}

#[test]
fn slots() {
    assert_eq!(tree(&["-s", "31,lpc"]), "pci.0.31.0.device=lpc");
    assert_eq!(tree(&["-s", "0:4:0,virtio-blk,/d.img"]), "pci.0.4.0.device=virtio-blk pci.0.4.0.path=/d.img");
    assert_eq!(tree(&["-s", "2:3,virtio-rnd"]), "pci.0.2.3.device=virtio-rnd");
    assert_eq!(
        tree(&["-s", "3,ahci-cd,x.iso,ro"]),
        "pci.0.3.0.device=ahci pci.0.3.0.port.0.type=cd pci.0.3.0.port.0.path=x.iso pci.0.3.0.port.0.ro=true"
    );
    for argument in ["lpc", "32,lpc", "0:8,lpc", "256:0:0,lpc", ",lpc", "x,lpc", "1:2:3:4,lpc", "-1,lpc"] {
        let expected = (4, format!("Invalid PCI slot info field \"{argument}\"\n"));
        assert_eq!(failure(&["-s", argument, "vm0"]), expected);
    }
    let text = |text: &str| (4, text.to_owned());
    assert_eq!(failure(&["-s", "3,tulip"]), text("pci slot 0:3:0: unknown device \"tulip\"\n"));
    assert_eq!(failure(&["-s", "1:3:7,"]), text("pci slot 1:3:7: unknown device \"\"\n"));
    assert_eq!(failure(&["-s", "3,lpc", "-s", "0:3:0,nvme,x"]), text("pci slot 0:3:0 already occupied!\n"));
    assert_eq!(
        failure(&["-s", "4,hda,a=1,a.b=2"]),
        text(
            "bhyve: Failed to create configuration node pci.0.4.0.a.b: it is a child of existing variable pci.0.4.0.a\n"
        )
    );
    assert_eq!(failure(&["-o", "pci=1", "-s", "4,hda"]).0, 4);
}

#[test]
fn lpc_devices() {
    for (argument, keys) in [
        ("com1,stdio", "lpc.com1.path=stdio"),
        ("COM4,tcp=127.0.0.1:1234", "lpc.com4.path=tcp=127.0.0.1:1234"),
        ("bootrom", "bootrom=auto"),
        ("bootrom,/fw.fd", "bootrom=/fw.fd"),
        ("BootROM,/fw.fd,/vars.fd", "bootrom=/fw.fd bootvars=/vars.fd"),
        ("bootrom,/fw.fd,fwcfg=qemu", "lpc.fwcfg=qemu bootrom=/fw.fd"),
        ("bootrom,/fw.fd,/vars.fd,fwcfg=qemu", "lpc.fwcfg=qemu bootrom=/fw.fd bootvars=/vars.fd"),
        ("tpm,passthru,/dev/tpm0", "tpm.type=passthru tpm.path=/dev/tpm0 tpm.version=2.0"),
        ("tpm,swtpm,/run/s,version=2.0,intf=crb", "tpm.type=swtpm tpm.path=/run/s tpm.version=2.0 tpm.intf=crb"),
        ("pc-testdev", "lpc.pc-testdev=true"),
    ] {
        assert_eq!(tree(&["-l", argument]), keys, "{argument}");
    }
    for argument in ["com5,stdio", "com1", "com1,", "floppy", "fwcfg,qemu", ",x"] {
        let expected = (64, format!("bhyve: invalid lpc device configuration '{argument}'\n"));
        assert_eq!(failure(&["-l", argument, "vm0"]), expected);
    }
    for (argument, what) in [("bootrom,", "bootrom option"), ("tpm", "tpm type"), ("tpm,swtpm", "tpm path")] {
        let expected = (4, format!("bhyve: invalid {what} \"{argument}\"\n"));
        assert_eq!(failure(&["-l", argument, "vm0"]), expected);
    }
}

#[test]
fn listings() {
    for argument in ["help", "hel", "h", ""] {
        let exit = run(&["-s", argument, "-z"]).unwrap_err();
        assert_eq!((exit.code, exit.stderr.as_str()), (0, ""));
        assert!(exit.stdout.starts_with("ahci\n"), "{}", exit.stdout);
        let exit = run(&["-l", argument]).unwrap_err();
        assert_eq!((exit.code, exit.stderr.as_str()), (0, ""));
        assert_eq!(exit.stdout, "bootrom\ncom1\ncom2\ncom3\ncom4\ntpm\npc-testdev\n");
    }
    assert_eq!(failure(&["-s", "helper"]).0, 4);
    assert_eq!(failure(&["-l", "helper"]).0, 64);
}

#[test]
fn help_and_mistakes_show_the_usage() {
    is_usage(&failure(&["-h"]), 0);
    is_usage(&failure(&["-AHh", "vm0"]), 0);
    is_usage(&failure(&[]), 1);
    is_usage(&failure(&["vm0", "vm1"]), 1);
    is_usage(&failure(&["vm0", "-H"]), 1);
    is_usage(&failure(&[""]), 1);
    for letter in ["-b", "-g", "-L", "-T", "-i", "-z", "-N", "--help", "-\u{fc}"] {
        let found = failure(&[letter, "vm0"]);
        is_usage(&found, 1);
        assert!(found.1.starts_with("bhyve: illegal option -- "), "{}", found.1);
    }
    for letter in WITH_ARGUMENT {
        let found = failure(&[&format!("-{}", *letter as char)]);
        is_usage(&found, 1);
        assert!(found.1.starts_with(&format!("bhyve: option requires an argument -- {}\n", *letter as char)));
    }
}

#[test]
fn the_name_is_operand_or_key() {
    assert_eq!(run(&["-o", "name=one"]).unwrap().get_str("name").as_deref(), Some("one"));
    assert_eq!(run(&["-o", "name=one", "two"]).unwrap().get_str("name").as_deref(), Some("two"));
    assert_eq!(run(&["-o", "name=%(x)", "-o", "x=y"]).unwrap().get_str("name").as_deref(), Some("y"));
    assert_eq!(run(&["--", "-odd"]).unwrap().get_str("name").as_deref(), Some("-odd"));
    is_usage(&failure(&["-o", "name=%(x)", "-o", "x.y=z"]), 1);
}

#[test]
fn assignments() {
    for argument in ["", "a", "=a", "a=", "="] {
        let expected = (64, format!("bhyve: invalid configuration option '{argument}'\n"));
        assert_eq!(failure(&["-o", argument, "vm0"]), expected);
    }
    let expected = (4, "bhyve: Attempting to add value 2 to existing node memory\n".to_owned());
    assert_eq!(failure(&["-o", "memory=2", "vm0"]), expected);
    let (code, text) = failure(&["-o", "memory.size.low=2", "vm0"]);
    assert_eq!(code, 4);
    assert!(text.contains("memory.size.low") && text.contains("is a child of existing variable memory.size"), "{text}");
}

#[test]
fn dump_ends_with_the_raw_tree() {
    let exit = run(&["-o", "config.dump=yes", "-o", "p=/vm/%(name)", "vm0"]).unwrap_err();
    assert_eq!((exit.code, exit.stderr.as_str()), (1, ""));
    assert!(exit.stdout.ends_with("config.dump=yes\np=/vm/%(name)\nname=vm0\n"), "{}", exit.stdout);
    is_usage(&failure(&["-o", "config.dump=1"]), 1);
    let (code, text) = failure(&["-o", "config.dump=perhaps", "vm0"]);
    assert_eq!(code, 4);
    assert!(text.starts_with("bhyve: Invalid value perhaps for boolean variable config.dump"), "{text}");
}

#[test]
fn restoring_is_not_there_yet() {
    let (code, text) = failure(&["-r", "/var/vm.ckp"]);
    assert_eq!((code, text.lines().count()), (1, 1));
    assert!(text.contains("'/var/vm.ckp'"), "{text}");
    is_usage(&failure(&["-r", "file", "-h"]), 0);
}

#[test]
fn files_and_options_act_in_order() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/base.cfg");
    assert_eq!(run(&["-k", file, "-o", "cpus=4", "vm0"]).unwrap().get_str("cpus").as_deref(), Some("4"));
    assert_eq!(run(&["-o", "cpus=4", "-k", file, "vm0"]).unwrap().get_str("cpus").as_deref(), Some("2"));
    assert_eq!(run(&["-k", file, "-c", "8", "vm0"]).unwrap().get_str("cpus").as_deref(), Some("8"));
    let (code, text) = failure(&["-k", "/nonexistent", "vm0"]);
    assert_eq!(code, 4);
    assert!(text.starts_with("bhyve: Failed to open configuration file /nonexistent: No such file"), "{text}");
}

#[test]
fn arguments_that_are_not_utf8_are_refused_politely() {
    let bad = || OsString::from_vec(b"\xff".to_vec());
    let end = |words: Vec<OsString>| parse_command_line(words, legacy::DEVICES, NoWarnings).unwrap_err();
    let exit = end(vec!["-o".into(), bad(), "vm0".into()]);
    assert_eq!((exit.code, exit.stderr.as_str()), (64, "bhyve: the argument of -o is not valid UTF-8: '\u{fffd}'\n"));
    let exit = end(vec![bad()]);
    assert_eq!((exit.code, exit.stderr.as_str()), (64, "bhyve: the VM's name is not valid UTF-8: '\u{fffd}'\n"));
    let exit = end(vec![OsString::from_vec(b"-\xff".to_vec())]);
    assert!(exit.code == 1 && exit.stderr.starts_with("bhyve: illegal option -- \\xff\n"));
    assert_eq!(end(vec!["-k".into(), bad()]).code, 4);
}

#[derive(Clone, Default)]
struct Collect(Arc<Mutex<Vec<String>>>);

impl Warnings for Collect {
    fn warn(&self, text: &str) {
        self.0.lock().unwrap().push(text.into());
    }
}

#[test]
fn old_spellings_warn_and_work() {
    let warnings = Collect::default();
    let words = ["-o", "lpc.bootrom=/fw.fd", "vm0"].map(OsString::from);
    let config = parse_command_line(words, legacy::DEVICES, warnings.clone()).unwrap();
    assert_eq!(config.get_str("bootrom").as_deref(), Some("/fw.fd"));
    assert_eq!(*warnings.0.lock().unwrap(), ["'lpc.bootrom' is deprecated, use 'bootrom' instead"]);
}

#[test]
fn a_caller_may_bring_its_own_devices() {
    let devices = [DeviceSyntax::plain("toaster")];
    let words = ["-s", "7,toaster,slots=4", "vm0"].map(OsString::from);
    let config = parse_command_line(words, &devices, NoWarnings).unwrap();
    assert_eq!(config.get_str("pci.0.7.0.slots").as_deref(), Some("4"));
    let exit = parse_command_line(["-s", "help"].map(OsString::from), &devices, NoWarnings).unwrap_err();
    assert_eq!(exit.stdout, "toaster\n");
}
