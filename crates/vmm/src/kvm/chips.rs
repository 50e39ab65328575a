//! Interrupt lines and messages on their way to the kernel's chips.
//!
//! Several devices may drive one input of a chip, and the PIRQ router pairs inputs as software chooses, so lines are
//! combined here, one per input, before the kernel is told.

use std::sync::Arc;

use irqchip::IrqRouter;
use kvm_bindings::kvm_msi;
use platform::{IrqLine, IrqSink, MsiMessage, MsiSink, Persist};

use super::kernel::{IOAPIC_GSI, IOAPIC_PINS, KernelVm, PIC_GSI};
use crate::engine::{EngineError, InterruptChips};
use crate::sources::Sources;

/// Inputs that the kernel knows under consecutive interrupt numbers.
struct Inputs {
    vm: Arc<KernelVm>,
    first_gsi: u32,
}

impl IrqSink for Inputs {
    fn set_level(&self, line: u32, asserted: bool) {
        // The kernel refuses only numbers it does not know.
        let _ = self.vm.fd.set_irq_line(self.first_gsi + line, asserted);
    }
}

/// Message-signalled interrupts.
struct Msi(Arc<KernelVm>);

impl MsiSink for Msi {
    fn send(&self, message: MsiMessage) {
        if message.address >> 20 != 0xfee {
            return;
        }
        let msi = kvm_msi { address_lo: message.address as u32, data: message.data, ..Default::default() };
        // A message to nobody is an error to the kernel, and nothing on a PC.
        let _ = self.0.fd.signal_msi(msi);
    }
}

/// The kernel's chips, as the board sees them.
pub(super) struct KvmChips {
    router: IrqRouter,
    pic: Arc<Sources>,
    ioapic: Arc<Sources>,
    msi: Arc<Msi>,
}

impl KvmChips {
    pub(super) fn new(vm: &Arc<KernelVm>) -> Result<Self, EngineError> {
        let inputs = |first_gsi| Arc::new(Inputs { vm: vm.clone(), first_gsi });
        let router = IrqRouter::over(inputs(PIC_GSI), inputs(IOAPIC_GSI), IOAPIC_PINS);
        let (pic, ioapic) = (Arc::new(Sources::pic(&router)), Arc::new(Sources::ioapic(&router, IOAPIC_PINS)));
        Ok(Self { router, pic, ioapic, msi: Arc::new(Msi(vm.clone())) })
    }
}

impl InterruptChips for KvmChips {
    fn line(&self, gsi: u32) -> Option<IrqLine> {
        self.router.source(gsi)
    }
    fn pic(&self) -> Arc<dyn IrqSink> {
        self.pic.clone()
    }
    fn ioapic(&self) -> Arc<dyn IrqSink> {
        self.ioapic.clone()
    }
    fn msi(&self) -> Arc<dyn MsiSink> {
        self.msi.clone()
    }
    fn pins(&self) -> u32 {
        IOAPIC_PINS
    }
    /// Nothing yet: the kernel's chips have a state of their own form, which a snapshot has to convert to the neutral one,
    /// and half of it (the local APICs) belongs to vCPUs that must not run meanwhile.
    fn persistent(&self) -> Vec<(String, Arc<dyn Persist>)> {
        Vec::new()
    }
}
