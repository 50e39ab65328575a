use config::{NoWarnings, legacy};

use super::*;

fn config(keys: &[(&str, &str)]) -> Config {
    let mut config = Config::with_defaults(NoWarnings);
    for (key, value) in keys {
        config.set(key, *value).unwrap();
    }
    config
}

#[test]
fn boot_order_is_by_index_in_open_firmware_paths() {
    let config = config(&[
        ("pci.0.2.0.device", "virtio-blk"),
        ("pci.0.2.0.bootindex", "7"),
        ("pci.0.26.1.device", "virtio-net"),
        ("pci.0.26.1.bootindex", "2"),
        ("pci.0.3.0.device", "ahci"),
        ("pci.0.3.0.port.1.bootindex", "3"),
        ("pci.0.4.0.device", "virtio-blk"),
    ]);
    let functions = config::pci_functions(&config, legacy::DEVICES).unwrap();
    let order = String::from_utf8(boot_order(&functions).unwrap()).unwrap();
    assert_eq!(order, "/pci@i0cf8/pci@1a,1\n/pci@i0cf8/pci@3,0\n/pci@i0cf8/pci@2,0\0");
}

#[test]
fn a_copy_of_the_variables_is_made_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm/vars.fd");
    copy_once(b"first", &file).unwrap();
    copy_once(b"second", &file).unwrap();
    assert_eq!(std::fs::read(&file).unwrap(), b"first");
    assert_eq!(std::fs::read_dir(file.parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn files_that_cannot_be_are_said_to_be_so() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, size: usize| {
        let path = folder.path().join(name);
        std::fs::write(&path, vec![0; size]).unwrap();
        path.display().to_string()
    };
    let error = |rom: &str, vars: Option<&str>| {
        let error = MachineError::from(BootRom::named(rom, vars).err().unwrap());
        let exit = error.into_exit();
        (exit.code, exit.stderr)
    };
    let (good, odd, vars) = (file("good", 8192), file("odd", 5000), file("vars", 4096));
    let (code, text) = error(&odd, None);
    assert_eq!(code, 4);
    assert!(text.contains("bootrom size 5000"), "{text}");
    let (code, text) = error(&good, Some(&odd));
    assert!(code == 4 && text.contains("bootvars size 5000"), "{text}");
    let (code, text) = error(&good, Some("/nonexistent/vars"));
    assert!(code == 4 && text.contains("Error opening bootvars \"/nonexistent/vars\""), "{text}");
    let (code, text) = error("/nonexistent/rom", Some(&vars));
    assert!(code == 4 && text.contains("Error opening bootrom \"/nonexistent/rom\""), "{text}");
    let huge = file("huge", (16 << 20) + 8192);
    assert!(error(&huge, None).1.contains("bootrom size"));

    let first = BootRom::named(&good, Some(&vars)).unwrap();
    assert!(first.notes.is_empty());
    assert!(error(&good, Some(&vars)).1.contains("in use by another VM"));
}

#[test]
fn qemus_firmware_sees_as_many_address_bits_as_memory_and_bars_need() {
    const GIB: u64 = 1 << 30;
    for (high, end, bits) in
        [(0, 64 * GIB, 38), (28 * GIB, 64 * GIB, 38), (29 * GIB, 96 * GIB, 38), (300 * GIB, 352 * GIB, 39)]
    {
        assert_eq!(memory64(high), end - 32 * GIB..end);
        assert_eq!(physical_bits(high), bits);
    }
}
