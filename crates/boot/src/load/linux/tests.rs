use memory::GuestMemory;
use platform::x86::{VcpuState, gpr, seg};

use crate::fixture::{board, bytes_at, linux_image, number, put, start};
use crate::{ACPI_BASE, Board, BootError};

fn zero_page(state: &VcpuState, memory: &GuestMemory) -> Vec<u8> {
    bytes_at(memory, state.gpr[gpr::RSI], 4096)
}

fn command_line(page: &[u8], memory: &GuestMemory) -> String {
    let address = number(page, 0x228, 4) | number(page, 0xc8, 4) << 32;
    let bytes = bytes_at(memory, address, 2048);
    String::from_utf8(bytes.split(|byte| *byte == 0).next().unwrap().to_vec()).unwrap()
}

#[test]
fn takes_the_64_bit_entry() {
    let initrd: Vec<u8> = (0..5000).map(|index| index as u8).collect();
    let (state, memory) = start(&linux_image(), Some(&initrd), "console=ttyS0 quiet", &board()).unwrap();
    assert_eq!(state.rip, 0x100_0200);
    assert_eq!(state.segments[seg::CS].access & 1 << 13, 1 << 13, "64-bit code");
    assert_eq!(bytes_at(&memory, 0x100_0000, 4096), [b'K'; 4096]);
    assert_eq!(bytes_at(&memory, 0xff_ffff, 1), [0]);

    let page = zero_page(&state, &memory);
    assert_eq!(&page[0x202..0x206], b"HdrS");
    assert_eq!(page[0x210], 0xff, "type of loader");
    assert_eq!(number(&page, 0x214, 4), 0x100_0000);
    assert_eq!(number(&page, 0x70, 8), ACPI_BASE);
    assert_eq!(command_line(&page, &memory), "console=ttyS0 quiet");
    let (address, size) = (number(&page, 0x218, 4), number(&page, 0x21c, 4));
    assert_eq!((address, size), ((512 << 20) - 0x2000, 5000));
    assert_eq!(bytes_at(&memory, address, 5000), initrd);
    assert_eq!((number(&page, 0xc0, 4), number(&page, 0xc4, 4)), (0, 0));
}

#[test]
fn the_memory_map_is_in_all_three_forms() {
    let (state, memory) = start(&linux_image(), None, "", &board()).unwrap();
    let page = zero_page(&state, &memory);
    let entries: Vec<_> = page[0x2d0..]
        .chunks(20)
        .take(page[0x1e8].into())
        .map(|entry| (number(entry, 0, 8), number(entry, 8, 8), number(entry, 16, 4)))
        .collect();
    assert_eq!(
        entries,
        [(0, 0xa0000, 1), (0xc0000, 0x40000, 2), (0x10_0000, 511 << 20, 1), (0xe000_0000, 0x1000_0000, 2)]
    );
    assert_eq!((number(&page, 0x1e0, 4), number(&page, 0x02, 2)), (511 << 10, 0xffff));
    assert_eq!(number(&page, 0x218, 8), 0, "no initrd");

    let silent = Board { acpi: false, ..board() };
    let (state, memory) = start(&linux_image(), None, "", &silent).unwrap();
    assert_eq!(number(&zero_page(&state, &memory), 0x70, 8), 0);
}

#[test]
fn takes_the_32_bit_entry_of_a_32_bit_kernel() {
    let mut image = linux_image();
    put(&mut image, 0x236, &[0]);
    put(&mut image, 0x22c, &0xff_ffffu32.to_le_bytes());
    let (state, memory) = start(&image, Some(b"initrd"), "x", &board()).unwrap();
    assert_eq!((state.rip, state.cr0, state.efer), (0x100_0000, 0x11, 0));
    assert_eq!(state.segments[seg::CS].selector, 0x10);
    assert_eq!(state.segments[seg::DS].selector, 0x18);
    assert_eq!([gpr::RBX, gpr::RBP, gpr::RDI].map(|index| state.gpr[index]), [0; 3]);
    let page = zero_page(&state, &memory);
    assert_eq!(number(&page, 0x218, 4), 0xff_f000, "below the highest address for an initrd");
}

