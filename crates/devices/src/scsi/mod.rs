//! SCSI targets: what answers command descriptor blocks, whatever carries them (SPC-4, SBC-3, SAM-5).
//!
//! | module | what it does |
//! |---|---|
//! | [`cdb`] | the fields of command descriptor blocks |
//! | [`sense`] | status and sense data |
//! | [`inquiry`] | INQUIRY and the vital product data |
//! | [`mode`] | MODE SENSE and MODE SELECT |
//! | [`unit`] | a direct-access logical unit on a disk |

pub mod cdb;
pub mod inquiry;
pub mod mode;
pub mod sense;
pub mod unit;

pub use sense::{Sense, status};
pub use unit::{LogicalUnit, Outcome};
