//! Requests that are done, collected until the back end has no more to tell for now: the driver gets all of them at once,
//! with one interrupt.

use std::sync::{Arc, Mutex, PoisonError};

use super::context::VirtioContext;
use super::queue::Chain;

/// The collections of a device's queues.
pub(crate) struct Completions {
    context: Arc<VirtioContext>,
    lists: Vec<Mutex<Vec<(Chain, u32)>>>,
}

impl Completions {
    /// Empty collections for all queues.
    pub(crate) fn new(context: Arc<VirtioContext>) -> Arc<Self> {
        let lists = context.queues().iter().map(|_| Mutex::default()).collect();
        Arc::new(Self { context, lists })
    }

    /// Notes that a request is done and has `written` bytes for the driver. [`settle`](Self::settle) has to follow.
    pub(crate) fn add(&self, chain: Chain, written: u32) {
        match self.lists.get(usize::from(chain.queue().index())) {
            Some(list) => list.lock().unwrap_or_else(PoisonError::into_inner).push((chain, written)),
            None => self.context.complete(chain, written),
        }
    }

    /// Gives everything collected back to the driver.
    pub(crate) fn settle(&self) {
        for (list, queue) in self.lists.iter().zip(self.context.queues()) {
            let mut chains = std::mem::take(&mut *list.lock().unwrap_or_else(PoisonError::into_inner));
            if !chains.is_empty() {
                self.context.complete_all(queue, &mut chains);
            }
        }
    }
}
