//! What every PCI device must do, whatever it is: a suite to be stamped on each.
//!
//! * Reset restores the power-on state, from any state.
//! * A saved state, restored into a fresh device, is the same state; damaged states are refused, not obeyed.
//! * Garbage in configuration space, BARs and memory does no harm: no panic, no access outside guest memory (which the
//!   host traps), and after a reset the device works.

use std::any::Any;
use std::sync::Arc;

use memory::GuestMemory;
use platform::{AccessSize, Bus, Persist};

use crate::pci::GuestFunction;
use crate::random::Random;

const SIZES: [AccessSize; 4] = [AccessSize::Byte, AccessSize::Word, AccessSize::Dword, AccessSize::Qword];

/// A device on a board of its own, freshly powered on.
pub struct Subject {
    /// The port bus.
    pub ports: Arc<Bus>,
    /// The memory bus.
    pub memory: Arc<Bus>,
    /// The guest's RAM.
    pub ram: GuestMemory,
    /// Where the device is: bus, slot, function.
    pub address: (u8, u8, u8),
    /// Its state.
    pub state: Arc<dyn Persist>,
    /// Whatever must live as long as the device.
    pub board: Box<dyn Any>,
}

impl Subject {
    /// Keeps `more` as long as the device lives.
    #[must_use]
    pub fn keeping(self, more: impl Any) -> Self {
        Self { board: Box::new((self.board, more)), ..self }
    }
}

impl Subject {
    /// The function as a driver sees it.
    pub fn function(&self) -> GuestFunction {
        GuestFunction::new(self.ports.clone(), self.memory.clone(), self.address)
    }

    fn save(&self) -> Vec<u8> {
        self.state.save().expect("a device can always be saved")
    }
}

/// Runs the whole suite. `make` gives a fresh device each time; `work` brings it into use, as a driver would, and
/// checks that it works; it must work from the power-on state.
///
/// # Panics
/// The device breaks a rule.
pub fn check(make: impl Fn() -> Subject, work: impl Fn(&Subject)) {
    reset_restores_power_on(&make, &work);
    state_makes_the_round_trip(&make, &work);
    damaged_states_are_refused(&make, &work);
    for seed in 0..8 {
        garbage_does_no_harm(&make, &work, seed);
    }
}

fn reset_restores_power_on(make: &impl Fn() -> Subject, work: &impl Fn(&Subject)) {
    let subject = make();
    let (state, config) = (subject.save(), subject.function().config_bytes());
    for round in 0..3 {
        if round > 0 {
            scribble(&subject, &mut Random::new(round), 200);
            subject.state.reset();
        }
        work(&subject);
        assert_ne!(subject.save(), state, "the work left no trace, so this test would show nothing");
        subject.state.reset();
        assert_eq!(subject.function().config_bytes(), config, "configuration space after reset {round}");
        assert_eq!(subject.save(), state, "state after reset {round}");
    }
}

fn state_makes_the_round_trip(make: &impl Fn() -> Subject, work: &impl Fn(&Subject)) {
    let first = make();
    work(&first);
    let saved = first.save();
    assert_eq!(first.save(), saved, "saving changes nothing");
    let second = make();
    second.state.restore(first.state.version(), &saved).expect("a saved state can be restored");
    assert_eq!(second.save(), saved);
    assert_eq!(second.function().config_bytes(), first.function().config_bytes());
    assert!(second.state.restore(first.state.version() + 1, &saved).is_err(), "a version of the future");
    second.state.reset();
    work(&second);
}

fn damaged_states_are_refused(make: &impl Fn() -> Subject, work: &impl Fn(&Subject)) {
    let subject = make();
    work(&subject);
    let saved = subject.save();
    let version = subject.state.version();
    for len in 0..saved.len() {
        assert!(subject.state.restore(version, &saved[..len]).is_err(), "cut to {len} bytes");
    }
    assert!(subject.state.restore(version, &[&saved[..], &[0]].concat()).is_err(), "a byte too many");
    let mut random = Random::new(1);
    for _ in 0..500 {
        let mut damaged = saved.clone();
        for _ in 0..=random.below(4) {
            let at = random.below(damaged.len() as u64) as usize;
            damaged[at] = random.bits() as u8;
        }
        // Either is right, as long as it does not panic and what follows works.
        let _ = subject.state.restore(version, &damaged);
        scribble(&subject, &mut random, 5);
    }
    subject.state.reset();
    work(&subject);
}

fn garbage_does_no_harm(make: &impl Fn() -> Subject, work: &impl Fn(&Subject), seed: u64) {
    let subject = make();
    let mut random = Random::new(seed);
    for _ in 0..20 {
        if random.one_in(2) {
            work(&subject);
        }
        scribble(&subject, &mut random, 200);
        if random.one_in(4) {
            subject.save();
        }
        subject.state.reset();
    }
    work(&subject);
}

/// Random accesses to configuration space and the BARs, and random bytes in RAM that the device may take for its own.
pub fn scribble(subject: &Subject, random: &mut Random, count: usize) {
    let function = subject.function();
    let bars: Vec<_> = (0..6).map(|index| function.bar(index)).filter(|bar| bar.start != 0).collect();
    for _ in 0..count {
        let size = random.pick(&SIZES);
        match random.below(8) {
            0 => {
                function.config(random.below(256) as u16, size);
            }
            1 => function.set_config(random.below(256) as u16, size, random.nasty() as u32),
            2 => {
                let at = random.below(subject.ram.size() - 8);
                subject.ram.write_u64(at, random.nasty()).expect("inside RAM");
            }
            kind => {
                let Some(bar) = (!bars.is_empty()).then(|| random.pick(&bars)) else { continue };
                let offset = if random.one_in(2) { random.below(64) } else { random.below(0x5000) };
                let value = if random.one_in(4) { random.below(subject.ram.size()) } else { random.nasty() };
                if kind < 4 {
                    function.read(bar, offset, size);
                } else {
                    function.write(bar, offset, size, value);
                }
            }
        }
    }
}
