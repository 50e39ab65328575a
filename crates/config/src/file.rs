//! The `-k` file of bhyve_config(5): one `key=value` per line.
//!
//! Nothing is trimmed: blanks around the `=` and at the end of the line belong to the key or the value, and so does
//! what looks like a trailing comment. Only lines with `#` in the first column are comments.

use std::fs;
use std::path::Path;

use crate::error::ConfigError;
use crate::store::Config;

/// Splits `key=value` at the first `=`; `None` if the `=`, the key or the value is missing.
#[must_use]
pub fn split_option(text: &str) -> Option<(&str, &str)> {
    text.split_once('=').filter(|(key, value)| !key.is_empty() && !value.is_empty())
}

/// Adds a file's keys to the configuration.
///
/// # Errors
/// The file cannot be read, a line is no option, or a key does not fit the tree.
pub fn load(config: &mut Config, path: &Path) -> Result<(), ConfigError> {
    let bytes = fs::read(path).map_err(|source| ConfigError::FileOpen { path: path.into(), source })?;
    parse(config, path, &bytes)
}

/// Adds the keys of a file with these contents; `path` is for messages.
///
/// # Errors
/// A line is no option (or not UTF-8), or a key does not fit the tree.
pub fn parse(config: &mut Config, path: &Path, bytes: &[u8]) -> Result<(), ConfigError> {
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    for (index, raw) in bytes.split(|byte| *byte == b'\n').enumerate() {
        if raw.is_empty() || raw[0] == b'#' {
            continue;
        }
        let line = index + 1;
        let bad = |text: &str| ConfigError::FileLine { path: path.into(), line, text: text.into() };
        let text = std::str::from_utf8(raw).map_err(|_| bad(&String::from_utf8_lossy(raw)))?;
        let (key, value) = split_option(text).ok_or_else(|| bad(text))?;
        config.set(key, value).map_err(|source| ConfigError::FileTree { path: path.into(), line, source })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;
    use crate::store::NoWarnings;

    fn parsed(text: &[u8]) -> Result<String, Exit> {
        let mut config = Config::new(NoWarnings);
        parse(&mut config, Path::new("vm.cfg"), text)?;
        Ok(config.dump())
    }

    #[test]
    fn lines_are_taken_as_they_are() {
        let text = b"# comment\n\nname=vm0\nmemory.size=1G # not a comment\n spaced = a=b \nname=vm1";
        assert_eq!(parsed(text).unwrap(), "memory.size=1G # not a comment\n spaced = a=b \nname=vm1\n");
        assert_eq!(parsed(b"").unwrap(), "");
        assert_eq!(parsed(b"# caf\xe9 in an old encoding\na=1\n").unwrap(), "a=1\n");
    }

    #[test]
    fn bad_lines_name_file_and_line() {
        for (text, line, shown) in [
            (&b"a=1\nb\n"[..], 2, "b"),
            (b"=1\n", 1, "=1"),
            (b"\n\na=\n", 3, "a="),
            (b" \n", 1, " "),
            (b"a=1\r\n\r\n", 2, "\r"),
            (b"a=\xff\n", 1, "a=\u{fffd}"),
        ] {
            let exit = parsed(text).unwrap_err();
            assert_eq!(exit.code, 4);
            assert_eq!(exit.stderr, format!("bhyve: vm.cfg line {line}: invalid config option '{shown}'\n"));
        }
    }

    #[test]
    fn conflicts_name_file_and_line() {
        let exit = parsed(b"a.b=1\na=2\n").unwrap_err();
        assert_eq!(exit.stderr, "bhyve: vm.cfg line 2: Attempting to add value 2 to existing node a\n");
        assert_eq!(exit.code, 4);
    }

    #[test]
    fn a_file_that_is_not_there_says_why() {
        let mut config = Config::new(NoWarnings);
        let exit: Exit = load(&mut config, Path::new("/nonexistent/vm.cfg")).unwrap_err().into();
        assert_eq!(exit.code, 4);
        assert!(exit.stderr.starts_with("bhyve: Failed to open configuration file /nonexistent/vm.cfg: No such file"));
    }
}
