//! No list of arguments, however strange, may do anything but parse or end in an orderly way.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use config::numa;
use config::tree::Node;
use config::{Config, NoWarnings, Topology, legacy, memory_size, parse_command_line, pci_functions};
use proptest::prelude::*;

const CODES: [u8; 4] = [0, 1, 4, 64];

/// Parses, and reads all that this crate reads of a configuration.
fn run(args: Vec<OsString>) {
    match parse_command_line(args, legacy::DEVICES, NoWarnings) {
        Ok(config) => {
            assert!(config.get_str("name").is_some_and(|name| !name.is_empty()));
            let _ = (Topology::resolve(&config), pci_functions(&config, legacy::DEVICES), config.dump());
            if let Ok(memory) = memory_size(&config) {
                let _ = numa::domains(&config, memory);
            }
            read_all(&config, config.root(), "");
        }
        Err(exit) => {
            assert!(CODES.contains(&exit.code), "{exit:?}");
            assert!(exit.stdout.is_empty() || exit.stderr.is_empty(), "{exit:?}");
        }
    }
}

fn read_all(config: &Config, node: &Node, prefix: &str) {
    for (name, _) in node.iter() {
        let path = format!("{prefix}{name}");
        match config.root().node(&path) {
            Some(child) => read_all(config, child, &format!("{path}.")),
            None => drop((config.get_str(&path), config.get_bool(&path), config.get_size(&path))),
        }
    }
}

/// Any bytes, except that no file is opened: `-k` and `file=` need their letters.
fn harmless_bytes() -> impl Strategy<Value = OsString> {
    prop::collection::vec(any::<u8>().prop_filter("no -k, no file=", |byte| !matches!(byte, b'k' | b'f')), 0..24)
        .prop_map(OsString::from_vec)
}

/// Words that mean something, put together at random.
fn likely_word() -> impl Strategy<Value = OsString> {
    const PIECES: &[&str] = &[
        "-",
        "--",
        "-s",
        "-l",
        "-c",
        "-m",
        "-o",
        "-p",
        "-n",
        "-G",
        "-U",
        "-f",
        "-r",
        "-AHPw",
        "-h",
        "0",
        "1",
        "3",
        "31",
        "255",
        "65536",
        ":",
        ",",
        "=",
        ".",
        "%",
        "%(",
        ")",
        "\\",
        "ahci",
        "ahci-cd",
        "ahci-hd",
        "amd_hostbridge",
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
        "hd:",
        "cd:",
        "pci",
        "ppt",
        "ram=",
        "tcp=",
        "rfb",
        "mac=",
        "bootrom",
        "com1",
        "tpm",
        "pc-testdev",
        "id=",
        "cpus=",
        "size=",
        "name",
        "memory.size",
        "config.dump",
        "sockets=",
        "threads=",
        "4G",
        "0x",
        "-1",
        "w",
        "/a/b",
        "ü",
        "\u{0}",
        " ",
        "\n",
        "help",
        "true",
        "string=",
    ];
    prop::collection::vec(prop::sample::select(PIECES), 1..8).prop_map(|pieces| pieces.concat().into())
}

/// An option that exists with an argument made of likely pieces.
fn likely_option() -> impl Strategy<Value = Vec<OsString>> {
    (prop::sample::select(&b"aAcCDeGHhIKlmMnopPrsSuUwWxY"[..]), likely_word())
        .prop_map(|(letter, word)| vec![format!("-{}", letter as char).into(), word])
}

/// A device at some slot with a configuration of likely pieces.
fn likely_device() -> impl Strategy<Value = Vec<OsString>> {
    let names: Vec<&str> = legacy::DEVICES.iter().map(|device| device.name).collect();
    (0..40u8, prop::sample::select(names), likely_word())
        .prop_map(|(slot, name, conf)| vec!["-s".into(), format!("{slot},{name},{}", conf.to_string_lossy()).into()])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes(args in prop::collection::vec(harmless_bytes(), 0..8)) {
        run(args);
    }

    #[test]
    fn likely_words(args in prop::collection::vec(likely_word(), 0..10)) {
        run(args);
    }

    #[test]
    fn likely_options(mut args in prop::collection::vec(likely_option(), 0..8), name in "[a-z]{1,3}") {
        args.push(vec![name.into()]);
        run(args.concat());
    }

    #[test]
    fn likely_devices(mut args in prop::collection::vec(likely_device(), 0..6)) {
        args.push(vec!["vm0".into()]);
        run(args.concat());
    }

    #[test]
    fn any_file(bytes in prop::collection::vec(prop_oneof![Just(b'='), Just(b'\n'), Just(b'.'), Just(b'%'), any::<u8>()], 0..200)) {
        let mut config = Config::new(NoWarnings);
        if config::file::parse(&mut config, "x.cfg".as_ref(), &bytes).is_ok() {
            read_all(&config, config.root(), "");
        }
    }

    #[test]
    fn what_was_stored_is_read_back(keys in prop::collection::btree_map("[a-z]{1,4}(\\.[a-z0-9]{1,3}){0,4}", "[^%\n\\\\]{1,12}", 0..20)) {
        let mut config = Config::new(NoWarnings);
        let stored: Vec<_> = keys.iter().filter(|(key, value)| config.set(key, value.as_str()).is_ok()).collect();
        for (key, value) in &stored {
            prop_assert_eq!(config.get_str(key), Some((*value).clone()));
        }
        prop_assert_eq!(config.dump().lines().count(), stored.len());
    }
}
