//! The options of a disk, shared by all emulations that have one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use config::NodeRef;

use super::BlockError;
use super::nbd::NbdUri;
use super::throttle::Limits;

/// Sector sizes to present to the guest, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SectorSize {
    /// Unit of addressing.
    pub logical: u32,
    /// Unit that the medium writes at once.
    pub physical: u32,
}

/// What is behind a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Format {
    /// A file or block device whose bytes are the disk's.
    Raw,
    /// A qcow2 file.
    Qcow2,
    /// A server that speaks NBD.
    Nbd(NbdUri),
}

/// How to open a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockOptions {
    /// The file or block device, or the server's URI.
    pub path: PathBuf,
    /// What is there.
    pub format: Format,
    /// By-pass the host's page cache.
    pub nocache: bool,
    /// Every write is on stable storage before it is reported done.
    pub sync: bool,
    /// Open for reading only.
    pub read_only: bool,
    /// Sector sizes, if not those of the host's file or device.
    pub sector_size: Option<SectorSize>,
    /// Offer discard, if the host can do it.
    pub discard: bool,
    /// Keep other processes from opening the image.
    pub lock: bool,
    /// Use io_uring where the host has it.
    pub ring: bool,
    /// How much the disk may do.
    pub limits: Limits,
    /// How long requests wait for an NBD server that went away.
    pub reconnect: Duration,
}

/// Keys every disk has; `bootindex` is for the firmware, not for the disk.
const KEYS: &[&str] = &[
    "device",
    "path",
    "nocache",
    "direct",
    "sync",
    "ro",
    "sectorsize",
    "nodelete",
    "bootindex",
    "lock",
    "format",
    "aio",
    "iops",
    "bps",
    "reconnect",
];

/// Seconds for which requests wait for an NBD server that went away, and the most that can be asked for.
const RECONNECT: u32 = 60;
const MAX_RECONNECT: u32 = 7 * 24 * 3600;

impl BlockOptions {
    /// The defaults, for the disk at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: Format::Raw,
            nocache: false,
            sync: false,
            read_only: false,
            sector_size: None,
            discard: true,
            lock: true,
            ring: true,
            limits: Limits::default(),
            reconnect: Duration::from_secs(RECONNECT.into()),
        }
    }

    /// Reads the keys of a disk's node. Besides those it may have the keys of the emulation, `others`.
    ///
    /// # Errors
    /// A key that is none, or with a value that cannot be.
    pub fn from_node(node: &NodeRef<'_>, others: &[&str]) -> Result<Self, BlockError> {
        let path = node.get_str("path").filter(|path| !path.is_empty()).ok_or(BlockError::NoPath)?;
        Self::from_node_for(path.into(), node, others)
    }

    /// As [`from_node`](Self::from_node), for the disk at `path`, whatever the node says of that.
    ///
    /// # Errors
    /// A key that is none, or with a value that cannot be.
    pub fn from_node_for(path: PathBuf, node: &NodeRef<'_>, others: &[&str]) -> Result<Self, BlockError> {
        if let Some(unknown) = node.keys().find(|key| !KEYS.contains(key) && !others.contains(key)) {
            return Err(BlockError::Option(unknown.into()));
        }
        Ok(Self {
            format: format(node, &path)?,
            nocache: node.bool_or("nocache", false)?,
            sync: node.bool_or("sync", false)? || node.bool_or("direct", false)?,
            read_only: node.bool_or("ro", false)?,
            sector_size: node.get_str("sectorsize").map(|text| SectorSize::parse(&text)).transpose()?,
            discard: !node.bool_or("nodelete", false)?,
            lock: node.bool_or("lock", true)?,
            ring: node.get_word("aio", &["io_uring", "threads"])? != Some(1),
            limits: Limits {
                iops: node.int_or("iops", 1..=u64::from(u32::MAX), 0)?,
                bps: node.get_size("bps")?.unwrap_or(0),
            },
            reconnect: Duration::from_secs(node.int_or("reconnect", 0..=MAX_RECONNECT, RECONNECT)?.into()),
            path,
        })
    }
}

/// The format is what `format=` says, otherwise what the name says: never what the first bytes say, for those are the
/// guest's to write.
fn format(node: &NodeRef<'_>, path: &Path) -> Result<Format, BlockError> {
    let text = path.to_string_lossy();
    match node.get_word("format", &["raw", "qcow2"])? {
        Some(0) => Ok(Format::Raw),
        Some(_) if NbdUri::is_one(&text) => Err(BlockError::FormatOverNbd),
        Some(_) => Ok(Format::Qcow2),
        None if NbdUri::is_one(&text) => Ok(Format::Nbd(NbdUri::parse(&text)?)),
        None if has_qcow2_name(path) => Ok(Format::Qcow2),
        None => Ok(Format::Raw),
    }
}

