//! The target: its logical units, and the commands that are under way in each.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::layout::Address;
use backend::block::Disk;
use backend::scsi_generic::ScsiGeneric;

use crate::scsi::{LogicalUnit, Sense};

/// Where REPORT LUNS has the number of bytes that follow, and where units begin.
const LIST_HEADER: usize = 8;

/// What is behind a logical unit.
pub(super) enum Backing {
    /// A disk, whose commands are answered here.
    Disk(LogicalUnit),
    /// A SCSI device of the host, which answers itself; the other value has the threads that wait for it.
    Host(Arc<ScsiGeneric>, Disk),
}

/// A logical unit with its tasks.
pub(super) struct Unit {
    pub(super) lun: u16,
    pub(super) backing: Backing,
    /// How many tasks have each tag. Drivers make tags unique; hostile ones need not.
    tasks: Mutex<HashMap<u64, u32>>,
    ended: Condvar,
    /// Task management is dropping what has not begun.
    aborting: AtomicBool,
}

impl Unit {
    pub(super) fn new(lun: u16, backing: Backing) -> Self {
        Self { lun, backing, tasks: Mutex::default(), ended: Condvar::new(), aborting: AtomicBool::new(false) }
    }

    /// What does its work.
    pub(super) fn executor(&self) -> &Disk {
        match &self.backing {
            Backing::Disk(logical) => logical.disk(),
            Backing::Host(_, executor) => executor,
        }
    }

    /// What the driver will be told at its next command.
    pub(super) fn attention(&self) -> Option<Sense> {
        match &self.backing {
            Backing::Disk(logical) => logical.pending_attention(),
            Backing::Host(..) => None,
        }
    }

    /// Has the driver told something at its next command. A device of the host does that itself.
    pub(super) fn set_attention(&self, sense: Option<Sense>) {
        if let Backing::Disk(logical) = &self.backing {
            logical.set_attention(sense);
        }
    }

    fn tasks(&self) -> MutexGuard<'_, HashMap<u64, u32>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin_task(&self, tag: u64) {
        *self.tasks().entry(tag).or_default() += 1;
    }

    pub(super) fn end_task(&self, tag: u64) {
        let mut tasks = self.tasks();
        if let Some(count) = tasks.get_mut(&tag) {
            *count -= 1;
            if *count == 0 {
                tasks.remove(&tag);
            }
        }
        drop(tasks);
        self.ended.notify_all();
    }

    pub(super) fn has_task(&self, tag: u64) -> bool {
        self.tasks().contains_key(&tag)
    }

    pub(super) fn has_tasks(&self) -> bool {
        !self.tasks().is_empty()
    }

    /// Waits for the end of a task.
    pub(super) fn wait_for_task(&self, tag: u64) {
        drop(self.ended.wait_while(self.tasks(), |tasks| tasks.contains_key(&tag)));
    }

    /// Whether cancelled requests are those of [`abort_all`](Self::abort_all), which says so to the driver.
    pub(super) fn is_aborting(&self) -> bool {
        self.aborting.load(Ordering::SeqCst)
    }

    /// Ends all tasks: those not begun are dropped, the others awaited.
    pub(super) fn abort_all(&self) {
        self.aborting.store(true, Ordering::SeqCst);
        self.executor().cancel_queued();
        self.aborting.store(false, Ordering::SeqCst);
        drop(self.ended.wait_while(self.tasks(), |tasks| !tasks.is_empty()));
    }
}

/// All units.
pub(super) struct Target {
    pub(super) units: Vec<Unit>,
    /// The answer to REPORT LUNS.
    pub(super) luns: Vec<u8>,
}

impl Target {
    /// A target with the units numbered from 0.
    pub(super) fn new(units: Vec<Backing>) -> Self {
        let units: Vec<_> = (0..).zip(units).map(|(lun, backing)| Unit::new(lun, backing)).collect();
        let mut luns = vec![0; LIST_HEADER + 8 * units.len()];
        luns[..4].copy_from_slice(&(8 * units.len() as u32).to_be_bytes());
        for (unit, place) in units.iter().zip(luns[LIST_HEADER..].chunks_exact_mut(8)) {
            // Peripheral addressing for small numbers, flat space for the others (SAM-5, 4.7).
            let number = if unit.lun < 256 { unit.lun } else { unit.lun | 0x4000 };
            place[..2].copy_from_slice(&number.to_be_bytes());
        }
        Self { units, luns }
    }

    /// The unit of that address.
    pub(super) fn unit(&self, address: Address) -> Option<&Unit> {
        match address {
            Address::Unit(lun) => self.units.get(usize::from(lun)),
            Address::ReportLuns | Address::Nobody => None,
        }
    }
}
