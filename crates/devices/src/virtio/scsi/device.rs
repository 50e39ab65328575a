//! The device: queues, configuration, events. Commands are taken from the request queues on the thread of the first
//! unit's disk; the control queue has a thread, because task management waits.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use platform::{Persist, StateError};
use serde::{Deserialize, Serialize};

use super::layout::{
    self, CDB_SIZE, CDB_SIZE_AT, EVENT_PARAM_CHANGE, EVENT_SIZE, EVENTS_MISSED, MAX_CDB_SIZE, MAX_SENSE_SIZE,
    SENSE_SIZE, SENSE_SIZE_AT, address_of,
};
use super::target::{Backing, Target};
use crate::factory::DeviceError;
use crate::scsi::Sense;
use crate::virtio::completions::Completions;
use crate::virtio::worker::Worker;
use crate::virtio::{VirtioContext, VirtioDevice, read_structure};

/// Feature bits (5.6.3).
mod scsi_feature {
    /// Units may come and go. They do not, but Linux gives buffers for events only if they may.
    pub(super) const HOTPLUG: u64 = 1 << 1;
    /// Changes of a unit's parameters are told.
    pub(super) const CHANGE: u64 = 1 << 2;
}

/// Queues before those for requests: control and events.
pub(super) const OTHER_QUEUES: u16 = 2;
const CONTROL: u16 = 0;
const EVENTS: u16 = 1;

const VERSION: u32 = 1;

pub(super) struct Scsi {
    pub(super) context: Arc<VirtioContext>,
    pub(super) target: Target,
    /// Commands that are answered; settled wherever commands are taken or done.
    pub(super) completions: Arc<Completions>,
    sense_size: AtomicU32,
    cdb_size: AtomicU32,
    /// For each request queue, whether a thread is going to look at it.
    scheduled: Vec<AtomicBool>,
    /// Units whose change the driver has yet to be told, and whether some were not told for want of buffers.
    events: Mutex<Events>,
    worker: Worker,
    this: Weak<Self>,
}

#[derive(Default)]
struct Events {
    changed: Vec<u16>,
    missed: bool,
}

/// Version 1 of the state.
#[derive(Serialize, Deserialize)]
struct State {
    sense_size: u32,
    cdb_size: u32,
    attentions: Vec<Option<Sense>>,
}

impl Scsi {
    pub(super) fn new(context: Arc<VirtioContext>, units: Vec<Backing>, queues: u16) -> Result<Arc<Self>, DeviceError> {
        let address = context.address();
        let name = format!("scsi-{}:{}", address.slot, address.func);
        let slot: Arc<Mutex<Weak<Self>>> = Arc::default();
        let theirs = slot.clone();
        let worker = Worker::spawn(name, move |_| {
            let device = theirs.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
            if let Some(device) = device {
                device.serve_control();
            }
        });
        let worker =
            worker.map_err(|source| DeviceError::Host { what: "start the thread of virtio-scsi".into(), source })?;
        let completions = Completions::new(context.clone());
        let device = Arc::new_cyclic(|this: &Weak<Self>| {
            for (lun, unit) in (0..).zip(&units) {
                let Backing::Disk(unit) = unit else { continue };
                let theirs = completions.clone();
                unit.disk().on_settled(Box::new(move || theirs.settle()));
                let this = this.clone();
                unit.disk().on_resize(Box::new(move || {
                    if let Some(device) = this.upgrade() {
                        device.resized(lun);
                    }
                }));
            }
            Self {
                context,
                target: Target::new(units),
                completions,
                sense_size: AtomicU32::new(SENSE_SIZE),
                cdb_size: AtomicU32::new(CDB_SIZE),
                scheduled: (0..queues).map(|_| AtomicBool::new(false)).collect(),
                events: Mutex::default(),
                worker,
                this: this.clone(),
            }
        });
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = device.this.clone();
        Ok(device)
    }

    /// Bytes of sense data and of command descriptor blocks.
    pub(super) fn sizes(&self) -> (usize, usize) {
        (self.sense_size.load(Ordering::Relaxed) as usize, self.cdb_size.load(Ordering::Relaxed) as usize)
    }

    /// Takes all commands from request queue `index`, counted from 0.
    fn serve(self: &Arc<Self>, index: u16) {
        let Some(scheduled) = self.scheduled.get(usize::from(index)) else { return };
        // Before the queue is looked at: a doorbell from here on schedules another look.
        scheduled.store(false, Ordering::SeqCst);
        if let Some(queue) = self.context.queue(OTHER_QUEUES + index) {
            self.context.drain(queue, |chain| self.command(chain));
            self.completions.settle();
        }
    }

    fn serve_control(&self) {
        if let Some(queue) = self.context.queue(CONTROL) {
            self.context.drain(queue, |chain| self.control(chain));
            self.completions.settle();
        }
        self.send_events();
    }

