//! What is the same for all formats: files, errors, and whatever bytes a file may hold.

use std::error::Error;
use std::path::Path;

use super::*;
use crate::fixture::{Folder, Random, board, elf_image, linux_image, memory_of, put};

fn fails(kernel: &Path, initrd: Option<&Path>) -> BootError {
    load(kernel, initrd, "", &memory_of(&board()), &board()).unwrap_err()
}

#[test]
fn files_must_be_there_and_be_files() {
    let folder = Folder::new();
    let kernel = folder.file("kernel", &linux_image());
    let missing = folder.path().join("missing");

    let error = fails(&missing, None);
    assert_eq!(error.to_string(), format!("cannot open kernel {}", missing.display()));
    assert!(error.source().unwrap().to_string().contains("No such file"));
    let error = fails(&kernel, Some(&missing));
    assert_eq!(error.to_string(), format!("cannot open initrd {}", missing.display()));

    let error = fails(folder.path(), None);
    assert!(matches!(error, BootError::NotAFile { role: Role::Kernel, .. }), "{error}");
    let error = fails(&kernel, Some(Path::new("/dev/zero")));
    assert!(matches!(error, BootError::NotAFile { role: Role::Initrd, .. }), "{error}");
    let error = fails(&kernel, Some(&folder.file("empty", b"")));
    assert!(error.to_string().ends_with("empty is empty"), "{error}");
}

#[test]
fn says_what_an_unknown_file_looks_like() {
    let folder = Folder::new();
    let looks: [(&[u8], &str); 5] = [
        (b"", "is empty:"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"MZ\0\0", "EFI application"),
        (b"!<arch>\n", "archive"),
        (b"#!/bin/sh\n", "of unknown format"),
    ];
    for (bytes, wanted) in looks {
        let error = fails(&folder.file("kernel", bytes), None);
        assert!(matches!(error, BootError::Format { .. }));
        assert!(error.to_string().contains(wanted), "{error}");
        assert!(error.to_string().contains("bzImage"), "{error}");
    }
}

/// One valid image of each format.
fn images() -> Vec<Vec<u8>> {
    let segment = (1, 0x200, 0x10_0000, 0x10_0000, 0x100, 0x200);
    let mut pvh = elf_image(true, 0x10_0000, &[segment, (4, 0x300, 0, 0, 0x20, 0x20)]);
    put(&mut pvh, 0x300, b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0\0\0\x10\0");
    let mut multiboot = elf_image(false, 0x10_0000, &[segment]);
    put(&mut multiboot, 0x200, b"\x02\xb0\xad\x1b\0\0\0\0\xfe\x4f\x52\xe4");
    let mut flat = vec![0; 0x200];
    put(&mut flat, 0, b"\x02\xb0\xad\x1b\0\0\x01\0\xfe\x4f\x51\xe4");
    put(&mut flat, 12, b"\0\0\x10\0\0\0\x10\0\0\0\0\0\0\0\0\0\0\0\x10\0");
    vec![linux_image(), pvh, multiboot, flat]
}

#[test]
fn no_content_of_a_file_does_harm() {
    let folder = Folder::new();
    let board = Board { low_memory: 20 << 20, ..board() };
    let memory = memory_of(&board);
    let initrd = folder.file("initrd", b"initrd");
    let kernel = folder.path().join("kernel");
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut started = 0;
    let mut try_to_load = |bytes: &[u8]| {
        std::fs::write(&kernel, bytes).unwrap();
        let result = load(&kernel, Some(&initrd), "command line", &memory, &board);
        if let Err(error) = &result {
            assert!(!error.to_string().is_empty());
        }
        started += usize::from(result.is_ok());
    };

    for image in images() {
        try_to_load(&image);
        for _ in 0..600 {
            let mut image = image.clone();
            // Most changes hit the headers, and often with values at the edges.
            for _ in 0..=random.below(4) {
                let at = random.below(image.len().min(0x400));
                let byte = [0, 0xff, 0x7f, 0x80, random.next() as u8][random.below(5)];
                let len = [1, 2, 4, 8][random.below(4)];
                image[at..].iter_mut().take(len).for_each(|target| *target = byte);
            }
            if random.below(8) == 0 {
                image.truncate(random.below(image.len()));
            }
            try_to_load(&image);
        }
    }
    for _ in 0..300 {
        let mut bytes = vec![0; random.below(0x3000)];
        bytes.iter_mut().for_each(|byte| *byte = random.next() as u8);
        try_to_load(&bytes);
    }
    assert!(started > 4, "all four images, and some of the changed ones");
}

#[test]
fn each_unchanged_image_starts() {
    let folder = Folder::new();
    for image in images() {
        let kernel = folder.file("kernel", &image);
        load(&kernel, None, "", &memory_of(&board()), &board()).unwrap();
    }
}
