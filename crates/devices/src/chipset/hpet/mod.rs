//! High precision event timers (IA-PC HPET specification 1.0a) at FED00000: a 32-bit counter of 2^24 Hz and 8 timers,
//! one-shot or periodic, edge- or level-triggered, by line, by message (FSB), or in place of the 8254 and the
//! real-time clock.
//!
//! Reading the counter takes no timer, and a host timer is armed only where a match interrupts. Matches that come
//! faster than the host can follow become one.

mod chip;
mod regs;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use platform::time::SharedTime;
use platform::{AccessSize, BusDevice, IrqSink, MsiMessage, MsiSink, Persist, StateError, Timer, state};

pub use self::regs::{ADDRESS, FREQUENCY_HZ, LENGTH, TIMERS};

use self::chip::{Chip, Route};
use self::regs::offset;
use super::lines::LineSwitch;

const KIND: &str = "hpet";
const VERSION: u32 = 1;
/// A timer does not bother the host more often: a guest may ask for a match every 60 ns.
const SHORTEST_NS: u64 = 50_000;
/// Place of the legacy lines among the levels, after the I/O APIC's inputs.
const LEGACY_SHIFT: usize = 32;

/// Where the timers' interrupts go.
#[derive(Clone)]
pub struct HpetWiring {
    /// The I/O APIC's inputs, numbered by GSI. An input that other devices drive, too, must be shared there.
    pub gsi: Arc<dyn IrqSink>,
    /// The inputs that timers can be routed to, one bit each. bhyve offers the upper four: 20 to 23 of 24.
    pub routes: u32,
    /// The lines of the 8254 (IRQ 0) and the real-time clock (IRQ 8); legacy replacement takes them over.
    pub legacy: [Arc<LineSwitch>; 2],
    /// Takes messages.
    pub msi: Arc<dyn MsiSink>,
}

struct Inner {
    chip: Chip,
    /// Levels last given to lines: bit n for GSI n, then the legacy lines.
    levels: u64,
    /// For when each timer is armed.
    armed: [Option<u64>; TIMERS],
    /// When each timer matched last.
    matched_ns: [u64; TIMERS],
}

/// The HPET on the memory bus.
pub struct Hpet {
    inner: Mutex<Inner>,
    wiring: HpetWiring,
    time: SharedTime,
    timers: [Box<dyn Timer>; TIMERS],
}

