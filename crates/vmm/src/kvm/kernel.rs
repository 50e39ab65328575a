//! The VM in the kernel: guest memory, interrupt chips, and which inputs an interrupt number reaches.
#![allow(unsafe_code)]

use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_X2APIC_API, KVM_CAP_X86_USER_SPACE_MSR, KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_READONLY, KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_UNKNOWN, KVM_PIT_SPEAKER_DUMMY, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use memory::{GuestMemory, RomKind};

use super::refused;
use crate::engine::{EngineError, VmOptions};
use crate::policy::AccessPolicy;

/// A page that KVM on VT-x maps guest-physical memory one to one with while the guest has paging off. Below the ROM window, above
/// the APICs.
const IDENTITY_MAP: u64 = 0xfeff_c000;
/// Three pages for a task state segment that KVM on VT-x needs for real mode.
const TSS: usize = 0xfeff_d000;

/// Inputs of the 8259 pair.
pub(super) const PIC_INPUTS: u32 = 16;
/// Pins of the kernel's I/O APIC.
pub(super) const IOAPIC_PINS: u32 = 24;
/// The pair's input that the second chip hangs on.
const CASCADE: u32 = 2;
/// First interrupt number that reaches one input of the 8259 pair alone. Below are the global system interrupts, which the
/// kernel's 8254 needs.
pub(super) const PIC_GSI: u32 = IOAPIC_PINS;
/// First interrupt number that reaches one pin of the I/O APIC alone.
pub(super) const IOAPIC_GSI: u32 = PIC_GSI + PIC_INPUTS;

/// A VM in the kernel.
pub(super) struct KernelVm {
    pub(super) fd: VmFd,
    /// What guest-physical addresses are mapped to; the kernel writes there while a vCPU runs.
    pub(super) memory: GuestMemory,
}

