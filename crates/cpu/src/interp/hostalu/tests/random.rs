//! Random operands.

/// Xorshift.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub(super) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
    pub(super) fn byte(&mut self) -> u8 {
        (self.next() >> 24) as u8
    }
    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// Bytes that make interesting numbers of any type.
    pub(super) fn numbers(&mut self, bytes: &mut [u8]) {
        const F64: [u64; 12] = [
            0,
            1 << 63,
            0x3ff0_0000_0000_0000,
            0xbff8_0000_0000_0000,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff8_0000_0000_0000,
            0x7ff0_0000_0000_0001,
            1,
            0x000f_ffff_ffff_ffff,
            0x7fef_ffff_ffff_ffff,
            0x41df_ffff_ffe0_0000,
        ];
        const F32: [u32; 10] =
            [0, 1 << 31, 0x3f80_0000, 0xc040_0000, 0x7f80_0000, 0x7fc0_0000, 0x7f80_0001, 1, 0x7f7f_ffff, 0x4f00_0000];
        let kind = self.below(5);
        for chunk in bytes.chunks_mut(8) {
            let value = match kind {
                0 => self.next(),
                1 => self.pick(&F64),
                2 => u64::from(self.pick(&F32)) | u64::from(self.pick(&F32)) << 32,
                3 => f64::from_bits(self.next() & 0x800f_ffff_ffff_ffff | (1000 + self.below(50)) << 52).to_bits(),
                _ => {
                    let mut float =
                        || u64::from(self.next() as u32 & 0x807f_ffff | (110 + self.below(40) as u32) << 23);
                    float() | float() << 32
                }
            };
            let length = chunk.len();
            chunk.copy_from_slice(&value.to_le_bytes()[..length]);
        }
    }
}
