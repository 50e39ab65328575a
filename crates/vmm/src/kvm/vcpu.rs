//! Runs a vCPU and serves its exits.

use std::sync::Arc;

use cpu::{Features, SharedCpus};
use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit as KvmExit, VcpuFd};
use platform::x86::{Activity, VcpuState};
use platform::{PowerEvent, PowerSink};

use super::cpuid::{self, Supported};
use super::fallback::Fallback;
use super::halt::{self, Watched};
use super::kernel::KernelVm;
use super::kick::Kick;
use super::outside::{Outside, Unclaimed};
use super::refused;
use super::registers::{self, MsrList};
use crate::engine::{EngineError, Vcpu, VcpuExit, VcpuHandle, VmOptions};

/// One vCPU.
pub(super) struct KvmVcpu {
    index: u32,
    fd: VcpuFd,
    kick: Arc<Kick>,
    outside: Arc<Outside>,
    power: Arc<dyn PowerSink>,
    msrs: MsrList,
    /// After a triple fault, which the kernel does not remember.
    shut_down: bool,
    /// Times that the kernel was asked to enter the guest.
    exits: u64,
    features: Arc<Features>,
    shared: Arc<SharedCpus>,
    /// Made when first needed.
    fallback: Option<Box<Fallback>>,
    vm: Arc<KernelVm>,
    _watched: Watched,
}

/// An exit that needs the vCPU itself, once the data in its run page is done with.
enum Pending {
    Unclaimed(Unclaimed),
    Internal,
    Failed(String),
    SystemEvent(u32),
}

impl KvmVcpu {
    pub(super) fn new(
        index: u32,
        vm: &Arc<KernelVm>,
        options: &VmOptions,
        supported: &Supported,
        shared: Arc<SharedCpus>,
        watched: Watched,
    ) -> Result<Self, EngineError> {
        let place = options.layout.placement(index);
        let fd = vm.fd.create_vcpu(u64::from(place.apic_id)).map_err(refused(format!("create vCPU {index} in KVM")))?;
        let features = Arc::new(supported.model(place, &options.model, fd.get_tsc_khz().ok())?);
        let cpuid = cpuid::table(&features)?;
        fd.set_cpuid2(&cpuid).map_err(refused(format!("set the CPUID of vCPU {index}")))?;
        let kick = Arc::new(Kick::new(&fd, vm.fd.run_size())?);
        let msrs = MsrList::probe(&fd);
        let outside = Arc::new(Outside::new(index, options));
        let (power, vm) = (options.power.clone(), vm.clone());
        Ok(Self {
            index,
            fd,
            kick,
            outside,
            power,
            msrs,
            shut_down: false,
            exits: 0,
            features,
            shared,
            fallback: None,
            vm,
            _watched: watched,
        })
    }

    /// The way to reach it from other threads.
    pub(super) fn kick(&self) -> Arc<Kick> {
        self.kick.clone()
    }

    fn serve(&mut self, pending: Pending) -> Result<Option<VcpuExit>, EngineError> {
        match pending {
            Pending::Unclaimed(access) => {
                let rip = self.fd.get_regs().map_err(refused("read the registers of a vCPU"))?.rip;
                self.outside.report(&access, rip);
            }
            Pending::Internal => return self.serve_internal_error(),
            Pending::SystemEvent(kind) => self.power.request(match kind {
                KVM_SYSTEM_EVENT_RESET => PowerEvent::Reset,
                KVM_SYSTEM_EVENT_SHUTDOWN => PowerEvent::PowerOff,
                KVM_SYSTEM_EVENT_CRASH => PowerEvent::Abort,
                other => return Err(self.stuck(&format!("system event {other}"))),
            }),
            Pending::Failed(why) => return Err(self.stuck(&why)),
        }
        Ok(None)
    }