impl KernelVm {
    /// Makes a VM with memory and interrupt chips, but without vCPUs.
    pub(super) fn new(kvm: &Kvm, options: &VmOptions) -> Result<Self, EngineError> {
        let limit = kvm.get_max_vcpus();
        if options.layout.cpus as usize > limit {
            let why = format!("this host's KVM runs at most {limit} vCPUs per VM");
            return Err(EngineError::NoKvm { why });
        }
        let fd = kvm.create_vm().map_err(refused("create a VM in KVM"))?;
        let vm = Self { fd, memory: options.memory.clone() };
        vm.enable_capabilities()?;
        vm.claim_msrs(&options.policy)?;
        vm.map_memory()?;
        vm.fd.set_identity_map_address(IDENTITY_MAP).map_err(refused("place KVM's identity map"))?;
        vm.fd.set_tss_address(TSS).map_err(refused("place KVM's task state segment"))?;
        vm.fd.create_irq_chip().map_err(refused("create interrupt chips in KVM"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.fd.create_pit2(pit).map_err(refused("create an interval timer in KVM"))?;
        let routes = KvmIrqRouting::from_entries(&routes())
            .map_err(|_| EngineError::Unsupported("KVM: too many interrupt routes".into()))?;
        vm.fd.set_gsi_routing(&routes).map_err(refused("route interrupts in KVM"))?;
        Ok(vm)
    }

    /// Unknown MSRs come to our policy, and instructions that KVM cannot emulate to our interpreter.
    fn enable_capabilities(&self) -> Result<(), EngineError> {
        let enable = |cap, argument: u32| {
            self.fd.enable_cap(&kvm_enable_cap { cap, args: [u64::from(argument), 0, 0, 0], ..Default::default() })
        };
        enable(KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER)
            .map_err(refused("have KVM report unknown MSRs"))?;
        // Where there is no such capability (before Linux 5.15), user mode gets #UD instead: as good as it gets.
        let _ = enable(KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1);
        // Without it, APIC ids end at 254.
        let _ = enable(KVM_CAP_X2APIC_API, KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK);
        Ok(())
    }

    /// MSRs that the policy answers come to it, also those that KVM knows.
    fn claim_msrs(&self, policy: &AccessPolicy) -> Result<(), EngineError> {
        // A clear bit denies the access, and denied ones are reported. No range is longer than the 16 that are here.
        const DENIED: [u8; 2] = [0; 2];
        let ranges: Vec<_> = policy
            .answered()
            .map(|(base, last)| MsrFilterRange {
                flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
                base,
                msr_count: last - base + 1,
                bitmap: &DENIED,
            })
            .collect();
        self.fd
            .set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
            .map_err(refused("have KVM report MSRs that have fixed answers"))
    }

    /// RAM and firmware. Flash is left out: each access comes to its chip, which may show something else than its contents.
    fn map_memory(&self) -> Result<(), EngineError> {
        let roms = self.memory.roms();
        let fixed = roms.iter().filter(|rom| rom.kind == RomKind::Fixed).map(|rom| (rom.range, KVM_MEM_READONLY));
        for (slot, (range, flags)) in (0..).zip(self.memory.ranges().map(|range| (range, 0)).chain(fixed)) {
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: range.start.0,
                memory_size: range.size,
                userspace_addr: self.memory.base() as u64 + range.start.0,
            };
            // SAFETY: base + address is the host address of every byte of RAM and ROM. The mapping outlives its use: guest memory is
            // only reached while a vCPU runs, and each vCPU keeps this VM, which keeps the memory.
            unsafe { self.fd.set_user_memory_region(region) }.map_err(refused("give guest memory to KVM"))?;
        }
        Ok(())
    }
}

fn route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn pic(gsi: u32, input: u32) -> kvm_irq_routing_entry {
    let chip = if input < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
    route(gsi, chip, input % 8)
}

/// The global system interrupts as on a PC, for the kernel's 8254; then one number for each single input.
fn routes() -> Vec<kvm_irq_routing_entry> {
    let pic_inputs = || (0..PIC_INPUTS).filter(|input| *input != CASCADE);
    let timer_pin = |gsi| if gsi == 0 { 2 } else { gsi };
    let mut all: Vec<_> = pic_inputs().map(|input| pic(input, input)).collect();
    all.extend((0..IOAPIC_PINS).map(|gsi| route(gsi, KVM_IRQCHIP_IOAPIC, timer_pin(gsi))));
    all.extend(pic_inputs().map(|input| pic(PIC_GSI + input, input)));
    all.extend((0..IOAPIC_PINS).map(|pin| route(IOAPIC_GSI + pin, KVM_IRQCHIP_IOAPIC, pin)));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_has_a_number_of_its_own() {
        let all: Vec<_> = routes()
            .iter()
            .map(|entry| {
                // SAFETY: all routes are made by `route`, which writes this field.
                let chip = unsafe { entry.u.irqchip };
                (entry.gsi, chip.irqchip, chip.pin)
            })
            .collect();
        let of = |gsi| all.iter().filter(|route| route.0 == gsi).map(|route| (route.1, route.2)).collect::<Vec<_>>();
        assert_eq!(of(0), [(KVM_IRQCHIP_PIC_MASTER, 0), (KVM_IRQCHIP_IOAPIC, 2)]);
        assert_eq!(of(2), [(KVM_IRQCHIP_IOAPIC, 2)]);
        assert_eq!(of(9), [(KVM_IRQCHIP_PIC_SLAVE, 1), (KVM_IRQCHIP_IOAPIC, 9)]);
        assert_eq!(of(23), [(KVM_IRQCHIP_IOAPIC, 23)]);
        assert_eq!(of(PIC_GSI + 15), [(KVM_IRQCHIP_PIC_SLAVE, 7)]);
        assert!(of(PIC_GSI + CASCADE).is_empty());
        assert_eq!(of(IOAPIC_GSI), [(KVM_IRQCHIP_IOAPIC, 0)]);
        assert_eq!(of(IOAPIC_GSI + 23), [(KVM_IRQCHIP_IOAPIC, 23)]);
    }
}
