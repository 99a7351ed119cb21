//! Pairs with their counts and the places of their occurrences: a hash table with open addressing.
//!
//! A table of its own because the joining of a pair looks up a batch of pairs known in advance, whose
//! slots can be fetched from memory at the same time.

use std::ops::Range;

use super::Pair;
use crate::memory::{Zero, ZeroedArray, prefetch};

/// Where the occurrences of a pair stand: a part of one of the arena's chunks.
#[derive(Clone, Copy, Default)]
pub struct Place {
    pub chunk: u32,
    pub start: u32,
    pub length: u32,
}

// SAFETY: all fields are numbers.
unsafe impl Zero for Place {}

impl Place {
    pub fn range(self) -> Range<usize> {
        self.start as usize..(self.start + self.length) as usize
    }

    /// Take so many of the first occurrences away.
    pub fn take(&mut self, length: u32) -> Self {
        let taken = Self { length, ..*self };
        self.start += length;
        self.length -= length;
        taken
    }
}

/// A pair and its count. They lie apart from the place, which is needed far less often.
#[derive(Clone, Copy)]
struct Slot {
    /// The complement of the key: zero is that of no pair, as ids stay below `u32::MAX`.
    mark: u64,
    count: u64,
}

// SAFETY: both fields are numbers.
unsafe impl Zero for Slot {}

const FREE: u64 = 0;

/// A pair as one number that sorts as the pair does.
pub fn key_of((left, right): Pair) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// The pair of a key.
pub fn pair_of(key: u64) -> Pair {
    ((key >> 32) as u32, key as u32)
}

pub struct Table {
    /// A power of two, at most half of them taken.
    slots: ZeroedArray<Slot>,
    /// By the number of the slot.
    places: ZeroedArray<Place>,
    taken: usize,
    /// Pairs whose count is less are forgotten when the table grows. The count of a pair never grows
    /// again, so nobody will ask for them.
    least: u64,
}

impl Table {
    pub fn new(least: u64) -> Self {
        Self { slots: ZeroedArray::new(1 << 10), places: ZeroedArray::new(1 << 10), taken: 0, least }
    }

    /// The place of a pair, if it is known.
    #[inline]
    pub fn place_mut(&mut self, key: u64) -> Option<&mut Place> {
        let at = find(&self.slots, key);
        (self.slots[at].mark != FREE).then(|| &mut self.places[at])
    }

    /// The place of a pair, which then occurs no more.
    pub fn take_place(&mut self, key: u64) -> Option<Place> {
        let at = find(&self.slots, key);
        self.slots[at].count = 0;
        (self.slots[at].mark != FREE).then(|| self.places[at])
    }

    /// The count of a pair, zero if it is not known.
    #[inline]
    pub fn count(&self, key: u64) -> u64 {
        self.slots[find(&self.slots, key)].count
    }

    /// `count` occurrences of a pair are gone.
    #[inline]
    pub fn subtract(&mut self, key: u64, count: u64) {
        let at = find(&self.slots, key);
        let slot = &mut self.slots[at];
        if slot.mark != FREE {
            slot.count -= count;
        }
    }

    /// The count and the place of a pair, zero if it was not known.
    #[inline]
    pub fn get_or_insert(&mut self, key: u64) -> (&mut u64, &mut Place) {
        let mut at = find(&self.slots, key);
        if self.slots[at].mark == FREE {
            if self.taken * 2 >= self.slots.len() {
                self.grow();
                at = find(&self.slots, key);
            }
            self.taken += 1;
            self.slots[at].mark = !key;
        }
        (&mut self.slots[at].count, &mut self.places[at])
    }

    /// Ask for the slot of a pair that will be needed soon.
    #[inline]
    pub fn prefetch(&self, key: u64) {
        prefetch(&self.slots, first_slot(self.slots.len(), key));
    }

    /// Every pair with its count and its place, in no order that means anything.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64, Place)> {
        let taken = self.slots.iter().zip(&*self.places).filter(|(slot, _)| slot.mark != FREE);
        taken.map(|(slot, place)| (!slot.mark, slot.count, *place))
    }

    #[cold]
    fn grow(&mut self) {
        let kept: Vec<_> = self.iter().filter(|(_, count, _)| *count >= self.least).collect();
        let slots = (kept.len() * 4).next_power_of_two().max(self.slots.len());
        (self.slots, self.places) = (ZeroedArray::new(slots), ZeroedArray::new(slots));
        self.taken = kept.len();
        for (key, count, place) in kept {
            let at = find(&self.slots, key);
            self.slots[at] = Slot { mark: !key, count };
            self.places[at] = place;
        }
    }
}

/// Where the search for a key begins: the high bits of its product with 2^64 / golden ratio
/// (Knuth, The Art of Computer Programming, 6.4).
#[inline]
fn first_slot(slots: usize, key: u64) -> usize {
    (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - slots.trailing_zeros())) as usize
}

/// The slot that holds a key, or the free one where it would go.
#[inline]
fn find(slots: &[Slot], key: u64) -> usize {
    let mut at = first_slot(slots.len(), key);
    while slots[at].mark != !key && slots[at].mark != FREE {
        at = (at + 1) & (slots.len() - 1);
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_as_their_pairs_do_and_turn_back_into_them() {
        let mut pairs = [(256, 0), (0, 0), (0, 7), (1, 300), (1 << 31, 5), (255, 1 << 31)];
        let mut keys = pairs.map(key_of);
        keys.sort_unstable();
        pairs.sort_unstable();
        assert_eq!(keys.map(pair_of), pairs);
    }

    #[test]
    fn a_table_that_grows_keeps_what_counts_and_forgets_the_rest() {
        let mut table = Table::new(10);
        for id in 0..1000 {
            *table.get_or_insert(key_of((id, id + 1))).0 = 5 + u64::from(id) % 10;
        }
        for id in 0..1000 {
            let (count, expected) = (table.count(key_of((id, id + 1))), 5 + u64::from(id) % 10);
            assert!(count == expected || (count == 0 && expected < 10), "{id}: {count}");
        }
        assert_eq!(table.count(key_of((1, 1))), 0);
        assert!(table.place_mut(key_of((1, 1))).is_none());
        assert!(table.iter().filter(|(_, count, _)| *count >= 10).count() == 500);
    }

    #[test]
    fn counts_go_down_and_unknown_pairs_stay_unknown() {
        let mut table = Table::new(1);
        *table.get_or_insert(key_of((1, 2))).0 = 5;
        table.subtract(key_of((1, 2)), 3);
        table.subtract(key_of((2, 1)), 3);
        assert_eq!((table.count(key_of((1, 2))), table.count(key_of((2, 1)))), (2, 0));
    }
}
