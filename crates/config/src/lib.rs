//! The configuration tree, the bhyve(8) command line and the bhyve_config(5) file.
