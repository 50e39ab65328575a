//! Connections by their two ends, and by a number that the kernel keeps for us.

use std::collections::HashMap;
use std::net::SocketAddr;

/// The guest's end and the other, as the guest sees it.
pub(super) type Ends = (SocketAddr, SocketAddr);

/// Numbers are 60 bits: a place, and above it how often that was used.
const PLACE: u64 = 0xffff_ffff;
const USES: u32 = 0x0fff_ffff;

/// A collection of connections of one kind. Numbers are not used again for very long.
pub(super) struct Table<T> {
    slots: Vec<(u32, Option<(Ends, T)>)>,
    free: Vec<usize>,
    by_ends: HashMap<Ends, u64>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new(), by_ends: HashMap::new() }
    }
}

impl<T> Table<T> {
    pub(super) fn len(&self) -> usize {
        self.by_ends.len()
    }

    /// The number the next entry will get.
    fn next_id(&mut self) -> (usize, u64) {
        let place = self.free.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            self.slots.len() - 1
        });
        (place, u64::from(self.slots[place].0) << 32 | place as u64)
    }

    /// Adds an entry, made with its number; one with the same ends goes.
    pub(super) fn insert<E>(&mut self, ends: Ends, make: impl FnOnce(u64) -> Result<T, E>) -> Result<u64, E> {
        if let Some(old) = self.by_ends.get(&ends) {
            self.remove(*old);
        }
        let (place, id) = self.next_id();
        match make(id) {
            Ok(entry) => {
                self.slots[place].1 = Some((ends, entry));
                self.by_ends.insert(ends, id);
                Ok(id)
            }
            Err(why) => {
                self.free.push(place);
                Err(why)
            }
        }
    }

    pub(super) fn find(&self, ends: Ends) -> Option<u64> {
        self.by_ends.get(&ends).copied()
    }

    pub(super) fn get_mut(&mut self, id: u64) -> Option<&mut T> {
        let (uses, slot) = self.slots.get_mut((id & PLACE) as usize)?;
        if u64::from(*uses) != id >> 32 {
            return None;
        }
        slot.as_mut().map(|(_, entry)| entry)
    }

    pub(super) fn remove(&mut self, id: u64) {
        let place = (id & PLACE) as usize;
        if self.get_mut(id).is_some()
            && let Some((uses, slot)) = self.slots.get_mut(place)
            && let Some((ends, _)) = slot.take()
        {
            *uses = (*uses + 1) & USES;
            self.by_ends.remove(&ends);
            self.free.push(place);
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        self.slots.iter().enumerate().filter_map(|(place, (uses, slot))| {
            slot.as_ref().map(|(_, entry)| (u64::from(*uses) << 32 | place as u64, entry))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(port: u16) -> Ends {
        (SocketAddr::from(([10, 0, 2, 15], port)), SocketAddr::from(([192, 0, 2, 1], 80)))
    }

    #[test]
    fn numbers_of_entries_that_are_gone_mean_nothing() {
        let mut table = Table::default();
        let put = |table: &mut Table<u64>, port| table.insert(ends(port), Ok::<_, ()>).unwrap();
        let (first, second) = (put(&mut table, 1), put(&mut table, 2));
        assert_eq!((table.find(ends(1)), table.get_mut(second).copied()), (Some(first), Some(second)));
        table.remove(first);
        assert_eq!((table.find(ends(1)), table.len()), (None, 1));
        assert_eq!(table.get_mut(first), None);
        let third = put(&mut table, 3);
        assert!(third != first && third & PLACE == first & PLACE);
        table.remove(first);
        let again = put(&mut table, 3);
        assert_eq!(table.get_mut(third), None);
        assert_eq!(table.len(), 2);
        assert_eq!(table.iter().map(|(id, _)| id).collect::<Vec<_>>(), [again, second]);
        assert!(table.insert(ends(9), |_| Err(())).is_err());
        assert_eq!(table.find(ends(9)), None);
    }
}
