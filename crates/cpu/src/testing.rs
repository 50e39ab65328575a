//! A small machine for tests: memory with descriptor tables, a task-state segment and page tables in place, a vCPU in
//! the wanted mode, an environment that records what reaches it, and code written with iced's assembler.
//!
//! ```text
//! 0x0000 real-mode vectors     0x3000 TSS                 0x8000 code under test
//! 0x1000 GDT                   0x6000 top of the user's   0xA000 handlers, one every 16 bytes
//! 0x2000 IDT                          stack               0x10000 page tables (identity, first GiB)
//!                              0x7000 top of ring 0's stack
//! ```

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use memory::{GuestMemory, MemoryOptions};
use platform::x86::{DescriptorTable, Segment, VcpuState, cr0, cr4, efer, gpr, rflags, seg};

use crate::features::Leaf;
use crate::{Environment, Events, Exit, Features, HostCounter, SharedCpus, Vcpu};

/// Where things are.
pub(crate) mod at {
    pub(crate) const GDT: u64 = 0x1000;
    pub(crate) const IDT: u64 = 0x2000;
    pub(crate) const TSS: u64 = 0x3000;
    pub(crate) const USER_STACK: u64 = 0x6000;
    pub(crate) const STACK: u64 = 0x7000;
    pub(crate) const CODE: u64 = 0x8000;
    pub(crate) const HANDLERS: u64 = 0xa000;
    pub(crate) const PAGES: u64 = 0x10000;
}

/// Selectors of the GDT that [`Machine`] sets up. Everything is flat.
pub(crate) mod sel {
    pub(crate) const CODE32: u16 = 0x08;
    pub(crate) const DATA: u16 = 0x10;
    pub(crate) const CODE16: u16 = 0x18;
    pub(crate) const DATA16: u16 = 0x20;
    pub(crate) const CODE64: u16 = 0x28;
    pub(crate) const USER_CODE32: u16 = 0x33;
    pub(crate) const USER_DATA: u16 = 0x3b;
    pub(crate) const USER_CODE64: u16 = 0x43;
    /// Two entries, for long mode.
    pub(crate) const TSS: u16 = 0x48;
    /// First of the entries that tests may use.
    pub(crate) const FREE: u16 = 0x60;
}

/// Bytes of the GDT.
const GDT_SIZE: u16 = 0x200;

/// One thing that reached the environment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Bus {
    In(u16, u8),
    Out(u16, u8, u32),
    Read(u64, u8),
    Write(u64, u8, u64),
    InitReset,
}

/// An environment that records, and answers what the test has put in.
#[derive(Default)]
pub(crate) struct World {
    log: Mutex<Vec<Bus>>,
    /// Answers to port reads, in order; all ones when there is none.
    pub(crate) port_input: Mutex<VecDeque<u32>>,
    /// Bytes of MMIO space; all ones where nothing was put or written.
    pub(crate) mmio: Mutex<HashMap<u64, u8>>,
    /// Interrupts to be acknowledged, in order.
    pub(crate) interrupts: Mutex<VecDeque<u8>>,
    /// MSRs outside the core.
    pub(crate) msrs: Mutex<HashMap<u32, u64>>,
    pub(crate) cr8: AtomicU8,
    pub(crate) tsc: AtomicU64,
    /// If not 0: the TSC is the host's counter, but never less than this.
    pub(crate) highest: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    /// Takes what has reached the environment since the last call.
    pub(crate) fn take_log(&self) -> Vec<Bus> {
        std::mem::take(&mut lock(&self.log))
    }
}

