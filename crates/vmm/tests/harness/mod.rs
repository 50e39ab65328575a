//! A small machine around an engine, for guests of a few instructions that tests assemble themselves.
//!
//! [`Machine`] has 16 MiB of RAM, interrupt chips and a [`World`] of recording devices. Its constructors set up real, 32-bit
//! protected, or 64-bit mode with descriptor tables, page tables and a handler for every vector. A handler's first instruction
//! ends the run, so that a test finds the exception frame on the stack and the vector in RIP.

// Several test programs share this; each uses a part.
#![allow(dead_code, unused_imports, unreachable_pub)]

mod descriptors;
mod paging;
mod world;

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use memory::{GuestMemory, MemoryOptions};
use platform::Bus;
use platform::time::SharedTime;
use platform::x86::{DescriptorTable, SEGMENT_UNUSABLE, Segment, VcpuState, cr0, cr4, efer, gpr, rflags, seg};
use vmm::engine::{CpuLayout, EngineKind};
use vmm::{AccessPolicy, HostTime, InterruptChips, PolicyOptions, Vcpu, VcpuExit, VmOptions};

pub use descriptors::{descriptor, gate, sel};
pub use paging::{Paging, pte};
pub use world::{Access, World};

/// Longest time that any guest here may take before it counts as hung.
pub const HUNG: Duration = Duration::from_secs(60);

/// Where things are in guest-physical memory.
pub mod at {
    pub const IVT: u64 = 0;
    pub const GDT: u64 = 0x1000;
    pub const LDT: u64 = 0x1800;
    pub const IDT: u64 = 0x2000;
    /// Task state segment, with an I/O permission bitmap that ends at [`TSS`] + [`TSS_LIMIT`].
    pub const TSS: u64 = 0x3000;
    pub const TSS_LIMIT: u32 = 0xfff;
    pub const TSS2: u64 = 0x4000;
    pub const CODE: u64 = 0x5000;
    pub const USER_CODE: u64 = 0x6000;
    /// Top of the ring-0 stack.
    pub const STACK: u64 = 0x7f00;
    pub const HANDLERS: u64 = 0x8000;
    /// Top of the ring-3 stack.
    pub const USER_STACK: u64 = 0xaf00;
    /// Top of a third stack.
    pub const OTHER_STACK: u64 = 0xbf00;
    pub const DATA: u64 = 0xc000;
    /// Page tables, up to 0x40000.
    pub const PAGES: u64 = 0x2_0000;
    /// Pages for a test to map as it likes.
    pub const FREE: u64 = 0x10_0000;
    /// Memory-mapped recording device.
    pub const MMIO: u64 = 0xd000_0000;
    pub const MMIO_SIZE: u64 = 0x1_0000;
}

/// Recording ports.
pub const PORT: u16 = 0x100;
/// Number of recording ports.
pub const PORTS: u64 = 0x10;
/// A write to this port ends the run.
pub const FINISH: u8 = 0xf4;

/// What a machine is made of.
#[derive(Clone, Copy)]
pub struct Config {
    pub engine: EngineKind,
    pub cpus: u32,
    pub policy: PolicyOptions,
}

/// Whether the host's processor is AMD's or Hygon's.
pub fn host_is_amd() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::x86_64::__cpuid(0).ebx != u32::from_le_bytes(*b"Genu");
    #[cfg(not(target_arch = "x86_64"))]
    true
}

/// Whether tests for KVM can run; says why not.
pub fn has_kvm() -> bool {
    match vmm::kvm::probe() {
        Ok(()) => true,
        Err(why) => {
            eprintln!("skipped on KVM: {why}");
            false
        }
    }
}

/// A VM and its world. `state` is what the boot vCPU starts the next run with, and what it ended the last one with.
pub struct Machine {
    pub engine: EngineKind,
    pub memory: GuestMemory,
    pub world: Arc<World>,
    pub chips: Arc<dyn InterruptChips>,
    pub vcpus: Vec<Box<dyn Vcpu>>,
    pub state: VcpuState,
    pub mmio: Arc<Bus>,
}