#[test]
fn old_protocols_find_the_command_line_by_its_offset() {
    let mut image = linux_image();
    put(&mut image, 0x206, &[1, 2]); // 2.01
    put(&mut image, 0x1f4, &[0xff, 0xff, 0xff, 0xff]); // the size is not to be trusted yet
    let (state, memory) = start(&image, None, "old", &board()).unwrap();
    assert_eq!(state.rip, 0x10_0000, "not relocatable: at 1 MiB");
    assert_eq!(bytes_at(&memory, 0x10_0000, 4096), [b'K'; 4096]);
    let page = zero_page(&state, &memory);
    assert_eq!((state.gpr[gpr::RSI], number(&page, 0x20, 2)), (0x90000, 0xa33f));
    assert_eq!(bytes_at(&memory, 0x90000 + number(&page, 0x22, 2), 4), b"old\0");
    assert_eq!(number(&page, 0x228, 4), 0);
}

#[test]
fn an_initrd_may_lie_above_four_gigabytes() {
    // 4 KiB below the kernel's working space are too small, so only high memory is left.
    let board = Board { low_memory: 3 << 30, high_memory: 1 << 30, ..board() };
    let mut image = linux_image();
    put(&mut image, 0x258, &0x10_0000u64.to_le_bytes());
    put(&mut image, 0x260, &((3u32 << 30) - 0x10_1000).to_le_bytes());
    let (state, memory) = start(&image, Some(&[7; 0x1800]), "", &board).unwrap();
    let page = zero_page(&state, &memory);
    assert_eq!((number(&page, 0xc0, 4), number(&page, 0x218, 4)), (1, 0x3fff_e000));
    assert_eq!(bytes_at(&memory, 0x1_3fff_e000, 0x1800), [7; 0x1800]);

    put(&mut image, 0x236, &[1]); // 64-bit entry, but all below 4 GiB
    let error = start(&image, Some(&[7; 0x1800]), "", &board).err().unwrap();
    assert!(matches!(error, BootError::NoRoom { what: "initrd", .. }), "{error}");
}

#[test]
fn says_what_does_not_fit() {
    let small = Board { low_memory: 17 << 20, ..board() };
    let error = start(&linux_image(), None, "", &small).err().unwrap();
    assert!(matches!(error, BootError::DoesNotFit { what: "kernel", start: 0x100_0000, .. }), "{error}");
    assert!(error.to_string().contains("-m"), "{error}");

    let board = Board { low_memory: 32 << 20, ..board() };
    let error = start(&linux_image(), Some(&vec![1; 33 << 20]), "", &board).err().unwrap();
    assert!(matches!(error, BootError::NoRoom { what: "initrd", size, .. } if size == 33 << 20), "{error}");

    assert!(start(&linux_image(), None, &"x".repeat(2047), &board).is_ok());
    let error = start(&linux_image(), None, &"x".repeat(2048), &board).err().unwrap();
    assert!(matches!(error, BootError::CommandLine { len: 2048, limit: 2047 }), "{error}");
}

#[test]
fn notices_what_is_missing() {
    let image = linux_image();
    for (size, part) in [(0x300, "setup code"), (1024, "kernel code"), (image.len() - 16, "kernel code")] {
        let error = start(&image[..size], None, "", &board()).err().unwrap();
        assert!(matches!(error, BootError::Truncated { part: found, .. } if found == part), "{size}: {error}");
    }
    // The last paragraph may be partly there.
    assert!(start(&image[..image.len() - 15], None, "", &board()).is_ok());

    let mut low = image.clone();
    put(&mut low, 0x211, &[0]);
    let error = start(&low, None, "", &board()).err().unwrap();
    assert!(error.to_string().contains("zImage"), "{error}");

    let mut hollow = image;
    put(&mut hollow, 0x1f4, &[0; 4]);
    assert!(matches!(start(&hollow, None, "", &board()), Err(BootError::Invalid { .. })));
}

#[test]
fn a_kernel_may_not_lie_where_the_loader_is() {
    let mut image = linux_image();
    put(&mut image, 0x258, &0x8_f800u64.to_le_bytes());
    put(&mut image, 0x260, &[0; 4]);
    let error = start(&image, None, "", &board()).err().unwrap();
    assert!(matches!(error, BootError::Overlap { other: "boot parameters", .. }), "{error}");
}
