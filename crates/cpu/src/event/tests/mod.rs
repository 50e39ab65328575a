//! Events delivered to the machine of [`crate::testing`].

mod faults;
mod long;
