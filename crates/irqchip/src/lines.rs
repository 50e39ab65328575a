//! Interrupt lines that several devices drive: asserted as long as any of them asserts it (wired-OR).

use std::sync::{Arc, Mutex, PoisonError};

use platform::{IrqLine, IrqSink};

/// A line with any number of sources. Lines of its [`IrqSink`] are the sources' numbers.
pub struct SharedLine {
    outputs: Vec<IrqLine>,
    sources: Mutex<Sources>,
}

#[derive(Default)]
struct Sources {
    asserted: Vec<bool>,
    /// Number of `true`s in `asserted`.
    count: usize,
}

impl SharedLine {
    /// A line without sources yet, which drives all `outputs` alike.
    pub fn new(outputs: Vec<IrqLine>) -> Arc<Self> {
        Arc::new(Self { outputs, sources: Mutex::default() })
    }

    /// A new source, not asserting.
    pub fn source(self: &Arc<Self>) -> IrqLine {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let number = sources.asserted.len();
        sources.asserted.push(false);
        // There is one source per device: far fewer than 2^32.
        IrqLine::new(self.clone(), number as u32)
    }

    /// Whether any source asserts the line.
    pub fn is_asserted(&self) -> bool {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).count != 0
    }

    pub(crate) fn levels(&self) -> Vec<bool> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).asserted.clone()
    }

    /// Restores the sources' levels without driving the outputs, whose chips restore theirs.
    pub(crate) fn restore(&self, levels: Vec<bool>) {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        sources.count = levels.iter().filter(|&&asserted| asserted).count();
        sources.asserted = levels;
    }
}

impl IrqSink for SharedLine {
    fn set_level(&self, line: u32, asserted: bool) {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(source) = sources.asserted.get_mut(line as usize) else { return };
        if std::mem::replace(source, asserted) == asserted {
            return;
        }
        let before = sources.count;
        sources.count = if asserted { before + 1 } else { before - 1 };
        if (before == 0) != (sources.count == 0) {
            // Under the lock, so that the outputs see changes in the order they happen.
            for output in &self.outputs {
                output.set(asserted);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u32, bool)>>);
    impl IrqSink for Recorder {
        fn set_level(&self, line: u32, asserted: bool) {
            self.0.lock().unwrap().push((line, asserted));
        }
    }

    #[test]
    fn stays_up_until_the_last_source_lets_go() {
        let recorder = Arc::new(Recorder::default());
        let line = SharedLine::new(vec![IrqLine::new(recorder.clone(), 5), IrqLine::new(recorder.clone(), 21)]);
        let (a, b) = (line.source(), line.source());
        a.set(true);
        a.set(true);
        b.set(true);
        a.set(false);
        assert!(line.is_asserted());
        assert_eq!(*recorder.0.lock().unwrap(), [(5, true), (21, true)]);
        a.set(false);
        b.set(false);
        assert_eq!(recorder.0.lock().unwrap()[2..], [(5, false), (21, false)]);
        line.set_level(9, true);
        assert!(!line.is_asserted(), "there is no such source");
    }

    #[test]
    fn levels_are_restored_silently() {
        let recorder = Arc::new(Recorder::default());
        let line = SharedLine::new(vec![IrqLine::new(recorder.clone(), 0)]);
        let (a, b) = (line.source(), line.source());
        line.restore(vec![true, false]);
        b.set(true);
        b.set(false);
        assert!(recorder.0.lock().unwrap().is_empty());
        a.set(false);
        assert_eq!(*recorder.0.lock().unwrap(), [(0, false)]);
    }
}
