//! The pairs that may still be joined, and where each of them stands.
//!
//! Only pairs with a count of at least `least` are kept, a guess at the count of the last merge: the
//! count of a pair never grows after the merge that gave birth to it, so the others would be kept for
//! nothing. Where the guess was too high, the lists are built anew with a lower one.
//!
//! A list names every place where its pair was born, in the order of positions. A place where it stands no
//! more is recognised by the symbols there.

use std::ops::Range;

use super::progress::Progress;
use super::queue::Queue;
use super::table::{List, Table, key_of};
use super::words::{Occurrence, Words};

pub struct Lists {
    /// The lists, one after another.
    pub arena: Vec<Occurrence>,
    pub table: Table,
    queue: Queue,
    least: u64,
    /// Where the list of the pair being joined was: the lists that are born go there first.
    vacant: Range<usize>,
}

impl Lists {
    /// List the pairs of `words` that occur at least `least` times, which is at least once.
    pub fn build<E>(
        words: &Words,
        token_lengths: &[u32],
        least: u64,
        progress: &mut Progress<'_, E>,
    ) -> Result<Self, E> {
        let mut all = Table::new(0);
        words.visit_pairs(token_lengths, progress, |pair, _, count| {
            let list = all.get_or_insert(key_of(pair));
            list.count += count;
            list.length += 1;
        })?;
        let mut lists = Self {
            arena: Vec::new(),
            table: Table::new(least),
            queue: Queue::new(least),
            least,
            vacant: 0..0,
        };
        let mut filled = 0;
        for (key, List { count, length, .. }) in all.iter() {
            if count >= least {
                // The length is counted anew while the list is filled.
                *lists.table.get_or_insert(key) = List { count, start: filled, length: 0 };
                lists.queue.push(key, count);
                filled += length;
            }
        }
        lists.arena.resize(filled, Occurrence::default());
        words.visit_pairs(token_lengths, progress, |pair, occurrence, _| {
            if let Some(list) = lists.table.get_mut(key_of(pair)) {
                lists.arena[list.start + list.length] = occurrence;
                list.length += 1;
            }
        })?;
        Ok(lists)
    }

    pub fn least(&self) -> u64 {
        self.least
    }

    /// Take the pair to be joined next and where its list is; `None` if every pair has a count below
    /// `least`.
    pub fn pop(&mut self) -> Option<(u64, Range<usize>)> {
        let key = self.queue.pop(|key| self.table.count(key))?;
        let list = std::mem::take(self.table.get_mut(key)?);
        self.vacant = list.start..list.start + list.length;
        Some((key, self.vacant.clone()))
    }

    /// Add a pair that was just born. Returns where in the arena its occurrences must be written.
    pub fn add(&mut self, key: u64, count: u64, length: usize) -> usize {
        let start = if length <= self.vacant.len() {
            let start = self.vacant.start;
            self.vacant.start += length;
            start
        } else {
            let start = self.arena.len();
            self.arena.resize(start + length, Occurrence::default());
            start
        };
        *self.table.get_or_insert(key) = List { count, start, length };
        self.queue.push(key, count);
        start
    }
}
