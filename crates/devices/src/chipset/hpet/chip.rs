//! The HPET as a register machine that is told the time.
//!
//! Nothing counts: the main counter is worked out from the time since it was started. In a running HPET every timer
//! has a tick at which it matches next, counted from the start, so that the wrapping of the 32-bit counter needs no
//! attention.

use platform::time::{ns_to_ticks, ticks_to_ns};
use serde::{Deserialize, Serialize};

use super::regs::*;

/// Ticks after which the counter is where it was.
const WRAP: u64 = 1 << 32;

/// One timer.
#[derive(Clone, Serialize, Deserialize)]
struct Timer {
    /// Writable bits of the configuration.
    config: u32,
    comparator: u32,
    period: u32,
    fsb_data: u32,
    fsb_address: u32,
    /// Tick (since the counter was started) of the next match; no meaning while it stands.
    next: u64,
}

impl Timer {
    fn new() -> Self {
        Self { config: 0, comparator: u32::MAX, period: 0, fsb_data: 0, fsb_address: 0, next: 0 }
    }

    fn is(&self, bit: u32) -> bool {
        self.config & bit != 0
    }

    fn repeats(&self) -> bool {
        self.is(timer::PERIODIC) && self.period != 0
    }

    /// Goes past `tick`; returns whether the timer matched on the way. Several matches are one.
    fn pass(&mut self, tick: u64) -> bool {
        let Some(late) = tick.checked_sub(self.next) else { return false };
        let step = if self.repeats() { u64::from(self.period) } else { WRAP };
        let advance = (late / step + 1) * step;
        self.next = self.next.saturating_add(advance);
        if self.repeats() {
            self.comparator = self.comparator.wrapping_add(advance as u32);
        }
        true
    }
}

/// Where a timer's interrupt goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Route {
    Nowhere,
    /// I/O APIC input.
    Gsi(u32),
    /// In place of the 8254 (0) or the real-time clock (1).
    Legacy(usize),
    /// A message.
    Message {
        address: u32,
        data: u32,
    },
}

/// All state of the chip; also the archived state, version 1.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Chip {
    config: u64,
    /// Bit n: timer n, level-triggered, waits to be acknowledged.
    status: u32,
    /// The counter when it was stopped or started.
    base: u32,
    /// Nanoseconds on the clock of timers when it was started.
    start_ns: u64,
    timers: [Timer; TIMERS],
    /// I/O APIC inputs that timers can be routed to, one bit each.
    routes: u32,
}

