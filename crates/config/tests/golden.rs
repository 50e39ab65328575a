//! Whole command lines of the programs that start bhyve, each with the tree that `config.dump=1` must print.
//!
//! `golden/NAME.cmd` is a command line as one would type it; lines that begin with `#` are comments. `golden/NAME.tree`
//! is the dump, written down from the manual. `-k` files lie beside them; tests run in the crate's folder.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use config::{Exit, Topology, Warnings, legacy, memory_size, parse_command_line, pci_functions};

#[derive(Clone, Default)]
struct Collect(Arc<Mutex<Vec<String>>>);

impl Warnings for Collect {
    fn warn(&self, text: &str) {
        self.0.lock().unwrap().push(text.into());
    }
}

/// Splits a command line at blanks, as a shell does: quotes hold blanks together, a backslash joins lines.
fn words(text: &str) -> Vec<OsString> {
    let joined: String = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(|line| [line.trim_end_matches('\\'), " "])
        .collect();
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for c in joined.chars() {
        match (c, quote) {
            ('\'' | '"', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (_, Some(q)) if q == c => quote = None,
            (' ', None) => words.extend(word.take().map(OsString::from)),
            _ => word.get_or_insert_default().push(c),
        }
    }
    assert!(quote.is_none(), "unfinished quote in {text}");
    assert_eq!(words.first(), Some(&"bhyve".into()), "a command line begins with the program: {text}");
    words.remove(0);
    words
}

fn dump_of(arguments: &[OsString]) -> (Exit, Vec<String>) {
    let warnings = Collect::default();
    let all = ["-o", "config.dump=1"].map(OsString::from).into_iter().chain(arguments.iter().cloned());
    let exit = parse_command_line(all, legacy::DEVICES, warnings.clone()).expect_err("a dump ends the program");
    let warnings = warnings.0.lock().unwrap().clone();
    (exit, warnings)
}

fn cases(extension: &str) -> BTreeSet<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_some_and(|found| found == extension)).collect()
}

#[test]
fn command_lines_give_their_trees() {
    let commands = cases("cmd");
    let with_trees: BTreeSet<PathBuf> = cases("tree").iter().map(|path| path.with_extension("cmd")).collect();
    assert_eq!(commands, with_trees, "each command line has a tree");
    assert!(commands.len() >= 20, "{}", commands.len());
    for path in commands {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let arguments = words(&fs::read_to_string(&path).unwrap());
        let (exit, warnings) = dump_of(&arguments);
        assert_eq!((exit.code, exit.stderr.as_str()), (1, ""), "{name}");
        let expected = fs::read_to_string(path.with_extension("tree")).unwrap();
        assert_eq!(exit.stdout, expected, "{name}");
        let may_warn = name.contains("deprecated");
        assert_eq!(warnings.is_empty(), !may_warn, "{name}: {warnings:?}");
    }
}

#[test]
fn command_lines_make_sense_as_machines() {
    for path in cases("cmd") {
        let name = path.display();
        let arguments = words(&fs::read_to_string(&path).unwrap());
        let config = parse_command_line(arguments, legacy::DEVICES, Collect::default()).unwrap();
        assert!(Topology::resolve(&config).unwrap().cpus >= 1, "{name}");
        assert!(memory_size(&config).unwrap() >= 64 << 20, "{name}");
        let functions = pci_functions(&config, legacy::DEVICES).unwrap();
        assert!(functions.windows(2).all(|pair| pair[0].address < pair[1].address), "{name}");
        assert!(functions.iter().any(|function| function.device == "lpc"), "{name}");
    }
}

#[test]
fn a_dump_read_as_a_file_gives_the_same_tree() {
    for path in cases("tree") {
        let arguments = ["-k".into(), path.clone().into_os_string(), "-o".into(), "config.dump=1".into()];
        let config = parse_command_line(arguments, legacy::DEVICES, Collect::default()).unwrap_err();
        let sorted = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
        assert_eq!(sorted(&config.stdout), sorted(&fs::read_to_string(&path).unwrap()), "{}", path.display());
    }
}
