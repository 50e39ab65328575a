//! Logical destinations (SDM vol. 3, 11.6.2.2 and 11.12.10.2).

/// Whether an APIC in xAPIC mode is addressed by the 8-bit logical destination `id`.
///
/// The flat model is a mask of eight APICs; the cluster model is a cluster number above a mask of four.
pub(super) fn xapic_matches(ldr: u32, dfr: u32, id: u32) -> bool {
    let own = ldr >> 24;
    if id > 0xff {
        return false;
    }
    match dfr >> 28 {
        0xf => own & id != 0,
        0 => (id >> 4 == own >> 4 || id >> 4 == 0xf) && own & id & 0xf != 0,
        _ => false,
    }
}

/// The logical ID of an APIC in x2APIC mode: a cluster of 16 in the upper half, one bit in the lower.
pub(super) fn x2apic_ldr(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 0xf)
}

/// Whether an APIC in x2APIC mode with this logical ID is addressed by `id`.
pub(super) fn x2apic_matches(ldr: u32, id: u32) -> bool {
    ldr >> 16 == id >> 16 && ldr & id & 0xffff != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_cluster_and_x2apic() {
        let (flat, cluster) = (u32::MAX, 0x0fff_ffff);
        assert!(xapic_matches(0x0400_0000, flat, 0x0c));
        assert!(!xapic_matches(0x0400_0000, flat, 0x03));
        assert!(!xapic_matches(0x0400_0000, flat, 0x104));
        assert!(xapic_matches(0x2100_0000, cluster, 0x23));
        assert!(!xapic_matches(0x2100_0000, cluster, 0x13));
        assert!(!xapic_matches(0x2100_0000, cluster, 0x22));
        assert!(xapic_matches(0x2100_0000, cluster, 0xf1), "cluster 15 is a broadcast");
        assert!(!xapic_matches(0x2100_0000, 0x5fff_ffff, 0xff), "neither model");
        assert_eq!(x2apic_ldr(0x25), 0x2_0020);
        assert!(x2apic_matches(x2apic_ldr(0x25), 0x2_ffff));
        assert!(!x2apic_matches(x2apic_ldr(0x25), 0x1_0020));
    }
}
