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

#[test]
fn firmware_learns_where_physical_presence_is_if_there_is_a_tpm() {
    let with = |tpm| {
        let board = boot::Board {
            apic_ids: vec![0],
            x2apic: false,
            topology: boot::Topology { sockets: 1, cores: 1, threads: 1 },
            low_memory: 512 << 20,
            high_memory: 0,
            buses: Vec::new(),
            lpc: None,
            hpet: None,
            fw_cfg: true,
            tpm,
            generation_id: None,
            numa: Vec::new(),
            caches: Vec::new(),
            acpi: true,
            mptable: true,
            uuid: [0; 16],
            smbios: boot::SmbiosStrings::default(),
        };
        let files = files(&config(&[]), &board, Flavour::Qemu).unwrap();
        files.into_iter().find(|(name, _)| name == "etc/tpm/config").map(|(_, contents)| contents)
    };
    // The address, then versions: TPM 2.0, interface 1.3.
    assert_eq!(with(true).unwrap(), [0x00, 0x50, 0xd4, 0xfe, 2, 1]);
    assert_eq!(with(false), None);
}

#[test]
fn images_that_need_system_management_mode_are_told_by_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let rom = |name: &str, guid: &[u8]| {
        let path = folder.path().join(name);
        let mut image = vec![0; 8192];
        image[8192 - 48..][..guid.len()].copy_from_slice(guid);
        std::fs::write(&path, image).unwrap();
        path
    };
    // What OVMF is recognised by.
    let ovmf = 0x96b5_82de_1fb2_45f7_baea_a366_c55a_082d_u128.to_be_bytes();
    let guid = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15].map(|index| ovmf[index]);
    let warned = |path: &Path| {
        let notes = BootRom::named(&path.display().to_string(), None).unwrap().notes;
        let lines: Vec<_> = notes.iter().filter(|note| note.contains("System Management Mode")).collect();
        assert!(lines.iter().all(|line| line.contains("OVMF_VARS_4M.ms.fd") && !line.contains('\n')), "{lines:?}");
        assert!(lines.len() <= 1, "{lines:?}");
        lines.len() == 1
    };
    let secure = rom("OVMF_CODE_4M.secboot.fd", &guid);
    assert!(warned(&secure));
    let link = folder.path().join("OVMF_CODE_4M.ms.fd");
    std::os::unix::fs::symlink(&secure, &link).unwrap();
    assert!(warned(&link));
    assert!(warned(&rom("ovmf-x86_64-smm-ms-code.bin", &guid)));
    assert!(!warned(&rom("OVMF_CODE_4M.fd", &guid)));
    assert!(!warned(&rom("OVMF.inteltdx.secboot.fd", &guid)));
    assert!(!warned(&rom("other.secboot.fd", &[])));
}