impl Hpet {
    /// An HPET after reset: the counter stands at 0.
    pub fn new(wiring: HpetWiring, time: SharedTime) -> Arc<Self> {
        let chip = Chip::new(wiring.routes);
        let inner = Inner { chip, levels: 0, armed: [None; TIMERS], matched_ns: [0; TIMERS] };
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let timers = std::array::from_fn(|n| {
                let weak = weak.clone();
                time.timer(Box::new(move || {
                    if let Some(hpet) = weak.upgrade() {
                        hpet.timer_ran_out(n);
                    }
                }))
            });
            Self { inner: Mutex::new(inner), wiring, time, timers }
        })
    }

    /// Whether the HPET has taken over the lines of the 8254 and the real-time clock.
    pub fn replaces_legacy(&self) -> bool {
        self.lock().chip.legacy()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn timer_ran_out(&self, n: usize) {
        let mut inner = self.lock();
        inner.armed[n] = None;
        self.look(&mut inner, self.time.now_ns());
        self.arm(&mut inner);
    }

    /// Brings the timers up to date and delivers what they have to tell.
    fn look(&self, inner: &mut Inner, now_ns: u64) {
        let matched = inner.chip.look(now_ns);
        for n in (0..TIMERS).filter(|n| matched & 1 << n != 0) {
            inner.matched_ns[n] = now_ns;
            match inner.chip.edge(n) {
                Some(Route::Message { address, data }) => {
                    self.wiring.msi.send(MsiMessage { address: address.into(), data });
                }
                Some(route) => self.pulse(inner, route),
                None => {}
            }
        }
        self.sync_levels(inner);
    }

    fn pulse(&self, inner: &Inner, route: Route) {
        // A line that another timer holds has no edge.
        if let Some(line) = line_of(route).filter(|line| inner.levels & 1 << line == 0) {
            self.set_line(line, true);
            self.set_line(line, false);
        }
    }

    /// Makes the lines what the level-triggered timers say.
    fn sync_levels(&self, inner: &mut Inner) {
        let lines = (0..TIMERS).filter_map(|n| inner.chip.level(n)).filter_map(line_of);
        let levels = lines.fold(0, |levels, line| levels | 1 << line);
        let changed = levels ^ inner.levels;
        inner.levels = levels;
        for line in (0..LEGACY_SHIFT + 2).filter(|line| changed & 1 << line != 0) {
            self.set_line(line, levels & 1 << line != 0);
        }
    }

    fn set_line(&self, line: usize, asserted: bool) {
        match line.checked_sub(LEGACY_SHIFT) {
            None => self.wiring.gsi.set_level(line as u32, asserted),
            Some(n) => {
                if let Some(switch) = self.wiring.legacy.get(n) {
                    switch.second().set(asserted);
                }
            }
        }
    }

    fn select_legacy(&self, inner: &Inner) {
        for switch in &self.wiring.legacy {
            switch.select_second(inner.chip.legacy());
        }
    }

    /// Makes the host's timers what the chip's state says.
    fn arm(&self, inner: &mut Inner) {
        for (n, timer) in self.timers.iter().enumerate() {
            let earliest = inner.matched_ns[n].saturating_add(SHORTEST_NS);
            let deadline = inner.chip.deadline(n).map(|deadline| deadline.max(earliest));
            if deadline != inner.armed[n] {
                inner.armed[n] = deadline;
                match deadline {
                    Some(deadline) => timer.arm(deadline),
                    None => timer.disarm(),
                }
            }
        }
    }

    fn write_register(&self, offset: u64, mask: u64, value: u64) {
        let mut inner = self.lock();
        let now_ns = self.time.now_ns();
        self.look(&mut inner, now_ns);
        inner.chip.write(offset, mask, value, now_ns);
        // A comparator that was set to this very moment matches.
        self.look(&mut inner, now_ns);
        if offset == offset::CONFIG {
            self.select_legacy(&inner);
        }
        self.arm(&mut inner);
    }
}

/// The place of a route's line among the levels.
fn line_of(route: Route) -> Option<usize> {
    match route {
        Route::Gsi(gsi) => Some(gsi as usize),
        Route::Legacy(n) => Some(LEGACY_SHIFT + n),
        Route::Nowhere | Route::Message { .. } => None,
    }
}

impl BusDevice for Hpet {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        let (register, shift) = (offset & !7, offset % 8 * 8);
        let mut inner = self.lock();
        let now_ns = self.time.now_ns();
        // The counter and the capabilities are read all the time; they need no look at the timers.
        if register == offset::STATUS || register >= offset::TIMERS {
            self.look(&mut inner, now_ns);
            self.arm(&mut inner);
        }
        inner.chip.read(register, now_ns) >> shift & size.mask()
    }

    /// Registers are written by aligned 32- or 64-bit accesses (2.3.1); others are ignored.
    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        let wide = matches!(size, AccessSize::Dword | AccessSize::Qword);
        if wide && offset.is_multiple_of(size.bytes()) {
            let shift = offset % 8 * 8;
            self.write_register(offset & !7, size.mask() << shift, value << shift);
        }
    }
}

impl Persist for Hpet {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::encode(KIND, &self.lock().chip.to_state(self.time.now_ns()))
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let archived: Chip = state::decode(KIND, VERSION, version, bytes)?;
        let chip = Chip::from_state(archived, self.time.now_ns(), self.wiring.routes)
            .map_err(|why| StateError::Invalid { kind: KIND, why })?;
        let mut inner = self.lock();
        inner.chip = chip;
        let lines = (0..TIMERS).filter_map(|n| inner.chip.level(n)).filter_map(line_of);
        inner.levels = lines.fold(0, |levels, line| levels | 1 << line);
        inner.matched_ns = [0; TIMERS];
        self.arm(&mut inner);
        Ok(())
    }

    fn reset(&self) {
        let mut inner = self.lock();
        inner.chip.reset();
        self.sync_levels(&mut inner);
        self.select_legacy(&inner);
        self.arm(&mut inner);
    }
}