impl Chip {
    pub(super) fn new(routes: u32) -> Self {
        Self { config: 0, status: 0, base: 0, start_ns: 0, timers: std::array::from_fn(|_| Timer::new()), routes }
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.routes);
    }

    /// For an archive: the time since the start rather than a moment that only this process knows.
    pub(super) fn to_state(&self, now_ns: u64) -> Self {
        Self { start_ns: now_ns.wrapping_sub(self.start_ns), ..self.clone() }
    }

    /// Back from an archive.
    ///
    /// # Errors
    /// Which rule the state breaks.
    pub(super) fn from_state(state: Self, now_ns: u64, routes: u32) -> Result<Self, String> {
        if state.config & !config::ALL != 0 || state.timers.iter().any(|timer| timer.config & !timer::WRITABLE != 0) {
            return Err("configuration bits that do not exist".to_owned());
        }
        if state.status >= 1 << TIMERS {
            return Err("status bits that do not exist".to_owned());
        }
        if state.routes != routes {
            return Err(format!("interrupt routes {:#x} instead of {routes:#x}", state.routes));
        }
        let elapsed_ns = state.start_ns;
        let latest = ns_to_ticks(elapsed_ns, FREQUENCY_HZ).saturating_add(WRAP);
        if elapsed_ns > u64::MAX / 2 || state.timers.iter().any(|timer| timer.next > latest) {
            return Err("a timer that is due in more than one round of the counter".to_owned());
        }
        // The start may lie before this process's clock began.
        Ok(Self { start_ns: now_ns.wrapping_sub(elapsed_ns), ..state })
    }

    fn running(&self) -> bool {
        self.config & config::ENABLE != 0
    }

    pub(super) fn legacy(&self) -> bool {
        self.config & config::LEGACY != 0
    }

    /// Ticks since the counter was started.
    fn ticks(&self, now_ns: u64) -> u64 {
        ns_to_ticks(now_ns.wrapping_sub(self.start_ns), FREQUENCY_HZ)
    }

    fn counter(&self, now_ns: u64) -> u32 {
        if self.running() { self.base.wrapping_add(self.ticks(now_ns) as u32) } else { self.base }
    }

    /// Reads the 64-bit register at `offset`.
    pub(super) fn read(&self, offset: u64, now_ns: u64) -> u64 {
        match offset {
            offset::CAPABILITIES => CAPABILITIES,
            offset::CONFIG => self.config,
            offset::STATUS => self.status.into(),
            offset::COUNTER => self.counter(now_ns).into(),
            _ => {
                let Some((n, register)) = timer_register(offset) else { return 0 };
                let timer = &self.timers[n];
                match register {
                    offset::TIMER_CONFIG => {
                        u64::from(self.routes) << 32 | u64::from(timer.config | timer::CAPABILITIES)
                    }
                    offset::COMPARATOR => timer.comparator.into(),
                    offset::FSB_ROUTE => u64::from(timer.fsb_address) << 32 | u64::from(timer.fsb_data),
                    _ => 0,
                }
            }
        }
    }

    /// Writes those bits of the 64-bit register at `offset` that `mask` selects. The timers are up to date.
    pub(super) fn write(&mut self, offset: u64, mask: u64, value: u64, now_ns: u64) {
        let merged = |old: u64| old & !mask | value & mask;
        match offset {
            offset::CONFIG => self.write_config(merged(self.config) & config::ALL, now_ns),
            offset::STATUS => self.status &= !((value & mask) as u32),
            // Meant for a standing counter (2.3.7); a running one goes on from there.
            offset::COUNTER => {
                self.base = merged(self.counter(now_ns).into()) as u32;
                self.start(now_ns);
            }
            _ => {
                let Some((n, register)) = timer_register(offset) else { return };
                match register {
                    offset::TIMER_CONFIG => self.write_timer_config(n, merged(self.timers[n].config.into()) as u32),
                    offset::COMPARATOR if mask as u32 != 0 => {
                        let comparator = merged(self.timers[n].comparator.into()) as u32;
                        self.write_comparator(n, comparator, now_ns);
                    }
                    offset::FSB_ROUTE => {
                        let timer = &mut self.timers[n];
                        let route = merged(u64::from(timer.fsb_address) << 32 | u64::from(timer.fsb_data));
                        (timer.fsb_address, timer.fsb_data) = ((route >> 32) as u32, route as u32);
                    }
                    _ => {}
                }
            }
        }
    }

    /// Brings the timers up to `now_ns`; returns which ones matched, a bit each. Level-triggered ones are marked in
    /// the status.
    pub(super) fn look(&mut self, now_ns: u64) -> u32 {
        if !self.running() {
            return 0;
        }
        let ticks = self.ticks(now_ns);
        let mut matched = 0;
        for (n, timer) in self.timers.iter_mut().enumerate() {
            if timer.pass(ticks) {
                matched |= 1 << n;
                if timer.is(timer::LEVEL) {
                    self.status |= 1 << n;
                }
            }
        }
        matched
    }

    /// When timer `n` must be looked at; `None` while it cannot do anything that anybody would see.
    pub(super) fn deadline(&self, n: usize) -> Option<u64> {
        let timer = self.timers.get(n)?;
        let waits = timer.is(timer::LEVEL) && self.status & 1 << n != 0;
        let due = self.running() && timer.is(timer::INTERRUPT) && !waits;
        due.then(|| self.start_ns.wrapping_add(ticks_to_ns(timer.next, FREQUENCY_HZ)))
    }

    /// Where timer `n`'s interrupt goes at a match, if it is edge-triggered or a message.
    pub(super) fn edge(&self, n: usize) -> Option<Route> {
        let timer = self.timers.get(n)?;
        let route = self.route(n);
        let edge = !timer.is(timer::LEVEL) || matches!(route, Route::Message { .. });
        (timer.is(timer::INTERRUPT) && edge).then_some(route)
    }

    /// Where timer `n` holds a line.
    pub(super) fn level(&self, n: usize) -> Option<Route> {
        let timer = self.timers.get(n)?;
        (timer.is(timer::INTERRUPT) && timer.is(timer::LEVEL) && self.status & 1 << n != 0).then(|| self.route(n))
    }

    /// Legacy replacement comes before any other routing of the first two timers (2.3.5).
    fn route(&self, n: usize) -> Route {
        let Some(timer) = self.timers.get(n) else { return Route::Nowhere };
        let gsi = (timer.config & timer::ROUTE) >> timer::ROUTE_SHIFT;
        if self.legacy() && n < 2 {
            Route::Legacy(n)
        } else if timer.is(timer::FSB) {
            Route::Message { address: timer.fsb_address, data: timer.fsb_data }
        } else if self.routes & 1 << gsi != 0 {
            Route::Gsi(gsi)
        } else {
            Route::Nowhere
        }
    }

    fn write_config(&mut self, value: u64, now_ns: u64) {
        let counter = self.counter(now_ns);
        let was_running = self.running();
        self.config = value;
        if self.running() != was_running {
            self.base = counter;
            self.start(now_ns);
        }
    }

    /// The counter goes on from `base`, now.
    fn start(&mut self, now_ns: u64) {
        self.start_ns = now_ns;
        for n in 0..TIMERS {
            self.schedule(n, 0);
            // A timer that stands where it matches has done so before.
            if self.timers[n].next == 0 {
                self.timers[n].pass(0);
            }
        }
    }

    /// The next time the counter reaches the comparator, at `ticks` or later.
    fn schedule(&mut self, n: usize, ticks: u64) {
        let counter = self.base.wrapping_add(ticks as u32);
        let timer = &mut self.timers[n];
        timer.next = ticks.saturating_add(timer.comparator.wrapping_sub(counter).into());
    }

    fn write_timer_config(&mut self, n: usize, value: u32) {
        let routes = self.routes;
        let timer = &mut self.timers[n];
        let was_level = timer.is(timer::LEVEL);
        timer.config = value & timer::WRITABLE;
        // A route that does not exist does not stick (2.3.8): that is how software finds out.
        let gsi = (value & timer::ROUTE) >> timer::ROUTE_SHIFT;
        if routes & 1 << gsi == 0 {
            timer.config &= !timer::ROUTE;
        }
        if was_level && !timer.is(timer::LEVEL) {
            self.status &= !(1 << n);
        }
    }

    /// In periodic mode a write is the period, and with SET_VALUE the comparator as well (2.3.9.2.2).
    fn write_comparator(&mut self, n: usize, value: u32, now_ns: u64) {
        let ticks = self.ticks(now_ns);
        let running = self.running();
        let timer = &mut self.timers[n];
        if timer.is(timer::PERIODIC) {
            timer.period = value;
        }
        if !timer.is(timer::PERIODIC) || timer.is(timer::SET_VALUE) {
            timer.comparator = value;
            if running {
                self.schedule(n, ticks);
            }
        }
        self.timers[n].config &= !timer::SET_VALUE;
    }
}

/// Number of the timer and offset in it.
fn timer_register(offset: u64) -> Option<(usize, u64)> {
    let offset = offset.checked_sub(offset::TIMERS)?;
    let n = (offset / offset::TIMER_BYTES) as usize;
    (n < TIMERS).then_some((n, offset % offset::TIMER_BYTES))
}
