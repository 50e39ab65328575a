//! The counter of the local APIC's timer (SDM vol. 3, 11.5.4), in ticks of the undivided bus clock.
//!
//! Nothing counts: a running counter is the tick at which it reaches zero. Deadlines are kept in ticks, so a periodic
//! timer does not drift.

use super::registers::{LocalSource, lvt};

/// What the timer does, by bits 18:17 of its LVT entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
}

impl TimerMode {
    pub(super) fn from_lvt(entry: u32) -> Self {
        match entry >> lvt::TIMER_MODE_SHIFT & 3 {
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            // The value 3 is reserved.
            _ => Self::OneShot,
        }
    }
}

/// The LVT entry that belongs to the timer.
pub(super) const SOURCE: LocalSource = LocalSource::Timer;

/// The timer's registers.
#[derive(Clone, Default, Debug)]
pub(super) struct ApicTimer {
    /// Initial-count register.
    pub(super) initial: u32,
    /// Divide configuration register: bits 0, 1 and 3.
    pub(super) divide: u32,
    /// Bus tick at which the counter reaches zero; `None` when stopped.
    pub(super) deadline: Option<u64>,
    /// IA32_TSC_DEADLINE; 0 when disarmed.
    pub(super) tsc_deadline: u64,
}

impl ApicTimer {
    /// The bus clock is divided by 2 to the power of this.
    fn shift(&self) -> u32 {
        (((self.divide & 3) | (self.divide >> 1 & 4)) + 1) & 7
    }

    /// Bus ticks from the initial count to zero.
    pub(super) fn period(&self) -> u64 {
        u64::from(self.initial) << self.shift()
    }

    /// Writes the initial count: starts counting, or stops if it is 0.
    pub(super) fn start(&mut self, now: u64, initial: u32) {
        self.initial = initial;
        self.deadline = (initial != 0).then(|| now.saturating_add(self.period()));
    }

    /// Stops everything: the timer changes to or from TSC-deadline mode.
    pub(super) fn stop(&mut self) {
        self.initial = 0;
        self.deadline = None;
        self.tsc_deadline = 0;
    }

    /// Writes the divide configuration; a running counter goes on from where it is.
    pub(super) fn set_divide(&mut self, now: u64, value: u32) {
        let count = u64::from(self.current(now));
        self.divide = value & 0xb;
        if self.deadline.is_some() {
            self.deadline = Some(now.saturating_add(count << self.shift()));
        }
    }

    /// The current count. Call [`Self::expire`] first.
    pub(super) fn current(&self, now: u64) -> u32 {
        let left = self.deadline.map_or(0, |deadline| deadline.saturating_sub(now));
        u32::try_from(left.div_ceil(1 << self.shift())).unwrap_or(u32::MAX)
    }

    /// Whether the counter has reached zero since the last call. Reloads it if periodic; periods that nobody looked at
    /// in time count once.
    pub(super) fn expire(&mut self, now: u64, periodic: bool) -> bool {
        let Some(deadline) = self.deadline else { return false };
        if now < deadline {
            return false;
        }
        let period = self.period();
        self.deadline = (periodic && period != 0).then(|| {
            let missed = (now - deadline) / period;
            deadline.saturating_add((missed + 1).saturating_mul(period))
        });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divides_by_every_power() {
        let divisors = [2, 4, 8, 16, 32, 64, 128, 1];
        for (code, divisor) in [0, 1, 2, 3, 8, 9, 10, 11].into_iter().zip(divisors) {
            let mut timer = ApicTimer { divide: code, ..Default::default() };
            timer.start(1000, 10);
            assert_eq!(timer.deadline, Some(1000 + 10 * divisor), "code {code}");
            assert_eq!(timer.current(1000), 10);
            assert_eq!(timer.current(1000 + 9 * divisor), 1);
            assert!(!timer.expire(999 + 10 * divisor, false));
            assert!(timer.expire(1000 + 10 * divisor, false));
            assert_eq!(timer.current(1000 + 10 * divisor), 0);
            assert!(!timer.expire(u64::MAX, false), "a one-shot timer runs out once");
        }
    }

    #[test]
    fn periodic_keeps_its_phase_when_looked_at_late() {
        let mut timer = ApicTimer { divide: 0xb, ..Default::default() };
        timer.start(0, 100);
        assert!(timer.expire(350, true));
        assert_eq!((timer.deadline, timer.current(350)), (Some(400), 50));
        assert!(!timer.expire(399, true));
        assert!(timer.expire(400, true));
    }

    #[test]
    fn another_divisor_keeps_the_count() {
        let mut timer = ApicTimer { divide: 0xb, ..Default::default() };
        timer.start(0, 100);
        timer.set_divide(40, 0);
        assert_eq!((timer.current(40), timer.deadline), (60, Some(160)));
        timer.start(0, 0);
        timer.set_divide(40, 0xb);
        assert_eq!(timer.deadline, None);
    }
}
