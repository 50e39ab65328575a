//! Writer of cpio archives in the "newc" format, which Linux unpacks as its initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst). Everything belongs to root and
//! has time 0, so equal input gives an equal archive, and nobody needs to be root to make one.

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive being written. A folder must be added before what is in it.
pub(crate) struct Archive {
    bytes: Vec<u8>,
    last_inode: u32,
}

impl Archive {
    pub(crate) fn new() -> Self {
        Self { bytes: Vec::new(), last_inode: 0 }
    }

    pub(crate) fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
    }

    /// `permissions` are the low nine bits of the mode.
    pub(crate) fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.entry(path, FILE | permissions, (0, 0), content);
    }

    pub(crate) fn link(&mut self, path: &str, target: &str) {
        self.entry(path, LINK | 0o777, (0, 0), target.as_bytes());
    }

    pub(crate) fn character_device(&mut self, path: &str, permissions: u32, device: (u32, u32)) {
        self.entry(path, CHARACTER_DEVICE | permissions, device, &[]);
    }

    /// Ends the archive and returns its bytes.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.header("TRAILER!!!", 0, 0, (0, 0), 0);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.last_inode += 1;
        let size = u32::try_from(content.len()).expect("newc files are below 4 GB");
        self.header(path, self.last_inode, mode, device, size);
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn header(&mut self, path: &str, inode: u32, mode: u32, device: (u32, u32), size: u32) {
        let name_size = u32::try_from(path.len() + 1).expect("paths are short");
        let links = if mode & 0o170_000 == DIRECTORY { 2 } else { 1 };
        let (uid, gid, mtime, checksum) = (0, 0, 0, 0);
        self.bytes.extend_from_slice(b"070701");
        let fields = [inode, mode, uid, gid, links, mtime, size, 0, 0, device.0, device.1, name_size, checksum];
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Entry {
        name: String,
        mode: u32,
        device: (u32, u32),
        content: Vec<u8>,
    }

    fn read(archive: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(&archive[at..at + 6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&archive[at + 6 + n * 8..][..8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let name_end = at + 110 + field(11) as usize;
            let name = String::from_utf8(archive[at + 110..name_end - 1].to_vec()).unwrap();
            assert_eq!(archive[name_end - 1], 0);
            let start = name_end.next_multiple_of(4);
            let end = start + field(6) as usize;
            if name == "TRAILER!!!" {
                assert_eq!(end, archive.len());
                return entries;
            }
            let (mode, device) = (field(1), (field(9), field(10)));
            entries.push(Entry { name, mode, device, content: archive[start..end].to_vec() });
            at = end.next_multiple_of(4);
        }
    }

    #[test]
    fn entries_come_back() {
        let mut archive = Archive::new();
        archive.directory("dev");
        archive.character_device("dev/console", 0o600, (5, 1));
        archive.file("init", 0o755, b"#!/bin/sh\n");
        archive.link("sh", "busybox");
        let entries = read(&archive.finish());
        let seen: Vec<_> = entries.iter().map(|e| (e.name.as_str(), e.mode, e.device, e.content.as_slice())).collect();
        assert_eq!(
            seen,
            [
                ("dev", 0o040_755, (0, 0), &b""[..]),
                ("dev/console", 0o020_600, (5, 1), b""),
                ("init", 0o100_755, (0, 0), b"#!/bin/sh\n"),
                ("sh", 0o120_777, (0, 0), b"busybox"),
            ]
        );
    }

    #[test]
    fn every_length_of_name_and_content_is_padded_right() {
        for length in 0..9 {
            let name = "n".repeat(length + 1);
            let content = vec![0x55; length];
            let mut archive = Archive::new();
            archive.file(&name, 0o644, &content);
            archive.file("last", 0o644, b"x");
            let entries = read(&archive.finish());
            assert_eq!((entries[0].name.as_str(), &entries[0].content), (name.as_str(), &content));
            assert_eq!(entries[1].name, "last");
        }
    }

    #[test]
    fn inodes_differ_so_that_nothing_is_taken_for_a_hard_link() {
        let mut archive = Archive::new();
        archive.file("a", 0o644, b"");
        archive.file("b", 0o644, b"");
        let bytes = archive.finish();
        let second = 110 + 2;
        assert_ne!(bytes[6..14], bytes[second + 6..second + 14]);
    }
}