impl Machine {
    /// Real mode, all segments 0, code at [`at::CODE`]; other vCPUs wait for a start-up IPI.
    pub fn new(config: Config) -> Self {
        let memory = GuestMemory::new(MemoryOptions { size: 16 << 20, ..Default::default() }).expect("guest memory");
        let (ports, mmio) = (Arc::new(Bus::new("port")), Arc::new(Bus::new("memory")));
        let world = Arc::new(World::default());
        world.map(&ports, &mmio);
        let time: SharedTime = HostTime::start().expect("a timer thread");
        let layout = CpuLayout { cpus: config.cpus, sockets: config.cpus, cores: 1, threads: 1, x2apic: true };
        let options = VmOptions {
            layout,
            memory: memory.clone(),
            ports,
            mmio: mmio.clone(),
            time,
            policy: Arc::new(AccessPolicy::new(config.policy, world.clone())),
            model: cpu::CpuModel::default(),
            translator: Some(cpu::TranslatorOptions { threshold: 2, cache_bytes: 8 << 20, check: 0 }),
            perf_map: None,
            power: world.clone(),
        };
        let vm = vmm::create(config.engine, &options).expect("a VM");
        world.connect(vm.vcpus.iter().map(|vcpu| vcpu.handle()));
        let (chips, vcpus) = (vm.chips, vm.vcpus);
        let mut machine = Self { engine: config.engine, memory, world, chips, vcpus, state: VcpuState::reset(), mmio };
        machine.write_handlers();
        machine.enter_real();
        machine
    }

    /// A machine of one vCPU in real mode.
    pub fn real(engine: EngineKind) -> Self {
        let policy = PolicyOptions { strict_msr: true, amd: host_is_amd(), ..Default::default() };
        Self::new(Config { engine, cpus: 1, policy })
    }

    /// A machine of one vCPU in 32-bit protected mode at ring 0, flat, without paging.
    pub fn protected(engine: EngineKind) -> Self {
        let mut machine = Self::real(engine);
        machine.enter_protected();
        machine
    }

    /// A machine of one vCPU in 64-bit mode at ring 0; the first 4 GiB are mapped one to one, for all rings.
    pub fn long(engine: EngineKind) -> Self {
        let mut machine = Self::real(engine);
        machine.enter_long();
        machine
    }

    fn enter_real(&mut self) {
        let state = &mut self.state;
        state.segments = [Segment::real(0); 6];
        state.idtr = DescriptorTable { base: at::IVT, limit: 0x3ff };
        state.rip = at::CODE;
        state.gpr[gpr::RSP] = at::STACK;
        for vector in 0..=255u16 {
            self.put32(at::IVT + 4 * u64::from(vector), at::HANDLERS as u32 + 16 * u32::from(vector));
        }
    }

    /// 32-bit protected mode with a handler behind an interrupt gate of DPL 0 for every vector.
    pub fn enter_protected(&mut self) {
        descriptors::write_gdt(self, false);
        for vector in 0..=255 {
            self.set_gate(vector, gate(sel::CODE32, handler(vector) as u32, 0x8e, 0));
        }
        self.put32(at::TSS + 4, at::STACK as u32);
        self.put32(at::TSS + 8, u32::from(sel::DATA));
        self.put16(at::TSS + 0x66, 0x68);
        self.memory.fill(at::TSS + 0x68, u64::from(at::TSS_LIMIT) + 1 - 0x68, 0xff).expect("RAM");
        self.state.cr0 = cr0::PE | cr0::ET | cr0::NE;
        self.state.tr = Segment { selector: sel::TSS, base: at::TSS, limit: at::TSS_LIMIT, access: 0x8b };
        self.enter_with_tables(sel::CODE32, 0x7ff);
    }

    /// 64-bit mode with a handler behind an interrupt gate of DPL 0 for every vector.
    pub fn enter_long(&mut self) {
        descriptors::write_gdt(self, true);
        for vector in 0..=255 {
            self.set_gate64(vector, handler(vector), 0x8e, 0);
        }
        self.put64(at::TSS + 4, at::STACK);
        self.put16(at::TSS + 0x66, 0x68);
        self.memory.fill(at::TSS + 0x68, u64::from(at::TSS_LIMIT) + 1 - 0x68, 0xff).expect("RAM");
        paging::identity_long(self);
        let state = &mut self.state;
        state.cr0 = cr0::PE | cr0::ET | cr0::NE | cr0::PG | cr0::WP;
        state.cr3 = at::PAGES;
        state.cr4 = cr4::PAE | cr4::OSFXSR;
        state.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        state.tr = Segment { selector: sel::TSS, base: at::TSS, limit: at::TSS_LIMIT, access: 0x8b };
        self.enter_with_tables(sel::CODE64, 0xfff);
    }

    fn enter_with_tables(&mut self, code: u16, idt_limit: u16) {
        self.state.gdtr = DescriptorTable { base: at::GDT, limit: descriptors::GDT_LIMIT };
        self.state.idtr = DescriptorTable { base: at::IDT, limit: idt_limit };
        self.state.ldtr = Segment { selector: 0, base: 0, limit: 0, access: SEGMENT_UNUSABLE };
        self.set_cs(code);
        self.set_data(sel::DATA);
    }

