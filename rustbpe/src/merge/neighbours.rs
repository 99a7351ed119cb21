//! What stands beside the places where a pair is joined, grouped by token.

use std::sync::atomic::{AtomicU64, Ordering};

use super::lists::Lists;
use super::table::Place;
use super::threads::{shared, side_by_side};
use super::words::Occurrence;

/// The neighbours on one side, as one thread found them. Reused from merge to merge.
#[derive(Default)]
pub struct Neighbours {
    /// By token id; all zero but for the ids in `met`.
    groups: Vec<Group>,
    met: Vec<u32>,
    found: Vec<(u32, Occurrence)>,
}

#[derive(Clone, Copy, Default)]
struct Group {
    /// Sum of the counts of the words.
    weight: u64,
    occurrences: u32,
    /// Where the next occurrence goes.
    next: u32,
}

/// No list is made of these occurrences. No list is so long.
const NOWHERE: u32 = u32::MAX;

impl Neighbours {
    /// Make room for token ids below `ids`.
    fn reserve(&mut self, ids: usize) {
        if ids > self.groups.len() {
            self.groups.resize(ids.next_power_of_two(), Group::default());
        }
    }

    /// The token `id` stands here; `occurrence` is that of the pair which it makes with the joined token.
    #[inline]
    pub fn add(&mut self, id: u32, occurrence: Occurrence, weight: u64) {
        self.count(id, 1, weight);
        self.found.push((id, occurrence));
    }

    #[inline]
    fn count(&mut self, id: u32, occurrences: u32, weight: u64) {
        let group = &mut self.groups[id as usize];
        if group.occurrences == 0 {
            self.met.push(id);
        }
        group.occurrences += occurrences;
        group.weight += weight;
    }

    /// Count those that another thread has found to these.
    fn count_all(&mut self, other: &Self) {
        for id in &other.met {
            let group = other.groups[*id as usize];
            self.count(*id, group.occurrences, group.weight);
        }
    }

    /// Give the pairs of these tokens with the joined token places for their lists, those which are
    /// frequent enough; `None` if there is none.
    fn place(&mut self, lists: &mut Lists, key_with: impl Fn(u32) -> u64) -> Option<Place> {
        let least = lists.least();
        let mut length = 0;
        for id in &self.met {
            let group = &self.groups[*id as usize];
            if group.weight >= least {
                length += group.occurrences;
                lists.table.prefetch(key_with(*id));
            }
        }
        if length == 0 {
            return None;
        }
        let all = lists.make_room(length);
        let mut rest = all;
        for id in &self.met {
            let group = &mut self.groups[*id as usize];
            group.next = NOWHERE;
            if group.weight >= least {
                group.next = rest.start - all.start;
                lists.add(key_with(*id), group.weight, rest.take(group.occurrences));
            }
        }
        Some(all)
    }

    /// Take the next places of all those that were found.
    fn take_places(&mut self, all: &mut Self) {
        for id in &self.met {
            let group = &mut self.groups[*id as usize];
            let of_all = &mut all.groups[*id as usize];
            group.next = of_all.next;
            if of_all.next != NOWHERE {
                of_all.next += group.occurrences;
            }
        }
    }

    /// Write the occurrences to their places.
    fn write(&mut self, places: &[AtomicU64]) {
        for (id, occurrence) in &self.found {
            let next = &mut self.groups[*id as usize].next;
            if *next != NOWHERE {
                places[*next as usize].store(occurrence.0, Ordering::Relaxed);
                *next += 1;
            }
        }
    }

    fn forget(&mut self) {
        for id in self.met.drain(..) {
            self.groups[id as usize] = Group::default();
        }
        self.found.clear();
    }
}

/// The neighbours on one side.
pub struct Side {
    /// By thread. With more than one, each has seen places behind those of the thread before it.
    threads: Vec<Neighbours>,
    all: Neighbours,
    used: usize,
}

impl Side {
    pub fn new(threads: usize) -> Self {
        let neighbours = |_| Neighbours::default();
        Self { threads: (0..threads).map(neighbours).collect(), all: Neighbours::default(), used: 0 }
    }

    /// Let so many threads look for tokens with ids below `ids`.
    pub fn start(&mut self, threads: usize, ids: usize) -> &mut [Neighbours] {
        self.used = threads;
        let found = &mut self.threads[..threads];
        found.iter_mut().for_each(|found| found.reserve(ids));
        found
    }

    /// Add up what the threads found.
    pub fn add_up(&mut self, ids: usize) {
        if self.used > 1 {
            self.all.reserve(ids);
            self.threads[..self.used].iter().for_each(|found| self.all.count_all(found));
        }
    }

    /// The tokens that stand here, each once, with how often they do.
    pub fn weights(&self) -> impl Iterator<Item = (u32, u64)> {
        let all = if self.used > 1 { &self.all } else { &self.threads[0] };
        all.met.iter().map(|id| (*id, all.groups[*id as usize].weight))
    }

    /// Make the lists of the pairs of these tokens with the joined token, and forget the tokens.
    pub fn move_to(&mut self, lists: &mut Lists, key_with: impl Fn(u32) -> u64) {
        let threads = &mut self.threads[..self.used];
        if let [found] = threads {
            if let Some(place) = found.place(lists, key_with) {
                found.write(shared(lists.occurrences_mut(place)));
            }
        } else if let Some(place) = self.all.place(lists, key_with) {
            threads.iter_mut().for_each(|found| found.take_places(&mut self.all));
            let places = shared(lists.occurrences_mut(place));
            side_by_side(&mut *threads, |found| found.write(places));
        }
        threads.iter_mut().for_each(Neighbours::forget);
        self.all.forget();
    }
}
