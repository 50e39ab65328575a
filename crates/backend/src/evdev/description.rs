//! An input device by its description, in the text form of evemu's recordings: what a device of this kernel says by itself.
//!
//! | line | meaning |
//! |---|---|
//! | `N: name` | its name |
//! | `I: bus vendor product version` | ids, in hexadecimal |
//! | `P: byte byte …` | properties, eight bytes to a line |
//! | `B: type byte byte …` | codes of a type of events, continued by further lines for the type |
//! | `A: axis minimum maximum fuzz flat resolution` | an absolute axis; the number is hexadecimal, the others are decimal |
//! | `# …`, other lines with a colon | nothing |

use std::io;

use super::{AXES, InputInfo, TYPES};

/// Bytes of a bitmap, at most: 0x300 keys.
const MAX_BITMAP: usize = 96;
/// Bytes of a name, at most.
const MAX_NAME: usize = 127;

/// Adds one line to a description.
///
/// # Errors
/// The line makes no sense.
pub(super) fn line(info: &mut InputInfo, line: &str) -> io::Result<()> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, format!("\"{line}\" describes no input device"));
    if line.starts_with('#') {
        return Ok(());
    }
    let (kind, rest) = line.split_once(':').ok_or_else(wrong)?;
    let mut words = rest.split_whitespace();
    let mut hex = |limit: u32| {
        let number = words.next().and_then(|word| u32::from_str_radix(word, 16).ok());
        number.filter(|number| *number < limit).ok_or_else(wrong)
    };
    match kind {
        "N" => info.name = rest.trim().bytes().take(MAX_NAME).collect(),
        "I" => {
            for id in &mut info.ids {
                *id = hex(0x10000)? as u16;
            }
        }
        "P" => add(&mut info.properties, rest).ok_or_else(wrong)?,
        "B" => {
            let event_type = hex(TYPES.into())? as u8;
            let (_, bytes) = rest.trim_start().split_once(' ').ok_or_else(wrong)?;
            add(info.events.entry(event_type).or_default(), bytes).ok_or_else(wrong)?;
        }
        "A" => {
            let axis = hex(AXES.into())? as u8;
            let mut range = [0; 5];
            for number in &mut range {
                // Signed; the resolution is missing in old recordings.
                *number = words.next().map_or(Ok(0), |word| word.parse::<i32>().map_err(|_| wrong()))? as u32;
            }
            info.axes.insert(axis, range);
        }
        _ => {}
    }
    Ok(())
}

/// Adds bytes to a bitmap; `None` if they are none, or too many.
fn add(bitmap: &mut Vec<u8>, text: &str) -> Option<()> {
    for word in text.split_whitespace() {
        bitmap.push(u8::from_str_radix(word, 16).ok()?);
    }
    (bitmap.len() <= MAX_BITMAP).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_is_read() {
        let mut info = InputInfo::default();
        let text = "# EVEMU 1.3\nN: A pen\nI: 0003 056a 00f8 0110\nP: 02 00\nB: 01 00 04\nB: 01 ff\nA: 00 -5 10 1 2 3\nA: 3f 0 1 0 0";
        text.lines().for_each(|text| line(&mut info, text).unwrap());
        assert_eq!((info.name.as_slice(), info.ids), (&b"A pen"[..], [3, 0x56a, 0xf8, 0x110]));
        assert_eq!((info.properties.as_slice(), info.events[&1].as_slice()), (&[2, 0][..], &[0, 4, 0xff][..]));
        assert_eq!((info.axes[&0], info.axes[&0x3f]), ([-5i32 as u32, 10, 1, 2, 3], [0, 1, 0, 0, 0]));
        let long = format!("P: {}", "00 ".repeat(97));
        for bad in
            ["x", "I: 1 2 3", "I: 10000 1 1 1", "B: 20 00", "B: 01", "B: 01 100", "A: 40 0 0 0 0 0", "A: 0 x", &long]
        {
            assert!(line(&mut InputInfo::default(), bad).is_err(), "{bad}");
        }
    }
}
