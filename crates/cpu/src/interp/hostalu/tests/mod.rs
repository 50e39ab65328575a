//! The same instruction bytes run by a vCPU and, with the same registers and memory, directly on the host.

mod broad;
mod fixture;
mod native;
