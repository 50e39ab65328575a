//! x87, MMX, SSE, AVX and AVX-512 registers of a vCPU.
//!
//! The struct is also the context block of the stubs of [`super::hostalu`]: they reach everything at
//! fixed offsets from one register, so the layout is `repr(C)` and the offsets are taken with `offset_of!`.

#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]

/// State-component numbers of the XSAVE feature set (SDM vol. 1, 13.1).
pub(crate) mod component {
    pub(crate) const X87: u32 = 0;
    pub(crate) const SSE: u32 = 1;
    pub(crate) const AVX: u32 = 2;
    pub(crate) const OPMASK: u32 = 5;
    pub(crate) const ZMM_HI256: u32 = 6;
    pub(crate) const HI16_ZMM: u32 = 7;
}

/// Bits of MXCSR.
pub(crate) mod mxcsr {
    /// The six exception flags.
    pub(crate) const FLAGS: u32 = 0x3f;
    /// The six exception masks.
    pub(crate) const MASKS: u32 = 0x1f80;
    /// Underflow, among the flags.
    pub(crate) const UNDERFLOW: u32 = 1 << 4;
    /// Tiny results become zero while underflow is masked.
    pub(crate) const FLUSH_TO_ZERO: u32 = 1 << 15;
    /// After RESET and INIT.
    pub(crate) const RESET: u32 = 0x1f80;
}

/// Bits of the x87 status word.
pub(crate) mod fsw {
    /// The six exception flags.
    pub(crate) const FLAGS: u16 = 0x3f;
    /// Error summary: an unmasked exception is pending.
    pub(crate) const ES: u16 = 1 << 7;
    /// Busy; equal to ES.
    pub(crate) const B: u16 = 1 << 15;
}

/// Where things are in the FXSAVE image.
pub(super) mod image {
    pub(crate) const FCW: usize = 0;
    pub(crate) const FSW: usize = 2;
    /// Abridged tag word: a bit per physical register, 1 = not empty.
    pub(crate) const FTW: usize = 4;
    pub(crate) const MXCSR: usize = 24;
    /// ST0–ST7, 16 bytes apart, 10 bytes used.
    pub(crate) const ST: usize = 32;
    pub(crate) const XMM: usize = 160;
}

/// The vector registers, of which a guest may see the first half and the first 16 or 32 bytes of each.
pub(crate) type Vectors = [[u8; 64]; 32];

/// The registers. Vector register `n` is the first 16, 32 or 64 bytes of `vectors[n]`; what the guest's feature set does
/// not have stays zero.
#[repr(C, align(64))]
pub(crate) struct FpuState {
    /// Stands in for the memory operand of an instruction run by a stub.
    pub(crate) bounce: [u8; 64],
    pub(crate) vectors: Vectors,
    /// The x87 part of the guest's state in the form of FXRSTOR64, while it is parked. Control and status word, instruction
    /// and data pointers, MXCSR and XMM registers in it are not the guest's: they hold what the host's FXSAVE64 left there.
    pub(super) legacy: [u8; 512],
    pub(crate) opmasks: [u64; 8],
    /// RFLAGS for and from a stub.
    pub(super) stub_flags: u64,
    mxcsr: u32,
    /// MXCSR for running a stub: all exceptions masked, no flags.
    pub(super) run_mxcsr: u32,
    /// The same for instructions that report exceptions.
    pub(super) report_mxcsr: u32,
    /// The same for those among them that may underflow.
    pub(super) underflow_mxcsr: u32,
    /// Exceptions that the guest has not masked, in the position of the flags.
    pub(super) unmasked: u32,
    /// MXCSR after a stub.
    pub(super) raised: u32,
    /// MXCSR after the first run of a stub that runs its instruction twice.
    pub(super) raised_before: u32,
    /// The host's MXCSR.
    pub(super) host_mxcsr: u32,
    /// x87 control and status word, wherever the registers are.
    control: u16,
    pub(super) status: u16,
    /// The x87 registers and tags are in the host's registers, not in `legacy`.
    live: bool,
    /// Zero while emitted code may use the registers: they are live, and no exception can be raised. Then control and status
    /// word are the host's, too.
    reserved: u8,
    /// Last x87 instruction: opcode, offset and selector; its memory operand.
    pub(super) fop: u16,
    pub(super) fcs: u16,
    pub(super) fds: u16,
    pub(super) fip: u64,
    pub(super) fdp: u64,
    /// What CPUID says about XSAVE areas, once somebody asked.
    pub(super) model: Option<super::xsave::Model>,
}

