//! Kernel modules: what each one needs, and the order to load them in. Debian's kernel packages
//! bring no `modules.dep`, so the dependencies are read from the modules themselves.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The modules of one kernel version.
pub(crate) struct Modules {
    files: BTreeMap<String, PathBuf>,
    builtin: Vec<String>,
}

impl Modules {
    /// Takes stock of a `lib/modules/VERSION` folder.
    pub(crate) fn in_folder(folder: &Path) -> Result<Self> {
        let list = folder.join("modules.builtin");
        let list = fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
        let builtin = list.lines().map(|line| module_name(Path::new(line))).collect();
        let mut files = BTreeMap::new();
        collect(&folder.join("kernel"), &mut files)?;
        Ok(Self { files, builtin })
    }

    /// The modules to load for `wanted`, each after those that it needs. What is built into the
    /// kernel is left out.
    pub(crate) fn in_order(&self, wanted: &[&str]) -> Result<Vec<(String, PathBuf)>> {
        let mut order = Vec::new();
        for name in wanted {
            self.add(name, &mut order)?;
        }
        Ok(order.into_iter().map(|name| (name.clone(), self.files[&name].clone())).collect())
    }

    fn add(&self, name: &str, order: &mut Vec<String>) -> Result<()> {
        let name = name.replace('-', "_");
        if order.contains(&name) || self.builtin.contains(&name) {
            return Ok(());
        }
        let Some(file) = self.files.get(&name) else {
            bail!("this kernel has no module {name}");
        };
        let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let info =
            section(&bytes, b".modinfo").with_context(|| format!("{} is not a kernel module", file.display()))?;
        for needed in dependencies(info) {
            self.add(&needed, order)?;
        }
        order.push(name);
        Ok(())
    }
}

/// Finds all modules below a folder, by name.
fn collect(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "ko") {
            files.insert(module_name(&path), path);
        }
    }
    Ok(())
}

/// The kernel's name of a module: files may have dashes where the name has underscores.
fn module_name(file: &Path) -> String {
    file.file_stem().unwrap_or_default().to_string_lossy().replace('-', "_")
}

/// The `depends=` entry of a module's information, which is a sequence of NUL-terminated strings.
fn dependencies(info: &[u8]) -> Vec<String> {
    let entries = info.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    let mut values = entries.filter_map(|e| e.strip_prefix("depends=").map(str::to_owned));
    let names = values.next().unwrap_or_default();
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// The content of a section of a little-endian ELF file of either class (System V gABI, chapter 4).
fn section<'a>(file: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    let class64 = match file.get(..6)? {
        [0x7f, b'E', b'L', b'F', 1, 1] => false,
        [0x7f, b'E', b'L', b'F', 2, 1] => true,
        _ => return None,
    };
    let number = |at: usize, size: usize| -> Option<usize> {
        let bytes = file.get(at..at.checked_add(size)?)?;
        Some(bytes.iter().rev().fold(0, |n, byte| n << 8 | usize::from(*byte)))
    };
    let word = if class64 { 8 } else { 4 };
    let (table, counts, offset_at) = if class64 { (0x28, 0x3a, 0x18) } else { (0x20, 0x2e, 0x10) };
    let table = number(table, word)?;
    let [entry_size, entries, names] = [number(counts, 2)?, number(counts + 2, 2)?, number(counts + 4, 2)?];
    let content = |index: usize| {
        let header = table.checked_add(index.checked_mul(entry_size)?)?;
        let offset = number(header.checked_add(offset_at)?, word)?;
        let size = number(header.checked_add(offset_at + word)?, word)?;
        Some((number(header, 4)?, file.get(offset..offset.checked_add(size)?)?))
    };
    let (_, names) = content(names)?;
    (0..entries).filter_map(content).find_map(|(name, bytes)| {
        let name = names.get(name..)?.split(|byte| *byte == 0).next()?;
        (name == wanted).then_some(bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with the sections "" (none), ".modinfo" and ".shstrtab".
    fn module(class64: bool, info: &[u8]) -> Vec<u8> {
        let word = if class64 { 8 } else { 4 };
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut file = vec![0; 0x40];
        file[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', if class64 { 2 } else { 1 }, 1]);
        let info_at = file.len();
        file.extend_from_slice(info);
        let names_at = file.len();
        file.extend_from_slice(names);
        let table = file.len();
        let (table_field, counts, offset_at) = if class64 { (0x28, 0x3a, 0x18) } else { (0x20, 0x2e, 0x10) };
        let put = |file: &mut Vec<u8>, at: usize, size: usize, value: usize| {
            file[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        };
        put(&mut file, table_field, word, table);
        for (n, value) in [0x40, 3, 2].into_iter().enumerate() {
            put(&mut file, counts + n * 2, 2, value);
        }
        file.resize(table + 3 * 0x40, 0);
        for (n, (name, at, size)) in
            [(0, 0, 0), (1, info_at, info.len()), (10, names_at, names.len())].into_iter().enumerate()
        {
            let header = table + n * 0x40;
            put(&mut file, header, 4, name);
            put(&mut file, header + offset_at, word, at);
            put(&mut file, header + offset_at + word, word, size);
        }
        file
    }

    #[test]
    fn dependencies_are_read_from_both_classes() {
        for class64 in [false, true] {
            let file = module(class64, b"license=GPL\0depends=rng-core,virtio\0name=x\0");
            let info = section(&file, b".modinfo").unwrap();
            assert_eq!(dependencies(info), ["rng-core", "virtio"]);
            assert_eq!(section(&file, b".text"), None);
        }
        assert!(dependencies(b"depends=\0").is_empty());
        assert!(dependencies(b"").is_empty());
    }

    #[test]
    fn a_damaged_module_is_no_module() {
        let file = module(true, b"depends=\0");
        for length in 0..file.len() - 0x40 {
            assert_eq!(section(&file[..length], b".modinfo"), None);
        }
        let mut huge = file;
        huge[0x28..0x30].fill(0xff);
        assert_eq!(section(&huge, b".modinfo"), None);
    }

    #[test]
    fn needed_modules_come_first_and_builtin_ones_not_at_all() {
        let folder = std::env::temp_dir().join(format!("xtask-modinfo-{}", std::process::id()));
        let kernel = folder.join("kernel/drivers");
        fs::create_dir_all(&kernel).unwrap();
        fs::write(folder.join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
        fs::write(kernel.join("virtio-rng.ko"), module(true, b"depends=virtio,core\0")).unwrap();
        fs::write(kernel.join("core.ko"), module(true, b"depends=\0")).unwrap();
        fs::write(kernel.join("virtio.ko"), module(true, b"depends=core\0")).unwrap();
        let modules = Modules::in_folder(&folder).unwrap();
        let order = modules.in_order(&["ext4", "virtio_rng", "core"]).unwrap();
        let names: Vec<_> = order.iter().map(|(name, _)| name.as_str()).collect();
        let missing = modules.in_order(&["nothing"]);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(names, ["core", "virtio", "virtio_rng"]);
        assert!(missing.is_err());
    }
}
