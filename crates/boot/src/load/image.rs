//! A kernel or initrd file: bounded reads, and copies into guest memory that never hold the whole file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use memory::GuestMemory;

use super::error::{BootError, Role};

const COPY_STEP: u64 = 1 << 20;

/// An open file of known size.
pub(super) struct Image {
    role: Role,
    path: PathBuf,
    file: File,
    size: u64,
}

impl Image {
    pub(super) fn open(role: Role, path: &Path) -> Result<Self, BootError> {
        let path = path.to_owned();
        // Opening a pipe would wait for its other end, so look first.
        let metadata = match std::fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(source) => return Err(BootError::Open { role, path, source }),
        };
        if !metadata.is_file() {
            return Err(BootError::NotAFile { role, path });
        }
        match File::open(&path) {
            Ok(file) => Ok(Self { role, path, file, size: metadata.len() }),
            Err(source) => Err(BootError::Open { role, path, source }),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Up to `len` bytes from the start: fewer if the file is shorter.
    pub(super) fn start(&self, len: u64) -> Result<Vec<u8>, BootError> {
        self.bytes(0, len.min(self.size))
    }

    /// The `len` bytes from `offset`, which must be there. `part` says what they are.
    pub(super) fn read(&self, offset: u64, len: u64, part: &'static str) -> Result<Vec<u8>, BootError> {
        self.check(offset, len, part)?;
        self.bytes(offset, len)
    }

    /// Fails if the file ends before `len` bytes from `offset` do.
    pub(super) fn check(&self, offset: u64, len: u64, part: &'static str) -> Result<(), BootError> {
        let end = offset.saturating_add(len);
        if end > self.size {
            return Err(BootError::Truncated { path: self.path.clone(), part, end, size: self.size });
        }
        Ok(())
    }

    /// Copies `len` bytes from `offset` to guest address `gpa`. `part` says what they are.
    pub(super) fn copy(
        &self,
        offset: u64,
        len: u64,
        memory: &GuestMemory,
        gpa: u64,
        part: &'static str,
    ) -> Result<(), BootError> {
        self.check(offset, len, part)?;
        let mut done = 0;
        while done < len {
            let step = (len - done).min(COPY_STEP);
            let bytes = self.bytes(offset + done, step)?;
            memory
                .write(gpa.saturating_add(done), &bytes)
                .map_err(|source| BootError::Memory { what: part, source })?;
            done += step;
        }
        Ok(())
    }

    fn bytes(&self, offset: u64, len: u64) -> Result<Vec<u8>, BootError> {
        let mut bytes = vec![0; len as usize];
        match self.file.read_exact_at(&mut bytes, offset) {
            Ok(()) => Ok(bytes),
            Err(source) => Err(BootError::Read { role: self.role, path: self.path.clone(), source }),
        }
    }

    pub(super) fn invalid(&self, why: impl Into<String>) -> BootError {
        BootError::Invalid { path: self.path.clone(), why: why.into() }
    }
}

/// The little-endian number at `offset`, or 0 beyond the end of `bytes`: the header fields that old formats do not have
/// are 0 where newer ones look for them.
pub(super) fn field<const N: usize>(bytes: &[u8], offset: usize) -> u64 {
    let number: Option<&[u8; N]> = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    number.map_or(0, |number| number.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}
