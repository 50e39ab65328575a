//! What libvirt runs at its start to see what bhyve can do. It looks at standard error only, gives no VM name, and
//! expects an end at once.

use std::ffi::OsString;

use config::{Exit, NoWarnings, legacy, parse_command_line};

fn probe(words: &[&str]) -> Exit {
    parse_command_line(words.iter().map(OsString::from), legacy::DEVICES, NoWarnings).expect_err("no VM name")
}

fn ends_with_usage(exit: &Exit) {
    assert_eq!(exit.code, 1);
    assert!(exit.stdout.is_empty());
    assert!(exit.stderr.starts_with("Usage: bhyve "), "{}", exit.stderr);
}

#[test]
fn options_seen_in_the_help_text() {
    let exit = probe(&["-h"]);
    assert_eq!(exit.code, 0);
    assert!(exit.stdout.is_empty());
    assert!(exit.stderr.contains("-u:"));
    assert!(!exit.stderr.contains("-c vcpus"));
}

#[test]
fn devices() {
    for device in ["ahci", "e1000", "fbuf", "xhci", "hda", "virtio-rnd", "virtio-9p"] {
        let exit = probe(&["-s", &format!("0,{device}")]);
        ends_with_usage(&exit);
        assert!(!exit.stderr.contains("unknown device"), "{device}: {}", exit.stderr);
    }
    let exit = probe(&["-s", "0,no-such-device"]);
    assert_eq!(exit.code, 4);
    assert_eq!(exit.stderr, "pci slot 0:0:0: unknown device \"no-such-device\"\n");
}

#[test]
fn boot_rom() {
    let exit = probe(&["-l", "bootrom"]);
    assert_ne!(exit.code, 0);
    assert!(!exit.stderr.contains("bhyve: invalid lpc device configuration 'bootrom'"), "{}", exit.stderr);
    let exit = probe(&["-l", "no-such-device"]);
    assert_eq!(exit.code, 64);
    assert_eq!(exit.stderr, "bhyve: invalid lpc device configuration 'no-such-device'\n");
}

#[test]
fn display_password() {
    let exit = probe(&["-s", "0,fbuf,password="]);
    ends_with_usage(&exit);
    assert!(!exit.stderr.contains("Invalid fbuf emulation \"password\""), "{}", exit.stderr);
}
