//! The text that comes out of a guest, and what is typed into it.

use std::io::{Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often a wait looks whether it is still worth it.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn follow(&self, mut from: impl Read) {
        let mut buffer = [0; 4096];
        loop {
            // A terminal whose other side is closed gives an error.
            let count = from.read(&mut buffer).unwrap_or(0);
            let mut state = self.lock();
            state.bytes.extend_from_slice(&buffer[..count]);
            state.ended = count == 0;
            self.changed.notify_all();
            if state.ended {
                return;
            }
        }
    }
}

/// Both directions of a guest's serial line. Everything that comes out is kept.
pub struct Console {
    shared: Arc<Shared>,
    input: Box<dyn Write + Send>,
    /// Where the next search begins.
    position: usize,
}

/// Why a text did not come.
#[derive(Debug, PartialEq, Eq)]
pub enum Silence {
    /// There will be no more output.
    Ended,
    /// It took too long.
    TimedOut,
}

impl Console {
    /// A console whose output is read from `output` until it ends, by a thread of its own.
    ///
    /// # Panics
    /// The host gives no thread.
    pub fn new(output: impl Read + Send + 'static, input: impl Write + Send + 'static) -> Self {
        let shared = Arc::<Shared>::default();
        let following = shared.clone();
        let thread = std::thread::Builder::new().name("console".into());
        thread.spawn(move || following.follow(output)).expect("cannot start a thread");
        Self { shared, input: Box::new(input), position: 0 }
    }

    /// Types `text`.
    ///
    /// # Errors
    /// Nobody listens any more.
    pub fn send(&mut self, text: &str) -> std::io::Result<()> {
        self.input.write_all(text.as_bytes())?;
        self.input.flush()
    }

    /// Waits for `text` after what was found before, and returns all that came up to its end, without carriage returns.
    ///
    /// # Errors
    /// It does not come: the output has ended, or there is no `hope`, or `patience` is over.
    pub fn wait_for(
        &mut self,
        text: &str,
        patience: Duration,
        mut hope: impl FnMut() -> bool,
    ) -> Result<String, Silence> {
        let deadline = Instant::now() + patience;
        let mut state = self.shared.lock();
        let (mut searched, mut hopeless) = (self.position, false);
        loop {
            if let Some(found) = find(&state.bytes[searched..], text.as_bytes()) {
                let end = searched + found + text.len();
                let passed = plain(&state.bytes[self.position..end]);
                self.position = end;
                return Ok(passed);
            }
            searched = state.bytes.len().saturating_sub(text.len()).max(self.position);
            // Without hope, what was still under way gets one more moment.
            if state.ended || hopeless {
                return Err(Silence::Ended);
            }
            if Instant::now() >= deadline {
                return Err(Silence::TimedOut);
            }
            let (next, timeout) = self.shared.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner);
            state = next;
            if timeout.timed_out() {
                drop(state);
                hopeless = !hope();
                state = self.shared.lock();
            }
        }
    }

    /// Waits until there will be no more output; returns whether that is so.
    pub fn wait_for_end(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut state = self.shared.lock();
        while !state.ended && Instant::now() < deadline {
            (state, _) = self.shared.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner);
        }
        state.ended
    }

    /// Everything that has come out so far, without carriage returns.
    pub fn transcript(&self) -> String {
        plain(&self.shared.lock().bytes)
    }
}

fn plain(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace('\r', "")
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Cursor, sink};

    #[test]
    fn searches_go_on_where_the_last_one_ended() {
        let mut console = Console::new(Cursor::new("one two\r\none three"), sink());
        let mut wait = |text| console.wait_for(text, Duration::from_secs(10), || true);
        assert_eq!(wait("one").as_deref(), Ok("one"));
        assert_eq!(wait("one").as_deref(), Ok(" two\none"));
        assert_eq!(wait("one"), Err(Silence::Ended));
        assert_eq!(wait("three").as_deref(), Ok(" three"));
        assert_eq!(console.transcript(), "one two\none three");
    }

    #[test]
    fn hope_and_patience_end() {
        let (output, _kept_open) = std::io::pipe().unwrap();
        let mut console = Console::new(output, sink());
        assert_eq!(console.wait_for("x", Duration::ZERO, || true), Err(Silence::TimedOut));
        assert_eq!(console.wait_for("x", Duration::from_secs(600), || false), Err(Silence::Ended));
    }
}
