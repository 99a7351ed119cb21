//! Pairs with their counts and occurrence lists: a hash table with open addressing.
//!
//! A table of its own because the joining of a pair looks up a batch of pairs known in advance, whose
//! slots can be fetched from memory at the same time.

use super::Pair;
use crate::memory::prefetch;

/// What is known of a pair: its count, and where its occurrences stand in the arena.
#[derive(Clone, Copy, Default)]
pub struct List {
    pub count: u64,
    pub start: usize,
    pub length: usize,
}

#[derive(Clone, Copy)]
struct Slot {
    key: u64,
    list: List,
}

/// No pair has this key: ids stay below `u32::MAX`.
const FREE: u64 = u64::MAX;

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
    slots: Vec<Slot>,
    taken: usize,
    /// Pairs whose count is less are forgotten when the table grows. The count of a pair never grows
    /// again, so nobody will ask for them.
    least: u64,
}

impl Table {
    pub fn new(least: u64) -> Self {
        Self { slots: free_slots(1 << 10), taken: 0, least }
    }

    /// The list of a pair, if there is one.
    #[inline]
    pub fn get_mut(&mut self, key: u64) -> Option<&mut List> {
        let at = find(&self.slots, key);
        let slot = &mut self.slots[at];
        (slot.key != FREE).then_some(&mut slot.list)
    }

    /// The count of a pair, zero if it has no list.
    #[inline]
    pub fn count(&self, key: u64) -> u64 {
        // A free slot has an empty list.
        self.slots[find(&self.slots, key)].list.count
    }

    /// `count` occurrences of a pair are gone.
    #[inline]
    pub fn subtract(&mut self, key: u64, count: u64) {
        if let Some(list) = self.get_mut(key) {
            list.count -= count;
        }
    }

    /// The list of a pair, an empty one if there was none.
    #[inline]
    pub fn get_or_insert(&mut self, key: u64) -> &mut List {
        let mut at = find(&self.slots, key);
        if self.slots[at].key == FREE {
            if self.taken * 2 >= self.slots.len() {
                self.grow();
                at = find(&self.slots, key);
            }
            self.taken += 1;
            self.slots[at].key = key;
        }
        &mut self.slots[at].list
    }

    /// Ask for the slot of a pair that will be needed soon.
    #[inline]
    pub fn prefetch(&self, key: u64) {
        prefetch(&self.slots, first_slot(self.slots.len(), key));
    }

    /// Every pair with its list, in no order that means anything.
    pub fn iter(&self) -> impl Iterator<Item = (u64, List)> {
        self.slots.iter().filter(|slot| slot.key != FREE).map(|slot| (slot.key, slot.list))
    }

    #[cold]
    fn grow(&mut self) {
        let kept: Vec<Slot> = self
            .slots
            .iter()
            .filter(|slot| slot.key != FREE && slot.list.count >= self.least)
            .copied()
            .collect();
        self.slots = free_slots((kept.len() * 4).next_power_of_two().max(self.slots.len()));
        self.taken = kept.len();
        for slot in kept {
            let at = find(&self.slots, slot.key);
            self.slots[at] = slot;
        }
    }
}

fn free_slots(slots: usize) -> Vec<Slot> {
    vec![Slot { key: FREE, list: List::default() }; slots]
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
    while slots[at].key != key && slots[at].key != FREE {
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
            table.get_or_insert(key_of((id, id + 1))).count = 5 + u64::from(id) % 10;
        }
        for id in 0..1000 {
            let (count, expected) = (table.count(key_of((id, id + 1))), 5 + u64::from(id) % 10);
            assert!(count == expected || (count == 0 && expected < 10), "{id}: {count}");
        }
        assert_eq!(table.count(key_of((1, 1))), 0);
        assert!(table.get_mut(key_of((1, 1))).is_none());
        assert!(table.iter().filter(|(_, list)| list.count >= 10).count() == 500);
    }

    #[test]
    fn counts_go_down_and_unknown_pairs_stay_unknown() {
        let mut table = Table::new(1);
        table.get_or_insert(key_of((1, 2))).count = 5;
        table.subtract(key_of((1, 2)), 3);
        table.subtract(key_of((2, 1)), 3);
        assert_eq!((table.count(key_of((1, 2))), table.count(key_of((2, 1)))), (2, 0));
    }
}