impl Environment for World {
    fn mmio_read(&self, gpa: u64, size: u8) -> u64 {
        lock(&self.log).push(Bus::Read(gpa, size));
        let mmio = lock(&self.mmio);
        (0..u64::from(size)).rev().fold(0, |v, i| v << 8 | u64::from(*mmio.get(&(gpa + i)).unwrap_or(&0xff)))
    }
    fn mmio_write(&self, gpa: u64, size: u8, value: u64) {
        lock(&self.log).push(Bus::Write(gpa, size, value));
        let mut mmio = lock(&self.mmio);
        for (i, byte) in value.to_le_bytes().into_iter().take(size.into()).enumerate() {
            mmio.insert(gpa + i as u64, byte);
        }
    }
    fn io_read(&self, port: u16, size: u8, _: u64) -> u32 {
        lock(&self.log).push(Bus::In(port, size));
        lock(&self.port_input).pop_front().unwrap_or(u32::MAX)
    }
    fn io_write(&self, port: u16, size: u8, value: u32, _: u64) {
        lock(&self.log).push(Bus::Out(port, size, value));
    }
    fn interrupt_pending(&self) -> bool {
        !lock(&self.interrupts).is_empty()
    }
    fn interrupt_acknowledge(&self) -> Option<u8> {
        lock(&self.interrupts).pop_front()
    }
    fn read_cr8(&self) -> u8 {
        self.cr8.load(Ordering::Relaxed)
    }
    fn write_cr8(&self, value: u8) {
        self.cr8.store(value, Ordering::Relaxed);
    }
    fn read_msr(&self, index: u32) -> Option<u64> {
        lock(&self.msrs).get(&index).copied()
    }
    fn write_msr(&self, index: u32, value: u64) -> bool {
        lock(&self.msrs).get_mut(&index).map(|msr| *msr = value).is_some()
    }
    fn tsc(&self) -> u64 {
        match self.highest.load(Ordering::Relaxed) {
            0 => self.tsc.fetch_add(1, Ordering::Relaxed),
            highest => highest,
        }
    }
    fn host_counter(&self) -> Option<HostCounter<'_>> {
        let highest = &self.highest;
        (highest.load(Ordering::Relaxed) != 0).then_some(HostCounter { base: 0, highest })
    }
    fn init_reset(&self) {
        lock(&self.log).push(Bus::InitReset);
    }
}

/// A segment descriptor: base, limit in bytes, access byte, flags (bit 3 G, 2 D/B, 1 L). With G the limit is in pages.
pub(crate) fn descriptor(base: u32, limit: u32, access: u8, flags: u8) -> u64 {
    let (base, limit) = (u64::from(base), u64::from(limit));
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | u64::from(access) << 40
        | (limit >> 16 & 15) << 48
        | u64::from(flags) << 52
        | (base >> 24) << 56
}

/// A gate's lower eight bytes: selector, offset, access byte (0x8E: present, DPL 0, 32/64-bit interrupt gate), count
/// (parameter count of a call gate, IST of a 64-bit interrupt gate).
pub(crate) fn gate(selector: u16, offset: u32, access: u8, count: u8) -> u64 {
    let offset = u64::from(offset);
    (offset & 0xffff)
        | u64::from(selector) << 16
        | u64::from(count) << 32
        | u64::from(access) << 40
        | (offset >> 16) << 48
}

/// The features of instructions that need no host: leaf 1 ECX, leaf 7 EBX and ECX, leaf 80000001H ECX.
const INTEGER: [u32; 4] = [
    1 << 13 | 1 << 20 | 1 << 22 | 1 << 23 | 1 << 30,
    1 | 1 << 3 | 1 << 8 | 1 << 10 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 23 | 1 << 24,
    1 << 22,
    1 | 1 << 5,
];

/// A vCPU in its machine.
pub(crate) struct Machine {
    pub(crate) vcpu: Vcpu,
    pub(crate) world: Arc<World>,
    pub(crate) memory: GuestMemory,
}

impl Machine {
    /// Real mode, all segments 0, code at [`at::CODE`].
    pub(crate) fn real() -> Self {
        Self::with_vendor(false)
    }

    /// As [`Machine::real`], with the vendor's choice.
    pub(crate) fn with_vendor(amd: bool) -> Self {
        let memory = GuestMemory::new(MemoryOptions { size: 16 << 20, shared: true, ..Default::default() })
            .expect("guest memory");
        let world = Arc::new(World::default());
        let features = Features {
            leaves: vec![
                Leaf { function: 1, index: None, regs: [0x806f8, 0, INTEGER[0], 0] },
                Leaf { function: 7, index: Some(0), regs: [0, INTEGER[1], INTEGER[2], 0] },
                Leaf { function: 0xd, index: Some(1), regs: [0xf, 0, 0, 0] },
                Leaf { function: 0x8000_0001, index: None, regs: [0, 0, INTEGER[3], 1 << 27] },
            ],
            physical_bits: 46,
            xcr0_mask: 7,
            cr4_mask: u64::from(u32::MAX),
            amd,
        };
        let shared = Arc::new(SharedCpus::default());
        let events = Arc::new(Events::default());
        let vcpu = Vcpu::new(memory.clone(), world.clone(), events, shared, Arc::new(features));
        let mut machine = Self { vcpu, world, memory };
        let mut state = VcpuState::reset();
        state.segments = [Segment::real(0); 6];
        state.idtr = DescriptorTable { base: 0, limit: 0x3ff };
        state.rip = at::CODE;
        state.gpr[gpr::RSP] = at::STACK;
        machine.vcpu.set_state(&state);
        for vector in 0..=255u16 {
            machine.put(u64::from(vector) * 4, (at::HANDLERS as u32) + 16 * u32::from(vector));
        }
        machine
    }

