//! Runs data instructions on the host CPU.

/// Stubs that run one instruction each.
#[derive(Default)]
pub(crate) struct HostAlu {}
