//! Guest-physical memory on a memfd: regions, checked typed access, code and dirty tracking.
