//! Instructions that KVM gives up on (it knows few vector instructions when they reach MMIO) are executed by our own CPU,
//! on the same memory and buses; then the guest goes on in KVM.

use std::sync::Arc;

use cpu::{Events, Exit, Features, SharedCpus};
use kvm_bindings::{KVM_VCPUEVENT_VALID_SHADOW, kvm_debugregs};
use kvm_ioctls::VcpuFd;
use platform::x86::{VcpuState, rflags, seg};

use super::kernel::KernelVm;
use super::outside::Outside;
use super::refused;
use super::registers::{self, MsrList};
use super::vectors;
use crate::engine::EngineError;

/// Longest instruction, in bytes.
const MAX_INSTRUCTION: u64 = 15;
/// CS access rights: 64-bit code.
const LONG: u32 = 1 << 13;
/// DR6: single step.
const DR6_BS: u64 = 1 << 14;

/// The interpreter of one vCPU.
pub(super) struct Fallback {
    vcpu: cpu::Vcpu,
    vm: Arc<KernelVm>,
}

impl Fallback {
    pub(super) fn new(
        vm: Arc<KernelVm>,
        outside: Arc<Outside>,
        shared: Arc<SharedCpus>,
        features: Arc<Features>,
    ) -> Self {
        let events = Arc::new(Events::default());
        Self { vcpu: cpu::Vcpu::new(vm.memory.clone(), outside, events, shared, features), vm }
    }

    /// Executes the instruction at which the vCPU stands. Returns whether the vCPU has shut down over it.
    pub(super) fn execute(&mut self, fd: &VcpuFd, msrs: &MsrList) -> Result<bool, EngineError> {
        let state = registers::get(fd, msrs)?;
        self.forget_code(fd, &state);
        self.vcpu.set_state(&state);
        self.vcpu.set_xsave_area(&vectors::get(fd)?);
        let before = self.vcpu.state();
        let exit = self.vcpu.step(1);
        let after = self.vcpu.state();
        registers::set_core(fd, &after)?;
        vectors::set(fd, &self.vcpu.xsave_area())?;
        registers::write_msrs(fd, &registers::changed_msrs(&before.msrs, &after.msrs))?;
        // A trap flag that is still set has not been acted on: any exception would have cleared it.
        let stepped = before.rflags & after.rflags & rflags::TF != 0;
        settle_events(fd, &after, stepped)?;
        Ok(exit == Some(Exit::Shutdown))
    }

    /// The guest may have changed its code without telling anybody: under KVM nobody watches its writes.
    fn forget_code(&self, fd: &VcpuFd, state: &VcpuState) {
        let cs = &state.segments[seg::CS];
        let wide = cs.access & LONG != 0;
        let linear = |offset: u64| {
            let address = state.rip.wrapping_add(offset);
            if wide { address } else { cs.base.wrapping_add(address) & 0xffff_ffff }
        };
        for address in [linear(0), linear(MAX_INSTRUCTION - 1)] {
            if let Ok(found) = fd.translate_gva(address)
                && found.valid != 0
            {
                self.vm.memory.pages().note_write(found.physical_address, 1);
            }
        }
    }
}

/// Takes back the #UD that KVM may have queued for the instruction, ends the interrupt shadow of the one before, and queues the
/// debug trap of a single step.
fn settle_events(fd: &VcpuFd, after: &VcpuState, stepped: bool) -> Result<(), EngineError> {
    let mut events = fd.get_vcpu_events().map_err(refused("read the events of a vCPU"))?;
    if events.exception.nr == cpu::vector::UD {
        (events.exception.injected, events.exception.pending) = (0, 0);
    }
    if stepped {
        let [d0, d1, d2, d3, dr6, dr7] = after.dr;
        let debug = kvm_debugregs { db: [d0, d1, d2, d3], dr6: dr6 | DR6_BS, dr7, ..Default::default() };
        fd.set_debug_regs(&debug).map_err(refused("write the debug registers of a vCPU"))?;
        (events.exception.injected, events.exception.nr, events.exception.has_error_code) = (1, cpu::vector::DB, 0);
    }
    events.interrupt.shadow = 0;
    events.flags = KVM_VCPUEVENT_VALID_SHADOW;
    fd.set_vcpu_events(&events).map_err(refused("write the events of a vCPU"))
}
