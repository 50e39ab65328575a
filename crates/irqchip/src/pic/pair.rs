//! The two 8259As of a PC: the slave's output is the master's input 2.

use serde::{Deserialize, Serialize};

use super::chip::Chip;

/// The master's input that the slave's output is wired to.
pub(super) const CASCADE: u8 = 2;

/// Inputs that the edge/level control registers let be level-triggered: not 0 (timer), 1 (keyboard), 2 (cascade), 8
/// (clock), 13 (coprocessor).
const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];

/// Ports of the pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Port {
    Command(usize),
    Data(usize),
    EdgeLevel(usize),
}

/// Both chips: master, then slave. Plain data: it is also its own snapshot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Pair {
    chips: [Chip; 2],
}

const MASTER: usize = 0;
const SLAVE: usize = 1;

impl Pair {
    pub(super) fn new() -> Self {
        let mut pair = Self { chips: [Chip::default(), Chip::default()] };
        pair.reset();
        pair
    }

    pub(super) fn reset(&mut self) {
        for chip in &mut self.chips {
            chip.reset();
        }
        self.update();
    }

    /// Why a pair cannot be in this state.
    pub(super) fn check(&self) -> Result<(), String> {
        for (chip, writable) in self.chips.iter().zip(ELCR_WRITABLE) {
            chip.check()?;
            if chip.elcr & !writable != 0 {
                return Err("an input is level-triggered that cannot be".into());
            }
        }
        Ok(())
    }

    /// Brings the cascade up to date; returns the level of the pair's output.
    pub(super) fn update(&mut self) -> bool {
        let slave = self.chips[SLAVE].request(None).is_some();
        let master = &mut self.chips[MASTER];
        master.set_cascade(CASCADE, slave);
        master.request(Some(CASCADE)).is_some()
    }

    pub(super) fn set_line(&mut self, line: u8, asserted: bool) {
        match line {
            CASCADE => {}
            0..8 => self.chips[MASTER].set_line(line, asserted),
            8..16 => self.chips[SLAVE].set_line(line - 8, asserted),
            _ => {}
        }
    }

    /// The vector that [`Self::acknowledge`] would return.
    pub(super) fn peek(&self) -> u8 {
        let [master, slave] = &self.chips;
        match master.request(Some(CASCADE)) {
            Some(CASCADE) => slave.vector(slave.request(None).unwrap_or(7)),
            Some(input) => master.vector(input),
            None => master.vector(7),
        }
    }

    /// One acknowledge cycle. A chip that does not request any more answers with its input 7: a spurious interrupt,
    /// which is not in service.
    pub(super) fn acknowledge(&mut self) -> u8 {
        let vector = self.peek();
        let [master, slave] = &mut self.chips;
        if let Some(input) = master.request(Some(CASCADE)) {
            if input == CASCADE
                && let Some(input) = slave.request(None)
            {
                slave.serve(input);
            }
            master.serve(input);
        }
        vector
    }

    pub(super) fn read(&mut self, port: Port) -> u8 {
        match port {
            Port::EdgeLevel(chip) => self.chips[chip].elcr,
            Port::Command(chip) | Port::Data(chip) if self.chips[chip].take_poll() => self.poll(chip),
            Port::Command(chip) => self.chips[chip].read_command(),
            Port::Data(chip) => self.chips[chip].read_data(),
        }
    }

    /// A poll serves one chip's request as an acknowledge cycle would, and says which it was.
    fn poll(&mut self, chip: usize) -> u8 {
        let cascade = (chip == MASTER).then_some(CASCADE);
        match self.chips[chip].request(cascade) {
            Some(input) => {
                self.chips[chip].serve(input);
                0x80 | input
            }
            None => 0,
        }
    }

    pub(super) fn write(&mut self, port: Port, value: u8) {
        match port {
            Port::Command(chip) => self.chips[chip].write_command(value),
            Port::Data(chip) => self.chips[chip].write_data(value),
            Port::EdgeLevel(chip) => self.chips[chip].set_elcr(value & ELCR_WRITABLE[chip]),
        }
    }
}
