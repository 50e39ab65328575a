//! The balloon's socket on the host: lines in, a line out for each.
//!
//! | line | answer |
//! |---|---|
//! | `size SIZE` | `OK`; the guest begins to give pages up, or takes them back |
//! | `stats` | `wanted=BYTES actual=BYTES` and what the guest says of its memory, asked for now |
//!
//! Anything else is answered by `ERROR` and why.

use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use backend::tty::{SerialBackend, SerialDevice, Tty};

use super::{Balloon, PAGE, STATS, feature};
use crate::virtio::VirtioDevice;

/// Longest line that is read.
const MAX_LINE: usize = 128;
/// Clients may ask so much without reading the answers.
const MAX_OUTPUT: usize = 1 << 16;

/// Names of the statistics by their tags (virtio 1.2, 5.5.6.4).
const NAMES: [&str; 10] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free",
    "total",
    "available",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
];
/// Bytes of one statistic: tag and value, without a gap.
const STATISTIC: usize = 10;

/// What a client has said and is to hear.
#[derive(Default)]
struct Talk {
    line: Vec<u8>,
    /// Lines that wait for statistics of the guest.
    asked: usize,
    output: VecDeque<u8>,
}

/// The socket.
pub(super) struct Control {
    tty: Tty,
    talk: Mutex<Talk>,
}

impl Control {
    pub(super) fn new(tty: Tty) -> Self {
        Self { tty, talk: Mutex::default() }
    }

    /// Clients are heard from now on.
    pub(super) fn attach(balloon: &Arc<Balloon>) {
        if let Some(control) = &balloon.control {
            let device: Arc<dyn SerialDevice> = balloon.clone();
            control.tty.attach(Arc::downgrade(&device));
        }
    }

    fn talk(&self) -> MutexGuard<'_, Talk> {
        self.talk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, line: &str) {
        let mut talk = self.talk();
        if talk.output.len() < MAX_OUTPUT {
            talk.output.extend(line.bytes().chain([b'\n']));
        }
        drop(talk);
        self.flush();
    }

    fn flush(&self) {
        let mut talk = self.talk();
        let taken = self.tty.send(talk.output.make_contiguous());
        let taken = taken.min(talk.output.len());
        talk.output.drain(..taken);
    }
}

impl Balloon {
    /// Carries out a client's line.
    fn command(&self, control: &Control, line: &str) {
        let mut words = line.split_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some("size"), Some(size), None) => match self.set_size(size) {
                Ok(()) => control.say("OK"),
                Err(why) => control.say(&format!("ERROR {why}")),
            },
            (Some("stats"), None, None) => self.ask(control),
            _ => control.say("ERROR say \"size SIZE\" or \"stats\""),
        }
    }

    fn set_size(&self, text: &str) -> Result<(), String> {
        let size = config::value::parse_size(text).map_err(|why| format!("size \"{text}\": {why}"))?;
        let ram = self.context.memory().size();
        if size >= ram {
            return Err(format!("size {size}: a balloon of that size leaves nothing of {ram} bytes of memory"));
        }
        self.set_wanted(u32::try_from(size / PAGE).unwrap_or(u32::MAX));
        Ok(())
    }

    /// Asks the guest for fresh statistics: a driver that gets its buffer back fills it anew.
    fn ask(&self, control: &Control) {
        let ready = self.context.is_driver_ok() && self.context.has(feature::STATS);
        let Some(queue) = self.context.queue(STATS).filter(|_| ready) else { return control.say(&self.sizes()) };
        control.talk().asked += 1;
        let chain = self.context.pop(queue);
        // Without a buffer there the statistics are on their way, for somebody who has asked before.
        if queue.enable_notifications() {
            self.notify(STATS);
        }
        chain.into_iter().for_each(|chain| self.context.complete(chain, 0));
    }

    fn sizes(&self) -> String {
        let (wanted, actual) = self.pages();
        format!("wanted={} actual={}", u64::from(wanted) * PAGE, u64::from(actual) * PAGE)
    }

    /// The driver has put statistics on its queue: they go to whoever has asked. They stay there for the next.
    pub(super) fn take_statistics(&self) {
        let (Some(control), Some(queue)) = (&self.control, self.context.queue(STATS)) else { return };
        let Some(chain) = self.context.pop(queue) else { return };
        let mut bytes = [0; STATISTIC * NAMES.len() * 2];
        // The chain's buffers were checked to be in RAM.
        let count = chain.readable.read(self.context.memory(), &mut bytes).unwrap_or(0);
        queue.put_back([chain]);
        let asked = std::mem::take(&mut control.talk().asked);
        let mut line = self.sizes();
        for statistic in bytes[..count].as_chunks::<STATISTIC>().0 {
            let [low, high, value @ ..] = *statistic;
            if let Some(name) = NAMES.get(usize::from(u16::from_le_bytes([low, high]))) {
                // Writing to a string cannot fail.
                let _ = write!(line, " {name}={}", u64::from_le_bytes(value));
            }
        }
        (0..asked).for_each(|_| control.say(&line));
    }

    /// The driver is gone: it will not answer.
    pub(super) fn forget_questions(&self) {
        if let Some(control) = &self.control {
            let asked = std::mem::take(&mut control.talk().asked);
            (0..asked).for_each(|_| control.say(&self.sizes()));
        }
    }
}

impl SerialDevice for Balloon {
    fn receive(&self, bytes: &[u8]) -> usize {
        let Some(control) = &self.control else { return bytes.len() };
        for byte in bytes {
            let mut talk = control.talk();
            if *byte != b'\n' {
                // One byte more than the limit marks a line that is too long.
                if talk.line.len() <= MAX_LINE {
                    talk.line.push(*byte);
                }
                continue;
            }
            let line = std::mem::take(&mut talk.line);
            drop(talk);
            if line.len() > MAX_LINE {
                control.say("ERROR the line is too long");
            } else {
                self.command(control, &String::from_utf8_lossy(&line));
            }
        }
        bytes.len()
    }

    fn output_ready(&self) {
        if let Some(control) = &self.control {
            control.flush();
        }
    }

    fn client(&self, here: bool) {
        if let Some(control) = self.control.as_ref().filter(|_| here) {
            // What the one before has not finished or not heard is not this one's.
            *control.talk() = Talk::default();
        }
    }
}
