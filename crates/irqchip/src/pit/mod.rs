//! The 8254 programmable interval timer, and port 61h.
//!
//! Counter 0 drives interrupt line 0, counter 1 once refreshed memory, counter 2 is the speaker's tone, gated and read
//! through port 61h. `counter` is one counter; this file gives the three a lock, ports, host time and snapshots.

mod counter;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use platform::state::{StateError, decode, encode};
use platform::time::{SharedTime, ns_to_ticks, ticks_to_ns};
use platform::{AccessSize, Bus, BusDevice, BusError, IrqLine, Persist, Timer};
use serde::{Deserialize, Serialize};

use crate::bytewise;

use counter::Counter;

/// Frequency of the input clock, in Hz.
pub const PIT_HZ: u64 = 1_193_182;

const KIND: &str = "i8254";
const VERSION: u32 = 1;

/// Shortest time, in ns, between two wake-ups for a periodic counter; edges in between are merged.
const MIN_PERIOD_NS: u64 = 100_000;

/// Added to the clock's ticks, so that a count loaded long before a restored snapshot lies at a positive tick.
const ORIGIN: u64 = 1 << 62;

/// Longest age of a count in a snapshot, in ticks (over 100,000 years).
const MAX_AGE: u64 = ORIGIN / 2;

/// State of the three counters and port 61h, version 1. Ticks are relative to [`ORIGIN`] as the moment of the snapshot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct State {
    counters: [Counter; 3],
    /// Speaker enable, bit 1 of port 61h.
    speaker: bool,
    /// Bit 4 of port 61h, which toggles with every read.
    refresh: bool,
    /// Level of interrupt line 0.
    line: bool,
}

impl State {
    fn power_on() -> Self {
        let counters = [Counter::new(true), Counter::new(true), Counter::new(false)];
        Self { counters, speaker: false, refresh: false, line: false }
    }
}

struct Core {
    state: State,
    /// Next rise of counter 0's output that makes an interrupt.
    due: Option<u64>,
}

/// The timer.
pub struct Pit {
    core: Mutex<Core>,
    time: SharedTime,
    timer: Box<dyn Timer>,
    irq: IrqLine,
}

impl Pit {
    /// A timer after power-up that drives `irq` with counter 0.
    pub fn new(time: SharedTime, irq: IrqLine) -> Arc<Self> {
        Arc::new_cyclic(|this: &Weak<Self>| {
            let this = this.clone();
            let timer = time.timer(Box::new(move || {
                if let Some(pit) = this.upgrade() {
                    let now = pit.now();
                    let mut core = pit.lock();
                    pit.catch_up(&mut core, now);
                    // Whatever is due later, the host timer is not set for it any more.
                    core.due = None;
                    pit.arm(&mut core, now);
                }
            }));
            Self { core: Mutex::new(Core { state: State::power_on(), due: None }), time, timer, irq }
        })
    }

    /// Puts the timer at ports 40h to 43h, and port 61h in its place.
    ///
    /// # Errors
    /// One of the ports is taken.
    pub fn map(self: &Arc<Self>, ports: &Bus) -> Result<(), BusError> {
        ports.map(0x40, 4, Arc::new(CounterPorts(self.clone())))?;
        ports.map(0x61, 1, Arc::new(Port61(self.clone())))
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        ORIGIN + ns_to_ticks(self.time.now_ns(), PIT_HZ)
    }

    /// Makes the edge of counter 0 that is due, if one is, and brings the line to the output's level.
    fn catch_up(&self, core: &mut Core, now: u64) {
        let counter = &mut core.state.counters[0];
        counter.advance(now);
        let rose = core.due.is_some_and(|due| due <= now);
        let level = counter.output(now);
        if rose {
            core.due = None;
            self.irq.set(false);
            self.irq.set(true);
            core.state.line = true;
        }
        if core.state.line != level {
            core.state.line = level;
            self.irq.set(level);
        }
    }

