//! From linear addresses to guest-physical ones, and memory access on the way.

pub(crate) mod access;
pub(crate) mod tlb;
pub(crate) mod walk;

/// What an access wants to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Access {
    Read,
    Write,
    Execute,
}
