//! Runs the vCPUs, each on its thread, until the VM ends.

use std::sync::Arc;
use std::thread::JoinHandle;

use config::Config;
use platform::x86::{VcpuState, seg};
use platform::{PowerEvent, PowerSink};
use rustix::thread::CpuSet;
use vmm::{EngineError, Vcpu, VcpuExit};

use crate::MachineError;
use crate::power::PowerLatch;

/// A vCPU's thread; it gives the vCPU back when the VM has ended.
type Thread = JoinHandle<(Box<dyn Vcpu>, Result<(), EngineError>)>;

/// Runs `vcpus` until a power event, and returns it.
///
/// # Errors
/// A thread could not be started, or an engine could not go on.
pub(crate) fn run(
    vcpus: Vec<Box<dyn Vcpu>>,
    power: &Arc<PowerLatch>,
    config: &Config,
) -> Result<PowerEvent, MachineError> {
    let handles: Vec<_> = vcpus.iter().map(|vcpu| vcpu.handle()).collect();
    let threads = start(vcpus, power, config)?;
    let event = power.wait();
    for handle in &handles {
        handle.stop();
    }
    let mut stopped = Vec::new();
    for thread in threads {
        // A panicking vCPU aborts the process, so every thread comes back.
        if let Ok((vcpu, result)) = thread.join() {
            result?;
            stopped.push(vcpu);
        }
    }
    if config.bool_or("cpu.stats", false)? {
        stopped.iter().for_each(|vcpu| print_statistics(vcpu.as_ref()));
    }
    if event == PowerEvent::Abort {
        stopped.iter_mut().for_each(|vcpu| print_state(vcpu.as_mut()));
    }
    Ok(event)
}

fn start(vcpus: Vec<Box<dyn Vcpu>>, power: &Arc<PowerLatch>, config: &Config) -> Result<Vec<Thread>, MachineError> {
    let mut threads = Vec::new();
    for vcpu in vcpus {
        let index = vcpu.index();
        let pinned = config::topology::vcpu_cpuset(config, index)?;
        let power = power.clone();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu {index}"))
            .spawn(move || run_vcpu(vcpu, &power, pinned))
            .map_err(|source| MachineError::Host { what: "start a vCPU thread", source })?;
        threads.push(thread);
    }
    Ok(threads)
}

fn run_vcpu(
    mut vcpu: Box<dyn Vcpu>,
    power: &PowerLatch,
    pinned: Option<Vec<u32>>,
) -> (Box<dyn Vcpu>, Result<(), EngineError>) {
    if let Some(cpus) = pinned {
        pin(vcpu.index(), &cpus);
    }
    let result = loop {
        match vcpu.run() {
            Ok(VcpuExit::Stopped) if power.get().is_some() => break Ok(()),
            Ok(VcpuExit::Stopped) => {}
            Ok(VcpuExit::Shutdown) => {
                power.request(PowerEvent::TripleFault);
                break Ok(());
            }
            Ok(VcpuExit::Refused) => {
                power.request(PowerEvent::Abort);
                break Ok(());
            }
            Err(error) => {
                power.request(PowerEvent::Abort);
                break Err(error);
            }
        }
    };
    (vcpu, result)
}

/// Pins the calling thread (`-p`).
fn pin(vcpu: u32, cpus: &[u32]) {
    let mut set = CpuSet::new();
    for &cpu in cpus.iter().filter(|&&cpu| (cpu as usize) < CpuSet::MAX_CPU) {
        set.set(cpu as usize);
    }
    if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
        eprintln!("bhyve: vCPU {vcpu} cannot be pinned to host CPUs {cpus:?}: {error}; it runs on any");
    }
}

/// Shows what a vCPU has done (`cpu.stats`).
fn print_statistics(vcpu: &dyn Vcpu) {
    let mut text = format!("vcpu{} stats:\n", vcpu.index());
    for (name, value) in vcpu.statistics().into_iter().filter(|(_, value)| *value != 0) {
        text += &format!("{name:<50}{value}\n");
    }
    eprint!("{text}");
}

/// Shows a vCPU's registers, for the report of a VM that could not go on.
fn print_state(vcpu: &mut dyn Vcpu) {
    let index = vcpu.index();
    match vcpu.state() {
        Ok(state) => eprintln!("{}", describe(index, &state)),
        Err(error) => eprintln!("vcpu {index}: state not available: {error}"),
    }
}

fn describe(index: u32, state: &VcpuState) -> String {
    let names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"];
    let mut text = format!("vm exit[{index}]\n\trip\t\t{:#018x}\n\trflags\t\t{:#018x}\n", state.rip, state.rflags);
    for (i, value) in state.gpr.iter().enumerate() {
        let name = names.get(i).map_or_else(|| format!("r{i}"), |name| (*name).to_owned());
        text += &format!("\t{name}\t\t{value:#018x}\n");
    }
    let cs = state.segments[seg::CS];
    text +=
        &format!("\tcs\t\t{:#06x} base {:#x} limit {:#x} access {:#x}\n", cs.selector, cs.base, cs.limit, cs.access);
    text += &format!(
        "\tcr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
        state.cr0, state.cr2, state.cr3, state.cr4, state.efer
    );
    text
}