    /// Sets the host timer for counter 0's next rise.
    fn arm(&self, core: &mut Core, now: u64) {
        let counter = &core.state.counters[0];
        let next = counter.next_rise(now);
        if next == core.due {
            return;
        }
        core.due = next;
        let Some(due) = next else {
            self.timer.disarm();
            return;
        };
        let deadline = ticks_to_ns(due - ORIGIN, PIT_HZ);
        let short = counter.period().is_some_and(|ticks| ticks_to_ns(ticks.into(), PIT_HZ) < MIN_PERIOD_NS);
        let earliest = if short { self.time.now_ns().saturating_add(MIN_PERIOD_NS) } else { 0 };
        self.timer.arm(deadline.max(earliest));
    }

    /// Runs `access` on the counters, with interrupt line 0 kept up to date.
    fn with<T>(&self, access: impl FnOnce(&mut State, u64) -> T) -> T {
        let now = self.now();
        let mut core = self.lock();
        self.catch_up(&mut core, now);
        let result = access(&mut core.state, now);
        self.catch_up(&mut core, now);
        self.arm(&mut core, now);
        result
    }

    fn write_control(&self, value: u8) {
        const READ_BACK: u8 = 3;
        const LATCH: u8 = 0;
        self.with(|state, now| {
            let select = value >> 6;
            if select == READ_BACK {
                for (index, counter) in state.counters.iter_mut().enumerate() {
                    if value & 2 << index != 0 {
                        read_back(counter, value, now);
                    }
                }
                return;
            }
            let Some(counter) = state.counters.get_mut(usize::from(select)) else { return };
            if value >> 4 & 3 == LATCH {
                counter.latch_count(now);
            } else {
                counter.write_control(value);
            }
        });
    }
}

/// The read-back command for one counter: bits 5 and 4 say, by being clear, what to latch.
fn read_back(counter: &mut Counter, command: u8, now: u64) {
    if command & 1 << 5 == 0 {
        counter.latch_count(now);
    }
    if command & 1 << 4 == 0 {
        counter.latch_status(now);
    }
}

/// Ports 40h to 43h.
struct CounterPorts(Arc<Pit>);

impl BusDevice for CounterPorts {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        bytewise::read(offset, size, |offset| {
            self.0.with(|state, now| state.counters.get_mut(offset as usize).map_or(0xff, |counter| counter.read(now)))
        })
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        bytewise::write(offset, size, value, |offset, byte| match offset {
            0..3 => self.0.with(|state, now| {
                if let Some(counter) = state.counters.get_mut(offset as usize) {
                    counter.write(byte, now);
                }
            }),
            3 => self.0.write_control(byte),
            _ => {}
        });
    }
}

/// Port 61h: bit 0 gate of counter 2, bit 1 speaker, bit 4 toggles, bit 5 output of counter 2.
struct Port61(Arc<Pit>);

impl BusDevice for Port61 {
    fn read(&self, _: u64, _: AccessSize) -> u64 {
        let now = self.0.now();
        let mut core = self.0.lock();
        let state = &mut core.state;
        state.refresh = !state.refresh;
        let tone = &mut state.counters[2];
        tone.advance(now);
        let bits = [(0, tone.gate()), (1, state.speaker), (4, state.refresh), (5, tone.output(now))];
        bits.into_iter().fold(0, |value, (bit, set)| value | u64::from(set) << bit)
    }

    fn write(&self, _: u64, _: AccessSize, value: u64) {
        let now = self.0.now();
        let mut core = self.0.lock();
        core.state.speaker = value & 2 != 0;
        core.state.counters[2].set_gate(value & 1 != 0, now);
    }
}

impl Persist for Pit {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let now = self.now();
        let mut state = self.lock().state.clone();
        for counter in &mut state.counters {
            counter.advance(now);
            counter.rebase(now, ORIGIN);
        }
        encode(KIND, &state)
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let mut state: State = decode(KIND, VERSION, version, bytes)?;
        let now = self.now();
        for counter in &mut state.counters {
            counter.check(ORIGIN, MAX_AGE).map_err(|why| StateError::Invalid { kind: KIND, why })?;
            counter.rebase(ORIGIN, now);
        }
        let mut core = self.lock();
        *core = Core { state, due: None };
        core.state.counters[0].advance(now);
        self.arm(&mut core, now);
        Ok(())
    }

    fn reset(&self) {
        let mut core = self.lock();
        self.timer.disarm();
        let lowered = core.state.line;
        *core = Core { state: State::power_on(), due: None };
        if lowered {
            self.irq.set(false);
        }
    }
}
