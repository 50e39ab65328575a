//! The bhyve(8) program.

fn main() {}
