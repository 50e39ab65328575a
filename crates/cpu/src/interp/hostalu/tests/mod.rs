//! The same instruction bytes run by a vCPU and, with the same registers and memory, directly on the host.

mod broad;
mod control;
mod faults;
mod fixture;
mod masks;
mod modes;
mod native;
mod pair;
mod random;
