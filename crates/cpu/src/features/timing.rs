//! Leaves that tell frequencies, so that guests need not measure them.

use super::Features;

/// Highest hypervisor leaf with frequencies.
const FREQUENCIES: u32 = 0x4000_0010;

/// The frequencies of a VM's clocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timing {
    /// Of the time-stamp counter, in kHz.
    pub tsc_khz: u32,
    /// Of the local APIC's timer before its divider, in kHz.
    pub apic_khz: u32,
}

impl Features {
    /// Adds the leaves that tell frequencies: 40000010H, as hypervisors have it, and on Intel 15H and 16H (SDM vol. 3, 19.7.3).
    #[must_use]
    pub fn with_timing(mut self, timing: Timing) -> Self {
        let Timing { tsc_khz, apic_khz } = timing;
        if let Some(top) = self.leaves.iter_mut().find(|leaf| leaf.function == 0x4000_0000) {
            top.regs[0] = FREQUENCIES;
        }
        self.add(FREQUENCIES, None, [tsc_khz, apic_khz, 0, 0]);
        let invariant = self.leaf(0x8000_0007, 0)[3] >> 8 & 1 != 0;
        if !self.amd && invariant && tsc_khz >= apic_khz && apic_khz != 0 && apic_khz <= u32::MAX / 1000 {
            let (numerator, denominator) = ratio(tsc_khz, apic_khz);
            self.add(0x15, None, [denominator, numerator, apic_khz * 1000, 0]);
            let mhz = (tsc_khz / 1000).min(0xffff);
            self.add(0x16, None, [mhz, mhz, 100, 0]);
            if let Some(top) = self.leaves.iter_mut().find(|leaf| leaf.function == 0) {
                top.regs[0] = top.regs[0].max(0x16);
            }
        }
        self
    }
}

/// The fraction closest to `tsc / crystal` whose numerator times `crystal` fits in 32 bits, as guests compute it.
fn ratio(tsc_khz: u32, crystal_khz: u32) -> (u32, u32) {
    let (tsc, crystal) = (u64::from(tsc_khz), u64::from(crystal_khz));
    let limit = (u64::from(u32::MAX) / tsc.max(1)).clamp(1, 4096);
    // The error of a denominator, in kHz times the denominator.
    let error = |d: u64| ((tsc * d + crystal / 2) / crystal * crystal).abs_diff(tsc * d);
    let better = |a: &u64, b: &u64| (error(*a) * b).cmp(&(error(*b) * a));
    let denominator =
        (1..=limit).filter(|d| (tsc * d + crystal / 2) <= u64::from(u32::MAX)).min_by(better).unwrap_or(1);
    let numerator = (tsc * denominator + crystal / 2) / crystal;
    (u32::try_from(numerator).unwrap_or(u32::MAX), denominator as u32)
}

#[cfg(test)]
mod tests {
    use super::super::Placement;
    use super::*;

    fn model(vendor: &[u8; 4], timing: Timing) -> Features {
        let vendor = u32::from_le_bytes(*vendor);
        let host = |function: u32, _| match function {
            0 => [0xd, vendor, 0, 0],
            0x8000_0007 => [0, 0, 0, 1 << 8],
            _ => [0; 4],
        };
        Features::from_host(Placement::single(), host).with_timing(timing)
    }

    #[test]
    fn frequencies_are_told() {
        let timing = Timing { tsc_khz: 2_445_406, apic_khz: 134_217 };
        let amd = model(b"Auth", timing);
        assert_eq!(amd.leaf(0x4000_0000, 0)[0], 0x4000_0010);
        assert_eq!(amd.leaf(0x4000_0010, 0), [2_445_406, 134_217, 0, 0]);
        assert_eq!(amd.leaf(0x15, 0), [0; 4], "AMD has no such leaf");
        let intel = model(b"Genu", timing);
        assert_eq!(intel.leaf(0, 0)[0], 0x16);
        assert_eq!(intel.leaf(0x16, 0)[0], 2445);
    }

    #[test]
    fn guests_that_compute_in_32_bits_come_out_right() {
        for (tsc_khz, apic_khz) in
            [(2_445_406, 134_217), (3_999_999, 1_000_000), (2_000_000, 200_000), (1_900_001, 25_000)]
        {
            let [denominator, numerator, crystal, _] = model(b"Genu", Timing { tsc_khz, apic_khz }).leaf(0x15, 0);
            let product = (crystal / 1000).checked_mul(numerator).expect("fits");
            let found = product / denominator;
            assert!(found.abs_diff(tsc_khz) <= tsc_khz / 1_000_000 + 300, "{tsc_khz}: {found}");
            assert!(crystal / 1000 == apic_khz);
        }
        let [denominator, numerator, crystal, _] =
            model(b"Genu", Timing { tsc_khz: 2_445_406, apic_khz: 134_217 }).leaf(0x15, 0);
        assert!((crystal / 1000 * numerator / denominator).abs_diff(2_445_406) <= 3);
    }
}
