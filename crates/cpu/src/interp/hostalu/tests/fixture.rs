//! A vCPU in 64-bit mode whose CPUID is the host's, one instruction at a time.

use std::arch::x86_64::__cpuid_count;
use std::sync::Arc;

use memory::{GuestMemory, MemoryOptions};
use platform::x86::{VcpuState, cr0, cr4, efer, seg};

use crate::decode::{self, Mode};
use crate::features::Leaf;
use crate::{Environment, Events, Features, SharedCpus, Step, Vcpu};

struct Nobody;

impl Environment for Nobody {
    fn mmio_read(&self, _: u64, _: u8) -> u64 {
        u64::MAX
    }
    fn mmio_write(&self, _: u64, _: u8, _: u64) {}
    fn io_read(&self, _: u16, _: u8) -> u32 {
        u32::MAX
    }
    fn io_write(&self, _: u16, _: u8, _: u32) {}
    fn interrupt_pending(&self) -> bool {
        false
    }
    fn interrupt_acknowledge(&self) -> Option<u8> {
        None
    }
    fn read_cr8(&self) -> u8 {
        0
    }
    fn write_cr8(&self, _: u8) {}
    fn read_msr(&self, _: u32) -> Option<u64> {
        None
    }
    fn write_msr(&self, _: u32, _: u64) -> bool {
        false
    }
    fn tsc(&self) -> u64 {
        0
    }
}

/// The host's CPUID.
pub(in crate::interp) fn host_features() -> Features {
    let mut leaves = Vec::new();
    for base in [0u32, 0x8000_0000] {
        let last = __cpuid_count(base, 0).eax.min(base + 0x40);
        for function in base..=last {
            let many = matches!(function, 7 | 0xd);
            for index in 0..if many { 10 } else { 1 } {
                let r = __cpuid_count(function, index);
                let regs = [r.eax, r.ebx, r.ecx, r.edx];
                leaves.push(Leaf { function, index: many.then_some(index), regs });
            }
        }
    }
    let vendor = __cpuid_count(0, 0).ebx;
    let xcr0 = __cpuid_count(0xd, 0);
    Features {
        leaves,
        physical_bits: 40,
        xcr0_mask: u64::from(xcr0.edx) << 32 | u64::from(xcr0.eax),
        cr4_mask: u64::MAX,
        amd: vendor == u32::from_le_bytes(*b"Auth"),
    }
}

/// A vCPU to run single instructions on.
pub(in crate::interp) struct Bench {
    pub(in crate::interp) vcpu: Vcpu,
    pub(in crate::interp) memory: GuestMemory,
    mode: Mode,
}

impl Bench {
    /// 64-bit mode without paging, everything enabled.
    pub(in crate::interp) fn new() -> Self {
        let memory = GuestMemory::new(MemoryOptions { size: 16 << 20, ..MemoryOptions::default() }).expect("memory");
        let features = Arc::new(host_features());
        let shared = Arc::new(SharedCpus::default());
        let mut vcpu =
            Vcpu::new(memory.clone(), Arc::new(Nobody), Arc::new(Events::default()), shared, features.clone());
        let mut state = VcpuState::reset();
        state.cr0 = cr0::PE | cr0::NE;
        state.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        state.efer = efer::LME | efer::LMA;
        state.xcr0 = features.xcr0_mask & crate::interp::xsave::KNOWN;
        for segment in &mut state.segments {
            (segment.base, segment.limit, segment.access) = (0, u32::MAX, 0xc093);
        }
        state.segments[seg::CS].access = 0xa09b;
        state.rip = 0x1000;
        vcpu.set_state(&state);
        Self { vcpu, memory, mode: Mode::long64() }
    }

    /// Decodes an instruction and runs it at the current RIP.
    pub(in crate::interp) fn run(&mut self, bytes: &[u8]) -> Step {
        let features = self.vcpu.features.clone();
        if self.vcpu.host_alu.make_room() {
            self.vcpu.cache = crate::cache::BlockCache::new();
        }
        let decoded = decode::decode_one(bytes, self.mode, &features, &mut self.vcpu.host_alu);
        let (op, _) = decoded.expect("a whole instruction");
        self.vcpu.regs[crate::state::RIP] += u64::from(op.len);
        let result = (op.run)(&mut self.vcpu, &op);
        if result.is_err() {
            self.vcpu.regs[crate::state::RIP] -= u64::from(op.len);
        }
        result
    }
}
