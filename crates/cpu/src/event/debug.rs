//! Debug exceptions (SDM vol. 3, 18.3).

use platform::x86::seg;

use crate::event::enter::Event;
use crate::state::{Shadow, attention};
use crate::trap::vector;
use crate::{Step, Vcpu};

/// DR6.BS: single step.
pub(crate) const DR6_BS: u64 = 1 << 14;
/// DR6.BT: the task-state segment switched to has its T flag set.
pub(crate) const DR6_BT: u64 = 1 << 15;
/// DR6.B0–B3.
const DR6_HITS: u64 = 15;
/// DR7.GD: MOV to and from debug registers traps.
const DR7_GD: u64 = 1 << 13;
/// IA32_DEBUGCTL.BTF: single-step on branches.
const DEBUGCTL_BTF: u64 = 2;
/// IA32_DEBUGCTL.LBR and BTF, which a debug exception clears.
const DEBUGCTL_LBR_BTF: u64 = 3;

impl Vcpu {
    /// Delivers the pending debug trap.
    pub(crate) fn deliver_debug_trap(&mut self) -> Step {
        self.activity = platform::x86::Activity::Running;
        self.report_debug();
        self.deliver_external(Event::exception(vector::DB, None, false))
    }

    /// Brings the debug registers up to date for the #DB about to be delivered.
    pub(crate) fn report_debug(&mut self) {
        if self.pending_dr6 != 0 {
            // The CPU replaces the breakpoint hits and leaves it to software to clear the rest.
            self.dr6 = self.dr6 & !DR6_HITS | self.pending_dr6;
        }
        self.forget_debug_trap();
        self.dr7 &= !DR7_GD;
        self.msrs.debugctl &= !DEBUGCTL_LBR_BTF;
    }

    /// Drops a pending debug trap: the instruction that caused it has faulted after all.
    #[inline]
    pub(crate) fn forget_debug_trap(&mut self) {
        self.pending_dr6 = 0;
        self.attention &= !attention::DEBUG_TRAP;
    }

    /// With IA32_DEBUGCTL.BTF only branches that are taken are followed by a single-step trap (SDM vol. 3, 18.4.5).
    pub(crate) fn step_on_branches(&mut self, start: u64, op: Option<&crate::decode::Op>) {
        let falls_through = op.is_some_and(|op| self.rip() == start.wrapping_add(u64::from(op.len)));
        if self.msrs.debugctl & DEBUGCTL_BTF != 0 && falls_through {
            self.stepping = false;
        }
    }

    /// Whether an instruction breakpoint matches RIP; notes it in `pending_dr6`.
    pub(crate) fn hits_breakpoint(&mut self) -> bool {
        if self.shadow == Shadow::MovSs {
            return false;
        }
        let linear = if self.in_64bit() { self.rip() } else { (self.seg_base[seg::CS] + self.rip()) & 0xffff_ffff };
        let hits = (0..4).filter(|&i| {
            let enabled = self.dr7 >> (2 * i) & 3 != 0;
            let on_execution = self.dr7 >> (16 + 4 * i) & 3 == 0;
            enabled && on_execution && self.dr[i] == linear
        });
        let hits = hits.fold(0, |bits, i| bits | 1 << i);
        self.pending_dr6 |= hits;
        hits != 0
    }
}
