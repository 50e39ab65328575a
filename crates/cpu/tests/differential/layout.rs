//! Where things are in the address space that a test program sees, and what goes into a run and comes out of it.
//!
//! Both sides map the same pages at the same linear addresses. They lie below 2 GiB so that 32-bit code and
//! RIP-relative operands reach them; everything around them is unmapped.

/// Bytes in a page.
pub(crate) const PAGE: u64 = 4096;
/// Two pages of code, readable and executable, with nothing behind them.
pub(crate) const CODE: u64 = 0x1000_0000;
/// The same pages, readable, writable and executable.
pub(crate) const WRITABLE_CODE: u64 = 0x1800_0000;
/// Length of the code area.
pub(crate) const CODE_LEN: usize = 2 * PAGE as usize;
/// Two pages of data; the page behind them is [`CONSTANTS`].
pub(crate) const DATA: u64 = 0x2000_0000;
/// Length of the writable data area.
pub(crate) const DATA_LEN: usize = 2 * PAGE as usize;
/// A page that may only be read.
pub(crate) const CONSTANTS: u64 = DATA + DATA_LEN as u64;
/// One page of stack.
pub(crate) const STACK: u64 = 0x3000_0000;
/// Length of the stack area.
pub(crate) const STACK_LEN: usize = PAGE as usize;
/// Writable memory that is set up before and compared after a run: data, then stack.
pub(crate) const MEMORY_LEN: usize = DATA_LEN + STACK_LEN;
/// What unused code bytes are: INT3, the instruction that ends every program.
pub(crate) const FILLER: u8 = 0xcc;
/// Longest program in bytes.
pub(crate) const MAX_PROGRAM: usize = 1024;
/// Room for an XSAVE area in the standard format.
pub(crate) const XSAVE_LEN: usize = 4096;
/// Bases of FS and GS in 64-bit mode.
pub(crate) const FS_BASE: u64 = DATA + 0x340;
pub(crate) const GS_BASE: u64 = DATA + 0x1098;

/// Selectors as Linux lays out its GDT.
pub(crate) mod selector {
    /// 32-bit code, flat.
    pub(crate) const CODE32: u16 = 0x23;
    /// Data, flat.
    pub(crate) const DATA: u16 = 0x2b;
    /// 64-bit code.
    pub(crate) const CODE64: u16 = 0x33;
    /// 64-bit code of the kernel.
    pub(crate) const KERNEL_CODE: u16 = 0x10;
    /// Data of the kernel.
    pub(crate) const KERNEL_DATA: u16 = 0x18;
    /// Task state segment.
    pub(crate) const TSS: u16 = 0x40;
    /// Local descriptor table.
    pub(crate) const LDT: u16 = 0x50;

    /// 16-bit code over the code area.
    pub(crate) const LDT_CODE16: u16 = 0x07;
    /// Writable data over data and constants; 64 KiB, so that its top is unmapped.
    pub(crate) const LDT_DATA: u16 = 0x0f;
    /// 16-bit stack over the stack area.
    pub(crate) const LDT_STACK16: u16 = 0x17;
    /// Data whose limit ends inside the first data page.
    pub(crate) const LDT_SHORT: u16 = 0x1f;
    /// Data that may only be read.
    pub(crate) const LDT_READ_ONLY: u16 = 0x27;
    /// Expand-down data: valid above its limit.
    pub(crate) const LDT_EXPAND_DOWN: u16 = 0x2f;
    /// Data marked not present.
    pub(crate) const LDT_ABSENT: u16 = 0x37;
    /// 32-bit code over the code area, not readable.
    pub(crate) const LDT_CODE32: u16 = 0x3f;
}

/// One entry of the local descriptor table.
#[derive(Clone, Copy)]
pub(crate) struct LdtEntry {
    pub(crate) base: u32,
    pub(crate) limit: u32,
    /// Bits 43:40 of the descriptor: type with the accessed bit.
    pub(crate) kind: u8,
    /// D/B.
    pub(crate) big: bool,
    pub(crate) present: bool,
}

const fn entry(base: u64, limit: u32, kind: u8, big: bool) -> LdtEntry {
    LdtEntry { base: base as u32, limit, kind, big, present: true }
}

/// The local descriptor table, by index.
pub(crate) const LDT: [LdtEntry; 8] = [
    entry(CODE, CODE_LEN as u32 - 1, 0xb, false),
    entry(DATA, 0xffff, 3, true),
    entry(STACK, STACK_LEN as u32 - 1, 3, false),
    entry(DATA, 0x7ff, 3, true),
    entry(DATA, 0xffff, 1, true),
    entry(DATA, 0x7ff, 7, false),
    LdtEntry { present: false, ..entry(DATA, 0xffff, 3, true) },
    entry(CODE, CODE_LEN as u32 - 1, 9, true),
];

