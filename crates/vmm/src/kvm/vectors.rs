//! The x87, SSE, AVX and AVX-512 registers of a vCPU, as an XSAVE area in the standard format.
#![allow(unsafe_code)]

use kvm_bindings::kvm_xsave;
use kvm_ioctls::VcpuFd;

use super::refused;
use crate::engine::EngineError;

/// The area of a vCPU that does not run.
pub(super) fn get(fd: &VcpuFd) -> Result<Vec<u8>, EngineError> {
    let area = fd.get_xsave().map_err(refused("read the vector registers of a vCPU"))?;
    Ok(area.region.iter().flat_map(|word| word.to_le_bytes()).collect())
}

/// Replaces what `area` covers of a vCPU that does not run.
pub(super) fn set(fd: &VcpuFd, area: &[u8]) -> Result<(), EngineError> {
    let mut image = kvm_xsave::default();
    for (word, bytes) in image.region.iter_mut().zip(area.chunks(4)) {
        let mut padded = [0; 4];
        padded[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_le_bytes(padded);
    }
    // SAFETY: the kernel reads more than the 4 KiB that are here only after the process has asked for dynamically enabled
    // components (AMX) for its guests, which this one never does.
    unsafe { fd.set_xsave(&image) }.map_err(refused("write the vector registers of a vCPU"))
}
