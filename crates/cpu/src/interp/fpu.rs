//! x87, MMX, SSE, AVX and AVX-512 registers.

/// The floating-point and SIMD registers.
#[derive(Default)]
pub(crate) struct FpuState {}
