//! Inter-processor interrupts: the interrupt command register (SDM vol. 3, 11.6.1) and the self-IPI register.

use super::registers::{FIRST_VECTOR, esr, icr};
use super::{ApicMode, LocalApic};
use crate::message::{DeliveryMode, Destination, Message, TriggerMode};

/// Bits 19:18 of the command register.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shorthand {
    None,
    Itself,
    All,
    Others,
}

impl Shorthand {
    fn from_command(low: u32) -> Self {
        match low >> icr::SHORTHAND_SHIFT & 3 {
            0 => Self::None,
            1 => Self::Itself,
            2 => Self::All,
            _ => Self::Others,
        }
    }
}

impl LocalApic {
    /// Sends what was written to the command register. Combinations that the SDM calls invalid send nothing.
    pub(super) fn send_ipi(&self, low: u32, destination: u32, mode: ApicMode) {
        let Some(delivery) = DeliveryMode::from_bits(low >> 8) else { return };
        let vector = low as u8;
        match delivery {
            // The de-assert form of INIT sets arbitration IDs, which no processor since the P6 has.
            DeliveryMode::Init if low & icr::LEVEL != 0 && low & icr::ASSERT == 0 => return,
            DeliveryMode::ExtInt | DeliveryMode::Smi => return,
            DeliveryMode::Fixed | DeliveryMode::LowestPriority if vector < FIRST_VECTOR => {
                self.inbox.error(esr::SEND_ILLEGAL_VECTOR);
                return;
            }
            _ => {}
        }
        let broadcast = if mode == ApicMode::X2Apic { u32::MAX } else { 0xff };
        let message = Message {
            destination: Destination::decode(destination, low & icr::DESTINATION_LOGICAL != 0, broadcast),
            mode: delivery,
            vector,
            // IPIs are edge-triggered whatever the trigger bit says (SDM vol. 3, 11.6.1).
            trigger: TriggerMode::Edge,
        };
        let resets = matches!(delivery, DeliveryMode::Init | DeliveryMode::Startup);
        match Shorthand::from_command(low) {
            Shorthand::None => {
                self.wiring.bus.route(&message);
            }
            Shorthand::Itself if !resets => {
                self.inbox.accept(&message);
            }
            Shorthand::All if !resets => self.wiring.bus.send_all(&message),
            Shorthand::Others => self.wiring.bus.send_others(&message, self.id()),
            Shorthand::Itself | Shorthand::All => {}
        }
    }

    pub(super) fn send_self(&self, vector: u8) {
        if vector < FIRST_VECTOR {
            self.inbox.error(esr::SEND_ILLEGAL_VECTOR);
        } else if self.inbox.accepts_fixed() {
            self.inbox.post(vector, TriggerMode::Edge);
        }
    }
}
