//! Fakes and drivers for tests: clock, interrupt line, guest memory, the guest's side of virtqueues.

pub mod clock;