/// A copy of the x87 state, for comparisons.
#[derive(Clone, Copy)]
pub(crate) struct X87Copy {
    /// The registers were in the host's.
    live: bool,
    legacy: [u8; 512],
    control: u16,
    status: u16,
    pointers: (u16, u16, u16, u64, u64),
}

impl X87Copy {
    /// Control, status and abridged tag word, and the registers: what programs see all the time.
    pub(crate) fn visible(&self) -> (u16, u16, u8, [[u8; 10]; 8]) {
        let st = |i: usize| std::array::from_fn(|n| self.legacy[image::ST + 16 * i + n]);
        (self.control, self.status, self.legacy[image::FTW], std::array::from_fn(st))
    }

    /// Whether programs see no difference.
    pub(crate) fn looks_like(&self, other: &Self) -> bool {
        let words = |copy: &Self| (copy.control, copy.status);
        words(self) == words(other) && (self.legacy == other.legacy || self.visible() == other.visible())
    }
}

impl Default for FpuState {
    /// The state after RESET (SDM vol. 3, table 9-1).
    fn default() -> Self {
        let mut state = Self {
            bounce: [0; 64],
            vectors: [[0; 64]; 32],
            legacy: [0; 512],
            opmasks: [0; 8],
            stub_flags: 0,
            mxcsr: 0,
            run_mxcsr: 0,
            report_mxcsr: 0,
            underflow_mxcsr: 0,
            unmasked: 0,
            raised: 0,
            raised_before: 0,
            host_mxcsr: mxcsr::RESET,
            control: 0,
            status: 0,
            live: false,
            reserved: 1,
            fop: 0,
            fcs: 0,
            fds: 0,
            fip: 0,
            fdp: 0,
            model: None,
        };
        state.legacy[image::MXCSR..image::MXCSR + 4].copy_from_slice(&mxcsr::RESET.to_le_bytes());
        state.set_mxcsr(mxcsr::RESET);
        state.set_fcw(0x40);
        state.set_ftw(0xff);
        state
    }
}

impl FpuState {
    /// Offset of the byte that is zero while emitted code may use the x87 registers.
    pub(crate) const RESERVED: usize = std::mem::offset_of!(Self, reserved);
    /// Offsets of the last x87 instruction's opcode and offset, CS, DS and operand offset.
    pub(crate) const POINTERS: [usize; 5] = [
        std::mem::offset_of!(Self, fop),
        std::mem::offset_of!(Self, fip),
        std::mem::offset_of!(Self, fcs),
        std::mem::offset_of!(Self, fds),
        std::mem::offset_of!(Self, fdp),
    ];

    pub(crate) fn mxcsr(&self) -> u32 {
        self.mxcsr
    }

    /// Sets MXCSR. The caller has checked the reserved bits.
    pub(crate) fn set_mxcsr(&mut self, value: u32) {
        self.mxcsr = value;
        self.run_mxcsr = value & !mxcsr::FLAGS | mxcsr::MASKS;
        (self.report_mxcsr, self.underflow_mxcsr) = (self.run_mxcsr, self.run_mxcsr);
        self.unmasked = !value >> 7 & mxcsr::FLAGS;
        if self.unmasked & mxcsr::UNDERFLOW != 0 {
            // Masked, only inexact tiny results raise the flag; unmasked, all of them do. Flushing to zero makes every tiny
            // result inexact, and leaves others alone.
            self.underflow_mxcsr |= mxcsr::FLUSH_TO_ZERO;
            // The guest's own flushing has no effect then.
            self.report_mxcsr &= !mxcsr::FLUSH_TO_ZERO;
        }
    }

