//! A command of the driver: parsed, given to its unit, answered.

use std::collections::VecDeque;
use std::sync::Arc;

use backend::block::{Disk, HostBuffers, IoError, Operation, Request};
use backend::scsi_generic::ScsiGeneric;

use super::device::Scsi;
use super::layout::{Address, HEADER_LEN, RESPONSE_LEN, Response};
use super::target::{Backing, Unit};
use crate::scsi::cdb::{Cdb, opcode};
use crate::scsi::unit::Command;
use crate::scsi::{Outcome, Sense, inquiry, status};
use crate::virtio::{Buffers, Chain};

/// What is needed to answer a command.
pub(super) struct Reply {
    chain: Chain,
    /// Room for the response, with sense data.
    response: Buffers,
    /// Bytes of data that the command offered to move.
    offered: u64,
    /// Whether they go to the driver.
    to_driver: bool,
    /// Its unit's number and its tag, while it is one of the unit's tasks.
    task: Option<(u16, u64)>,
}

impl Scsi {
    /// Does a command, or starts it.
    pub(super) fn command(self: &Arc<Self>, mut chain: Chain) {
        let (sense_size, cdb_size) = self.sizes();
        let memory = self.context.memory();
        let (header, out) = std::mem::take(&mut chain.readable).split((HEADER_LEN + cdb_size) as u64);
        let (response, input) = std::mem::take(&mut chain.writable).split((RESPONSE_LEN + sense_size) as u64);
        let mut bytes = vec![0; HEADER_LEN + cdb_size];
        // The chain's buffers were checked to be in RAM.
        let complete = header.read(memory, &mut bytes).is_ok_and(|read| read == bytes.len());
        let offered = out.len() + input.len();
        let reply = Reply { chain, response, offered, to_driver: !input.is_empty(), task: None };
        if !complete {
            return self.answer(reply, Response::Failure, status::GOOD, &[], 0);
        }
        let (header, cdb) = bytes.split_at(HEADER_LEN);
        let mut address = [0; 8];
        address.copy_from_slice(&header[..8]);
        let tag = header[8..16].iter().rev().fold(0, |tag, byte| tag << 8 | u64::from(*byte));
        let address = Address::parse(address);
        let command = Command { cdb: Cdb(cdb), out, input, memory };
        match self.target.unit(address) {
            Some(unit) => self.on_unit(unit, tag, command, reply),
            None if address == Address::Nobody => self.answer(reply, Response::BadTarget, status::GOOD, &[], 0),
            None => self.on_nothing(&command, reply),
        }
    }

    fn on_unit(self: &Arc<Self>, unit: &Unit, tag: u64, command: Command<'_>, mut reply: Reply) {
        let logical = match &unit.backing {
            Backing::Disk(logical) => logical,
            Backing::Host(device, executor) => {
                unit.begin_task(tag);
                reply.task = Some((unit.lun, tag));
                return self.pass_on(device.clone(), executor, command, reply);
            }
        };
        let input = command.input.clone();
        match logical.start(command, &self.target.luns) {
            Outcome::Data(data) => self.answer_data(reply, &input, &data),
            Outcome::Failed(sense) => self.check_condition(reply, sense),
            Outcome::Overrun => self.answer(reply, Response::Overrun, status::GOOD, &[], 0),
            Outcome::Disk { operations, moved, writes } => {
                unit.begin_task(tag);
                reply.task = Some((unit.lun, tag));
                let progress = Progress { scsi: self.clone(), operations: operations.into(), moved, writes };
                progress.go_on(reply);
            }
        }
    }

    /// Has a device of the host do a command.
    fn pass_on(self: &Arc<Self>, device: Arc<ScsiGeneric>, executor: &Disk, command: Command<'_>, reply: Reply) {
        let memory = command.memory;
        let buffers = |ranges: Buffers| HostBuffers::new(memory, ranges.into_ranges());
        let offered = reply.offered;
        // The chain's buffers were checked to be in RAM.
        let (Ok(out), Ok(input)) = (buffers(command.out), buffers(command.input)) else {
            return self.check_condition(reply, Sense::DATA_PHASE_ERROR);
        };
        // The device wants no more bytes than the command has.
        let cdb = command.cdb.0[..command.cdb.len().min(command.cdb.0.len())].to_vec();
        let scsi = self.clone();
        executor.defer(move || {
            match device.execute(&cdb, &out, &input) {
                Ok(ended) if ended.delivered => {
                    let moved = offered.saturating_sub(ended.residual.into());
                    scsi.answer(reply, Response::Ok, ended.status, &ended.sense, moved);
                }
                Ok(_) => scsi.answer(reply, Response::Failure, status::GOOD, &[], 0),
                Err(why) => {
                    scsi.context.warn_once(&format!("the host does not pass a command on: {why}"));
                    scsi.check_condition(reply, Sense::INVALID_FIELD);
                }
            }
            scsi.completions.settle();
        });
    }

