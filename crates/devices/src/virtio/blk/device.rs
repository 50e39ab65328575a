//! The disk behind the transport. A doorbell has one of the disk's threads look at the queue: it hands all requests but
//! the last to the disk, which may wake other threads for them, and keeps the last for its own thread. What is done is
//! given back when the disk has no more to tell for now.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use backend::block::{Disk, IoError, Request};
use platform::{GuestRange, Persist, StateError};

use super::ID_LEN;
use super::layout;
use super::request::{Abilities, Action, Parsed, Status, parse};
use crate::virtio::completions::Completions;
use crate::virtio::{Chain, VirtQueue, VirtioContext, VirtioDevice, read_structure};

/// Feature bits (5.2.3).
mod blk_feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const MQ: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

pub(super) struct Blk {
    context: Arc<VirtioContext>,
    disk: Disk,
    completions: Arc<Completions>,
    id: [u8; ID_LEN],
    /// For each queue, whether a thread is going to look at it.
    scheduled: Vec<AtomicBool>,
    this: Weak<Self>,
}

impl Blk {
    pub(super) fn new(context: Arc<VirtioContext>, disk: Disk, id: [u8; ID_LEN], queues: u16) -> Arc<Self> {
        let theirs = context.clone();
        disk.on_resize(Box::new(move || theirs.config_changed()));
        let completions = Completions::new(context.clone());
        let theirs = completions.clone();
        disk.on_settled(Box::new(move || theirs.settle()));
        let scheduled = (0..queues).map(|_| AtomicBool::new(false)).collect();
        Arc::new_cyclic(|this| Self { context, disk, completions, id, scheduled, this: this.clone() })
    }

    fn abilities(&self) -> Abilities {
        let geometry = self.disk.geometry();
        Abilities { discard: geometry.discard, write_zeroes: !geometry.read_only }
    }

    /// Takes all requests from a queue. On a thread of the disk.
    fn serve(&self, index: u16) {
        let (Some(queue), Some(scheduled)) = (self.context.queue(index), self.scheduled.get(usize::from(index))) else {
            return;
        };
        // Before the queue is looked at: a doorbell from here on schedules another look.
        scheduled.store(false, Ordering::SeqCst);
        let last = self.take_all(queue);
        if let Some(last) = last {
            self.disk.perform(last);
        }
    }

    /// Submits all requests of a queue but the last, which is returned.
    fn take_all(&self, queue: &Arc<VirtQueue>) -> Option<Request> {
        let mut last: Option<Request> = None;
        self.context.drain(queue, |chain| {
            if let Some(next) = self.begin(chain)
                && let Some(previous) = last.replace(next)
            {
                self.disk.submit(previous);
            }
        });
        last
    }

    /// Answers a request, or makes it one for the back end.
    fn begin(&self, mut chain: Chain) -> Option<Request> {
        let Some(Parsed { status, action }) = parse(self.context.memory(), &mut chain, self.abilities()) else {
            self.context.complete(chain, 0);
            return None;
        };
        match action {
            Action::Disk { operation, input } => {
                let (context, completions) = (self.context.clone(), self.completions.clone());
                let done = Box::new(move |result| finish(&context, &completions, chain, status, input, result));
                Some(Request { operation, done })
            }
            Action::Identify(buffers) => {
                let (answer, written) = match buffers.write(self.context.memory(), &self.id) {
                    Ok(written) if written == ID_LEN => (Status::Ok, written as u32),
                    _ => (Status::IoError, 0),
                };
                answer_request(&self.context, chain, status, answer, written);
                None
            }
            Action::Answer(answer) => {
                answer_request(&self.context, chain, status, answer, 0);
                None
            }
        }
    }
}

/// The back end is done with a request.
fn finish(
    context: &VirtioContext,
    completions: &Completions,
    chain: Chain,
    status: GuestRange,
    input: u32,
    result: Result<(), IoError>,
) {
    let (answer, data) = match result {
        Ok(()) => (Status::Ok, input),
        // Only a reset cancels. The driver has forgotten the request, and its memory may serve another purpose now.
        Err(IoError::Cancelled) => return drop(chain),
        Err(_) => (Status::IoError, 0),
    };
    let written = write_status(context, status, answer, data);
    completions.add(chain, written);
}

/// Answers a request at once; `data` bytes were written before its status byte.
fn answer_request(context: &VirtioContext, chain: Chain, status: GuestRange, answer: Status, data: u32) {
    let written = write_status(context, status, answer, data);
    context.complete(chain, written);
}

/// Writes the status byte; returns the number of bytes written in all.
fn write_status(context: &VirtioContext, status: GuestRange, answer: Status, data: u32) -> u32 {
    // The byte was checked to be in RAM.
    let written = context.memory().write_u8(status.start.0, answer as u8).is_ok();
    if written { data + 1 } else { 0 }
}

impl VirtioDevice for Blk {
    fn features(&self) -> u64 {
        let geometry = self.disk.geometry();
        let mut features = self.legacy_features();
        if self.scheduled.len() > 1 {
            features |= blk_feature::MQ;
        }
        if !geometry.read_only {
            features |= blk_feature::WRITE_ZEROES;
        }
        features
    }

    fn legacy_features(&self) -> u64 {
        let geometry = self.disk.geometry();
        let mut features = blk_feature::SEG_MAX | blk_feature::BLK_SIZE | blk_feature::FLUSH | blk_feature::TOPOLOGY;
        if geometry.read_only {
            features |= blk_feature::RO;
        }
        if geometry.discard {
            features |= blk_feature::DISCARD;
        }
        features
    }

    fn config_read(&self, offset: u32, bytes: &mut [u8]) {
        let structure = layout::structure(&self.disk.geometry(), self.scheduled.len() as u16);
        read_structure(&structure, offset, bytes);
    }

    fn notify(&self, index: u16) {
        let Some(scheduled) = self.scheduled.get(usize::from(index)) else { return };
        if scheduled.swap(true, Ordering::SeqCst) {
            return;
        }
        let this = self.this.clone();
        self.disk.defer(move || {
            if let Some(this) = this.upgrade() {
                this.serve(index);
            }
        });
    }
}

impl Persist for Blk {
    fn kind(&self) -> &'static str {
        "virtio-blk"
    }

    fn version(&self) -> u32 {
        1
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        self.disk.wait_idle();
        Ok(Vec::new())
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        platform::state::decode(self.kind(), self.version(), version, bytes)
    }

    fn reset(&self) {
        self.disk.cancel_queued();
    }
}
