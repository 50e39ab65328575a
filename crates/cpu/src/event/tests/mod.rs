//! Events delivered to the machine of [`crate::testing`].

mod faults;
mod garbage;
mod long;
mod protected;
mod real;
mod task;
mod v8086;