    /// The disk of a unit has another size now.
    fn resized(&self, lun: u16) {
        if let Some(unit) = self.target.units.get(usize::from(lun)) {
            unit.set_attention(Some(Sense::CAPACITY_CHANGED));
        }
        if self.context.has(scsi_feature::CHANGE) {
            let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
            if !events.changed.contains(&lun) {
                events.changed.push(lun);
            }
            drop(events);
            self.worker.wake(EVENTS);
        }
    }

    /// Tells the driver of changes, as far as it has given buffers for that.
    fn send_events(&self) {
        let Some(queue) = self.context.queue(EVENTS) else { return };
        loop {
            let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(&lun) = events.changed.first() else { return };
            let Some(chain) = self.context.pop(queue) else {
                events.missed = true;
                return;
            };
            events.changed.remove(0);
            let missed = if std::mem::take(&mut events.missed) { EVENTS_MISSED } else { 0 };
            drop(events);
            let reason = u32::from(Sense::CAPACITY_CHANGED.code) | u32::from(Sense::CAPACITY_CHANGED.qualifier) << 8;
            let mut bytes = [0; EVENT_SIZE];
            bytes[..4].copy_from_slice(&(EVENT_PARAM_CHANGE | missed).to_le_bytes());
            bytes[4..12].copy_from_slice(&address_of(lun));
            bytes[12..].copy_from_slice(&reason.to_le_bytes());
            let written = chain.writable.write(self.context.memory(), &bytes).unwrap_or(0);
            self.context.complete(chain, written as u32);
        }
    }
}

impl VirtioDevice for Scsi {
    fn features(&self) -> u64 {
        scsi_feature::HOTPLUG | scsi_feature::CHANGE
    }

    fn config_read(&self, offset: u32, bytes: &mut [u8]) {
        let (sense_size, cdb_size) = self.sizes();
        let structure = layout::config(self.scheduled.len() as u16, sense_size as u32, cdb_size as u32);
        read_structure(&structure, offset, bytes);
    }

    fn config_write(&self, offset: u32, bytes: &[u8]) {
        let Ok(word) = <[u8; 4]>::try_from(bytes).map(u32::from_le_bytes) else { return };
        match offset {
            SENSE_SIZE_AT if word <= MAX_SENSE_SIZE => self.sense_size.store(word, Ordering::Relaxed),
            CDB_SIZE_AT if word <= MAX_CDB_SIZE => self.cdb_size.store(word, Ordering::Relaxed),
            _ => {}
        }
    }

    fn notify(&self, index: u16) {
        if index < OTHER_QUEUES {
            return self.worker.wake(index);
        }
        let index = index - OTHER_QUEUES;
        let Some(scheduled) = self.scheduled.get(usize::from(index)) else { return };
        let Some(unit) = self.target.units.first() else { return };
        if scheduled.swap(true, Ordering::SeqCst) {
            return;
        }
        let this = self.this.clone();
        unit.executor().defer(move || {
            if let Some(this) = this.upgrade() {
                this.serve(index);
            }
        });
    }
}

impl Persist for Scsi {
    fn kind(&self) -> &'static str {
        "virtio-scsi"
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        self.worker.wait_idle();
        self.target.units.iter().for_each(|unit| unit.executor().wait_idle());
        let (sense_size, cdb_size) = self.sizes();
        let attentions = self.target.units.iter().map(|unit| unit.attention()).collect();
        let state = State { sense_size: sense_size as u32, cdb_size: cdb_size as u32, attentions };
        platform::state::encode(self.kind(), &state)
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let state: State = platform::state::decode(self.kind(), VERSION, version, bytes)?;
        let units = &self.target.units;
        if state.sense_size > MAX_SENSE_SIZE || state.cdb_size > MAX_CDB_SIZE || state.attentions.len() != units.len() {
            return Err(StateError::Invalid { kind: self.kind(), why: "sizes or number of units".into() });
        }
        self.sense_size.store(state.sense_size, Ordering::Relaxed);
        self.cdb_size.store(state.cdb_size, Ordering::Relaxed);
        for (unit, attention) in units.iter().zip(state.attentions) {
            unit.set_attention(attention);
        }
        Ok(())
    }

    fn reset(&self) {
        for unit in &self.target.units {
            unit.executor().cancel_queued();
        }
        *self.events.lock().unwrap_or_else(PoisonError::into_inner) = Events::default();
        self.sense_size.store(SENSE_SIZE, Ordering::Relaxed);
        self.cdb_size.store(CDB_SIZE, Ordering::Relaxed);
        for unit in &self.target.units {
            unit.set_attention(Some(Sense::RESET));
        }
    }
}
