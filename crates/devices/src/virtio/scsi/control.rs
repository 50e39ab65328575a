//! The control queue: task management and notification of events (virtio 1.2, 5.6.6.2).

use super::device::Scsi;
use super::layout::{Address, TmfResponse};
use super::target::Unit;
use crate::scsi::Sense;
use crate::virtio::Chain;

const TYPE_TMF: u32 = 0;
const TYPE_AN_QUERY: u32 = 1;
const TYPE_AN_SUBSCRIBE: u32 = 2;

/// Bytes of the longest request: type, subtype, address, tag.
const REQUEST_LEN: usize = 24;

/// Task management functions.
mod tmf {
    pub(super) const ABORT_TASK: u32 = 0;
    pub(super) const ABORT_TASK_SET: u32 = 1;
    pub(super) const CLEAR_ACA: u32 = 2;
    pub(super) const CLEAR_TASK_SET: u32 = 3;
    pub(super) const NEXUS_RESET: u32 = 4;
    pub(super) const UNIT_RESET: u32 = 5;
    pub(super) const QUERY_TASK: u32 = 6;
    pub(super) const QUERY_TASK_SET: u32 = 7;
}

impl Scsi {
    /// Answers a request of the control queue. May wait for the host: on a thread of its own.
    pub(super) fn control(&self, mut chain: Chain) {
        let memory = self.context.memory();
        let (readable, writable) = (std::mem::take(&mut chain.readable), std::mem::take(&mut chain.writable));
        let mut bytes = [0; REQUEST_LEN];
        let read = readable.read(memory, &mut bytes).unwrap_or(0);
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let address = |at: usize| {
            let mut address = [0; 8];
            address.copy_from_slice(&bytes[at..at + 8]);
            Address::parse(address)
        };
        let answer = match word(0) {
            TYPE_TMF if read >= REQUEST_LEN => {
                let tag = u64::from(word(16)) | u64::from(word(20)) << 32;
                vec![self.manage(word(4), address(8), tag) as u8]
            }
            // No event of the asynchronous kind is supported: none is on.
            TYPE_AN_QUERY | TYPE_AN_SUBSCRIBE if read >= 16 => vec![0, 0, 0, 0, 0],
            _ => vec![TmfResponse::Rejected as u8],
        };
        let written = writable.write(memory, &answer).unwrap_or(0);
        self.context.complete(chain, written as u32);
    }

    fn manage(&self, function: u32, address: Address, tag: u64) -> TmfResponse {
        if function == tmf::NEXUS_RESET {
            if address == Address::Nobody {
                return TmfResponse::BadTarget;
            }
            self.target.units.iter().for_each(reset_unit);
            return TmfResponse::Complete;
        }
        let Some(unit) = self.target.unit(address) else {
            return if address == Address::Nobody { TmfResponse::BadTarget } else { TmfResponse::IncorrectLun };
        };
        let asked = |there: bool| if there { TmfResponse::Succeeded } else { TmfResponse::Complete };
        match function {
            // The host cannot be stopped half-way, so a task is aborted by its end.
            tmf::ABORT_TASK => unit.wait_for_task(tag),
            tmf::ABORT_TASK_SET | tmf::CLEAR_TASK_SET => unit.abort_all(),
            tmf::UNIT_RESET => reset_unit(unit),
            tmf::QUERY_TASK => return asked(unit.has_task(tag)),
            tmf::QUERY_TASK_SET => return asked(unit.has_tasks()),
            tmf::CLEAR_ACA => {}
            _ => return TmfResponse::Rejected,
        }
        TmfResponse::Complete
    }
}

fn reset_unit(unit: &Unit) {
    unit.abort_all();
    unit.set_attention(Some(Sense::RESET));
}
