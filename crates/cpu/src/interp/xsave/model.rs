//! Where state components are in an XSAVE area, and what else the guest's CPUID says about it.

use super::super::fpu::component;
use super::{COMPONENTS, EXTENDED, MAX_AREA};
use crate::Features;

/// Where a component is in the standard format, and how it is placed in the compacted one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) offset: usize,
    pub(super) size: usize,
    aligned: bool,
}

/// Taken from CPUID once; looked at on every XSAVE and XRSTOR.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Model {
    /// By component number.
    places: [Place; 8],
    /// Bits that MXCSR can have: MXCSR_MASK.
    pub(super) mxcsr_mask: u32,
    /// FCS and FDS are deprecated and stored as zero (CPUID.07H.0:EBX[13]).
    pub(super) no_selectors: bool,
    /// XSAVEC and the compacted format of XRSTOR (CPUID.0DH.1:EAX[1]).
    pub(super) xsavec: bool,
    /// XGETBV with ECX 1 (CPUID.0DH.1:EAX[2]).
    pub(super) xgetbv1: bool,
}

impl Model {
    pub(super) fn new(features: &Features) -> Self {
        let xsave = features.leaf(0xd, 1)[0];
        // CPUID.80000001H:ECX[7]: misaligned SSE mode.
        let misaligned = features.leaf(0x8000_0001, 0)[2] >> 7 & 1 != 0;
        Self {
            places: std::array::from_fn(|n| place(features, n as u32)),
            mxcsr_mask: if misaligned { 0x2_ffff } else { 0xffff },
            no_selectors: features.leaf(7, 0)[1] >> 13 & 1 != 0,
            xsavec: xsave >> 1 & 1 != 0,
            xgetbv1: xsave >> 2 & 1 != 0,
        }
    }

    /// Places of the extended components of `set`, in the format given.
    pub(super) fn places(self, set: u64, compacted: bool) -> impl Iterator<Item = (u32, Place)> {
        let mut next = EXTENDED;
        COMPONENTS.into_iter().filter(move |&n| n >= 2 && set >> n & 1 != 0).map(move |n| {
            let mut place = self.places[n as usize & 7];
            if compacted {
                place.offset = if place.aligned { next.next_multiple_of(64) } else { next };
                next = place.offset + place.size;
            }
            (n, place)
        })
    }

    /// Size in bytes of an area with the components of `set`.
    pub(super) fn end(self, set: u64, compacted: bool) -> usize {
        self.places(set, compacted).map(|(_, place)| place.offset + place.size).max().unwrap_or(EXTENDED)
    }
}

/// The place of component `n` (2 and above) as CPUID leaf 0DH says; Intel's where it says nothing usable.
fn place(features: &Features, n: u32) -> Place {
    let fallback = match n {
        component::AVX => Place { offset: 576, size: 256, aligned: false },
        component::OPMASK => Place { offset: 1088, size: 64, aligned: false },
        component::ZMM_HI256 => Place { offset: 1152, size: 512, aligned: false },
        _ => Place { offset: 1664, size: 1024, aligned: false },
    };
    let [size, offset, flags, _] = features.leaf(0xd, n);
    let told = Place { offset: offset as usize, size: size as usize, aligned: flags & 2 != 0 };
    let usable =
        told.size == fallback.size && told.offset >= EXTENDED && told.offset.saturating_add(told.size) <= MAX_AREA;
    if usable { told } else { fallback }
}