/// What a program runs on in the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kernel {
    /// Long mode; 32-bit and 16-bit programs in compatibility mode, as on the host.
    Long,
    /// Protected mode with PAE paging.
    Protected,
}

/// Where the protected-mode kernel lies. The host has nothing there.
pub(crate) const KERNEL_32: u64 = 0xc000_0000;

/// How a program is run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub(crate) enum Mode {
    /// 64-bit mode.
    Long,
    /// 32-bit code in flat segments.
    Flat32,
    /// 16-bit protected-mode code in segments with a base and a limit.
    Segmented16,
}

impl Mode {
    pub(crate) fn bits(self) -> u32 {
        match self {
            Mode::Long => 64,
            Mode::Flat32 => 32,
            Mode::Segmented16 => 16,
        }
    }
    /// Linear address of instruction pointer 0.
    pub(crate) fn code_base(self) -> u64 {
        if self == Mode::Segmented16 { CODE } else { 0 }
    }
    /// ES, CS, SS, DS, FS, GS at the start.
    pub(crate) fn selectors(self, ldt: bool) -> [u16; 6] {
        use selector as s;
        match self {
            Mode::Long => [s::DATA, s::CODE64, s::DATA, s::DATA, 0, 0],
            Mode::Flat32 if ldt => [s::DATA, s::CODE32, s::DATA, s::DATA, s::LDT_DATA, s::LDT_SHORT],
            Mode::Flat32 => [s::DATA, s::CODE32, s::DATA, s::DATA, s::DATA, s::DATA],
            Mode::Segmented16 => {
                [s::LDT_DATA, s::LDT_CODE16, s::LDT_STACK16, s::LDT_DATA, s::LDT_READ_ONLY, s::LDT_EXPAND_DOWN]
            }
        }
    }
}

/// What goes into a run.
#[derive(Clone)]
#[repr(C)]
pub(crate) struct Input {
    pub(crate) gpr: [u64; 16],
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
    pub(crate) fs_base: u64,
    pub(crate) gs_base: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub(crate) selectors: [u16; 6],
    /// Which memory image to start from.
    pub(crate) image: u16,
    /// `xsave` is to be loaded; else the floating-point state is the initial one.
    pub(crate) use_xsave: u16,
    /// Where `code` goes, relative to [`CODE`].
    pub(crate) code_at: u32,
    pub(crate) code_len: u32,
    pub(crate) code: [u8; MAX_PROGRAM],
    pub(crate) xsave: [u8; XSAVE_LEN],
}

/// What comes out of a run.
#[derive(Clone)]
#[repr(C)]
pub(crate) struct Outcome {
    pub(crate) gpr: [u64; 16],
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
    /// Exception that ended the run.
    pub(crate) vector: u64,
    pub(crate) error: u64,
    /// Valid after a page fault.
    pub(crate) cr2: u64,
    pub(crate) fs_base: u64,
    pub(crate) gs_base: u64,
    pub(crate) selectors: [u16; 6],
    /// `xsave` holds the floating-point state.
    pub(crate) has_xsave: u16,
    pub(crate) pad: u16,
    pub(crate) memory: [u8; MEMORY_LEN],
    pub(crate) xsave: [u8; XSAVE_LEN],
}

impl Input {
    pub(crate) fn new() -> Box<Self> {
        Box::new(Self {
            gpr: [0; 16],
            rip: 0,
            rflags: 0x202,
            fs_base: FS_BASE,
            gs_base: GS_BASE,
            selectors: [0; 6],
            image: 0,
            use_xsave: 0,
            code_at: 0,
            code_len: 0,
            code: [0; MAX_PROGRAM],
            xsave: [0; XSAVE_LEN],
        })
    }
}

impl Outcome {
    pub(crate) fn new() -> Box<Self> {
        Box::new(Self {
            gpr: [0; 16],
            rip: 0,
            rflags: 0,
            vector: 0,
            error: 0,
            cr2: 0,
            fs_base: 0,
            gs_base: 0,
            selectors: [0; 6],
            has_xsave: 0,
            pad: 0,
            memory: [0; MEMORY_LEN],
            xsave: [0; XSAVE_LEN],
        })
    }
}

/// Memory images that both sides share: [`IMAGES`] random ones, and a slot for a particular one.
pub(crate) const IMAGES: usize = 16;
pub(crate) const OWN_IMAGE: usize = IMAGES;

/// Vectors.
pub(crate) const BP: u64 = 3;
pub(crate) const UD: u64 = 6;
pub(crate) const SS: u64 = 12;
pub(crate) const GP: u64 = 13;
pub(crate) const PF: u64 = 14;
pub(crate) const AC: u64 = 17;
pub(crate) const XM: u64 = 19;
