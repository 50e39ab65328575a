//! The timer in host time: when to wake up, and what to do then.
//!
//! The host timer is set lazily: a deadline that moves later leaves it alone, and the early wake-up sets it again. So
//! guests that re-arm far more often than they let the timer run out cost the host next to nothing. A masked timer is
//! not woken up for at all; what ran out meanwhile is worked out when a register is next touched.

use platform::time::{ns_to_ticks, ticks_to_ns};

use super::registers::lvt;
use super::timer::{SOURCE, TimerMode};
use super::{GeneralProtection, LocalApic, Registers};

/// Shortest period, in ns, at which a periodic timer wakes up the host. Guests can ask for a few nanoseconds; the
/// interrupts in between would be merged anyway, as the vector is still pending.
const MIN_PERIOD_NS: u64 = 100_000;

/// Longest time, in ns, for which the host timer is set (over an hour); later deadlines take several wake-ups.
const MAX_WAIT_NS: u64 = 1 << 42;

impl LocalApic {
    fn bus_ticks(&self, now_ns: u64) -> u64 {
        ns_to_ticks(now_ns, self.config.bus_hz)
    }

    /// Takes account of everything that has run out until now.
    fn catch_up(&self, registers: &mut Registers) {
        let expired = match self.timer_mode() {
            TimerMode::TscDeadline => {
                let deadline = registers.timer.tsc_deadline;
                let due = deadline != 0 && self.wiring.tsc.tsc() >= deadline;
                if due {
                    registers.timer.tsc_deadline = 0;
                }
                due
            }
            mode => {
                registers.timer.deadline.is_some() && {
                    let now = self.bus_ticks(self.wiring.time.now_ns());
                    registers.timer.expire(now, mode == TimerMode::Periodic)
                }
            }
        };
        if expired {
            self.inbox.raise(SOURCE);
        }
    }

    /// Sets the host timer for the next expiry, unless it is already set for that or an earlier moment.
    fn arm(&self, registers: &mut Registers) {
        if self.inbox.lvt(SOURCE) & lvt::MASKED != 0 {
            return;
        }
        let Some((now_ns, wait_ns)) = self.next_expiry(registers) else { return };
        let wanted = now_ns.saturating_add(wait_ns.min(MAX_WAIT_NS));
        if registers.armed_ns.is_none_or(|armed| armed > wanted) {
            registers.armed_ns = Some(wanted);
            self.timer.arm(wanted);
        }
    }

    /// Now, and how long to wait from now, in ns.
    fn next_expiry(&self, registers: &Registers) -> Option<(u64, u64)> {
        let timer = &registers.timer;
        match self.timer_mode() {
            TimerMode::TscDeadline => {
                if timer.tsc_deadline == 0 {
                    return None;
                }
                let now_ns = self.wiring.time.now_ns();
                let left = timer.tsc_deadline.saturating_sub(self.wiring.tsc.tsc());
                Some((now_ns, ticks_to_ns(left, self.wiring.tsc.hz())))
            }
            mode => {
                let deadline_ns = ticks_to_ns(timer.deadline?, self.config.bus_hz);
                let now_ns = self.wiring.time.now_ns();
                let wait = deadline_ns.saturating_sub(now_ns);
                let short = mode == TimerMode::Periodic
                    && wait < MIN_PERIOD_NS
                    && ticks_to_ns(timer.period(), self.config.bus_hz) < MIN_PERIOD_NS;
                Some((now_ns, if short { MIN_PERIOD_NS } else { wait }))
            }
        }
    }

    /// The host timer ran out: on its thread.
    pub(super) fn timer_ran_out(&self) {
        let mut registers = self.lock();
        registers.armed_ns = None;
        self.catch_up(&mut registers);
        self.arm(&mut registers);
    }

    /// The vCPU's time-stamp counter was written or its offset changed: a deadline in terms of it has moved.
    pub fn tsc_changed(&self) {
        let mut registers = self.lock();
        self.catch_up(&mut registers);
        self.arm(&mut registers);
    }

    pub(super) fn current_count(&self) -> u32 {
        if self.timer_mode() == TimerMode::TscDeadline {
            return 0;
        }
        let mut registers = self.lock();
        self.catch_up(&mut registers);
        registers.timer.current(self.bus_ticks(self.wiring.time.now_ns()))
    }

    pub(super) fn write_initial_count(&self, registers: &mut Registers, value: u32) {
        if self.timer_mode() == TimerMode::TscDeadline {
            return;
        }
        registers.timer.start(self.bus_ticks(self.wiring.time.now_ns()), value);
        self.arm(registers);
    }

    pub(super) fn write_divide(&self, registers: &mut Registers, value: u32) {
        self.catch_up(registers);
        registers.timer.set_divide(self.bus_ticks(self.wiring.time.now_ns()), value);
        self.arm(registers);
    }

    /// Writes the timer's LVT entry. Changing between one-shot and periodic leaves the counter alone; changing to or
    /// from TSC-deadline mode stops it (SDM vol. 3, 11.5.4.1).
    pub(super) fn write_timer_entry(&self, registers: &mut Registers, entry: u32) {
        self.catch_up(registers);
        let deadline_mode = |mode| mode == TimerMode::TscDeadline;
        if deadline_mode(self.timer_mode()) != deadline_mode(TimerMode::from_lvt(entry)) {
            registers.timer.stop();
        }
        self.inbox.set_lvt(SOURCE, entry);
        self.arm(registers);
    }

    pub(super) fn read_tsc_deadline(&self) -> Result<u64, GeneralProtection> {
        if !self.config.features.tsc_deadline {
            return Err(GeneralProtection);
        }
        if self.timer_mode() != TimerMode::TscDeadline {
            return Ok(0);
        }
        let mut registers = self.lock();
        self.catch_up(&mut registers);
        Ok(registers.timer.tsc_deadline)
    }

    /// Arms or, with 0, disarms; ignored outside TSC-deadline mode.
    pub(super) fn write_tsc_deadline(&self, value: u64) -> Result<(), GeneralProtection> {
        if !self.config.features.tsc_deadline {
            return Err(GeneralProtection);
        }
        if self.timer_mode() == TimerMode::TscDeadline {
            let mut registers = self.lock();
            registers.timer.tsc_deadline = value;
            self.catch_up(&mut registers);
            self.arm(&mut registers);
        }
        Ok(())
    }

    /// What is left of a running counter, in bus ticks, for a snapshot.
    pub(super) fn ticks_left(&self, registers: &Registers) -> Option<u64> {
        let now = self.bus_ticks(self.wiring.time.now_ns());
        registers.timer.deadline.map(|deadline| deadline.saturating_sub(now))
    }

    /// Lets a restored counter go on.
    pub(super) fn resume_timer(&self, registers: &mut Registers, left: Option<u64>) {
        let now = self.bus_ticks(self.wiring.time.now_ns());
        registers.timer.deadline = left.map(|left| now.saturating_add(left));
        self.arm(registers);
    }
}
