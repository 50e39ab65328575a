//! Versioned state of devices and chips, for snapshots.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why a state could not be taken over.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The state was written by a version this build does not know.
    #[error("{kind}: state version {found} is not supported (this build writes version {expected})")]
    Version {
        /// Kind of device.
        kind: &'static str,
        /// Version in the archive.
        found: u32,
        /// Version this build writes.
        expected: u32,
    },
    /// The bytes do not decode.
    #[error("{kind}: state cannot be decoded")]
    Decode {
        /// Kind of device.
        kind: &'static str,
        /// What the decoder says.
        source: postcard::Error,
    },
    /// The state decodes, but is not one this device can be in.
    #[error("{kind}: state is not valid: {why}")]
    Invalid {
        /// Kind of device.
        kind: &'static str,
        /// Which rule it breaks.
        why: String,
    },
}

/// Something whose state survives a snapshot.
///
/// Archived state is untrusted input: `restore` checks it like guest input.
pub trait Persist: Send + Sync {
    /// Kind of device, stable across releases ("uart16550").
    fn kind(&self) -> &'static str;
    /// Version of the state that `save` writes.
    fn version(&self) -> u32;
    /// The state as bytes.
    ///
    /// # Errors
    /// The state could not be encoded.
    fn save(&self) -> Result<Vec<u8>, StateError>;
    /// Takes over a state. Does not make interrupt edges: levels are restored silently.
    ///
    /// # Errors
    /// Unknown version, bytes that do not decode, or a state this device cannot be in.
    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError>;
    /// Puts the device into its power-on state.
    fn reset(&self);
}

/// Encodes a state struct.
///
/// # Errors
/// The struct cannot be encoded (it holds something the format has no form for).
pub fn encode<T: Serialize>(kind: &'static str, state: &T) -> Result<Vec<u8>, StateError> {
    postcard::to_stdvec(state).map_err(|source| StateError::Decode { kind, source })
}

/// Decodes a state struct of `expected` version; leftover bytes are an error.
///
/// # Errors
/// Another version, or bytes that do not decode.
pub fn decode<T: DeserializeOwned>(
    kind: &'static str,
    expected: u32,
    found: u32,
    bytes: &[u8],
) -> Result<T, StateError> {
    if found != expected {
        return Err(StateError::Version { kind, found, expected });
    }
    let (value, rest) = postcard::take_from_bytes(bytes).map_err(|source| StateError::Decode { kind, source })?;
    if rest.is_empty() {
        Ok(value)
    } else {
        Err(StateError::Invalid { kind, why: format!("{} bytes left over", rest.len()) })
    }
}
