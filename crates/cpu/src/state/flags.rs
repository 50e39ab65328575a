//! RFLAGS, with the six arithmetic flags kept as the operands of the last flag-setting operation left them.
//!
//! Most instructions set flags that nobody reads. So an operation stores three words, and a reader
//! derives the flag it wants:
//!
//! * `result`: the result, sign-extended to 64 bits. ZF, SF, PF come from it.
//! * `carry`: the carry (or borrow) out of every bit position, shifted so that the operation's top bit is bit 63.
//!   CF is bit 63; OF is bit 63 xor bit 62.
//! * `misc`: bit 3 is AF; bits 15:8 and bit 63 are differences to be applied to PF's byte and to SF, zero
//!   except after flags were loaded as such (POPF, SAHF), where the three need not agree with any result.

use platform::x86::rflags;

use super::int::Int;

/// RFLAGS of one vCPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flags {
    pub(crate) result: u64,
    pub(crate) carry: u64,
    pub(crate) misc: u64,
    /// All other bits, as in RFLAGS; bit 1 is always set.
    pub(crate) sys: u64,
}

const AF_BIT: u64 = 1 << 3;
const SIGN: u64 = 1 << 63;

impl Flags {
    pub(crate) fn new(value: u64) -> Self {
        let mut flags = Self { result: 0, carry: 0, misc: 0, sys: 0 };
        flags.set_value(value);
        flags
    }

    #[inline(always)]
    fn set_chain<T: Int>(&mut self, chain: u64, result: T) {
        self.result = result.sign_extend();
        self.carry = chain << (64 - T::BITS);
        self.misc = chain & AF_BIT;
    }

    /// After `result = a + b (+ carry in)`.
    #[inline(always)]
    pub(crate) fn set_add<T: Int>(&mut self, a: T, b: T, result: T) {
        let (a, b, r) = (a.to_u64(), b.to_u64(), result.to_u64());
        self.set_chain((a & b) | ((a | b) & !r), result);
    }

    /// After `result = a - b (- borrow in)`.
    #[inline(always)]
    pub(crate) fn set_sub<T: Int>(&mut self, a: T, b: T, result: T) {
        let (a, b, r) = (a.to_u64(), b.to_u64(), result.to_u64());
        self.set_chain((!a & b) | ((!a | b) & r), result);
    }

    /// After AND, OR, XOR, TEST: CF, OF, AF clear.
    #[inline(always)]
    pub(crate) fn set_logic<T: Int>(&mut self, result: T) {
        self.result = result.sign_extend();
        self.carry = 0;
        self.misc = 0;
    }

    /// Replaces CF, leaving all others.
    #[inline(always)]
    pub(crate) fn set_cf(&mut self, cf: bool) {
        let flip = (self.carry >> 63) ^ u64::from(cf);
        // OF is the difference of the two top bits: flip both.
        self.carry ^= flip << 63 | flip << 62;
    }

    /// Replaces CF and OF, leaving the others.
    #[inline(always)]
    pub(crate) fn set_cf_of(&mut self, cf: bool, of: bool) {
        self.carry = u64::from(cf) << 63 | u64::from(cf != of) << 62;
    }

    /// Replaces OF, leaving all others.
    #[inline(always)]
    pub(crate) fn set_of(&mut self, of: bool) {
        self.set_cf_of(self.cf(), of);
    }

    /// Replaces AF, leaving all others.
    #[inline(always)]
    pub(crate) fn set_af(&mut self, af: bool) {
        self.misc = (self.misc & !AF_BIT) | u64::from(af) << 3;
    }

    /// Replaces ZF, leaving all others.
    #[inline]
    pub(crate) fn set_zf(&mut self, zf: bool) {
        let value = self.value() & !rflags::ZF | if zf { rflags::ZF } else { 0 };
        self.set_arithmetic(value);
    }