    /// What a unit that is not there answers (SPC-4, 6.33; SAM-5, 4.6.4).
    fn on_nothing(&self, command: &Command<'_>, reply: Reply) {
        let limited = |bytes: &[u8], at, len| {
            let len = usize::try_from(command.cdb.number(at, len)).unwrap_or(usize::MAX);
            bytes[..bytes.len().min(len)].to_vec()
        };
        match command.cdb.opcode() {
            opcode::REPORT_LUNS => self.answer_data(reply, &command.input, &limited(&self.target.luns, 6, 4)),
            opcode::INQUIRY if command.cdb.byte(1) & 1 == 0 => {
                self.answer_data(reply, &command.input, &limited(&inquiry::absent(), 3, 2));
            }
            opcode::REQUEST_SENSE => {
                self.answer_data(reply, &command.input, &limited(&Sense::NO_UNIT.to_bytes(), 4, 1));
            }
            _ => self.check_condition(reply, Sense::NO_UNIT),
        }
    }

    fn answer_data(&self, reply: Reply, input: &Buffers, data: &[u8]) {
        match input.write(self.context.memory(), data) {
            Ok(written) if written == data.len() => {
                self.answer(reply, Response::Ok, status::GOOD, &[], written as u64);
            }
            _ => self.answer(reply, Response::Overrun, status::GOOD, &[], 0),
        }
    }

    fn check_condition(&self, reply: Reply, sense: Sense) {
        self.answer(reply, Response::Ok, status::CHECK_CONDITION, &sense.to_bytes(), 0);
    }

    /// Writes the response and has the chain given back when the completions are settled; `moved` bytes of data went
    /// either way.
    fn answer(&self, reply: Reply, response: Response, status: u8, sense: &[u8], moved: u64) {
        let room = (reply.response.len() as usize).saturating_sub(RESPONSE_LEN);
        let sense_bytes = &sense[..sense.len().min(room)];
        let residual = u32::try_from(reply.offered.saturating_sub(moved)).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(RESPONSE_LEN + sense_bytes.len());
        bytes.extend((sense_bytes.len() as u32).to_le_bytes());
        bytes.extend(residual.to_le_bytes());
        bytes.extend([0, 0, status, response as u8]);
        bytes.extend(sense_bytes);
        let fits = reply.response.write(self.context.memory(), &bytes).is_ok_and(|written| written >= RESPONSE_LEN);
        if let Some((lun, tag)) = reply.task
            && let Some(unit) = self.target.units.get(usize::from(lun))
        {
            unit.end_task(tag);
        }
        // Data lie behind the response, whatever of that is used.
        let data = if reply.to_driver { moved } else { 0 };
        let written = if data > 0 { reply.response.len() + data } else { bytes.len() as u64 };
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        self.completions.add(reply.chain, if fits { written } else { 0 });
    }

    /// Whether task management is ending all commands of a command's unit.
    fn is_aborting(&self, reply: &Reply) -> bool {
        reply.task.and_then(|(lun, _)| self.target.units.get(usize::from(lun))).is_some_and(Unit::is_aborting)
    }

    /// Forgets a command: the driver has.
    fn forget(&self, reply: Reply) {
        if let Some((lun, tag)) = reply.task
            && let Some(unit) = self.target.units.get(usize::from(lun))
        {
            unit.end_task(tag);
        }
        drop(reply.chain);
    }
}

/// A command whose operations the disk does one after the other.
struct Progress {
    scsi: Arc<Scsi>,
    operations: VecDeque<Operation>,
    moved: u64,
    writes: bool,
}

impl Progress {
    /// Starts the next operation, or answers.
    fn go_on(mut self, reply: Reply) {
        let Some(operation) = self.operations.pop_front() else {
            let moved = self.moved;
            return self.scsi.answer(reply, Response::Ok, status::GOOD, &[], moved);
        };
        let scsi = self.scsi.clone();
        let Some(unit) = reply.task.and_then(|(lun, _)| scsi.target.units.get(usize::from(lun))) else { return };
        let done = Box::new(move |result| self.after(reply, result));
        unit.executor().submit(Request { operation, done });
    }

    fn after(self, reply: Reply, result: Result<(), IoError>) {
        let sense = match result {
            Ok(()) => return self.go_on(reply),
            Err(IoError::Cancelled) if self.scsi.is_aborting(&reply) => {
                return self.scsi.answer(reply, Response::Aborted, status::GOOD, &[], 0);
            }
            // Only a reset of the device cancels otherwise, and then the driver has forgotten the command.
            Err(IoError::Cancelled) => return self.scsi.forget(reply),
            Err(IoError::ReadOnly) => Sense::WRITE_PROTECTED,
            Err(IoError::OutOfRange { .. }) => Sense::LBA_OUT_OF_RANGE,
            Err(IoError::Memory(_)) => Sense::DATA_PHASE_ERROR,
            Err(IoError::Host(why)) => Sense::of_host(&why, self.writes),
        };
        self.scsi.check_condition(reply, sense);
    }
}
