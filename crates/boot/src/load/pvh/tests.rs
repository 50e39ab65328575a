use memory::GuestMemory;
use platform::x86::{VcpuState, gpr};

use crate::fixture::{self, DIRT, board, bytes_at, elf_image, number, put};
use crate::{ACPI_BASE, BootError};

/// Two segments at 2 MiB and 4 MiB (the second with 0x100 bytes more in memory), and a note with the entry point.
fn image(wide: bool) -> Vec<u8> {
    const HIGH: u64 = 0xffff_ffff_8000_0000;
    let headers = [
        (1, 0x200, HIGH + 0x20_0000, 0x20_0000, 0x80, 0x80),
        (1, 0x280, HIGH + 0x40_0000, 0x40_0000, 0x40, 0x140),
        (4, 0x300, 0, 0, 0x40, 0x40),
    ];
    let mut image = elf_image(wide, HIGH + 0x20_0000, &headers);
    image[0x200..0x280].fill(b'A');
    image[0x280..0x2c0].fill(b'B');
    // A note of somebody else, with sizes that need rounding, then ours.
    put(&mut image, 0x300, &[3, 0, 0, 0, 5, 0, 0, 0, 18, 0, 0, 0]);
    put(&mut image, 0x30c, b"GN\0\0hello\0\0\0");
    put(&mut image, 0x318, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(&mut image, 0x324, b"Xen\0\x10\x00\x20\x00");
    image
}

fn start(image: &[u8], initrd: Option<&[u8]>) -> Result<(VcpuState, GuestMemory), BootError> {
    fixture::start(image, initrd, "root=/dev/vda", &board())
}

#[test]
fn enters_at_the_note_with_start_info() {
    for wide in [true, false] {
        let (state, memory) = start(&image(wide), Some(b"module")).unwrap();
        assert_eq!((state.rip, state.cr0, state.cr4, state.efer), (0x20_0010, 0x11, 0, 0));
        assert_eq!(bytes_at(&memory, 0x20_0000, 0x80), [b'A'; 0x80]);
        assert_eq!(bytes_at(&memory, 0x40_0000, 0x40), [b'B'; 0x40]);
        assert_eq!(bytes_at(&memory, 0x40_0040, 0x100), [0; 0x100], "cleared");
        assert_eq!(bytes_at(&memory, 0x40_0140, 1), [DIRT], "not more than that");

        let info = bytes_at(&memory, state.gpr[gpr::RBX], 56);
        assert_eq!((number(&info, 0, 4), number(&info, 4, 4), number(&info, 8, 4)), (0x336e_c578, 1, 0));
        assert_eq!(bytes_at(&memory, number(&info, 24, 8), 14), b"root=/dev/vda\0");
        assert_eq!(number(&info, 32, 8), ACPI_BASE);
        assert_eq!(number(&info, 12, 4), 1);
        let module = bytes_at(&memory, number(&info, 16, 8), 32);
        assert_eq!(bytes_at(&memory, number(&module, 0, 8), number(&module, 8, 8) as usize), b"module");
        assert_eq!((number(&module, 16, 8), number(&module, 24, 8)), (0, 0));

        let map = bytes_at(&memory, number(&info, 40, 8), 24 * number(&info, 48, 4) as usize);
        let entries: Vec<_> = map
            .chunks(24)
            .map(|entry| (number(entry, 0, 8), number(entry, 8, 8), number(entry, 16, 4), number(entry, 20, 4)))
            .collect();
        assert_eq!(entries[2], (0x10_0000, 511 << 20, 1, 0));
        assert_eq!(entries.len(), 4);
    }
}

#[test]
fn works_without_modules() {
    let (state, memory) = start(&image(true), None).unwrap();
    let info = bytes_at(&memory, state.gpr[gpr::RBX], 56);
    assert_eq!((number(&info, 12, 4), number(&info, 16, 8)), (0, 0));
}

#[test]
fn an_eight_byte_entry_must_be_below_four_gigabytes() {
    let mut long = image(true);
    put(&mut long, 0x31c, &[8]);
    assert_eq!(start(&long, None).unwrap().0.rip, 0x20_0010);
    put(&mut long, 0x32c, &[1]);
    let error = start(&long, None).err().unwrap();
    assert!(error.to_string().contains("beyond 4 GiB"), "{error}");
    put(&mut long, 0x31c, &[3]);
    assert!(matches!(start(&long, None), Err(BootError::Invalid { .. })));
}

#[test]
fn refuses_senseless_headers() {
    let changed = |offset: usize, bytes: &[u8]| {
        let mut image = image(true);
        put(&mut image, offset, bytes);
        start(&image, None).err().unwrap()
    };
    let first = 64;
    assert!(matches!(changed(first + 40, &[0x7f]), BootError::Invalid { .. }), "larger in the file than in memory");
    assert!(matches!(changed(first + 24, &[0, 0, 0x40]), BootError::Overlap { .. }), "onto the other segment");
    assert!(matches!(changed(first + 24, &[0xff; 8]), BootError::DoesNotFit { .. }), "beyond memory");
    assert!(matches!(changed(first + 40, &[0xff; 8]), BootError::DoesNotFit { .. }), "larger than memory");
    assert!(matches!(changed(first + 8, &[0, 8]), BootError::Truncated { .. }), "beyond the file");
    assert!(matches!(changed(first + 8, &[0xff; 8]), BootError::Truncated { .. }), "far beyond the file");
    assert!(matches!(changed(32, &[0xff; 8]), BootError::Truncated { .. }), "table beyond the file");
    assert!(matches!(changed(54, &[0]), BootError::Invalid { .. }), "headers too small");
    assert!(matches!(changed(56, &[0, 0]), BootError::Invalid { .. }), "no headers");
    assert!(matches!(changed(56, &[0xff, 0xff]), BootError::Invalid { .. }), "too many headers");
    assert!(matches!(changed(18, &[0xb7]), BootError::Invalid { .. }), "for ARM");
    assert!(matches!(changed(5, &[2]), BootError::Invalid { .. }), "big-endian");
    assert!(matches!(changed(4, &[9]), BootError::Invalid { .. }), "of no class");
    let error = start(&image(true)[..60], None).err().unwrap();
    assert!(matches!(error, BootError::Truncated { part: "ELF header", .. }), "{error}");
}

#[test]
fn without_note_or_multiboot_header_it_is_unknown() {
    let mut image = image(true);
    put(&mut image, 0x324, b"Xem");
    let error = start(&image, None).err().unwrap();
    assert!(error.to_string().contains("neither a PVH note nor a multiboot header"), "{error}");
}
