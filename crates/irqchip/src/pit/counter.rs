//! One counter of the 8254 (Intel data sheet 231164).
//!
//! Nothing counts: a counter is the tick at which its count was loaded, and everything visible follows from how long
//! ago that was. Ticks are of the input clock; they only grow. `now` in all methods is the current tick.

use serde::{Deserialize, Serialize};

/// Which bytes of a count the processor reads and writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
enum Access {
    Low,
    High,
    #[default]
    Both,
}

/// A count that waits for the end of the current (half) cycle, or for a trigger.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Reload {
    count: u32,
    /// Tick at which it is loaded; without meaning in modes that wait for a trigger.
    at: u64,
}

/// A counter. Plain data: it is also its own snapshot.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Counter {
    mode: u8,
    bcd: bool,
    access: Access,
    /// The count in effect, 1 to 65,536 (10,000 in BCD); 0 if none has been loaded yet.
    count: u32,
    reload: Option<Reload>,
    /// First byte of two.
    first_byte: Option<u8>,
    /// The next read of two gets the high byte.
    read_high: bool,
    latched: Option<u16>,
    latched_status: Option<u8>,
    gate: bool,
    /// Tick at which `count` was loaded; `None` if it was not.
    start: Option<u64>,
    /// Tick at which the gate stopped the counting.
    held: Option<u64>,
    /// A control word came after the last count.
    no_count: bool,
}

fn to_bcd(value: u32) -> u16 {
    (0..4).fold((0, value), |(bcd, rest), digit| (bcd | (rest % 10) << (digit * 4), rest / 10)).0 as u16
}

fn from_bcd(value: u16) -> u32 {
    (0..4).rev().fold(0, |sum, digit| sum * 10 + u32::from(value >> (digit * 4) & 0xf))
}

impl Counter {
    /// A counter after power-up, with its gate at a level.
    pub(super) fn new(gate: bool) -> Self {
        Self { gate, no_count: true, ..Self::default() }
    }

    /// Why a counter cannot be in this state, given that `now` is the tick it was saved at and no tick in it lies
    /// more than `max_age` before that.
    pub(super) fn check(&self, now: u64, max_age: u64) -> Result<(), String> {
        // The furthest that a load can lie ahead is the end of a cycle that begins with the next tick.
        let reach = now - max_age..=now + 1 + 0x1_0000;
        let in_reach = |tick: Option<u64>| tick.is_none_or(|tick| reach.contains(&tick));
        let loaded = self.count != 0 || self.start.is_none();
        let counts = self.count <= 0x1_0000 && self.reload.is_none_or(|reload| (1..=0x1_0000).contains(&reload.count));
        let load = self.reload.filter(|_| self.is_periodic()).map(|reload| reload.at);
        let ticks = in_reach(self.start) && in_reach(self.held) && in_reach(load);
        if self.mode > 5 || !loaded || !counts || !ticks {
            return Err("a counter's mode, count or time is out of range".into());
        }
        Ok(())
    }

    /// Moves all ticks from a clock that shows `from` to one that shows `to`.
    pub(super) fn rebase(&mut self, from: u64, to: u64) {
        let shift = |tick: &mut u64| *tick = tick.wrapping_sub(from).wrapping_add(to);
        self.start.iter_mut().for_each(shift);
        self.held.iter_mut().for_each(shift);
        if let Some(reload) = &mut self.reload {
            shift(&mut reload.at);
        }
    }

