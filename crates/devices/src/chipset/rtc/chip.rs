//! The MC146818 as a register machine that is told the time.
//!
//! The time of day is the host's wall clock plus an offset; nothing counts. Flags in register C are worked out when
//! somebody looks: what happened between the last look and now.

use platform::time::{ns_to_ticks, ticks_to_ns};
use serde::{Deserialize, Serialize};

use super::calendar::{Format, Moment};
use super::regs::*;

const SECOND_NS: i128 = 1_000_000_000;
const DAY_S: i64 = 86_400;

/// Both clocks of the host.
#[derive(Clone, Copy)]
pub(super) struct Now {
    /// Nanoseconds since 1970, UTC.
    pub(super) wall_ns: u64,
    /// Nanoseconds on the clock that timers follow.
    pub(super) mono_ns: u64,
}

/// All state of the chip; also the archived state, version 1.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Chip {
    /// Alarm, NVRAM, and while `held` the time of day, by index.
    bytes: Vec<u8>,
    index: u8,
    a: u8,
    b: u8,
    flags: u8,
    /// What the clock shows minus UTC. Wide enough for any date that the registers can hold.
    offset_ns: i128,
    /// The clock is stopped for setting; its registers are in `bytes`.
    held: bool,
    /// The time was written while held.
    written: bool,
    /// Second and period up to which flags are known.
    seen_second: i64,
    seen_period: u64,
}

impl Chip {
    /// A chip that shows UTC plus `offset_s`.
    pub(super) fn new(offset_s: i64, now: Now) -> Self {
        let mut chip = Self {
            bytes: vec![0; BYTES],
            index: 0,
            a: a::DEFAULT,
            b: b::DEFAULT,
            flags: 0,
            offset_ns: i128::from(offset_s) * SECOND_NS,
            held: false,
            written: false,
            seen_second: 0,
            seen_period: 0,
        };
        chip.look_away(now);
        chip
    }

    /// Power-on: the battery keeps time and NVRAM, whatever was half set is forgotten.
    pub(super) fn reset(&mut self, now: Now) {
        (self.index, self.a, self.b, self.flags) = (0, a::DEFAULT, b::DEFAULT, 0);
        (self.held, self.written) = (false, false);
        self.look_away(now);
    }