    /// Sets exception flags in MXCSR; none is ever cleared this way.
    #[inline(always)]
    pub(super) fn raise_mxcsr(&mut self, flags: u32) {
        self.mxcsr |= flags & mxcsr::FLAGS;
    }

    /// x87 control word.
    #[inline]
    pub(crate) fn fcw(&self) -> u16 {
        #[cfg(target_arch = "x86_64")]
        if self.reserved == 0 {
            return super::hostalu::x87::control();
        }
        self.control
    }

    /// Lets emitted code use the registers, if they are there; whether it may.
    #[inline]
    pub(crate) fn lend(&mut self) -> bool {
        const MASKS: u16 = 0x3f;
        self.unpark();
        self.reserved = u8::from(!self.live || self.control & MASKS != MASKS);
        self.reserved == 0
    }

    /// A copy of the x87 state. The registers stay where they are.
    pub(crate) fn copy_x87(&mut self) -> X87Copy {
        let live = self.live;
        self.park();
        let pointers = (self.fop, self.fcs, self.fds, self.fip, self.fdp);
        let copy = X87Copy { live, legacy: self.legacy, control: self.control, status: self.status, pointers };
        if live {
            self.lend();
        }
        copy
    }

    /// Brings a copy back, the registers to where they were.
    pub(crate) fn restore_x87(&mut self, copy: &X87Copy) {
        self.park();
        (self.legacy, self.control, self.status) = (copy.legacy, copy.control, copy.status);
        (self.fop, self.fcs, self.fds, self.fip, self.fdp) = copy.pointers;
        if copy.live {
            self.lend();
        }
    }

    /// Takes control and status word back from emitted code.
    #[inline]
    fn take_back(&mut self) {
        if self.reserved == 0 {
            (self.control, self.status) = (self.fcw(), self.fsw());
            self.reserved = 1;
        }
    }

    /// Sets the control word: bit 6 reads as 1, other reserved bits as 0; ES follows from the masks. No exception may be
    /// pending if the registers are live.
    pub(crate) fn set_fcw(&mut self, value: u16) {
        self.take_back();
        self.control = value & 0x1f3f | 0x40;
        #[cfg(target_arch = "x86_64")]
        if self.live {
            super::hostalu::x87::load_control(self);
        }
        self.status = self.with_summary(self.status);
    }

    /// x87 status word.
    #[inline]
    pub(crate) fn fsw(&self) -> u16 {
        #[cfg(target_arch = "x86_64")]
        if self.reserved == 0 {
            return super::hostalu::x87::status();
        }
        self.status
    }

    /// Sets the status word; ES and B follow from the flags and the control word's masks.
    pub(crate) fn set_fsw(&mut self, value: u16) {
        self.assert_parked();
        self.status = self.with_summary(value);
    }

    fn with_summary(&self, status: u16) -> u16 {
        let pending = status & !self.control & fsw::FLAGS != 0;
        let status = status & !(fsw::ES | fsw::B);
        if pending { status | fsw::ES | fsw::B } else { status }
    }

    /// Moves the x87 registers into the host's, for a stub. What happens to the image from then on is lost.
    #[inline(always)]
    pub(super) fn unpark(&mut self) {
        if !self.live {
            self.unpark_slow();
        }
    }

    /// Parks the registers with the image as FXRSTOR64 wants it.
    #[inline]
    pub(super) fn park_whole(&mut self) {
        self.park();
        self.legacy[image::FCW..image::FCW + 2].copy_from_slice(&self.control.to_le_bytes());
        self.legacy[image::FSW..image::FSW + 2].copy_from_slice(&self.status.to_le_bytes());
    }

    #[cold]
    fn unpark_slow(&mut self) {
        self.park_whole();
        #[cfg(target_arch = "x86_64")]
        {
            super::hostalu::x87::load(&self.legacy);
            self.live = true;
        }
    }

