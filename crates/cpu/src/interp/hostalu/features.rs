//! Whether an instruction exists, for the guest and on the host.

use iced_x86::CpuidFeature;

use crate::Features;
use crate::features::bits::Bit;
use crate::features::instruction::{data_bit, integer_bit};

/// Which CPUID bits are known to be set in both. Looked up once per feature.
pub(crate) struct Known {
    data: Box<[Option<bool>; 256]>,
    integer: Box<[Option<bool>; 256]>,
}

impl Default for Known {
    fn default() -> Self {
        Self { data: Box::new([None; 256]), integer: Box::new([None; 256]) }
    }
}

impl Known {
    /// Whether all of `wanted` are in the guest's CPUID and on the host.
    pub(crate) fn all(&mut self, wanted: &[CpuidFeature], guest: &Features) -> bool {
        wanted.iter().all(|&feature| {
            let slot = &mut self.data[feature as usize & 255];
            *slot.get_or_insert_with(|| has(feature, guest))
        })
    }

    /// Whether the guest's CPUID hides one of the features that an instruction of this CPU's own belongs to.
    pub(crate) fn hides(&mut self, wanted: &[CpuidFeature], guest: &Features) -> bool {
        wanted.iter().any(|&feature| {
            let slot = &mut self.integer[feature as usize & 255];
            *slot.get_or_insert_with(|| integer_bit(feature).is_some_and(|bit| !guest.has(bit)))
        })
    }
}

fn has(feature: CpuidFeature, guest: &Features) -> bool {
    let Some(bit) = data_bit(feature) else { return false };
    guest.has(bit) && on_host(feature, bit)
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
