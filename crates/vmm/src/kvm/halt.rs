//! Notices when no vCPU can ever run again: all are halted with interrupts disabled or wait for a start-up IPI.
//!
//! The kernel keeps halted vCPUs to itself and tells nobody, so a thread asks every vCPU once per [`INTERVAL`] to come out and
//! look at itself. Only an event from outside (an NMI, INIT, or a start-up IPI from another vCPU) could wake what was seen
//! dead; since the vCPUs look one after the other, all must be seen dead in [`ROUNDS`] successive rounds.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED};
use kvm_ioctls::VcpuFd;
use platform::x86::rflags;
use platform::{PowerEvent, PowerSink};

use super::kick::{Kick, Life};
use crate::engine::EngineError;

const INTERVAL: Duration = Duration::from_millis(500);
const ROUNDS: u32 = 3;

/// Keeps the watching thread alive; each vCPU has one.
pub(super) type Watched = Sender<()>;

/// Starts watching `kicks`, until all copies of the [`Watched`] that belongs to `vcpus_gone` are dropped or the VM has halted.
///
/// # Errors
/// The host has no thread to give.
pub(super) fn watch(
    kicks: Vec<Arc<Kick>>,
    vcpus_gone: Receiver<()>,
    power: Arc<dyn PowerSink>,
) -> Result<(), EngineError> {
    let thread = move || {
        let mut rounds = 0;
        while rounds < ROUNDS {
            kicks.iter().for_each(|kick| kick.ask());
            if vcpus_gone.recv_timeout(INTERVAL) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            // A vCPU that has not answered is busy.
            let all_dead = kicks.iter().all(|kick| kick.answer() == Life::Dead);
            rounds = if all_dead { rounds + 1 } else { 0 };
        }
        power.request(PowerEvent::Halt);
    };
    let started = std::thread::Builder::new().name("halt watch".into()).spawn(thread);
    started
        .map(drop)
        .map_err(|source| EngineError::Host { what: "start a thread that watches for halts".into(), source })
}

/// Whether the vCPU, which does not run at this moment, could only be woken by another vCPU.
pub(super) fn life(fd: &VcpuFd) -> Result<Life, kvm_ioctls::Error> {
    let dead = match fd.get_mp_state()?.mp_state {
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => true,
        KVM_MP_STATE_HALTED => {
            let events = fd.get_vcpu_events()?;
            let nmi = events.nmi.pending != 0 || events.nmi.injected != 0;
            !nmi && events.smi.pending == 0 && fd.get_regs()?.rflags & rflags::IF == 0
        }
        _ => false,
    };
    Ok(if dead { Life::Dead } else { Life::Alive })
}
