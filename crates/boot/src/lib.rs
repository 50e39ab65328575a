//! Firmware tables and kernel loaders: from a board description to bytes and entry state.
