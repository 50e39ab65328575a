//! The seam between the parts: small types and traits; no unsafe, no OS calls.
