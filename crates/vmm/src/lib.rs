//! A VM as an object: vCPUs, registers, exits, run and pause; engines kvm and soft behind one trait.