    /// Which rule an archived state breaks.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.bytes.len() != BYTES {
            return Err(format!("{} bytes instead of {BYTES}", self.bytes.len()));
        }
        // A thousand times what the registers can set, and far from where sums overflow.
        let limit_s = 1i64 << 52;
        if self.offset_ns.unsigned_abs() > (SECOND_NS * i128::from(limit_s)).unsigned_abs() {
            return Err(format!("the clock is off by {} ns", self.offset_ns));
        }
        if self.seen_second.unsigned_abs() > limit_s.unsigned_abs() {
            return Err(format!("the clock was last seen at {} s", self.seen_second));
        }
        if self.held != self.stopped() {
            return Err("the clock neither runs nor stands".to_owned());
        }
        Ok(())
    }

    /// Writes port 70. Bit 7 gates the NMI on a PC, not here.
    pub(super) fn select(&mut self, index: u8) {
        self.index = index & 0x7f;
    }

    /// Reads port 71.
    pub(super) fn read(&mut self, now: Now) -> u8 {
        match self.index {
            index::A => self.a | if self.update_in_progress(now) { a::UPDATE_IN_PROGRESS } else { 0 },
            index::B => self.b,
            index::C => {
                self.look(now);
                let interrupt = if self.interrupt() { c::INTERRUPT } else { 0 };
                std::mem::take(&mut self.flags) | interrupt
            }
            index::D => VALID,
            other if index::TIME.contains(&other) && !self.held => self.time_register(other, self.second(now)),
            other => self.byte(other),
        }
    }

    /// Writes port 71.
    pub(super) fn write(&mut self, value: u8, now: Now) {
        match self.index {
            index::A => self.control(now, |chip| chip.a = value & !a::UPDATE_IN_PROGRESS),
            index::B => self.control(now, |chip| {
                // Stopping the clock for setting ends update interrupts (data sheet, register B).
                chip.b = if value & b::SET != 0 { value & !b::UPDATE_INTERRUPT } else { value };
            }),
            index::C | index::D => {}
            other if index::TIME.contains(&other) => {
                if !self.held {
                    self.look(now);
                    self.capture(now);
                }
                self.set_byte(other, value);
                self.written = true;
                if !self.held {
                    self.apply(now);
                }
            }
            other => self.control(now, |chip| chip.set_byte(other, value)),
        }
    }

    /// Whether the interrupt output is active.
    pub(super) fn interrupt(&self) -> bool {
        self.flags & self.b & c::ALL != 0
    }

    /// The timer ran out: brings the flags up to date.
    pub(super) fn look(&mut self, now: Now) {
        let (second, period) = (self.second(now), self.period(now));
        if !self.held && second != self.seen_second {
            self.flags |= c::UPDATE;
            if self.next_alarm(self.seen_second).is_some_and(|at| at <= second) {
                self.flags |= c::ALARM;
            }
        }
        if period.is_some_and(|period| period != self.seen_period) {
            self.flags |= c::PERIODIC;
        }
        self.look_away(now);
    }

    /// When (by the clock of timers) the next interrupt is due; `None` while none is enabled, or one is pending.
    pub(super) fn next_interrupt(&self, now: Now) -> Option<u64> {
        if self.interrupt() {
            return None;
        }
        let enabled = |bit: u8| self.b & bit != 0;
        let second = self.second(now);
        let until = |at: i64| {
            let ns = i128::from(at) * SECOND_NS - self.clock_ns(now);
            now.mono_ns.saturating_add(u64::try_from(ns).unwrap_or(0))
        };
        let update = (enabled(c::UPDATE) && !self.held).then(|| until(second + 1));
        let alarm = if enabled(c::ALARM) && !self.held { self.next_alarm(second).map(until) } else { None };
        let periodic = if enabled(c::PERIODIC) { self.next_period_ns(now) } else { None };
        [update, alarm, periodic].into_iter().flatten().min()
    }

    /// What the clock shows, in seconds since 1970.
    pub(super) fn time(&self, now: Now) -> i64 {
        self.second(now)
    }

    /// Sets the clock, in seconds since 1970, now.
    pub(super) fn set_time(&mut self, seconds: i64, now: Now) {
        self.look(now);
        // Within what the registers can hold, so that sums stay small.
        let seconds = seconds.clamp(-DAY_S * 366 * 10_000, DAY_S * 366 * 10_000);
        self.offset_ns = i128::from(seconds) * SECOND_NS - i128::from(now.wall_ns);
        if self.held {
            self.capture(now);
            self.written = false;
        }
        self.look_away(now);
    }

    /// A byte of the NVRAM by index; `None` for the clock's own registers.
    pub(super) fn nvram(&self, index: u8) -> Option<u8> {
        is_nvram(index).then(|| self.byte(index))
    }

    /// Sets a byte of the NVRAM; `false` for the clock's own registers.
    pub(super) fn set_nvram(&mut self, index: u8, value: u8) -> bool {
        let ours = is_nvram(index);
        if ours {
            self.set_byte(index, value);
        }
        ours
    }

    fn byte(&self, index: u8) -> u8 {
        self.bytes.get(usize::from(index)).copied().unwrap_or(0xff)
    }

    fn set_byte(&mut self, index: u8, value: u8) {
        if let Some(byte) = self.bytes.get_mut(usize::from(index)) {
            *byte = value;
        }
    }

    fn clock_ns(&self, now: Now) -> i128 {
        i128::from(now.wall_ns) + self.offset_ns
    }

    fn second(&self, now: Now) -> i64 {
        self.clock_ns(now).div_euclid(SECOND_NS) as i64
    }

    fn stopped(&self) -> bool {
        self.b & b::SET != 0 || !self.divider_runs()
    }

    fn divider_runs(&self) -> bool {
        self.a & a::DIVIDER == a::DIVIDER_RUNS
    }

    fn update_in_progress(&self, now: Now) -> bool {
        !self.held && self.clock_ns(now).rem_euclid(SECOND_NS) >= SECOND_NS - i128::from(UPDATE_NS)
    }

    /// Ticks of the crystal between periodic interrupts (data sheet, table 5).
    fn period_ticks(&self) -> Option<u64> {
        match self.a & a::RATE {
            _ if !self.divider_runs() => None,
            0 => None,
            rate @ (1 | 2) => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    /// The number of the current period. Follows the clock of timers: the wall clock may be set back.
    fn period(&self, now: Now) -> Option<u64> {
        Some(ns_to_ticks(now.mono_ns, CRYSTAL_HZ) / self.period_ticks()?)
    }

    fn next_period_ns(&self, now: Now) -> Option<u64> {
        let next = self.period(now)?.saturating_add(1).saturating_mul(self.period_ticks()?);
        Some(ticks_to_ns(next, CRYSTAL_HZ))
    }

    /// From now on, only what is new counts.
    fn look_away(&mut self, now: Now) {
        self.seen_second = self.second(now);
        self.seen_period = self.period(now).unwrap_or(0);
    }

    /// A change to the control or alarm registers: what was before it counts by the old ones, and the clock may be
    /// stopped or started by it.
    fn control(&mut self, now: Now, change: impl FnOnce(&mut Self)) {
        self.look(now);
        let divider_ran = self.divider_runs();
        change(self);
        if self.divider_runs() && !divider_ran {
            // The first update comes half a second after the divider is let go (data sheet, "divider control").
            let phase = self.clock_ns(now).rem_euclid(SECOND_NS);
            self.offset_ns += SECOND_NS / 2 - phase;
        }
        match (self.held, self.stopped()) {
            (false, true) => {
                self.capture(now);
                (self.held, self.written) = (true, false);
            }
            (true, false) => {
                self.held = false;
                if self.written {
                    self.apply(now);
                }
            }
            _ => {}
        }
        self.look_away(now);
    }

    /// Puts the time into the registers.
    fn capture(&mut self, now: Now) {
        let second = self.second(now);
        for register in index::TIME {
            let value = self.time_register(register, second);
            self.set_byte(register, value);
        }
    }

    /// Sets the clock by the registers. A date or time that does not exist is not taken: the clock goes on as it was.
    fn apply(&mut self, now: Now) {
        self.written = false;
        let format = Format::of(self.b);
        let number = |index| format.decode(self.byte(index));
        let moment = || {
            let century = number(index::CENTURY)?;
            Some(Moment {
                year: i64::from(century) * 100 + i64::from(number(index::YEAR)?),
                month: number(index::MONTH)?,
                day: number(index::DAY)?,
                hour: format.decode_hour(self.byte(index::HOURS))?,
                minute: number(index::MINUTES)?,
                second: number(index::SECONDS)?,
            })
        };
        if let Some(seconds) = moment().and_then(Moment::to_seconds) {
            // The divider runs through: the phase of the second stays.
            self.offset_ns += i128::from(seconds - self.second(now)) * SECOND_NS;
            self.look_away(now);
        }
    }

    fn time_register(&self, register: u8, second: i64) -> u8 {
        let (moment, format) = (Moment::from_seconds(second), Format::of(self.b));
        match register {
            index::SECONDS => format.encode(moment.second),
            index::MINUTES => format.encode(moment.minute),
            index::HOURS => format.encode_hour(moment.hour),
            index::WEEKDAY => format.encode(Moment::weekday(second)),
            index::DAY => format.encode(moment.day),
            index::MONTH => format.encode(moment.month),
            index::YEAR => format.encode(moment.year.rem_euclid(100) as u8),
            _ => format.encode(moment.year.div_euclid(100).rem_euclid(100) as u8),
        }
    }

    /// The first second after `after` at which the alarm matches.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let format = Format::of(self.b);
        let field = |index, decode: fn(Format, u8) -> Option<u8>| match self.byte(index) {
            any if any & ALARM_ANY == ALARM_ANY => Some(None),
            register => decode(format, register).map(Some),
        };
        // A field that is no number matches never; `None` inside matches always.
        let hour = field(index::HOURS_ALARM, Format::decode_hour)?;
        let minute = field(index::MINUTES_ALARM, Format::decode)?;
        let second = field(index::SECONDS_ALARM, Format::decode)?;
        let misses = |field: Option<u8>, value: i64| field.is_some_and(|field| i64::from(field) != value);
        let midnight = after - after.rem_euclid(DAY_S);
        let mut at = after - midnight + 1;
        let end = at + DAY_S;
        while at < end {
            if misses(hour, at / 3600 % 24) {
                at = (at / 3600 + 1) * 3600;
            } else if misses(minute, at / 60 % 60) {
                at = (at / 60 + 1) * 60;
            } else if misses(second, at % 60) {
                at += 1;
            } else {
                return Some(midnight + at);
            }
        }
        None
    }
}

fn is_nvram(index: u8) -> bool {
    index >= index::NVRAM && usize::from(index) < BYTES && index != index::CENTURY
}