    #[inline(always)]
    pub(crate) fn cf(&self) -> bool {
        self.carry >> 63 != 0
    }
    #[inline(always)]
    pub(crate) fn of(&self) -> bool {
        (self.carry ^ self.carry << 1) >> 63 != 0
    }
    #[inline(always)]
    pub(crate) fn af(&self) -> bool {
        self.misc & AF_BIT != 0
    }
    #[inline(always)]
    pub(crate) fn zf(&self) -> bool {
        self.result == 0
    }
    #[inline(always)]
    pub(crate) fn sf(&self) -> bool {
        (self.result ^ self.misc) & SIGN != 0
    }
    #[inline(always)]
    pub(crate) fn pf(&self) -> bool {
        ((self.result ^ self.misc >> 8) as u8).count_ones() & 1 == 0
    }

    /// All of RFLAGS.
    pub(crate) fn value(&self) -> u64 {
        let bit = |set: bool, mask: u64| if set { mask } else { 0 };
        self.sys
            | bit(self.cf(), rflags::CF)
            | bit(self.pf(), rflags::PF)
            | bit(self.af(), rflags::AF)
            | bit(self.zf(), rflags::ZF)
            | bit(self.sf(), rflags::SF)
            | bit(self.of(), rflags::OF)
    }

    /// Sets the six arithmetic flags from the bits of `value`.
    pub(crate) fn set_arithmetic(&mut self, value: u64) {
        let zf = value & rflags::ZF != 0;
        self.result = u64::from(!zf);
        // Parity of the result's low byte is even exactly when it is zero.
        let parity_flip = u64::from((value & rflags::PF != 0) != zf);
        let sign = if value & rflags::SF != 0 { SIGN } else { 0 };
        self.misc = sign | parity_flip << 8 | if value & rflags::AF != 0 { AF_BIT } else { 0 };
        self.set_cf_of(value & rflags::CF != 0, value & rflags::OF != 0);
    }

    /// Sets all of RFLAGS; reserved bits take their fixed values.
    pub(crate) fn set_value(&mut self, value: u64) {
        const SYS: u64 = rflags::TF
            | rflags::IF
            | rflags::DF
            | rflags::IOPL
            | rflags::NT
            | rflags::RF
            | rflags::VM
            | rflags::AC
            | rflags::VIF
            | rflags::VIP
            | rflags::ID;
        self.sys = value & SYS | rflags::FIXED;
        self.set_arithmetic(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_combination_can_be_loaded() {
        let bits = [rflags::CF, rflags::PF, rflags::AF, rflags::ZF, rflags::SF, rflags::OF];
        for set in 0..64u32 {
            let value = bits.iter().enumerate().filter(|(i, _)| set >> i & 1 != 0).fold(0, |v, (_, bit)| v | bit);
            let mut flags = Flags::new(value | rflags::IF);
            assert_eq!(flags.value(), value | rflags::IF | rflags::FIXED);
            for cf in [false, true] {
                flags.set_cf(cf);
                assert_eq!(flags.value() & !rflags::CF, (value & !rflags::CF) | rflags::IF | rflags::FIXED);
                assert_eq!(flags.cf(), cf);
            }
        }
    }

    #[test]
    fn addition_and_subtraction_of_all_bytes() {
        for a in 0..=255u8 {
            for b in 0..=255u8 {
                let mut flags = Flags::new(0);
                flags.set_add(a, b, a.wrapping_add(b));
                let r = a.wrapping_add(b);
                assert_eq!(flags.cf(), a.checked_add(b).is_none());
                assert_eq!(flags.of(), (a as i8).checked_add(b as i8).is_none());
                assert_eq!(flags.af(), (a & 15) + (b & 15) > 15);
                assert_eq!((flags.zf(), flags.sf(), flags.pf()), (r == 0, r > 127, r.count_ones() % 2 == 0));
                flags.set_sub(a, b, a.wrapping_sub(b));
                assert_eq!(flags.cf(), a < b);
                assert_eq!(flags.of(), (a as i8).checked_sub(b as i8).is_none());
                assert_eq!(flags.af(), (a & 15) < (b & 15));
            }
        }
    }
}
