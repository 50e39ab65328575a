//! A vCPU in 64-bit mode whose CPUID is the host's, one instruction at a time.

use std::sync::Arc;

use iced_x86::CpuidFeature;
use memory::{GuestMemory, MemoryOptions};
use platform::x86::{Segment, VcpuState, cr0, cr4, efer, seg};

use crate::decode::{self, Flow, Mode, Op};
use crate::features::Placement;
use crate::testing::World;
use crate::{Events, Features, SharedCpus, Step, Vcpu};

/// Two megabytes of [`Bench::paged`].
pub(in crate::interp) const SPARSE: u64 = 0x40_0000;

/// A vCPU to run single instructions on.
pub(in crate::interp) struct Bench {
    pub(in crate::interp) vcpu: Vcpu,
    pub(in crate::interp) memory: GuestMemory,
    mode: Mode,
    /// x87 registers may stay in the host's between instructions, as they do in a running vCPU.
    pub(in crate::interp) resident: bool,
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
        Self { vcpu, memory, mode: Mode::long64(), resident: false }
    }

    /// As [`Bench::new`] with paging: identity-mapped, but of [`SPARSE`] only every other page is there, from the first on.
    pub(in crate::interp) fn paged() -> Self {
        const TABLES: u64 = 0x10000;
        let mut bench = Self::new();
        let entry = |at: u64, value: u64| bench.memory.write(at, &value.to_le_bytes()).expect("guest memory");
        entry(TABLES, TABLES + 0x1000 + 7);
        entry(TABLES + 0x1000, TABLES + 0x2000 + 7);
        for i in 0..8 {
            entry(TABLES + 0x2000 + 8 * i, i << 21 | 0xe7);
        }
        entry(TABLES + 0x2000 + 8 * (SPARSE >> 21), TABLES + 0x3000 + 7);
        for i in 0..512 {
            entry(TABLES + 0x3000 + 8 * i, if i & 1 == 0 { (SPARSE + (i << 12)) | 0x67 } else { 0 });
        }
        let mut state = bench.vcpu.state();
        state.cr0 |= cr0::PG;
        state.cr3 = TABLES;
        state.cr4 |= cr4::PAE;
        bench.vcpu.set_state(&state);
        bench
    }

    /// Flat 32-bit protected mode.
    pub(in crate::interp) fn protected() -> Self {
        let mut bench = Self::new();
        let mut state = bench.vcpu.state();
        state.efer = 0;
        state.segments[seg::CS].access = 0xc09b;
        state.segments[seg::CS].selector = 0x8;
        state.segments[seg::DS].selector = 0x10;
        bench.vcpu.set_state(&state);
        bench.mode = bench.vcpu.mode;
        bench
    }

    /// Sets the limit of DS.
    pub(in crate::interp) fn limit_data(&mut self, limit: u32) {
        let mut state = self.vcpu.state();
        state.segments[seg::DS].limit = limit;
        self.vcpu.set_state(&state);
        self.mode = self.vcpu.mode;
    }

    /// Real mode, all segments 0 but for CS = 0x100.
    pub(in crate::interp) fn real() -> Self {
        let mut bench = Self::new();
        let mut state = bench.vcpu.state();
        state.efer = 0;
        state.cr0 &= !cr0::PE;
        state.segments = [Segment::real(0); 6];
        state.segments[seg::CS] = Segment::real(0x100);
        bench.vcpu.set_state(&state);
        bench.mode = bench.vcpu.mode;
        bench
    }

    /// Bytes of guest memory.
    pub(in crate::interp) fn bytes<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read(gpa, &mut bytes).expect("guest memory");
        bytes
    }

    /// Puts bytes into guest memory.
    pub(in crate::interp) fn put(&self, gpa: u64, bytes: &[u8]) {
        self.memory.write(gpa, bytes).expect("guest memory");
    }

    /// Whether the guest, and so the host, has all of `features`.
    pub(in crate::interp) fn has(&mut self, features: &[CpuidFeature]) -> bool {
        let model = self.vcpu.features.clone();
        self.vcpu.host_alu.features.all(features, &model)
    }

    /// Decodes an instruction.
    pub(in crate::interp) fn decode(&mut self, bytes: &[u8]) -> (Op, Flow) {
        let features = self.vcpu.features.clone();
        let decoded = decode::decode_one(bytes, self.mode, &features, &mut self.vcpu.host_alu);
        decoded.expect("a whole instruction")
    }

    /// Decodes an instruction and runs it at the current RIP.
    pub(in crate::interp) fn run(&mut self, bytes: &[u8]) -> Step {
        if self.vcpu.host_alu.make_room() {
            self.vcpu.cache = crate::cache::BlockCache::new();
        }
        let (op, _) = self.decode(bytes);
        self.vcpu.regs[crate::state::RIP] += u64::from(op.len);
        let result = (op.run)(&mut self.vcpu, &op);
        if result.is_err() {
            self.vcpu.regs[crate::state::RIP] -= u64::from(op.len);
        }
        if !self.resident {
            self.vcpu.fpu.park();
        }
        result
    }
}
