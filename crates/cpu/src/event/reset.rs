//! INIT and start-up IPI (SDM vol. 3, 9.1 and 9.4).

use platform::x86::{Activity, Segment, VcpuState, cr0, gpr, seg};

use crate::Vcpu;

/// IA32_APIC_BASE, and its bit that marks the bootstrap processor.
const APIC_BASE: u32 = 0x1b;
const APIC_BASE_BSP: u64 = 1 << 8;

impl Vcpu {
    /// INIT: like RESET, but the APIC id, FPU, MSRs and caches stay (SDM vol. 3, table 9-1). The bootstrap processor
    /// starts again at the reset vector, the others wait for a start-up IPI.
    pub(crate) fn init(&mut self) {
        let mut state = VcpuState::reset();
        state.cr0 = self.cr0 & (cr0::CD | cr0::NW) | cr0::ET;
        state.xcr0 = self.xcr0;
        state.gpr[gpr::RDX] = self.signature();
        let bootstrap = self.env.read_msr(APIC_BASE).is_some_and(|base| base & APIC_BASE_BSP != 0);
        state.activity = if bootstrap { Activity::Running } else { Activity::WaitForSipi };
        // An empty list of MSRs leaves them as they are.
        self.set_state(&state);
        self.env.init_reset();
    }

    /// Start-up IPI: real mode at `vector`:0000.
    pub(crate) fn start_up(&mut self, vector: u8) {
        let selector = u16::from(vector) << 8;
        self.set_segment(seg::CS, Segment { access: 0x9b, ..Segment::real(selector) });
        self.set_rip(0);
        self.activity = Activity::Running;
    }

    /// Family, model and stepping, which INIT leaves in EDX.
    fn signature(&self) -> u64 {
        let leaf = self.features.leaves.iter().find(|leaf| leaf.function == 1);
        leaf.map_or(0xf00, |leaf| u64::from(leaf.regs[0]))
    }
}
