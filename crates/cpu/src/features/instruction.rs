//! Which CPUID bit announces an instruction.

use iced_x86::CpuidFeature;

use super::bits::{Bit, EAX, EBX, ECX, EDX};

/// Instructions that this CPU runs by itself. `None`: every guest has them, or a control register decides.
pub(crate) fn integer_bit(feature: CpuidFeature) -> Option<Bit> {
    use CpuidFeature as F;
    let (leaf, index, register, bit) = match feature {
        F::CMPXCHG16B => (1, 0, ECX, 13),
        // CRC32.
        F::SSE4_2 => (1, 0, ECX, 20),
        F::MOVBE => (1, 0, ECX, 22),
        F::POPCNT => (1, 0, ECX, 23),
        F::RDRAND => (1, 0, ECX, 30),
        F::FSGSBASE => (7, 0, EBX, 0),
        F::BMI1 => (7, 0, EBX, 3),
        F::BMI2 => (7, 0, EBX, 8),
        F::INVPCID => (7, 0, EBX, 10),
        F::RDSEED => (7, 0, EBX, 18),
        F::ADX => (7, 0, EBX, 19),
        F::SMAP => (7, 0, EBX, 20),
        F::CLFLUSHOPT => (7, 0, EBX, 23),
        F::CLWB => (7, 0, EBX, 24),
        F::RDPID => (7, 0, ECX, 22),
        F::XSAVEOPT => (0xd, 1, EAX, 0),
        F::XSAVEC => (0xd, 1, EAX, 1),
        F::XSAVES => (0xd, 1, EAX, 3),
        F::LZCNT => (0x8000_0001, 0, ECX, 5),
        F::RDTSCP => (0x8000_0001, 0, EDX, 27),
        _ => return None,
    };
    Some(Bit { leaf, index, register, bit })
}

/// SDM vol. 2, CPUID; AMD APM vol. 3, appendix E. `None`: not a feature of data instructions.
pub(crate) fn data_bit(feature: CpuidFeature) -> Option<Bit> {
    use CpuidFeature as F;
    let (leaf, index, register, bit) = match feature {
        F::FPU | F::FPU287 | F::FPU387 => (1, 0, EDX, 0),
        F::CMOV => (1, 0, EDX, 15),
        F::MMX => (1, 0, EDX, 23),
        F::FXSR => (1, 0, EDX, 24),
        F::SSE => (1, 0, EDX, 25),
        F::SSE2 => (1, 0, EDX, 26),
        F::SSE3 => (1, 0, ECX, 0),
        F::PCLMULQDQ => (1, 0, ECX, 1),
        F::SSSE3 => (1, 0, ECX, 9),
        F::FMA => (1, 0, ECX, 12),
        F::SSE4_1 => (1, 0, ECX, 19),
        F::SSE4_2 => (1, 0, ECX, 20),
        F::AES => (1, 0, ECX, 25),
        F::XSAVE => (1, 0, ECX, 26),
        F::AVX => (1, 0, ECX, 28),
        F::F16C => (1, 0, ECX, 29),
        F::AVX2 => (7, 0, EBX, 5),
        F::AVX512F => (7, 0, EBX, 16),
        F::AVX512DQ => (7, 0, EBX, 17),
        F::AVX512_IFMA => (7, 0, EBX, 21),
        F::AVX512PF => (7, 0, EBX, 26),
        F::AVX512ER => (7, 0, EBX, 27),
        F::AVX512CD => (7, 0, EBX, 28),
        F::SHA => (7, 0, EBX, 29),
        F::AVX512BW => (7, 0, EBX, 30),
        F::AVX512VL => (7, 0, EBX, 31),
        F::AVX512_VBMI => (7, 0, ECX, 1),
        F::AVX512_VBMI2 => (7, 0, ECX, 6),
        F::GFNI => (7, 0, ECX, 8),
        F::VAES => (7, 0, ECX, 9),
        F::VPCLMULQDQ => (7, 0, ECX, 10),
        F::AVX512_VNNI => (7, 0, ECX, 11),
        F::AVX512_BITALG => (7, 0, ECX, 12),
        F::AVX512_VPOPCNTDQ => (7, 0, ECX, 14),
        F::AVX512_VP2INTERSECT => (7, 0, EDX, 8),
        F::AVX512_FP16 => (7, 0, EDX, 23),
        F::SHA512 => (7, 1, EAX, 0),
        F::SM3 => (7, 1, EAX, 1),
        F::SM4 => (7, 1, EAX, 2),
        F::AVX_VNNI => (7, 1, EAX, 4),
        F::AVX512_BF16 => (7, 1, EAX, 5),
        F::AVX_IFMA => (7, 1, EAX, 23),
        F::AVX_VNNI_INT8 => (7, 1, EDX, 4),
        F::AVX_NE_CONVERT => (7, 1, EDX, 5),
        F::AVX_VNNI_INT16 => (7, 1, EDX, 10),
        F::XSAVEOPT => (0xd, 1, EAX, 0),
        F::XSAVEC => (0xd, 1, EAX, 1),
        F::XSAVES => (0xd, 1, EAX, 3),
        F::SSE4A => (0x8000_0001, 0, ECX, 6),
        F::XOP => (0x8000_0001, 0, ECX, 11),
        F::FMA4 => (0x8000_0001, 0, ECX, 16),
        F::D3NOWEXT => (0x8000_0001, 0, EDX, 30),
        F::D3NOW => (0x8000_0001, 0, EDX, 31),
        _ => return None,
    };
    Some(Bit { leaf, index, register, bit })
}