    /// Moves the x87 registers back into the image: before anybody looks at it, and before code outside this crate runs,
    /// which may use the host's.
    #[inline(always)]
    pub(crate) fn park(&mut self) {
        if self.live {
            self.park_slow();
        }
    }

    #[cold]
    fn park_slow(&mut self) {
        self.take_back();
        #[cfg(target_arch = "x86_64")]
        super::hostalu::x87::save(&mut self.legacy);
        self.live = false;
    }

    fn assert_parked(&self) {
        debug_assert!(!self.live, "x87 registers are looked at while they are in the host's");
    }

    /// Abridged tag word.
    pub(crate) fn ftw(&self) -> u8 {
        self.assert_parked();
        self.legacy[image::FTW]
    }

    pub(crate) fn set_ftw(&mut self, value: u8) {
        self.assert_parked();
        self.legacy[image::FTW] = value;
    }

    /// ST(i), 80 bits.
    pub(crate) fn st(&self, i: usize) -> [u8; 10] {
        self.assert_parked();
        let at = image::ST + 16 * (i & 7);
        std::array::from_fn(|n| self.legacy[at + n])
    }

    pub(crate) fn set_st(&mut self, i: usize, value: &[u8; 10]) {
        self.assert_parked();
        let at = image::ST + 16 * (i & 7);
        self.legacy[at..at + 10].copy_from_slice(value);
        self.legacy[at + 10..at + 16].fill(0);
    }

    /// An unmasked x87 exception waits for the next waiting instruction.
    #[inline]
    pub(crate) fn x87_pending(&self) -> bool {
        self.fsw() & fsw::ES != 0
    }

    /// Sets the status word, with every physical register staying as it is: the image keeps them relative to TOP.
    pub(crate) fn load_fsw(&mut self, value: u16) {
        let distance = usize::from((value >> 11).wrapping_sub(self.fsw() >> 11) & 7);
        if distance != 0 {
            let before: [[u8; 10]; 8] = std::array::from_fn(|i| self.st(i));
            for i in 0..8 {
                self.set_st(i, &before[(i + distance) & 7]);
            }
        }
        self.set_fsw(value);
    }

    /// The transition that every MMX instruction but EMMS makes: TOP 0, all registers valid. MMn is then ST(n).
    pub(crate) fn enter_mmx(&mut self) {
        self.load_fsw(self.fsw() & !(7 << 11));
        self.set_ftw(0xff);
    }

    /// FNINIT: control, status, tags and pointers; the registers' contents stay.
    pub(crate) fn finit(&mut self) {
        self.set_fcw(0x37f);
        self.load_fsw(0);
        self.set_ftw(0);
        (self.fop, self.fcs, self.fds, self.fip, self.fdp) = (0, 0, 0, 0, 0);
    }

    /// The full tag word of FNSTENV: two bits per physical register: 0 valid, 1 zero, 2 special, 3 empty.
    pub(crate) fn full_tags(&self) -> u16 {
        let top = usize::from(self.fsw() >> 11 & 7);
        (0..8usize).fold(0, |tags, physical| {
            let tag = if self.ftw() >> physical & 1 == 0 { 3 } else { tag_of(&self.st(physical.wrapping_sub(top))) };
            tags | tag << (2 * physical)
        })
    }

    /// The abridged tag word for a full one.
    pub(crate) fn abridged_tags(full: u16) -> u8 {
        (0..8).fold(0, |tags, i| if full >> (2 * i) & 3 == 3 { tags } else { tags | 1 << i })
    }

    /// VZEROUPPER, VZEROALL and the initial states: zeroes bytes `from..` of vector registers.
    pub(crate) fn zero_vectors(&mut self, registers: std::ops::Range<usize>, from: usize) {
        for register in &mut self.vectors[registers] {
            register[from..].fill(0);
        }
    }
}

/// Tag of a register's contents.
fn tag_of(st: &[u8; 10]) -> u16 {
    let exponent = u16::from_le_bytes([st[8], st[9]]) & 0x7fff;
    let mantissa = u64::from_le_bytes(std::array::from_fn(|i| st[i]));
    match (exponent, mantissa) {
        (0, 0) => 1,
        (0 | 0x7fff, _) => 2,
        (_, mantissa) if mantissa >> 63 == 0 => 2,
        _ => 0,
    }
}

