//! From text to values: the forms bhyve_config(5) accepts.

/// One KiB, MiB and so on are powers of this many bits.
const UNIT_BITS: u32 = 10;
const MIB: u64 = 1 << 20;

/// CPU numbers in lists are below this (`CPU_SETSIZE` of FreeBSD 14 and of Linux).
pub const MAX_CPUS: u32 = 1024;

/// `true on yes 1` and `false off no 0`, in any case.
#[must_use]
pub fn parse_bool(text: &str) -> Option<bool> {
    let is = |words: [&str; 4]| words.iter().any(|word| text.eq_ignore_ascii_case(word));
    if is(["true", "on", "yes", "1"]) {
        Some(true)
    } else if is(["false", "off", "no", "0"]) {
        Some(false)
    } else {
        None
    }
}

/// A number in C notation (decimal, `0x` hexadecimal, leading `0` octal), with an optional sign, as by strtol(3) with
/// base 0; nothing may follow it.
#[must_use]
pub fn parse_integer(text: &str) -> Option<i128> {
    let text = text.trim_start_matches([' ', '\t']);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (number, rest) = leading_number(digits)?;
    let number = i128::from(number);
    rest.is_empty().then_some(if negative { -number } else { number })
}

/// A size as the `-m` option takes it, in bytes.
///
/// A bare number below 1048576 counts MiB, a larger one bytes. With a suffix out of `b k m g t p e` (any case, and a
/// further `b` may follow) it counts in that unit of 1024 powers.
///
/// # Errors
/// What is wrong with the text, for a message.
pub fn parse_size(text: &str) -> Result<u64, &'static str> {
    const FORM: &str = "give a number of megabytes, or a number with one of the suffixes K, M, G, T";
    const TOO_LARGE: &str = "the size does not fit in 64 bits";
    let (number, suffix) = match leading_number(text) {
        Some(found) => found,
        None if text.bytes().next().is_some_and(|b| b.is_ascii_digit()) => return Err(TOO_LARGE),
        None => return Err(FORM),
    };
    if suffix.is_empty() {
        return if number < MIB { Ok(number * MIB) } else { Ok(number) };
    }
    let mut letters = suffix.bytes().map(|b| b.to_ascii_lowercase());
    let unit = letters.next().and_then(|letter| b"bkmgtpe".iter().position(|known| *known == letter)).ok_or(FORM)?;
    match (letters.next(), letters.next()) {
        (None, _) => {}
        (Some(b'b'), None) if unit > 0 => {}
        _ => return Err(FORM),
    }
    let shift = unit as u32 * UNIT_BITS;
    number.checked_mul(1 << shift).ok_or(TOO_LARGE)
}

/// A list of CPU numbers and ranges, `0-3,8`: sorted, each once.
///
/// # Errors
/// What is wrong with the text, for a message.
pub fn parse_cpu_list(text: &str) -> Result<Vec<u32>, String> {
    let number = |text: &str| -> Result<u32, String> {
        let number = parse_integer(text).ok_or_else(|| format!("'{text}' is no CPU number"))?;
        u32::try_from(number)
            .ok()
            .filter(|cpu| *cpu < MAX_CPUS)
            .ok_or_else(|| format!("CPU {number} is outside the valid range from 0 to {}", MAX_CPUS - 1))
    };
    let mut cpus = Vec::new();
    for part in text.split(',') {
        match part.split_once('-') {
            None => cpus.push(number(part)?),
            Some((first, last)) => {
                let (first, last) = (number(first)?, number(last)?);
                if first > last {
                    return Err(format!("the range {part} runs backwards"));
                }
                cpus.extend(first..=last);
            }
        }
        if cpus.len() > 64 * MAX_CPUS as usize {
            cpus.sort_unstable();
            cpus.dedup();
        }
    }
    cpus.sort_unstable();
    cpus.dedup();
    Ok(cpus)
}

/// The unsigned number in C notation that `text` begins with, and the rest. `None` without a digit or beyond 64 bits.
fn leading_number(text: &str) -> Option<(u64, &str)> {
    let (radix, digits) = match text.as_bytes() {
        [b'0', b'x' | b'X', digit, ..] if digit.is_ascii_hexdigit() => (16, &text[2..]),
        [b'0', ..] => (8, text),
        _ => (10, text),
    };
    let end = digits.find(|c: char| !c.is_digit(radix)).unwrap_or(digits.len());
    let number = u64::from_str_radix(&digits[..end], radix).ok()?;
    Some((number, &digits[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn booleans() {
        for word in ["true", "ON", "Yes", "1"] {
            assert_eq!(parse_bool(word), Some(true), "{word}");
        }
        for word in ["false", "OFF", "No", "0"] {
            assert_eq!(parse_bool(word), Some(false), "{word}");
        }
        for word in ["", "2", "y", "true ", "enabled"] {
            assert_eq!(parse_bool(word), None, "{word}");
        }
    }

    #[test]
    fn integers_take_c_notation() {
        for (text, value) in
            [("0", 0), ("42", 42), ("0x1F", 31), ("0X10", 16), ("010", 8), ("-5", -5), ("+7", 7), (" 3", 3)]
        {
            assert_eq!(parse_integer(text), Some(value), "{text}");
        }
        assert_eq!(parse_integer("0xffffffffffffffff"), Some(i128::from(u64::MAX)));
        for text in ["", " ", "x", "4x", "0x", "08", "4 ", "--1", "1.5", "0x10000000000000000", "٣"] {
            assert_eq!(parse_integer(text), None, "{text}");
        }
    }

    #[test]
    fn bare_sizes_count_megabytes_up_to_a_point() {
        assert_eq!(parse_size("8"), Ok(8 << 20));
        assert_eq!(parse_size("1048575"), Ok(1048575 << 20));
        assert_eq!(parse_size("1048576"), Ok(1048576));
        assert_eq!(parse_size("4294967296"), Ok(4 << 30));
        assert_eq!(parse_size("0x400"), Ok(1 << 30));
        assert_eq!(parse_size("0"), Ok(0));
    }

    #[test]
    fn sizes_take_suffixes() {
        for (text, value) in [
            ("8b", 8),
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            ("2G", 2 << 30),
            ("2gb", 2 << 30),
            ("3T", 3 << 40),
            ("4k", 4096),
            ("1p", 1 << 50),
            ("15E", 15 << 60),
        ] {
            assert_eq!(parse_size(text), Ok(value), "{text}");
        }
    }

    #[test]
    fn bad_sizes_are_refused() {
        for text in ["", "M", "1X", "1Gx", "1GBx", "1bb", "-1", "1.5G", " 1G", "16E", "99999999999999999999", "2 G"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert_eq!(parse_size("16E"), Err("the size does not fit in 64 bits"));
        assert_eq!(parse_size("99999999999999999999"), Err("the size does not fit in 64 bits"));
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpu_list("0-3,8"), Ok(vec![0, 1, 2, 3, 8]));
        assert_eq!(parse_cpu_list("5,1,5"), Ok(vec![1, 5]));
        for text in ["", ",", "a", "3-1", "1-", "-1", "1024", "0-1024", "1,,2", "1-2-3"] {
            assert!(parse_cpu_list(text).is_err(), "{text}");
        }
        let long = vec!["0-1023"; 1000].join(",");
        assert_eq!(parse_cpu_list(&long).unwrap().len(), 1024);
    }
}
