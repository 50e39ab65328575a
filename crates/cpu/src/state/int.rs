//! The four operand sizes of integer instructions.

/// An unsigned integer of one operand size, and how it lives in a general-purpose register.
///
/// Register numbers are 0–15; for bytes, `number | HIGH_BYTE` names AH, CH, DH, BH.
pub(crate) trait Int: Copy + Eq + Ord + std::fmt::Debug + 'static {
    const BITS: u32;
    const BYTES: u64 = Self::BITS as u64 / 8;
    fn from_u64(value: u64) -> Self;
    fn to_u64(self) -> u64;
    fn sign_extend(self) -> u64;
    fn get(regs: &[u64; 32], r: u8) -> Self;
    fn set(self, regs: &mut [u64; 32], r: u8);
    /// The most significant bit.
    #[inline(always)]
    fn sign(self) -> bool {
        self.sign_extend() >> 63 != 0
    }
}

/// Marks a byte register number as AH, CH, DH or BH.
pub(crate) const HIGH_BYTE: u8 = 0x40;

impl Int for u8 {
    const BITS: u32 = 8;
    #[inline(always)]
    fn from_u64(value: u64) -> Self {
        value as u8
    }
    #[inline(always)]
    fn to_u64(self) -> u64 {
        u64::from(self)
    }
    #[inline(always)]
    fn sign_extend(self) -> u64 {
        self as i8 as u64
    }
    #[inline(always)]
    fn get(regs: &[u64; 32], r: u8) -> Self {
        (regs[usize::from(r & 31)] >> (r >> 3 & 8)) as u8
    }
    #[inline(always)]
    fn set(self, regs: &mut [u64; 32], r: u8) {
        let shift = r >> 3 & 8;
        let reg = &mut regs[usize::from(r & 31)];
        *reg = (*reg & !(0xff << shift)) | u64::from(self) << shift;
    }
}

impl Int for u16 {
    const BITS: u32 = 16;
    #[inline(always)]
    fn from_u64(value: u64) -> Self {
        value as u16
    }
    #[inline(always)]
    fn to_u64(self) -> u64 {
        u64::from(self)
    }
    #[inline(always)]
    fn sign_extend(self) -> u64 {
        self as i16 as u64
    }
    #[inline(always)]
    fn get(regs: &[u64; 32], r: u8) -> Self {
        regs[usize::from(r & 31)] as u16
    }
    #[inline(always)]
    fn set(self, regs: &mut [u64; 32], r: u8) {
        let reg = &mut regs[usize::from(r & 31)];
        *reg = (*reg & !0xffff) | u64::from(self);
    }
}

impl Int for u32 {
    const BITS: u32 = 32;
    #[inline(always)]
    fn from_u64(value: u64) -> Self {
        value as u32
    }
    #[inline(always)]
    fn to_u64(self) -> u64 {
        u64::from(self)
    }
    #[inline(always)]
    fn sign_extend(self) -> u64 {
        self as i32 as u64
    }
    #[inline(always)]
    fn get(regs: &[u64; 32], r: u8) -> Self {
        regs[usize::from(r & 31)] as u32
    }
    #[inline(always)]
    fn set(self, regs: &mut [u64; 32], r: u8) {
        regs[usize::from(r & 31)] = u64::from(self);
    }
}

impl Int for u64 {
    const BITS: u32 = 64;
    #[inline(always)]
    fn from_u64(value: u64) -> Self {
        value
    }
    #[inline(always)]
    fn to_u64(self) -> u64 {
        self
    }
    #[inline(always)]
    fn sign_extend(self) -> u64 {
        self
    }
    #[inline(always)]
    fn get(regs: &[u64; 32], r: u8) -> Self {
        regs[usize::from(r & 31)]
    }
    #[inline(always)]
    fn set(self, regs: &mut [u64; 32], r: u8) {
        regs[usize::from(r & 31)] = self;
    }
}
