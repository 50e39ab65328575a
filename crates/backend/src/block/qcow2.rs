//! qcow2 images, by the library imago: backing chains, external data files, compressed clusters (read), discard.
//!
//! Each file of a chain is opened and locked here, so that nothing is opened that is not locked, and no format is ever
//! guessed from contents. What the library would misread is refused first.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, StorageOpenOptions};

use super::BlockError;
use super::buffers::HostBuffers;
use super::image::{Geometry, Image};
use super::options::{BlockOptions, Format, SectorSize, has_qcow2_name};
use super::raw::open_file;

/// Images in a backing chain, at most.
const MAX_CHAIN: u32 = 64;

/// Start of the file: "QFI\xfb".
const MAGIC: [u8; 4] = *b"QFI\xfb";

type Access = FormatAccess<Storage>;
type Driver = Qcow2<Storage, Arc<Access>>;

/// An open qcow2 image with its backing chain.
pub struct Qcow2Image {
    /// Exclusive for discards, which must not run beside transfers that use what they free.
    access: RwLock<Access>,
    /// Every write goes to stable storage.
    sync: bool,
    geometry: Geometry,
}

impl Qcow2Image {
    /// Opens an image and what it is based on.
    ///
    /// # Errors
    /// One of the files cannot be opened or is in use, or has a feature that cannot be had.
    pub fn open(options: &BlockOptions) -> Result<Self, BlockError> {
        let (file, read_only) = open_file(options)?;
        let path = &options.path;
        let meta = file.metadata().map_err(|source| BlockError::Stat { path: path.clone(), source })?;
        let physical = u32::try_from(meta.blksize()).ok().filter(|size| size.is_power_of_two() && *size >= 512);
        let mut version = [0; 4];
        // A file too short for it is refused below.
        let _ = file.read_exact_at(&mut version, 4);
        let access = open_qcow2(file, options, !read_only, 0)?;
        let natural = SectorSize { logical: 512, physical: physical.unwrap_or(512) };
        let sector_size = options.sector_size.unwrap_or(natural);
        let size = access.size() - access.size() % u64::from(sector_size.logical);
        // Version 2 has no clusters that read zero without being there.
        let discard = options.discard && !read_only && u32::from_be_bytes(version) >= 3;
        let geometry = Geometry { size, sector_size, read_only, discard };
        Ok(Self { access: RwLock::new(access), sync: options.sync, geometry })
    }

