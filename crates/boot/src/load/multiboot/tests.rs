use memory::GuestMemory;
use platform::x86::{VcpuState, gpr};

use crate::BootError;
use crate::fixture::{self, DIRT, board, bytes_at, elf_image, number, put};

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn header(flags: u32) -> Vec<u8> {
    words(&[0x1bad_b002, flags, 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags)])
}

/// No ELF file: the addresses are in the header, which lies at 0x40 of 0x200 bytes.
fn flat_image(load: u32, load_end: u32, bss_end: u32) -> Vec<u8> {
    let mut image: Vec<u8> = (0..0x200).map(|index| index as u8).collect();
    put(&mut image, 0x40, &header(1 << 16 | 0b11));
    put(&mut image, 0x4c, &words(&[load.wrapping_add(0x30), load, load_end, bss_end, 0x10_1234]));
    image
}

fn elf(wide: bool, entry: u64) -> Vec<u8> {
    let headers = [(1, 0x200, 0xffff_8000_0010_0000, 0x10_0000, 0x100, 0x200)];
    let narrow = [(1, 0x200, 0xc010_0000, 0x10_0000, 0x100, 0x200)];
    let mut image = elf_image(wide, entry, if wide { &headers } else { &narrow });
    put(&mut image, 0x208, &header(0b10));
    image
}

fn start(image: &[u8], initrd: Option<&[u8]>, text: &str) -> Result<(VcpuState, GuestMemory), BootError> {
    fixture::start(image, initrd, text, &board())
}

fn text(memory: &GuestMemory, address: u64) -> String {
    let bytes = bytes_at(memory, address, 4096);
    String::from_utf8(bytes.split(|byte| *byte == 0).next().unwrap().to_vec()).unwrap()
}

#[test]
fn gives_the_kernel_its_information() {
    let (state, memory) = start(&flat_image(0x10_0000, 0, 0), Some(b"module"), "a=b c").unwrap();
    assert_eq!((state.rip, state.gpr[gpr::RAX], state.cr0, state.efer), (0x10_1234, 0x2bad_b002, 0x11, 0));
    let info = bytes_at(&memory, state.gpr[gpr::RBX], 0x58);
    let word = |offset| number(&info, offset, 4);
    assert_eq!((word(0), word(4), word(8)), (0b10_0100_1101, 640, 511 << 10));
    let line = text(&memory, word(16));
    assert!(line.ends_with("/kernel a=b c"), "{line}");
    assert_eq!(text(&memory, word(64)), "bhyve");

    assert_eq!(word(20), 1);
    let module = bytes_at(&memory, word(24), 16);
    let [from, to, name] = [0, 4, 8].map(|offset| number(&module, offset, 4));
    assert_eq!((from % 4096, to - from), (0, 6));
    assert_eq!(bytes_at(&memory, from, 6), b"module");
    assert!(text(&memory, name).ends_with("/initrd"));

    let map = bytes_at(&memory, word(48), word(44) as usize);
    let entries: Vec<_> = map
        .chunks(24)
        .map(|entry| (number(entry, 0, 4), number(entry, 4, 8), number(entry, 12, 8), number(entry, 20, 4)))
        .collect();
    assert_eq!(entries[0], (20, 0, 0xa0000, 1));
    assert_eq!(entries[3], (20, 0xe000_0000, 0x1000_0000, 2));
    assert_eq!(entries.len(), 4);
}

#[test]
fn without_a_module_the_flag_is_clear() {
    let (state, memory) = start(&flat_image(0x10_0000, 0, 0), None, "").unwrap();
    let info = bytes_at(&memory, state.gpr[gpr::RBX], 0x58);
    assert_eq!((number(&info, 0, 4) & 1 << 3, number(&info, 20, 4)), (0, 0));
    assert!(text(&memory, number(&info, 16, 4)).ends_with("/kernel"));
}

#[test]
fn loads_by_the_addresses_in_the_header() {
    // The header is at 0x40 of the file and 0x30 behind the load address, so loading begins at 0x10 of the file.
    let image = flat_image(0x10_0000, 0x10_0100, 0x10_0180);
    let (_, memory) = start(&image, None, "").unwrap();
    assert_eq!(bytes_at(&memory, 0x10_0000, 0x100), image[0x10..0x110]);
    assert_eq!(bytes_at(&memory, 0x10_0100, 0x80), [0; 0x80], "cleared");
    assert_eq!(bytes_at(&memory, 0x10_0180, 1), [DIRT], "not more than that");
    let image = flat_image(0x10_0000, 0, 0);
    let (_, memory) = start(&image, None, "").unwrap();
    assert_eq!(bytes_at(&memory, 0x10_0000, 0x1f0), image[0x10..], "all of the file");
}

#[test]
fn addresses_must_make_sense() {
    let fails = |load, load_end, bss_end| start(&flat_image(load, load_end, bss_end), None, "").err().unwrap();
    assert!(matches!(fails(0x10_0000, 0x10_0400, 0), BootError::Truncated { .. }));
    assert!(matches!(fails(0x10_0000, 0xf_ffff, 0), BootError::Invalid { .. }), "ends before it begins");
    assert!(matches!(fails(0x10_0000, 0x10_0100, 0x10_00ff), BootError::Invalid { .. }), "BSS before the end");
    assert!(matches!(fails(0x10_0000, 0, 0xffff_ffff), BootError::DoesNotFit { .. }));
    assert!(matches!(fails(0x9_0000, 0, 0), BootError::Overlap { .. }));
    assert!(matches!(fails(0xffff_fff0, 0, 0), BootError::Invalid { .. }), "header before the load address");
    let mut image = flat_image(0x10_0000, 0, 0);
    put(&mut image, 0x4c, &words(&[0x10_0041]));
    assert!(matches!(start(&image, None, ""), Err(BootError::Invalid { .. })), "begins before the file does");
}

#[test]
fn loads_elf_kernels_and_finds_their_physical_entry() {
    for (wide, entry) in [(false, 0xc010_0020), (false, 0x10_0020), (true, 0xffff_8000_0010_0020), (true, 0x10_0020)] {
        let (state, memory) = start(&elf(wide, entry), None, "").unwrap();
        assert_eq!(state.rip, 0x10_0020, "{entry:#x}");
        assert_eq!(number(&bytes_at(&memory, 0x10_0008, 4), 0, 4), 0x1bad_b002);
    }
    let error = start(&elf(true, 0xffff_8000_0020_0000), None, "").err().unwrap();
    assert!(error.to_string().contains("32-bit mode"), "{error}");
}

#[test]
fn headers_must_be_understood_and_complete() {
    let mut image = vec![0; 0x4000];
    put(&mut image, 8, &header(1 << 3));
    let error = start(&image, None, "").err().unwrap();
    assert!(error.to_string().contains("unknown features (0x8)"), "{error}");
    put(&mut image, 8, &header(0));
    let error = start(&image, None, "").err().unwrap();
    assert!(error.to_string().contains("gives no addresses"), "{error}");

    // A wrong sum, a header that is not aligned, one beyond the first 8 KiB, one across that border.
    for (at, sum) in [(8, 1), (10, 0), (8192, 0), (8188, 0)] {
        let mut image = vec![0; 0x4000];
        let mut bytes = header(0);
        bytes[8] += sum;
        put(&mut image, at, &bytes);
        assert!(matches!(start(&image, None, ""), Err(BootError::Format { .. })), "{at}");
    }
}
