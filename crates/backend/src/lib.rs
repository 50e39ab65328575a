//! The host side of devices: block images, terminals.