    /// Runs a transfer; several at a time.
    fn shared<T>(&self, run: impl FnOnce(&Access) -> io::Result<T>) -> io::Result<T> {
        run(&self.access.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs a discard, alone.
    fn alone<T>(&self, run: impl FnOnce(&mut Access) -> io::Result<T>) -> io::Result<T> {
        run(&mut self.access.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Opens one image of a chain, `depth` images above it being open.
fn open_qcow2(file: File, options: &BlockOptions, writable: bool, depth: u32) -> Result<Access, BlockError> {
    let path = &options.path;
    let refuse = |why: String| BlockError::Qcow2 { path: path.clone(), why };
    if depth == MAX_CHAIN {
        return Err(refuse(format!("its backing chain has more than {MAX_CHAIN} images; is it a loop?")));
    }
    check_header(&file).map_err(refuse)?;
    let library = |why: io::Error| refuse(why.to_string());
    let storage = storage(file, options, writable).map_err(library)?;
    let mut image = Driver::open_image(storage, writable).map_err(library)?;
    if image.requires_external_data_file() {
        let name = image.implicit_external_data_file().cloned();
        let name = name.ok_or_else(|| refuse("it has an external data file but no name of it".into()))?;
        let data = beside(options, &name);
        let (file, read_only) = open_file(&data)?;
        if read_only && writable {
            return Err(refuse(format!("its data file {} cannot be written; say ro", data.path.display())));
        }
        image.set_data_file(Some(self::storage(file, &data, writable).map_err(library)?));
    } else {
        image.set_data_file(None);
    }
    let backing = match image.implicit_backing_file().cloned() {
        None => None,
        Some(name) => {
            let format = image.implicit_backing_format().cloned();
            Some(Arc::new(open_backing(options, &name, format.as_deref(), depth)?))
        }
    };
    image.set_backing(backing);
    Ok(FormatAccess::new(image))
}

/// Opens the image below `above`, for reading only.
fn open_backing(above: &BlockOptions, name: &str, format: Option<&str>, depth: u32) -> Result<Access, BlockError> {
    let refuse = |why: String| BlockError::Qcow2 { path: above.path.clone(), why };
    if name.contains(':') && !name.starts_with(['/', '.']) {
        return Err(refuse(format!("its backing file is \"{name}\"; only names of files are possible here")));
    }
    let mut options = BlockOptions { read_only: true, ..beside(above, name) };
    options.format = match format {
        Some("raw") => Format::Raw,
        Some("qcow2") => Format::Qcow2,
        Some(other) => return Err(refuse(format!("its backing file {name} has the format {other}, not raw or qcow2"))),
        None if has_qcow2_name(&options.path) => Format::Qcow2,
        None => {
            return Err(refuse(format!(
                "it does not say what format its backing file {name} has; \
                 record it with \"qemu-img rebase -u -F FORMAT -b {name} {}\"",
                above.path.display()
            )));
        }
    };
    let (file, _) = open_file(&options)?;
    if options.format == Format::Qcow2 {
        return open_qcow2(file, &options, false, depth + 1);
    }
    let library = |why: io::Error| refuse(format!("its backing file {name}: {why}"));
    let storage = storage(file, &options, false).map_err(library)?;
    let raw = Raw::builder(storage).open(DenyImplicitOpenGate::default()).map_err(library)?;
    Ok(FormatAccess::new(raw))
}

/// Options for a file that an image names, relative to that image.
fn beside(above: &BlockOptions, name: &str) -> BlockOptions {
    let folder = above.path.parent().map_or_else(PathBuf::new, Path::to_owned);
    BlockOptions { path: folder.join(name), ..above.clone() }
}

fn storage(file: File, options: &BlockOptions, writable: bool) -> io::Result<Storage> {
    let open = StorageOpenOptions::new().write(writable).direct(options.nocache).filename(&options.path);
    Storage::from_open_file(file, open)
}

/// Refuses, in words a user can act on, what the library cannot read or, worse, would read wrongly.
fn check_header(file: &File) -> Result<(), String> {
    // Version, encryption method and incompatible features of the header (QEMU, docs/interop/qcow2).
    let mut header = [0; 104];
    let read = |header: &mut [u8]| file.read_exact_at(header, 0);
    // Version 2 has a header of 72 bytes, and a file may end behind it.
    if read(&mut header).is_err() && read(&mut header[..72]).is_err() {
        return Err("it is too short to be one".into());
    }
    let word = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if header[..4] != MAGIC {
        return Err("it is none; for a raw disk say format=raw".into());
    }
    match word(32) {
        0 => {}
        1 => return Err("it is encrypted (AES); decrypt it with qemu-img convert".into()),
        2 => return Err("it is encrypted (LUKS); decrypt it with qemu-img convert, or encrypt inside the guest".into()),
        method => return Err(format!("it is encrypted by the unknown method {method}")),
    }
    let incompatible = if word(4) >= 3 { word(76) } else { 0 };
    let reasons = [
        (1 << 0, "it was not closed properly; repair it with \"qemu-img check -r all\""),
        (1 << 1, "it is marked corrupt; repair it with \"qemu-img check -r all\""),
        (1 << 3, "it is compressed with zstd; convert it with \"qemu-img convert -O qcow2\""),
        (1 << 4, "it has extended L2 entries; convert it with \"qemu-img convert -O qcow2\""),
    ];
    let found = reasons.iter().find(|(bit, _)| incompatible & bit != 0);
    found.map_or(Ok(()), |(_, why)| Err((*why).into()))
}

impl Image for Qcow2Image {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read(&self, offset: u64, to: &HostBuffers) -> io::Result<()> {
        let result = self.shared(|access| access.readv(to.io_slices_mut().into(), offset));
        to.note_written();
        result
    }

    fn write(&self, offset: u64, from: &HostBuffers, fua: bool) -> io::Result<()> {
        self.shared(|access| access.writev(from.io_slices().into(), offset))?;
        if fua || self.sync { self.flush() } else { Ok(()) }
    }

    fn flush(&self) -> io::Result<()> {
        self.shared(|access| {
            access.flush()?;
            access.sync()
        })
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.alone(|access| access.discard_to_any(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap && self.geometry.discard {
            self.alone(|access| access.discard_to_zero(offset, len))?;
        } else {
            self.shared(|access| access.write_zeroes(offset, len))?;
        }
        if self.sync { self.flush() } else { Ok(()) }
    }
}