    /// What KVM could not do: an instruction it cannot emulate goes to the interpreter.
    fn serve_internal_error(&mut self) -> Result<Option<VcpuExit>, EngineError> {
        let error = self.kick.page().internal_error();
        if error.kind != KVM_INTERNAL_ERROR_EMULATION {
            return Err(self.stuck(&format!("internal error {} {:x?}", error.kind, error.data())));
        }
        let fallback = self.fallback.get_or_insert_with(|| {
            let (vm, outside) = (self.vm.clone(), self.outside.clone());
            Box::new(Fallback::new(vm, outside, self.shared.clone(), self.features.clone()))
        });
        self.shut_down = fallback.execute(&self.fd, &self.msrs)?;
        Ok(self.shut_down.then_some(VcpuExit::Shutdown))
    }

    fn stuck(&self, why: &str) -> EngineError {
        let place = match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => format!(" at {:#x}:{:#x}", sregs.cs.selector, regs.rip),
            _ => String::new(),
        };
        EngineError::Unsupported(format!("vCPU {} cannot go on in KVM{place}: {why}", self.index))
    }

    /// Enters the guest once. What can be served with the data in the run page is served here.
    fn enter(&mut self) -> Result<Option<Pending>, kvm_ioctls::Error> {
        let width = self.kick.page();
        self.exits += 1;
        match self.fd.run()? {
            KvmExit::IoIn(port, data) => {
                return Ok(self.outside.port_read(port, width.port_width(), data).map(Pending::Unclaimed));
            }
            KvmExit::IoOut(port, data) => {
                return Ok(self.outside.port_write(port, width.port_width(), data).map(Pending::Unclaimed));
            }
            KvmExit::MmioRead(gpa, data) => self.outside.memory_read(gpa, data),
            KvmExit::MmioWrite(gpa, data) => self.outside.memory_write(gpa, data),
            KvmExit::X86Rdmsr(exit) => match self.outside.msr_read(exit.index) {
                Some(value) => (*exit.data, *exit.error) = (value, 0),
                None => *exit.error = 1,
            },
            KvmExit::X86Wrmsr(exit) => *exit.error = u8::from(!self.outside.msr_write(exit.index, exit.data)),
            // The kernel was interrupted before it entered the guest.
            KvmExit::Intr => {}
            KvmExit::Shutdown => self.shut_down = true,
            KvmExit::InternalError => return Ok(Some(Pending::Internal)),
            KvmExit::SystemEvent(kind, _) => return Ok(Some(Pending::SystemEvent(kind))),
            KvmExit::FailEntry(reason, _) => {
                return Ok(Some(Pending::Failed(format!(
                    "the processor refused to enter the guest, reason {reason:#x}"
                ))));
            }
            other => return Ok(Some(Pending::Failed(format!("unexpected exit {other:?}")))),
        }
        Ok(None)
    }
}

impl Vcpu for KvmVcpu {
    fn index(&self) -> u32 {
        self.index
    }

    /// A halted vCPU waits in the kernel.
    fn run(&mut self) -> Result<VcpuExit, EngineError> {
        let kick = self.kick.clone();
        let _inside = kick.enter();
        loop {
            if self.shut_down {
                return Ok(VcpuExit::Shutdown);
            }
            match self.enter() {
                Ok(None) => {}
                Ok(Some(pending)) => {
                    if let Some(exit) = self.serve(pending)? {
                        return Ok(exit);
                    }
                }
                Err(error) if error.errno() == libc::EINTR => {
                    let stop = self.kick.take_stop(|| halt::life(&self.fd));
                    if stop.map_err(refused(format!("see whether vCPU {} has halted", self.index)))? {
                        return Ok(VcpuExit::Stopped);
                    }
                }
                // A start-up IPI has arrived.
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(error) => return Err(refused(format!("run vCPU {} in KVM", self.index))(error)),
            }
        }
    }

    fn state(&mut self) -> Result<VcpuState, EngineError> {
        let mut state = registers::get(&self.fd, &self.msrs)?;
        if self.shut_down {
            state.activity = Activity::Shutdown;
        }
        Ok(state)
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        self.shut_down = state.activity == Activity::Shutdown;
        registers::set(&self.fd, state)
    }

    fn statistics(&self) -> Vec<(String, u64)> {
        vec![("exits: to the program".to_owned(), self.exits)]
    }

    fn handle(&self) -> Arc<dyn VcpuHandle> {
        self.kick.clone()
    }
}