/// State components in the layout of the XSAVE area.
impl FpuState {
    /// Copies component `n` out; `bytes` has the component's size (any prefix of it is served).
    pub(crate) fn save_component(&self, n: u32, bytes: &mut [u8]) {
        let part = |register: usize| match n {
            component::AVX => self.vectors.get(register).map(|v| &v[16..32]),
            component::ZMM_HI256 => self.vectors.get(register).map(|v| &v[32..64]),
            _ => self.vectors.get(16 + register).map(|v| &v[..]),
        };
        match n {
            component::OPMASK => {
                for (chunk, mask) in bytes.chunks_exact_mut(8).zip(self.opmasks) {
                    chunk.copy_from_slice(&mask.to_le_bytes());
                }
            }
            component::AVX | component::ZMM_HI256 | component::HI16_ZMM => {
                for (i, chunk) in bytes.chunks_exact_mut(component_chunk(n)).enumerate() {
                    if let Some(part) = part(i) {
                        chunk.copy_from_slice(part);
                    }
                }
            }
            _ => {}
        }
    }

    /// Takes component `n` over.
    pub(crate) fn load_component(&mut self, n: u32, bytes: &[u8]) {
        if n == component::OPMASK {
            for (mask, chunk) in self.opmasks.iter_mut().zip(bytes.chunks_exact(8)) {
                *mask = u64::from_le_bytes(std::array::from_fn(|i| chunk[i]));
            }
            return;
        }
        let (first, range) = match n {
            component::AVX => (0, 16..32),
            component::ZMM_HI256 => (0, 32..64),
            component::HI16_ZMM => (16, 0..64),
            _ => return,
        };
        for (register, chunk) in self.vectors[first..first + 16].iter_mut().zip(bytes.chunks_exact(component_chunk(n)))
        {
            register[range.clone()].copy_from_slice(chunk);
        }
    }

    /// The initial state of component `n` (SDM vol. 1, 13.6). MXCSR is not part of it.
    pub(crate) fn init_component(&mut self, n: u32) {
        match n {
            component::X87 => {
                self.finit();
                self.legacy[image::ST..image::XMM].fill(0);
            }
            component::SSE => self.vectors[..16].iter_mut().for_each(|v| v[..16].fill(0)),
            component::AVX => self.vectors[..16].iter_mut().for_each(|v| v[16..32].fill(0)),
            component::OPMASK => self.opmasks = [0; 8],
            component::ZMM_HI256 => self.zero_vectors(0..16, 32),
            component::HI16_ZMM => self.zero_vectors(16..32, 0),
            _ => {}
        }
    }

    /// Components that are not in their initial state: XINUSE.
    pub(crate) fn in_use(&self) -> u64 {
        let any = |registers: &[[u8; 64]], from: usize, to: usize| {
            registers.iter().any(|register| register[from..to].iter().fold(0, |all, byte| all | byte) != 0)
        };
        let (low, high) = self.vectors.split_at(16);
        let x87_initial = self.fcw() == 0x37f
            && self.fsw() == 0
            && self.ftw() == 0
            && (self.fop, self.fip, self.fdp, self.fcs, self.fds) == (0, 0, 0, 0, 0)
            && (0..8).all(|i| self.st(i) == [0; 10]);
        u64::from(!x87_initial) << component::X87
            | u64::from(any(low, 0, 16)) << component::SSE
            | u64::from(any(low, 16, 32)) << component::AVX
            | u64::from(self.opmasks != [0; 8]) << component::OPMASK
            | u64::from(any(low, 32, 64)) << component::ZMM_HI256
            | u64::from(any(high, 0, 64)) << component::HI16_ZMM
    }
}

/// Bytes per register in a component.
fn component_chunk(n: u32) -> usize {
    match n {
        component::AVX => 16,
        component::ZMM_HI256 => 32,
        _ => 64,
    }
}