    /// 32-bit protected mode at ring 0, flat, no paging; every vector has a 32-bit interrupt gate at DPL 0.
    pub(crate) fn protected() -> Self {
        Self::real().into_protected()
    }

    /// As [`Machine::protected`], on a machine made before.
    pub(crate) fn into_protected(mut self) -> Self {
        self.write_gdt(0x89);
        for vector in 0..=255u8 {
            self.set_gate(vector, gate(sel::CODE32, Self::handler(vector) as u32, 0x8e, 0));
        }
        // SS0:ESP0.
        self.put(at::TSS + 4, at::STACK as u32);
        self.put(at::TSS + 8, sel::DATA);
        let mut state = self.vcpu.state();
        state.cr0 = cr0::PE | cr0::ET | cr0::NE;
        self.set_tables(&mut state, 0x7ff);
        self.vcpu.set_state(&state);
        self.set_cs(sel::CODE32);
        self.set_data(sel::DATA);
        self
    }

    /// 64-bit mode at ring 0, first GiB identity-mapped with 2 MiB pages that everybody may use; every vector has an
    /// interrupt gate at DPL 0.
    pub(crate) fn long() -> Self {
        Self::real().into_long()
    }

    /// As [`Machine::long`], on a machine made before.
    pub(crate) fn into_long(mut self) -> Self {
        self.write_gdt(0x89);
        for vector in 0..=255u8 {
            self.set_gate64(vector, sel::CODE64, Self::handler(vector), 0x8e, 0);
        }
        self.put(at::TSS + 4, at::STACK);
        self.put(at::PAGES, at::PAGES + 0x1000 + 7);
        self.put(at::PAGES + 0x1000, at::PAGES + 0x2000 + 7);
        for i in 0..512u64 {
            self.put(at::PAGES + 0x2000 + 8 * i, i << 21 | 0xe7);
        }
        let mut state = self.vcpu.state();
        state.cr0 = cr0::PE | cr0::ET | cr0::NE | cr0::PG | cr0::WP;
        state.cr3 = at::PAGES;
        state.cr4 = cr4::PAE;
        state.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        self.set_tables(&mut state, 0xfff);
        self.vcpu.set_state(&state);
        self.set_cs(sel::CODE64);
        self.set_data(sel::DATA);
        self
    }

    fn write_gdt(&mut self, tss: u8) {
        let entries = [
            0,
            descriptor(0, 0xfffff, 0x9b, 0xc),
            descriptor(0, 0xfffff, 0x93, 0xc),
            descriptor(0, 0xffff, 0x9b, 0),
            descriptor(0, 0xffff, 0x93, 0),
            descriptor(0, 0xfffff, 0x9b, 0xa),
            descriptor(0, 0xfffff, 0xfb, 0xc),
            descriptor(0, 0xfffff, 0xf3, 0xc),
            descriptor(0, 0xfffff, 0xfb, 0xa),
            descriptor(at::TSS as u32, 0x2fff, tss | 2, 0),
        ];
        for (i, entry) in entries.into_iter().enumerate() {
            self.put(at::GDT + 8 * i as u64, entry);
        }
    }

    fn set_tables(&self, state: &mut VcpuState, idt_limit: u16) {
        state.gdtr = DescriptorTable { base: at::GDT, limit: GDT_SIZE - 1 };
        state.idtr = DescriptorTable { base: at::IDT, limit: idt_limit };
        state.tr = Segment { selector: sel::TSS, base: at::TSS, limit: 0x2fff, access: 0x8b };
        state.ldtr = Segment { selector: 0, base: 0, limit: 0, access: platform::x86::SEGMENT_UNUSABLE };
    }

    /// What loading `selector` from the GDT gives.
    pub(crate) fn segment(&self, selector: u16) -> Segment {
        let raw: u64 = self.get(at::GDT + u64::from(selector & !7));
        let limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
        Segment {
            selector,
            base: raw >> 16 & 0xff_ffff | raw >> 32 & 0xff00_0000,
            limit: if raw >> 55 & 1 != 0 { limit << 12 | 0xfff } else { limit },
            access: (raw >> 40 & 0xf0ff) as u32,
        }
    }

    /// Loads CS, and CPL with it, as a far transfer would. SS must be set to agree.
    pub(crate) fn set_cs(&mut self, selector: u16) {
        self.vcpu.cpl = (selector & 3) as u8;
        let segment = self.segment(selector);
        self.vcpu.set_segment(seg::CS, segment);
    }

