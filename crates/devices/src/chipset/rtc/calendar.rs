//! Seconds since 1970 to calendar dates and back (proleptic Gregorian), and the register formats of numbers.

use super::regs::{PM, b};

const DAY_S: i64 = 86_400;

/// A moment by the calendar.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Moment {
    pub(super) year: i64,
    /// 1 to 12.
    pub(super) month: u8,
    /// 1 to 31.
    pub(super) day: u8,
    /// 0 to 23.
    pub(super) hour: u8,
    /// 0 to 59.
    pub(super) minute: u8,
    /// 0 to 59.
    pub(super) second: u8,
}

impl Moment {
    /// The moment `seconds` after 1970-01-01 00:00:00.
    pub(super) fn from_seconds(seconds: i64) -> Self {
        let (days, rest) = (seconds.div_euclid(DAY_S), seconds.rem_euclid(DAY_S));
        // Years are counted from March, so that the leap day comes last; eras are 400 years of 146,097 days.
        let days = days + 719_468;
        let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        Self {
            year: era * 400 + year_of_era + i64::from(month <= 2),
            month: month as u8,
            day: day as u8,
            hour: (rest / 3600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
        }
    }

    /// Seconds since 1970-01-01 00:00:00; `None` for a date or time that does not exist.
    pub(super) fn to_seconds(self) -> Option<i64> {
        let exists =
            (1..=12).contains(&self.month) && self.day >= 1 && self.hour < 24 && self.minute < 60 && self.second < 60;
        if !exists {
            return None;
        }
        let year = self.year - i64::from(self.month <= 2);
        let month_from_march = (i64::from(self.month) + 9) % 12;
        let day_of_year = (153 * month_from_march + 2) / 5 + i64::from(self.day) - 1;
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        let time = i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second);
        let seconds = days * DAY_S + time;
        // The 31st of a shorter month would be taken for a day of the next.
        (Self::from_seconds(seconds) == self).then_some(seconds)
    }

    /// 1 (Sunday) to 7.
    pub(super) fn weekday(seconds: i64) -> u8 {
        // 1970 began on a Thursday.
        ((seconds.div_euclid(DAY_S) + 4).rem_euclid(7) + 1) as u8
    }
}

/// How register B says that numbers are written.
#[derive(Clone, Copy)]
pub(super) struct Format {
    register_b: u8,
}

impl Format {
    pub(super) fn of(register_b: u8) -> Self {
        Self { register_b }
    }

    /// A number of 0 to 99 as the register shows it.
    pub(super) fn encode(self, number: u8) -> u8 {
        if self.register_b & b::BINARY != 0 { number } else { ((number / 10 % 10) << 4) | (number % 10) }
    }

    /// The number in a register; `None` if it is not one of 0 to 99.
    pub(super) fn decode(self, register: u8) -> Option<u8> {
        let number = if self.register_b & b::BINARY != 0 {
            register
        } else if register & 0x0f > 9 {
            return None;
        } else {
            (register >> 4) * 10 + (register & 0x0f)
        };
        (number <= 99).then_some(number)
    }

    /// An hour of 0 to 23 as the register shows it.
    pub(super) fn encode_hour(self, hour: u8) -> u8 {
        if self.register_b & b::HOURS_24 != 0 {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { PM } else { 0 }
    }

    /// The hour (0 to 23) in a register.
    pub(super) fn decode_hour(self, register: u8) -> Option<u8> {
        if self.register_b & b::HOURS_24 != 0 {
            return self.decode(register).filter(|&hour| hour < 24);
        }
        let twelve = self.decode(register & !PM).filter(|hour| (1..=12).contains(hour))?;
        Some(twelve % 12 + if register & PM != 0 { 12 } else { 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        let moment = |year, month, day, hour, minute, second| Moment { year, month, day, hour, minute, second };
        for (seconds, expected, weekday) in [
            (0, moment(1970, 1, 1, 0, 0, 0), 5),
            (951_782_400, moment(2000, 2, 29, 0, 0, 0), 3),
            (1_000_000_000, moment(2001, 9, 9, 1, 46, 40), 1),
            (4_107_542_399, moment(2100, 2, 28, 23, 59, 59), 1),
            (4_107_542_400, moment(2100, 3, 1, 0, 0, 0), 2),
            (-1, moment(1969, 12, 31, 23, 59, 59), 4),
            (253_402_300_799, moment(9999, 12, 31, 23, 59, 59), 6),
        ] {
            assert_eq!(Moment::from_seconds(seconds), expected);
            assert_eq!(expected.to_seconds(), Some(seconds));
            assert_eq!(Moment::weekday(seconds), weekday, "{expected:?}");
        }
        for wrong in [
            moment(2023, 2, 29, 0, 0, 0),
            moment(2023, 4, 31, 0, 0, 0),
            moment(2023, 0, 1, 0, 0, 0),
            moment(2023, 13, 1, 0, 0, 0),
            moment(2023, 1, 0, 0, 0, 0),
            moment(2023, 1, 1, 24, 0, 0),
            moment(2023, 1, 1, 0, 60, 0),
            moment(2023, 1, 1, 0, 0, 60),
        ] {
            assert_eq!(wrong.to_seconds(), None, "{wrong:?}");
        }
    }

    #[test]
    fn every_day_of_nine_centuries_goes_round() {
        for day in (-200_000..130_000).step_by(1) {
            let seconds = day * DAY_S + 4321;
            assert_eq!(Moment::from_seconds(seconds).to_seconds(), Some(seconds));
        }
    }

    #[test]
    fn number_formats() {
        let (bcd, binary) = (Format::of(b::HOURS_24), Format::of(b::HOURS_24 | b::BINARY));
        assert_eq!((bcd.encode(59), binary.encode(59)), (0x59, 59));
        assert_eq!((bcd.decode(0x59), binary.decode(59)), (Some(59), Some(59)));
        assert_eq!((bcd.decode(0x5a), bcd.decode(0xa0), binary.decode(100)), (None, None, None));
        let (bcd12, binary12) = (Format::of(0), Format::of(b::BINARY));
        for (hour, twelve) in [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)] {
            assert_eq!(bcd12.encode_hour(hour), twelve);
            assert_eq!(bcd12.decode_hour(twelve), Some(hour));
            assert_eq!(binary12.decode_hour(binary12.encode_hour(hour)), Some(hour));
        }
        assert_eq!((bcd12.decode_hour(0x00), bcd12.decode_hour(0x13), bcd.decode_hour(0x24)), (None, None, None));
    }
}
