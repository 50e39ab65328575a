//! Whether an instruction exists, for the guest and on the host.

use iced_x86::CpuidFeature;

use crate::Features;

/// Which CPUID bits are known to be set in both. Looked up once per feature.
pub(crate) struct Known(Box<[Option<bool>; 256]>);

impl Default for Known {
    fn default() -> Self {
        Self(Box::new([None; 256]))
    }
}

impl Known {
    /// Whether all of `wanted` are in the guest's CPUID and on the host.
    pub(crate) fn all(&mut self, wanted: &[CpuidFeature], guest: &Features) -> bool {
        wanted.iter().all(|&feature| {
            let slot = &mut self.0[feature as usize & 255];
            *slot.get_or_insert_with(|| has(feature, guest))
        })
    }
}

fn has(feature: CpuidFeature, guest: &Features) -> bool {
    let Some(bit) = cpuid_bit(feature) else { return false };
    in_guest(guest, bit) && on_host(feature, bit)
}

/// Where a feature is announced.
#[derive(Clone, Copy)]
struct Bit {
    leaf: u32,
    index: u32,
    /// 0–3: EAX, EBX, ECX, EDX.
    register: usize,
    bit: u32,
}

/// Whether a CPUID bit is set for the guest.
fn in_guest(guest: &Features, bit: Bit) -> bool {
    let leaf = guest.leaves.iter().find(|l| l.function == bit.leaf && l.index.unwrap_or(0) == bit.index);
    leaf.is_some_and(|leaf| leaf.regs[bit.register & 3] >> bit.bit & 1 != 0)
}

#[cfg(target_arch = "x86_64")]
fn on_host(feature: CpuidFeature, bit: Bit) -> bool {
    use std::arch::is_x86_feature_detected;
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    if __cpuid(bit.leaf & 0x8000_0000).eax < bit.leaf {
        return false;
    }
    let leaf = __cpuid_count(bit.leaf, bit.index);
    let set = [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx][bit.register & 3] >> bit.bit & 1 != 0;
    // The operating system must have enabled the registers too.
    let enabled = match format!("{feature:?}") {
        name if name.starts_with("AVX512") => is_x86_feature_detected!("avx512f"),
        name if name.starts_with("AVX") => is_x86_feature_detected!("avx"),
        _ if matches!(feature, CpuidFeature::FMA | CpuidFeature::F16C | CpuidFeature::XOP | CpuidFeature::FMA4) => {
            is_x86_feature_detected!("avx")
        }
        _ => true,
    };
    set && enabled
}

#[cfg(not(target_arch = "x86_64"))]
fn on_host(_: CpuidFeature, _: Bit) -> bool {
    true
}

/// SDM vol. 2, CPUID; AMD APM vol. 3, appendix E. `None`: not a feature of data instructions.
fn cpuid_bit(feature: CpuidFeature) -> Option<Bit> {
    use CpuidFeature as F;
    const EAX: usize = 0;
    const EBX: usize = 1;
    const ECX: usize = 2;
    const EDX: usize = 3;
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
