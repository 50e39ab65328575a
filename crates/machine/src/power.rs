//! The event that ends the VM.

use std::sync::{Condvar, Mutex, PoisonError};

use platform::{PowerEvent, PowerSink};

/// Keeps the first power event, and lets one thread wait for it.
#[derive(Default)]
pub(crate) struct PowerLatch {
    event: Mutex<Option<PowerEvent>>,
    happened: Condvar,
}

impl PowerLatch {
    /// Waits for an event.
    pub(crate) fn wait(&self) -> PowerEvent {
        let mut event = self.event.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match *event {
                Some(event) => return event,
                None => event = self.happened.wait(event).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// The event, if there was one.
    pub(crate) fn get(&self) -> Option<PowerEvent> {
        *self.event.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PowerSink for PowerLatch {
    fn request(&self, event: PowerEvent) {
        self.event.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(event);
        self.happened.notify_all();
    }
}

/// bhyve's exit code for an event; `None` where the process aborts.
pub(crate) fn exit_code(event: PowerEvent) -> Option<u8> {
    Some(match event {
        PowerEvent::Reset => config::exit::OK,
        PowerEvent::PowerOff => config::exit::POWEROFF,
        PowerEvent::Halt => config::exit::HALT,
        PowerEvent::TripleFault => config::exit::TRIPLE_FAULT,
        PowerEvent::Exit(code) => code,
        PowerEvent::Abort => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_event_wins() {
        let latch = PowerLatch::default();
        latch.request(PowerEvent::PowerOff);
        latch.request(PowerEvent::Reset);
        assert_eq!(latch.wait(), PowerEvent::PowerOff);
        assert_eq!(latch.get(), Some(PowerEvent::PowerOff));
    }

    #[test]
    fn exit_codes_are_those_that_front_ends_know() {
        let codes = [PowerEvent::Reset, PowerEvent::PowerOff, PowerEvent::Halt, PowerEvent::TripleFault].map(exit_code);
        assert_eq!(codes, [Some(0), Some(1), Some(2), Some(3)]);
        assert_eq!(exit_code(PowerEvent::Exit(7)), Some(7));
        assert_eq!(exit_code(PowerEvent::Abort), None);
    }
}
