//! What this crate's tests share: a board, memory, files, and cheap pseudo-random bytes.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use memory::{GuestMemory, MemoryOptions};

use platform::x86::VcpuState;

use crate::board::{Board, InterruptRoute, Lpc, PciBus, SmbiosStrings, Topology, Window};
use crate::load::{BootError, load};

/// A machine with 2 vCPUs, 512 MiB, ISA bridge in slot 31 and interrupts in three slots.
pub(crate) fn board() -> Board {
    let route = |slot, pin, gsi, link| InterruptRoute { slot, pin, gsi, link };
    let window = |base, size| Some(Window { base, size });
    Board {
        apic_ids: vec![0, 1],
        x2apic: false,
        topology: Topology { sockets: 2, cores: 1, threads: 1 },
        low_memory: 512 << 20,
        high_memory: 0,
        buses: vec![PciBus {
            number: 0,
            io: window(0x2000, 0x80),
            mem32: window(0xc000_0000, 0x2000_0000),
            mem64: window(0x8_0000_0000, 0x8_0000_0000),
            routes: vec![route(2, 1, 16, 0), route(3, 1, 17, 1), route(3, 2, 18, 2), route(4, 1, 23, 7)],
        }],
        lpc: Some(Lpc { slot: 31, function: 0, uarts: [true, true, false, true] }),
        hpet: Some(0x8086_0701),
        fw_cfg: false,
        tpm: false,
        generation_id: None,
        numa: Vec::new(),
        caches: Vec::new(),
        acpi: true,
        mptable: true,
        uuid: [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff, 0],
        smbios: SmbiosStrings::default(),
    }
}

/// RAM of the size that `board` says.
pub(crate) fn memory_of(board: &Board) -> GuestMemory {
    GuestMemory::new(MemoryOptions { size: board.low_memory + board.high_memory, ..Default::default() }).unwrap()
}

/// `len` bytes of guest memory.
pub(crate) fn bytes_at(memory: &GuestMemory, gpa: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(gpa, &mut bytes).unwrap();
    bytes
}

/// Little-endian number of 1–8 bytes.
pub(crate) fn number(bytes: &[u8], offset: usize, len: usize) -> u64 {
    bytes[offset..offset + len].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// The sum that makes a table valid when it is 0.
pub(crate) fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

/// A folder that goes away with the value.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("boot-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Loads a kernel and an initrd of these contents into the memory of `board`. Where they reach, memory was not zero before.
pub(crate) fn start(
    kernel: &[u8],
    initrd: Option<&[u8]>,
    command_line: &str,
    board: &Board,
) -> Result<(VcpuState, GuestMemory), BootError> {
    let folder = Folder::new();
    let kernel = folder.file("kernel", kernel);
    let initrd = initrd.map(|bytes| folder.file("initrd", bytes));
    let memory = memory_of(board);
    let dirty = board.low_memory.min(8 << 20);
    memory.fill(0, dirty, DIRT).unwrap();
    load(&kernel, initrd.as_deref(), command_line, &memory, board).map(|state| (state, memory))
}

/// What [`start`] fills low memory with.
pub(crate) const DIRT: u8 = 0xee;

/// Xorshift: the same numbers in every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// Overwrites little-endian bytes at an offset.
pub(crate) fn put(image: &mut [u8], offset: usize, bytes: &[u8]) {
    image[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// A bzImage of protocol 2.15 with one setup sector: 64-bit entry, relocatable, 4096 bytes of code that are all `K`.
pub(crate) fn linux_image() -> Vec<u8> {
    let mut image = vec![0; 1024];
    image.extend([b'K'; 4096]);
    put(&mut image, 0x1f1, &[1]);
    put(&mut image, 0x1f4, &(4096u32 / 16).to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS\x0f\x02");
    put(&mut image, 0x211, &[1]); // loaded high
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes()); // highest initrd address
    put(&mut image, 0x234, &[1]); // relocatable
    put(&mut image, 0x236, &[0b11]); // 64-bit entry, may be above 4 GiB
    put(&mut image, 0x238, &2047u32.to_le_bytes()); // command line
    put(&mut image, 0x258, &0x100_0000u64.to_le_bytes()); // preferred address
    put(&mut image, 0x260, &0x20_0000u32.to_le_bytes()); // size while it sets itself up
    image
}

/// A program header: type, offset, virtual and physical address, size in file and in memory.
pub(crate) type ProgramHeader = (u32, u64, u64, u64, u64, u64);

/// An ELF executable with the given headers, 0x400 bytes long and zero where there are none.
pub(crate) fn elf_image(wide: bool, entry: u64, headers: &[ProgramHeader]) -> Vec<u8> {
    let mut image = vec![0; 0x400];
    put(&mut image, 0, b"\x7fELF\x01\x01\x01");
    put(&mut image, 18, &[if wide { 62 } else { 3 }]);
    let count = headers.len() as u8;
    if wide {
        put(&mut image, 4, &[2]);
        put(&mut image, 24, &entry.to_le_bytes());
        put(&mut image, 32, &[64]);
        put(&mut image, 54, &[56, 0, count]);
    } else {
        put(&mut image, 24, &(entry as u32).to_le_bytes());
        put(&mut image, 28, &[52]);
        put(&mut image, 42, &[32, 0, count]);
    }
    let mut at = if wide { 64 } else { 52 };
    for (kind, offset, virtual_address, physical_address, in_file, in_memory) in headers {
        put(&mut image, at, &kind.to_le_bytes());
        let numbers = [offset, virtual_address, physical_address, in_file, in_memory];
        for (index, number) in numbers.into_iter().enumerate() {
            if wide {
                put(&mut image, at + 8 + 8 * index, &number.to_le_bytes());
            } else {
                put(&mut image, at + 4 + 4 * index, &(*number as u32).to_le_bytes());
            }
        }
        at += if wide { 56 } else { 32 };
    }
    image
}
