//! What of the transport survives a snapshot.

use platform::StateError;
use platform::state::{decode, encode};
use serde::{Deserialize, Serialize};

use super::{Registers, VirtioPci};
use crate::virtio::queue::QueueState;

pub(super) const VERSION: u32 = 1;

/// Version 1 of a virtio function: transport, then the device in its own format.
#[derive(Serialize, Deserialize)]
pub(super) struct TransportState {
    status: u8,
    isr: u8,
    config_vector: u16,
    config_generation: u8,
    queue_select: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    /// What the driver wrote.
    driver_features: u64,
    /// What of that is in force.
    features: u64,
    queues: Vec<QueueState>,
    device_version: u32,
    device: Vec<u8>,
}

impl TransportState {
    pub(super) fn take(transport: &VirtioPci, device: Vec<u8>) -> Self {
        let registers = transport.registers().clone();
        let context = &transport.context;
        Self {
            status: context.status(),
            isr: context.isr(),
            config_vector: context.config_vector(),
            config_generation: context.config_generation(),
            queue_select: registers.queue_select,
            device_feature_select: registers.device_feature_select,
            driver_feature_select: registers.driver_feature_select,
            driver_features: registers.driver_features,
            features: context.features(),
            queues: context.queues().iter().map(|queue| queue.state()).collect(),
            device_version: transport.device.version(),
            device,
        }
    }

    pub(super) fn encode(&self, kind: &'static str) -> Result<Vec<u8>, StateError> {
        encode(kind, self)
    }

    pub(super) fn decode(kind: &'static str, version: u32, bytes: &[u8]) -> Result<Self, StateError> {
        decode(kind, VERSION, version, bytes)
    }

    /// Puts the state into a transport that has just been reset.
    pub(super) fn apply(self, transport: &VirtioPci) -> Result<(), StateError> {
        let context = &transport.context;
        let invalid = |why| StateError::Invalid { kind: transport.spec.name, why };
        let offered = transport.legacy_features() | transport.modern_features();
        if self.features & !offered != 0 {
            return Err(invalid(format!(
                "features {:#x} are in use that this device does not offer",
                self.features & !offered
            )));
        }
        if self.queues.len() != context.queues().len() {
            return Err(invalid(format!("{} queues", self.queues.len())));
        }
        for (queue, saved) in context.queues().iter().zip(self.queues) {
            let vector = context.valid_vector(saved.vector);
            queue.restore(QueueState { vector, ..saved }, self.features).map_err(invalid)?;
        }
        *transport.registers() = Registers {
            queue_select: self.queue_select,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            driver_features: self.driver_features,
        };
        context.set_features(self.features);
        context.set_config_vector(context.valid_vector(self.config_vector));
        context.set_config_generation(self.config_generation);
        context.restore_isr(self.isr);
        context.set_status(self.status);
        transport.device.restore(self.device_version, &self.device)
    }
}
