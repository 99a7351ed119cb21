//! Which pair comes next.
//!
//! Counts only fall, and the largest one with them. So only pairs of the class of counts in which the
//! largest is now are held in a heap, a small one; the others wait, unsorted, in the class where their
//! count was when it was last looked at. Entries are lazy: an entry whose count has fallen since is put
//! right when it comes up.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::classes::{CLASSES, class_of};

pub struct Queue {
    /// Pairs with a count of the open class, the most frequent first, then the smaller key.
    heap: BinaryHeap<(u64, Reverse<u64>)>,
    open: usize,
    /// Keys by the class of their count.
    waiting: Vec<Vec<u64>>,
    /// Pairs with a lower count are dropped.
    least: u64,
}

impl Queue {
    pub fn new(least: u64) -> Self {
        Self { heap: BinaryHeap::new(), open: CLASSES, waiting: vec![Vec::new(); CLASSES], least }
    }

    /// Add a pair. Its count must not exceed that of the last pair taken by more than its class.
    pub fn push(&mut self, key: u64, count: u64) {
        if count < self.least {
            return;
        }
        let class = class_of(count);
        if class >= self.open {
            self.heap.push((count, Reverse(key)));
        } else {
            self.waiting[class].push(key);
        }
    }

    /// Take the pair with the highest count, among equals the one with the smallest key. `count_of` gives
    /// the present count of a pair.
    pub fn pop(&mut self, count_of: impl Fn(u64) -> u64) -> Option<u64> {
        loop {
            if let Some(key) = self.pop_open(&count_of) {
                return Some(key);
            }
            self.open_next(&count_of)?;
        }
    }

    /// The pair that probably comes next.
    pub fn peek(&self) -> Option<u64> {
        self.heap.peek().map(|(_, Reverse(key))| *key)
    }

    fn pop_open(&mut self, count_of: impl Fn(u64) -> u64) -> Option<u64> {
        while let Some((count, Reverse(key))) = self.heap.pop() {
            let present = count_of(key);
            if present == count {
                return Some(key);
            }
            self.push(key, present);
        }
        None
    }

    /// Fill the heap from the next class that has pairs; `None` if there is none.
    fn open_next(&mut self, count_of: impl Fn(u64) -> u64) -> Option<()> {
        let filled = (0..self.open).rev().find(|class| !self.waiting[*class].is_empty())?;
        self.open = filled;
        for key in std::mem::take(&mut self.waiting[filled]) {
            self.push(key, count_of(key));
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn pairs_come_by_their_present_count_then_by_key() {
        let mut counts: HashMap<u64, u64> =
            [(1, 7), (2, 1 << 40), (3, 7), (4, (1 << 40) + 1), (5, 900), (6, 1)].into();
        let mut queue = Queue::new(2);
        for (key, count) in &counts {
            queue.push(*key, *count);
        }
        assert_eq!(queue.pop(|key| counts[&key]), Some(4));
        counts.insert(2, 8);
        counts.insert(5, 6);
        counts.insert(7, 1000);
        queue.push(7, 1000);
        let order: Vec<u64> = std::iter::from_fn(|| queue.pop(|key| counts[&key])).collect();
        assert_eq!(order, [7, 2, 1, 3, 5]);
    }
}
