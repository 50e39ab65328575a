//! The configuration of an input device: the driver selects what it wants to know (5.8.5).

use backend::evdev::InputInfo;

/// Bytes of the configuration.
pub(super) const CONFIG_SIZE: usize = 136;
/// Bytes of one answer, at most.
const MAX_ANSWER: usize = 128;

/// What can be selected.
mod select {
    pub(super) const NAME: u8 = 0x01;
    pub(super) const SERIAL: u8 = 0x02;
    pub(super) const IDS: u8 = 0x03;
    pub(super) const PROPERTIES: u8 = 0x10;
    pub(super) const EVENTS: u8 = 0x11;
    pub(super) const AXIS: u8 = 0x12;
}

/// The configuration with what is selected.
pub(super) fn structure(info: &InputInfo, select: u8, subselect: u8) -> [u8; CONFIG_SIZE] {
    let answer = answer(info, select, subselect);
    let len = answer.len().min(MAX_ANSWER);
    let mut structure = [0; CONFIG_SIZE];
    structure[..3].copy_from_slice(&[select, subselect, len as u8]);
    structure[8..8 + len].copy_from_slice(&answer[..len]);
    structure
}

fn answer(info: &InputInfo, select: u8, subselect: u8) -> Vec<u8> {
    match (select, subselect) {
        (select::NAME, 0) => info.name.clone(),
        (select::SERIAL, 0) => info.serial.clone(),
        (select::IDS, 0) => info.ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
        (select::PROPERTIES, 0) => bitmap(&info.properties),
        (select::EVENTS, kind) => info.events.get(&kind).map(|codes| bitmap(codes)).unwrap_or_default(),
        (select::AXIS, axis) => {
            info.axes.get(&axis).into_iter().flatten().flat_map(|word| word.to_le_bytes()).collect()
        }
        _ => Vec::new(),
    }
}

/// A bitmap without the zeroes at its end.
fn bitmap(bits: &[u8]) -> Vec<u8> {
    let len = bits.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    bits[..len].to_vec()
}