    fn modulus(&self) -> u32 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn is_triggered(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    /// Writes a control word that is not a latch command.
    pub(super) fn write_control(&mut self, value: u8) {
        *self = Self {
            mode: match value >> 1 & 7 {
                mode @ 0..=5 => mode,
                // Bit 2 of modes 2 and 3 is not decoded.
                mode => mode & 3,
            },
            bcd: value & 1 != 0,
            access: match value >> 4 & 3 {
                1 => Access::Low,
                2 => Access::High,
                _ => Access::Both,
            },
            ..Self::new(self.gate)
        };
    }

    /// Writes a byte of a new count.
    pub(super) fn write(&mut self, value: u8, now: u64) {
        self.advance(now);
        let value = u16::from(value);
        let written = match (self.access, self.first_byte.take()) {
            (Access::Low, _) => value,
            (Access::High, _) => value << 8,
            (Access::Both, Some(low)) => value << 8 | u16::from(low),
            (Access::Both, None) => {
                self.first_byte = Some(value as u8);
                if self.mode == 0 {
                    // The first byte stops the counting.
                    self.start = None;
                }
                return;
            }
        };
        let count = if self.bcd { from_bcd(written) } else { u32::from(written) };
        self.write_count(if count == 0 { self.modulus() } else { count }, now);
    }

    fn write_count(&mut self, count: u32, now: u64) {
        self.no_count = false;
        if self.is_triggered() {
            self.reload = Some(Reload { count, at: 0 });
        } else if let (true, Some(at)) = (self.is_periodic(), self.next_boundary(now)) {
            self.reload = Some(Reload { count, at });
        } else {
            self.load(count, now);
        }
    }

    /// Loads a count at the next tick.
    fn load(&mut self, count: u32, now: u64) {
        self.count = count;
        self.reload = None;
        self.start = Some(now + 1);
        self.held = (!self.gate && !self.is_triggered()).then_some(now + 1);
    }

    /// The end of the current cycle, or of the current half of a square wave.
    fn next_boundary(&self, now: u64) -> Option<u64> {
        let start = self.start?;
        let high = u64::from(self.high_ticks());
        let half = self.mode == 3 && now < start + high;
        Some(start + if half { high } else { u64::from(self.count) })
    }

    /// Length of a square wave's high half.
    fn high_ticks(&self) -> u32 {
        self.count.div_ceil(2)
    }

    /// Brings a periodic counter's start to its current cycle, and loads a waiting count that is due.
    pub(super) fn advance(&mut self, now: u64) {
        if !self.is_periodic() || self.held.is_some() {
            return;
        }
        let Some(start) = &mut self.start else { return };
        if let Some(reload) = self.reload
            && now >= reload.at
        {
            let in_middle = self.mode == 3 && reload.at < *start + u64::from(self.count);
            self.count = reload.count;
            self.reload = None;
            // A count loaded in the middle of a square wave times the low half.
            let elapsed = if in_middle { u64::from(self.count.div_ceil(2)) } else { 0 };
            *start = reload.at - elapsed;
        }
        let cycle = u64::from(self.count.max(1));
        *start += now.saturating_sub(*start) / cycle * cycle;
    }

    /// Level of the gate input.
    pub(super) fn gate(&self) -> bool {
        self.gate
    }

    /// Sets the gate input.
    pub(super) fn set_gate(&mut self, gate: bool, now: u64) {
        self.advance(now);
        let was = std::mem::replace(&mut self.gate, gate);
        if was == gate {
            return;
        }
        if self.is_triggered() {
            if gate {
                self.trigger(now);
            }
        } else if !gate {
            self.held = self.start.map(|start| now.max(start));
        } else if self.is_periodic() {
            self.trigger(now);
        } else if let (Some(start), Some(held)) = (&mut self.start, self.held.take()) {
            *start += now.saturating_sub(held);
        }
    }

    /// A rising edge of the gate (re)starts the count, the waiting one if there is one.
    fn trigger(&mut self, now: u64) {
        let count = self.reload.map_or(self.count, |reload| reload.count);
        if count != 0 && (self.start.is_some() || self.reload.is_some()) {
            self.load(count, now);
        }
    }

    /// Ticks since the count was loaded.
    fn elapsed(&self, now: u64) -> Option<u64> {
        Some(self.held.unwrap_or(now).saturating_sub(self.start?))
    }

    /// Level of the output. Call [`Self::advance`] first.
    pub(super) fn output(&self, now: u64) -> bool {
        let Some(elapsed) = self.elapsed(now) else { return self.mode != 0 };
        let count = u64::from(self.count.max(1));
        match self.mode {
            0 | 1 => elapsed >= count,
            2 => self.held.is_some() || elapsed % count != count - 1,
            3 => self.held.is_some() || elapsed % count < u64::from(self.high_ticks()),
            _ => elapsed != count,
        }
    }

    /// The counting element as the processor reads it.
    fn value(&self, now: u64) -> u16 {
        let elapsed = self.elapsed(now).unwrap_or(0);
        let modulus = self.modulus();
        let count = self.count.max(1);
        let position = (elapsed % u64::from(count)) as u32;
        let left = match self.mode {
            2 => count - position,
            3 => {
                // Counts down by two, twice per cycle.
                let high = self.high_ticks();
                (count & !1).saturating_sub(2 * if position < high { position } else { position - high })
            }
            _ => {
                let passed = (elapsed % u64::from(modulus)) as u32;
                (self.count + modulus - passed) % modulus
            }
        };
        if self.bcd { to_bcd(left % modulus) } else { left as u16 }
    }

    /// Latches the count until it is read; a count latched already stays.
    pub(super) fn latch_count(&mut self, now: u64) {
        self.advance(now);
        if self.latched.is_none() {
            self.latched = Some(self.value(now));
        }
    }

    /// Latches the status byte until it is read.
    pub(super) fn latch_status(&mut self, now: u64) {
        self.advance(now);
        if self.latched_status.is_some() {
            return;
        }
        let null = self.no_count || self.reload.is_some() || self.start.is_some_and(|start| start > now);
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::Both => 3,
        };
        let output = u8::from(self.output(now)) << 7;
        self.latched_status = Some(output | u8::from(null) << 6 | access << 4 | self.mode << 1 | u8::from(self.bcd));
    }

    /// Reads the latched status, the latched count, or the counting element.
    pub(super) fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        self.advance(now);
        let [low, high] = self.latched.unwrap_or_else(|| self.value(now)).to_le_bytes();
        let byte = match self.access {
            Access::Low => low,
            Access::High => high,
            Access::Both => {
                self.read_high = !self.read_high;
                if self.read_high {
                    return low;
                }
                high
            }
        };
        self.latched = None;
        byte
    }

    /// The next tick after `now` at which the output rises. Call [`Self::advance`] first.
    pub(super) fn next_rise(&self, now: u64) -> Option<u64> {
        let start = self.start?;
        if self.held.is_some() {
            return None;
        }
        let end = start + u64::from(self.count);
        let rise = match (self.mode, self.reload) {
            (0 | 1, _) => end,
            (2, Some(reload)) => reload.at,
            (3, Some(reload)) if reload.at < end => reload.at + u64::from(reload.count / 2),
            (2 | 3, _) => end,
            _ => end + 1,
        };
        (rise > now).then_some(rise)
    }

    /// Ticks between rises of the output, if it goes on rising.
    pub(super) fn period(&self) -> Option<u32> {
        self.is_periodic().then_some(self.count)
    }
}

#[cfg(test)]
impl Counter {
    /// Makes a state that accesses could not make.
    pub(super) fn force(&mut self, mode: u8, count: u32, start: Option<u64>) {
        (self.mode, self.count, self.start) = (mode, count, start);
    }
}