    /// Goes to ring 3 at [`at::USER_CODE`] with [`at::USER_STACK`], in the current width.
    pub fn enter_user(&mut self) {
        let code = if self.bits() == 64 { sel::USER_CODE64 } else { sel::USER_CODE32 };
        self.set_cs(code);
        self.set_data(sel::USER_DATA);
        self.state.rip = at::USER_CODE;
        self.state.gpr[gpr::RSP] = at::USER_STACK;
    }

    /// Loads CS with what its descriptor says.
    pub fn set_cs(&mut self, selector: u16) {
        self.state.segments[seg::CS] = self.segment(selector);
    }

    /// Loads ES, SS, DS, FS and GS with what their descriptor says.
    pub fn set_data(&mut self, selector: u16) {
        for index in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
            self.state.segments[index] = self.segment(selector);
        }
    }

    /// Width of code at the current CS.
    pub fn bits(&self) -> u32 {
        let access = self.state.segments[seg::CS].access;
        match () {
            () if self.state.efer & efer::LMA != 0 && access & 1 << 13 != 0 => 64,
            () if access & 1 << 14 != 0 => 32,
            () => 16,
        }
    }

    /// Handlers: end the run, then halt.
    fn write_handlers(&mut self) {
        for vector in 0..=255 {
            self.memory.write(handler(vector), &[0xe6, FINISH, 0xf4, 0xeb, 0xfd]).expect("RAM");
        }
    }

    /// Assembles code of the current width at an address.
    pub fn code_at(&mut self, address: u64, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> u64 {
        self.code_of(self.bits(), address, write)
    }

    /// Assembles code of `bits` at an address; returns where it ends.
    pub fn code_of(
        &mut self,
        bits: u32,
        address: u64,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> u64 {
        let mut assembler = CodeAssembler::new(bits).expect("a code width");
        write(&mut assembler).expect("encodable");
        let bytes = assembler.assemble(address).expect("encodable");
        self.memory.write(address, &bytes).expect("RAM");
        address + bytes.len() as u64
    }

    /// Assembles code at the boot vCPU's RIP, followed by the end of the run; returns where the code ends.
    pub fn code(&mut self, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> u64 {
        let end = self.code_at(self.state.rip, write);
        self.memory.write(end, &[0xe6, FINISH, 0xf4, 0xeb, 0xfd]).expect("RAM");
        end
    }

    /// Puts bytes at the boot vCPU's RIP, followed by the end of the run.
    pub fn bytes(&mut self, bytes: &[u8]) -> u64 {
        let end = self.state.rip + bytes.len() as u64;
        self.memory.write(self.state.rip, bytes).expect("RAM");
        self.memory.write(end, &[0xe6, FINISH, 0xf4, 0xeb, 0xfd]).expect("RAM");
        end
    }

    /// Runs until the boot vCPU's run ends.
    #[track_caller]
    pub fn run(&mut self) -> VcpuExit {
        self.run_with(|_| ())
    }

    /// Runs while `act` does something to the machine from outside.
    #[track_caller]
    pub fn run_with(&mut self, act: impl FnOnce(&World)) -> VcpuExit {
        self.vcpus[0].set_state(&self.state).expect("a valid state");
        let exit = self.resume_with(act);
        self.state = self.vcpus[0].state().expect("the state");
        exit
    }

    /// As [`Machine::run_with`], from where the vCPUs stand.
    #[track_caller]
    pub fn resume_with(&mut self, act: impl FnOnce(&World)) -> VcpuExit {
        let world = self.world.clone();
        let exit = std::thread::scope(|scope| {
            let stop = StopAll(&world);
            let (sender, receiver) = channel();
            let count = self.vcpus.len();
            for vcpu in &mut self.vcpus {
                let sender = sender.clone();
                scope.spawn(move || {
                    let exit = vcpu.run();
                    let _ = sender.send((vcpu.index(), exit));
                });
            }
            act(&world);
            let (mut boot_exit, mut ended) = (None, vec![false; count]);
            while boot_exit.is_none() {
                let Ok((index, exit)) = receiver.recv_timeout(HUNG) else { return None };
                ended[index as usize] = true;
                if index == 0 {
                    boot_exit = Some(exit);
                }
            }
            // A request to a vCPU that has ended already would end its next run.
            std::mem::forget(stop);
            (1..count).filter(|index| !ended[*index]).for_each(|index| world.stop(index));
            boot_exit
        });
        match exit {
            Some(exit) => exit.expect("the engine runs"),
            None => {
                let state = self.vcpus[0].state().expect("the state");
                panic!("the guest hung at {:#x}: {state:x?}", state.rip)
            }
        }
    }

    /// Runs, and expects the code to come to its end.
    #[track_caller]
    pub fn run_to_end(&mut self) {
        assert_eq!(self.run(), VcpuExit::Stopped);
        assert_eq!(self.vector(), None, "an exception ended the run: {:x?}", self.state);
    }

    /// Runs, and expects to end in the handler of `vector`.
    #[track_caller]
    pub fn run_to_handler(&mut self, vector: u8) {
        assert_eq!(self.run(), VcpuExit::Stopped);
        assert_eq!(self.vector(), Some(vector), "state {:x?}", self.state);
    }

    /// The vector in whose handler the boot vCPU stands.
    pub fn vector(&self) -> Option<u8> {
        let linear = self.state.rip.wrapping_add(if self.bits() == 64 { 0 } else { self.state.segments[seg::CS].base });
        let offset = linear.checked_sub(at::HANDLERS).filter(|offset| *offset < 0x1000)?;
        Some((offset / 16) as u8)
    }

    /// General-purpose register, by [`gpr`] number.
    pub fn reg(&self, r: usize) -> u64 {
        self.state.gpr[r]
    }

    /// The `n`th slot of `size` bytes above the stack pointer (SS base 0).
    pub fn stack(&self, n: u64, size: u64) -> u64 {
        let mask = if size == 2 { 0xffff } else { u64::MAX };
        let mut bytes = [0; 8];
        self.memory.read((self.state.gpr[gpr::RSP] & mask) + n * size, &mut bytes[..size as usize]).expect("RAM");
        u64::from_le_bytes(bytes)
    }

    /// The exception frame's error code, RIP, CS and flags, in the current width. With `error` false the error code reads 0.
    pub fn frame(&self, error: bool) -> Frame {
        let size = u64::from(self.bits() / 8);
        let first = u64::from(error);
        let slot = |n| self.stack(first + n, size);
        Frame {
            error: if error { self.stack(0, size) } else { 0 },
            rip: slot(0),
            cs: slot(1) as u16,
            flags: slot(2),
            rsp: slot(3),
            ss: slot(4) as u16,
        }
    }

    /// Sets bits of RFLAGS.
    pub fn set_flags(&mut self, set: u64, clear: u64) {
        self.state.rflags = self.state.rflags & !clear | set | rflags::FIXED;
    }

    pub fn put8(&self, gpa: u64, value: u8) {
        self.memory.write_u8(gpa, value).expect("RAM");
    }
    pub fn put16(&self, gpa: u64, value: u16) {
        self.memory.write_u16(gpa, value).expect("RAM");
    }
    pub fn put32(&self, gpa: u64, value: u32) {
        self.memory.write_u32(gpa, value).expect("RAM");
    }
    pub fn put64(&self, gpa: u64, value: u64) {
        self.memory.write_u64(gpa, value).expect("RAM");
    }
    pub fn get8(&self, gpa: u64) -> u8 {
        self.memory.read_u8(gpa).expect("RAM")
    }
    pub fn get16(&self, gpa: u64) -> u16 {
        self.memory.read_u16(gpa).expect("RAM")
    }
    pub fn get32(&self, gpa: u64) -> u32 {
        self.memory.read_u32(gpa).expect("RAM")
    }
    pub fn get64(&self, gpa: u64) -> u64 {
        self.memory.read_u64(gpa).expect("RAM")
    }
}

/// What an exception pushed. RSP and SS are there after a change of privilege, and always in 64-bit mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame {
    pub error: u64,
    pub rip: u64,
    pub cs: u16,
    pub flags: u64,
    pub rsp: u64,
    pub ss: u16,
}

/// Stops all vCPUs of a run that fails, so that their threads end.
struct StopAll<'a>(&'a World);

impl Drop for StopAll<'_> {
    fn drop(&mut self) {
        self.0.stop_all();
    }
}

/// Where the handler of a vector is.
pub fn handler(vector: u8) -> u64 {
    at::HANDLERS + 16 * u64::from(vector)
}

/// Stamps tests, functions of the engine's kind, on the engines: `everywhere` on both, `software` on the software CPU alone
/// (where KVM need not agree, or this host's KVM emulates too little).
#[macro_export]
macro_rules! stamp {
    (everywhere: $($both:ident),* $(,)? ; software: $($only:ident),* $(,)?) => {
        mod soft {
            $(#[test] fn $both() { super::$both(vmm::EngineKind::Soft); })*
            $(#[test] fn $only() { super::$only(vmm::EngineKind::Soft); })*
        }
        mod kvm {
            $(#[test] fn $both() {
                if $crate::harness::has_kvm() {
                    super::$both(vmm::EngineKind::Kvm);
                }
            })*
        }
    };
}
