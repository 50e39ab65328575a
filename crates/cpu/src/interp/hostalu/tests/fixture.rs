//! A vCPU in 64-bit mode whose CPUID is the host's, one instruction at a time.

use std::sync::Arc;

use memory::{GuestMemory, MemoryOptions};
use platform::x86::{VcpuState, cr0, cr4, efer, seg};

use crate::decode::{self, Mode};
use crate::features::Placement;
use crate::testing::World;
use crate::{Events, Features, SharedCpus, Step, Vcpu};

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
        let features = Arc::new(Features::host(Placement::single()));
        let shared = Arc::new(SharedCpus::default());
        let mut vcpu = Vcpu::new(
            memory.clone(),
            Arc::new(World::default()),
            Arc::new(Events::default()),
            shared,
            features.clone(),
        );
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