    /// Loads ES, SS, DS, FS, GS.
    pub(crate) fn set_data(&mut self, selector: u16) {
        let segment = self.segment(selector);
        for index in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
            self.vcpu.set_segment(index, segment);
        }
    }

    /// Goes to ring 3 in the current code width, with [`at::USER_STACK`].
    pub(crate) fn into_user(mut self) -> Self {
        self.set_cs(if self.vcpu.in_64bit() { sel::USER_CODE64 } else { sel::USER_CODE32 });
        self.set_data(sel::USER_DATA);
        self.vcpu.regs[gpr::RSP] = at::USER_STACK;
        self
    }

    /// Where vector's handler is.
    pub(crate) fn handler(vector: u8) -> u64 {
        at::HANDLERS + 16 * u64::from(vector)
    }

    /// Writes an entry of the GDT.
    pub(crate) fn set_descriptor(&mut self, selector: u16, value: u64) {
        self.put(at::GDT + u64::from(selector & !7), value);
    }

    /// Writes an entry of the IDT outside long mode.
    pub(crate) fn set_gate(&mut self, vector: u8, value: u64) {
        self.put(at::IDT + 8 * u64::from(vector), value);
    }

    /// Writes an entry of the IDT of long mode.
    pub(crate) fn set_gate64(&mut self, vector: u8, selector: u16, offset: u64, access: u8, ist: u8) {
        self.put(at::IDT + 16 * u64::from(vector), gate(selector, offset as u32, access, ist));
        self.put(at::IDT + 16 * u64::from(vector) + 8, offset >> 32);
    }

    /// Puts a value into guest memory.
    pub(crate) fn put<T: crate::state::int::Int>(&mut self, gpa: u64, value: T) {
        let bytes = value.to_u64().to_le_bytes();
        self.memory.write(gpa, &bytes[..T::BYTES as usize]).expect("in RAM");
    }

    /// Reads a value from guest memory.
    pub(crate) fn get<T: crate::state::int::Int>(&self, gpa: u64) -> T {
        let mut bytes = [0; 8];
        self.memory.read(gpa, &mut bytes[..T::BYTES as usize]).expect("in RAM");
        T::from_u64(u64::from_le_bytes(bytes))
    }

    /// Assembles for the current code width and puts the code at `address`.
    pub(crate) fn code_at(
        &mut self,
        address: u64,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> usize {
        let mut assembler = CodeAssembler::new(self.vcpu.mode.code_bits()).expect("a code width");
        write(&mut assembler).expect("encodable");
        let bytes = assembler.assemble(address).expect("encodable");
        self.memory.write(address, &bytes).expect("in RAM");
        bytes.len()
    }

    /// Puts code at RIP (CS base 0); returns its length.
    pub(crate) fn code(&mut self, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> usize {
        self.code_at(self.vcpu.rip(), write)
    }

    /// Puts bytes at RIP.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.memory.write(self.vcpu.rip(), bytes).expect("in RAM");
    }

    /// Runs `count` rounds, none of which may leave the vCPU.
    #[track_caller]
    pub(crate) fn step(&mut self, count: u64) {
        assert_eq!(self.vcpu.step(count), None::<Exit>);
    }

    /// General-purpose register, by [`gpr`] number.
    pub(crate) fn reg(&self, r: usize) -> u64 {
        self.vcpu.regs[r & 15]
    }

    /// Sets a general-purpose register.
    pub(crate) fn set_reg(&mut self, r: usize, value: u64) {
        self.vcpu.regs[r & 15] = value;
    }

    /// The n-th value of `T` above the stack pointer (SS base 0).
    pub(crate) fn stack<T: crate::state::int::Int>(&self, n: u64) -> T {
        self.get(self.vcpu.sp() + n * T::BYTES)
    }

    /// Whether RIP is at the handler of `vector`.
    #[track_caller]
    pub(crate) fn assert_in_handler(&self, vector: u8) {
        assert_eq!(self.vcpu.rip(), Self::handler(vector), "RIP is not at the handler of vector {vector}");
    }

    /// Changes RFLAGS.
    pub(crate) fn set_flags(&mut self, set: u64, clear: u64) {
        let value = self.vcpu.rflags() & !clear | set;
        self.vcpu.set_rflags(value | rflags::FIXED);
    }
}

#[test]
fn the_machines_execute() {
    for mut machine in [Machine::real(), Machine::protected(), Machine::long(), Machine::long().into_user()] {
        machine.code(|a| a.mov(iced_x86::code_asm::cl, 7));
        machine.step(1);
        assert_eq!(machine.reg(gpr::RCX), 7);
    }
}
