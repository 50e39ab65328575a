//! The software x86 CPU as a library over a memory handle and an events word.