/// Whether a file is qcow2 by its name.
pub(super) fn has_qcow2_name(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("qcow2"))
}

impl SectorSize {
    /// Reads `L` or `L/P`.
    fn parse(text: &str) -> Result<Self, BlockError> {
        let number = |part: &str| part.parse::<u32>().map_err(|_| BlockError::SectorSize(text.into()));
        let (logical, physical) = match text.split_once('/') {
            Some((logical, physical)) => (number(logical)?, number(physical)?),
            None => (number(text)?, number(text)?),
        };
        if logical >= 512 && logical <= physical && logical.is_power_of_two() && physical.is_power_of_two() {
            Ok(Self { logical, physical })
        } else {
            Err(BlockError::SectorSizes { logical, physical })
        }
    }
}

#[cfg(test)]
mod tests {
    use config::{Config, NoWarnings};

    use super::*;

    fn options(keys: &[(&str, &str)]) -> Result<BlockOptions, String> {
        let mut config = Config::new(NoWarnings);
        config.set("pci.0.3.0.device", "virtio-blk").unwrap();
        for (key, value) in keys {
            config.set(&format!("pci.0.3.0.{key}"), *value).unwrap();
        }
        BlockOptions::from_node(&config.node("pci.0.3.0").unwrap(), &["ser"]).map_err(|error| error.to_string())
    }

    #[test]
    fn reads_every_option() {
        assert_eq!(options(&[("path", "/d"), ("ser", "x")]), Ok(BlockOptions::new("/d")));
        let all = [
            ("path", "/d"),
            ("nocache", "true"),
            ("direct", "true"),
            ("ro", "true"),
            ("sectorsize", "512/4096"),
            ("nodelete", "true"),
            ("bootindex", "1"),
            ("lock", "off"),
            ("aio", "threads"),
            ("iops", "100"),
            ("bps", "2M"),
            ("reconnect", "5"),
        ];
        let expected = BlockOptions {
            path: "/d".into(),
            nocache: true,
            sync: true,
            read_only: true,
            sector_size: Some(SectorSize { logical: 512, physical: 4096 }),
            discard: false,
            lock: false,
            ring: false,
            limits: Limits { iops: 100, bps: 2 << 20 },
            reconnect: Duration::from_secs(5),
            ..BlockOptions::new("/d")
        };
        assert_eq!(options(&all), Ok(expected));
        assert!(options(&[("path", "/d"), ("sync", "on")]).unwrap().sync);
    }

    #[test]
    fn says_what_is_wrong() {
        let error = |keys: &[(&str, &str)]| options(keys).unwrap_err();
        assert_eq!(error(&[]), "No \"path\" for block device.");
        assert_eq!(error(&[("path", "/d"), ("nocahce", "true")]), "Invalid device option \"nocahce\"");
        for text in ["", "4k", "512/", "/512", "512/512/512", "-1"] {
            assert_eq!(error(&[("path", "/d"), ("sectorsize", text)]), format!("Invalid sector size \"{text}\""));
        }
        for text in ["256", "513", "4096/512", "0", "512/1000"] {
            let message = error(&[("path", "/d"), ("sectorsize", text)]);
            assert!(message.starts_with("Invalid sector size "), "{text}: {message}");
        }
        assert!(error(&[("path", "/d"), ("ro", "maybe")]).contains("pci.0.3.0.ro"));
        assert!(error(&[("path", "/d"), ("format", "vmdk")]).contains("raw"), "the message has the choices");
        assert!(error(&[("path", "/d"), ("iops", "0")]).contains("pci.0.3.0.iops"));
        assert!(error(&[("path", "/d"), ("bps", "fast")]).contains("pci.0.3.0.bps"));
        assert!(error(&[("path", "nbd://h/x"), ("format", "qcow2")]).contains("NBD"));
    }

    #[test]
    fn the_format_follows_from_option_and_name() {
        let format = |keys: &[(&str, &str)]| options(keys).unwrap().format;
        assert_eq!(format(&[("path", "/d.img")]), Format::Raw);
        assert_eq!(format(&[("path", "/d.QCOW2")]), Format::Qcow2);
        assert_eq!(format(&[("path", "/d.qcow2"), ("format", "raw")]), Format::Raw);
        assert_eq!(format(&[("path", "/d.img"), ("format", "qcow2")]), Format::Qcow2);
        assert!(matches!(format(&[("path", "nbd://h:1/x")]), Format::Nbd(_)));
        assert_eq!(format(&[("path", "nbd://h:1/x"), ("format", "raw")]), Format::Raw, "a file of that name");
    }
}
