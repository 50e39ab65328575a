//! Interrupt lines with more than one source.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use platform::{IrqLine, IrqSink, Persist, StateError, state};

/// Several sources on one line, which is asserted while any of them is.
pub struct OrLine {
    out: IrqLine,
    /// Bit n: source n asserts.
    sources: Mutex<u32>,
}

impl OrLine {
    /// Number of sources a line can have.
    pub const SOURCES: u32 = 32;

    /// A line without sources that asserts.
    pub fn new(out: IrqLine) -> Arc<Self> {
        Arc::new(Self { out, sources: Mutex::new(0) })
    }

    /// The line of source `n`, below [`Self::SOURCES`]; others go nowhere.
    pub fn source(self: &Arc<Self>, n: u32) -> IrqLine {
        IrqLine::new(self.clone(), n)
    }

    fn lock(&self) -> MutexGuard<'_, u32> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IrqSink for OrLine {
    fn set_level(&self, line: u32, asserted: bool) {
        let Some(bit) = 1u32.checked_shl(line) else { return };
        let mut sources = self.lock();
        let before = *sources;
        *sources = if asserted { before | bit } else { before & !bit };
        if (*sources != 0) != (before != 0) {
            // Under the lock, so that levels arrive in the order in which they were set.
            self.out.set(asserted);
        }
    }
}

const OR_KIND: &str = "or-line";

impl Persist for OrLine {
    fn kind(&self) -> &'static str {
        OR_KIND
    }
    fn version(&self) -> u32 {
        1
    }
    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::encode(OR_KIND, &*self.lock())
    }
    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        *self.lock() = state::decode(OR_KIND, 1, version, bytes)?;
        Ok(())
    }
    fn reset(&self) {
        let mut sources = self.lock();
        if std::mem::take(&mut *sources) != 0 {
            self.out.set(false);
        }
    }
}

/// A line that follows one of two sources: the one selected.
pub struct LineSwitch {
    out: IrqLine,
    state: Mutex<SwitchState>,
}

#[derive(Clone, Copy, Default, serde::Serialize, serde::Deserialize)]
struct SwitchState {
    levels: [bool; 2],
    second: bool,
}

impl SwitchState {
    fn level(&self) -> bool {
        self.levels[usize::from(self.second)]
    }
}

impl LineSwitch {
    /// A line that follows its first source.
    pub fn new(out: IrqLine) -> Arc<Self> {
        Arc::new(Self { out, state: Mutex::new(SwitchState::default()) })
    }

    /// The line of the first source.
    pub fn first(self: &Arc<Self>) -> IrqLine {
        IrqLine::new(self.clone(), 0)
    }

    /// The line of the second source.
    pub fn second(self: &Arc<Self>) -> IrqLine {
        IrqLine::new(self.clone(), 1)
    }

    /// Follows the second source, or the first again.
    pub fn select_second(&self, second: bool) {
        self.change(|state| state.second = second);
    }

    fn change(&self, change: impl FnOnce(&mut SwitchState)) {
        let mut state = self.lock();
        let before = state.level();
        change(&mut state);
        if state.level() != before {
            self.out.set(!before);
        }
    }

    fn lock(&self) -> MutexGuard<'_, SwitchState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IrqSink for LineSwitch {
    fn set_level(&self, line: u32, asserted: bool) {
        self.change(|state| {
            if let Some(level) = state.levels.get_mut(line as usize) {
                *level = asserted;
            }
        });
    }
}

const SWITCH_KIND: &str = "line-switch";

impl Persist for LineSwitch {
    fn kind(&self) -> &'static str {
        SWITCH_KIND
    }
    fn version(&self) -> u32 {
        1
    }
    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::encode(SWITCH_KIND, &*self.lock())
    }
    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        *self.lock() = state::decode(SWITCH_KIND, 1, version, bytes)?;
        Ok(())
    }
    fn reset(&self) {
        self.change(|state| *state = SwitchState::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::fixture::Lines;

    #[test]
    fn or_line_is_asserted_while_any_source_is() {
        let lines = Lines::new();
        let or = OrLine::new(lines.line(4));
        let (a, b) = (or.source(0), or.source(31));
        a.set(true);
        b.set(true);
        a.set(false);
        assert_eq!(lines.take(), [(4, true)]);
        let saved = or.save().unwrap();
        b.set(false);
        assert_eq!(lines.take(), [(4, false)]);
        or.source(32).set(true);
        or.restore(1, &saved).unwrap();
        assert_eq!(lines.take(), []);
        or.reset();
        assert_eq!(lines.take(), [(4, false)]);
    }

    #[test]
    fn switch_follows_the_selected_source() {
        let lines = Lines::new();
        let switch = LineSwitch::new(lines.line(8));
        switch.first().set(true);
        switch.select_second(true);
        assert_eq!(lines.take(), [(8, true), (8, false)]);
        switch.second().pulse();
        switch.first().set(false);
        assert_eq!(lines.take(), [(8, true), (8, false)]);
        let saved = switch.save().unwrap();
        switch.reset();
        switch.second().set(true);
        assert_eq!(lines.take(), []);
        switch.restore(1, &saved).unwrap();
        switch.second().set(true);
        assert_eq!(lines.take(), [(8, true)]);
    }
}
