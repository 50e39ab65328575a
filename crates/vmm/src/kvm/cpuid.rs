//! What the guest's CPUID says: what KVM supports, cut and completed as for the software CPU.

use cpu::Features;
use cpu::features::{CpuModel, Placement, Timing};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::refused;
use crate::engine::EngineError;

/// Leaf 1, ECX: the local APIC's timer has a TSC-deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 0x40000001, EAX: message-signalled interrupts and I/O APIC entries carry 15-bit destination ids.
const EXTENDED_DESTINATION_IDS: u32 = 1 << 0;

/// Frequency of the local APIC's timer in the kernel: a nanosecond a tick.
const APIC_KHZ: u32 = 1_000_000;

/// What KVM can give to guests on this host.
pub(super) struct Supported(Vec<kvm_cpuid_entry2>);

impl Supported {
    /// Asks KVM.
    pub(super) fn read(kvm: &Kvm) -> Result<Self, EngineError> {
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("learn what CPUID KVM supports"))?;
        let mut entries = cpuid.as_slice().to_vec();
        // Kernels before 6.13 name this feature by a capability alone.
        if kvm.check_extension(Cap::TscDeadlineTimer)
            && let Some(one) = entries.iter_mut().find(|entry| entry.function == 1)
        {
            one.ecx |= TSC_DEADLINE;
        }
        Ok(Self(entries))
    }

    fn leaf(&self, function: u32, index: u32) -> [u32; 4] {
        let matches = |entry: &&kvm_cpuid_entry2| {
            entry.function == function && (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0 || entry.index == index)
        };
        self.0.iter().find(matches).map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
    }

    /// The processor that a vCPU at `place` shows. `tsc_khz`: what KVM says of its time-stamp counter.
    pub(super) fn model(
        &self,
        place: Placement,
        model: &CpuModel,
        tsc_khz: Option<u32>,
    ) -> Result<Features, EngineError> {
        let filter = model.over(|function, index| self.leaf(function, index))?;
        let mut model = Features::from_host(place, |function, index| filter.leaf(function, index));
        if let Some(tsc_khz) = tsc_khz {
            model = model.with_timing(Timing { tsc_khz, apic_khz: APIC_KHZ });
        }
        // The kernel's I/O APIC knows 8 bits only.
        if let Some(leaf) = model.leaves.iter_mut().find(|leaf| leaf.function == 0x4000_0001) {
            leaf.regs[0] &= !EXTENDED_DESTINATION_IDS;
        }
        // What the software CPU says of speculation is not true of the host's.
        if let Some(leaf) = model.leaves.iter_mut().find(|leaf| leaf.function == 0x8000_0021) {
            let supported = self.leaf(0x8000_0021, 0);
            leaf.regs = std::array::from_fn(|i| leaf.regs[i] & supported[i]);
        }
        Ok(model)
    }
}

/// The model in KVM's form.
pub(super) fn table(model: &Features) -> Result<CpuId, EngineError> {
    let entries: Vec<_> = model
        .leaves
        .iter()
        .map(|leaf| kvm_cpuid_entry2 {
            function: leaf.function,
            index: leaf.index.unwrap_or(0),
            flags: if leaf.index.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: leaf.regs[0],
            ebx: leaf.regs[1],
            ecx: leaf.regs[2],
            edx: leaf.regs[3],
            ..Default::default()
        })
        .collect();
    CpuId::from_entries(&entries).map_err(|_| EngineError::Unsupported("KVM: too many CPUID leaves".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_what_kvm_offers() {
        let vendor = |b: &[u8; 4]| u32::from_le_bytes(*b);
        let entry = |function, index, flags, regs: [u32; 4]| kvm_cpuid_entry2 {
            function,
            index,
            flags,
            eax: regs[0],
            ebx: regs[1],
            ecx: regs[2],
            edx: regs[3],
            ..Default::default()
        };
        let supported = Supported(vec![
            entry(0, 0, 0, [0xd, vendor(b"Auth"), vendor(b"cAMD"), vendor(b"enti")]),
            entry(1, 0, 0, [0xa2_0f10, 0, 1 << 5 | 1 << 3 | 1, u32::MAX]),
            entry(7, 0, 1, [0, 1 << 5, 0, 0]),
            entry(0x4000_0000, 0, 0, [0x4000_0001, vendor(b"KVMK"), vendor(b"VMKV"), vendor(b"M\0\0\0")]),
        ]);
        let place = Placement { apic_id: 3, sockets: 1, cores: 4, threads: 1, x2apic: false };
        let model = supported.model(place, &CpuModel::default(), Some(2_000_000)).unwrap();
        assert_eq!(model.leaf(0x4000_0010, 0)[..2], [2_000_000, 1_000_000]);
        assert_eq!(model.leaf(1, 0)[2], 1 << 31 | 1, "SSE3 and the hypervisor bit; no MONITOR, VMX or x2APIC");
        assert_eq!(model.leaf(7, 0)[1], 1 << 5);
        assert_eq!(model.leaf(0x4000_0000, 0)[1], vendor(b"bhyv"));
        assert_eq!(model.leaf(0x4000_0001, 0)[0], 0);
        let table = table(&model).unwrap();
        let seven = table.as_slice().iter().find(|entry| entry.function == 7).unwrap();
        assert_eq!((seven.index, seven.flags, seven.ebx), (0, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, 1 << 5));
    }
}
