//! Reads the tree, builds the board, runs it, ends with bhyve's exit codes.
