//! The pairs that may still be joined, and where each of them stands.
//!
//! Only pairs with a count of at least `least` are kept, a guess at the count of the last merge: the
//! count of a pair never grows after the merge that gave birth to it, so the others would be kept for
//! nothing. Where the guess was too high, the lists are built anew with a lower one.
//!
//! A list names every place where its pair was born, in the order of positions. A place where it stands no
//! more is recognised by the symbols there.

use std::sync::atomic::Ordering;

use super::progress::Progress;
use super::queue::Queue;
use super::table::{Place, Table, key_of};
use super::threads::{shared, side_by_side};
use super::words::{Occurrence, Words};
use crate::memory::{ZeroedArray, prefetch};

/// Occurrences of a chunk of the arena, or more where one list needs more.
const CHUNK: usize = 1 << 18;

/// Pairs of bytes.
const BYTE_PAIRS: usize = 1 << 16;

/// Stands for no place in the first chunk, which has fewer occurrences.
const NOWHERE: u32 = u32::MAX;

pub struct Lists {
    /// The lists, one after another in each chunk. Chunks are never moved.
    arena: Vec<ZeroedArray<Occurrence>>,
    /// The rest of the last chunk.
    free: Place,
    /// Where the list of the pair being joined was: the lists that are born go there first.
    vacant: Place,
    pub table: Table,
    queue: Queue,
    least: u64,
}

impl Lists {
    fn new(least: u64) -> Self {
        Self {
            arena: Vec::new(),
            free: Place::default(),
            vacant: Place::default(),
            table: Table::new(least),
            queue: Queue::new(least),
            least,
        }
    }

    /// List the pairs of `words` that occur at least `least` times, which is at least once. No token has
    /// more than one byte yet.
    pub fn of_bytes<E>(words: &Words, least: u64, progress: &mut Progress<'_, E>) -> Result<Self, E> {
        let threads = rayon::current_num_threads();
        // Lengths by part, so that each part knows where in a list to begin; counts by thread.
        let mut lengths: Vec<Vec<u32>> = words.parts().iter().map(|_| vec![0; BYTE_PAIRS]).collect();
        let mut counts = vec![vec![0_u64; BYTE_PAIRS]; threads.min(words.parts().len())];
        for (parts, lengths) in words.parts().chunks(threads).zip(lengths.chunks_mut(threads)) {
            side_by_side(parts.iter().zip(lengths).zip(&mut counts), |((part, lengths), counts)| {
                words.visit_pairs(
                    part,
                    |_| 1,
                    |pair, _, count| {
                        lengths[number_of(pair)] += 1;
                        counts[number_of(pair)] += count;
                    },
                );
            });
            progress.spend(parts.iter().map(|part| part.positions.len()).sum())?;
        }

        let mut lists = Self::new(least);
        let mut filled = 0;
        for number in 0..BYTE_PAIRS {
            let count = counts.iter().map(|counts| counts[number]).sum();
            let start = filled;
            if count >= least {
                for lengths in &mut lengths {
                    filled += std::mem::replace(&mut lengths[number], filled);
                }
                let key = key_of((number as u32 >> 8, number as u32 & 0xff));
                lists.add(key, count, Place { chunk: 0, start, length: filled - start });
            } else if count > 0 {
                lengths.iter_mut().for_each(|lengths| lengths[number] = NOWHERE);
            }
        }

        let mut chunk = ZeroedArray::new(filled as usize);
        let places = shared(&mut chunk);
        for (parts, next) in words.parts().chunks(threads).zip(lengths.chunks_mut(threads)) {
            side_by_side(parts.iter().zip(next), |(part, next)| {
                words.visit_pairs(
                    part,
                    |_| 1,
                    |pair, occurrence, _| {
                        let next = &mut next[number_of(pair)];
                        if *next != NOWHERE {
                            places[*next as usize].store(occurrence.0, Ordering::Relaxed);
                            *next += 1;
                        }
                    },
                );
            });
            progress.spend(parts.iter().map(|part| part.positions.len()).sum())?;
        }
        lists.arena.push(chunk);
        Ok(lists)
    }

    /// List the pairs of `words` that occur at least `least` times, which is at least once.
    pub fn of_tokens<E>(
        words: &Words,
        token_lengths: &[u32],
        least: u64,
        progress: &mut Progress<'_, E>,
    ) -> Result<Self, E> {
        let length_of = |token: u32| token_lengths[token as usize] as usize;
        let mut all = Table::new(0);
        for part in words.parts() {
            words.visit_pairs(part, length_of, |pair, _, word_count| {
                let (count, place) = all.get_or_insert(key_of(pair));
                *count += word_count;
                place.length += 1;
            });
            progress.spend(part.positions.len())?;
        }
        let mut lists = Self::new(least);
        let mut filled = 0;
        for (key, count, Place { length, .. }) in all.iter() {
            if count >= least {
                // The length is counted anew while the list is filled.
                lists.add(key, count, Place { chunk: 0, start: filled, length: 0 });
                filled += length;
            }
        }
        let mut chunk = ZeroedArray::new(filled as usize);
        for part in words.parts() {
            words.visit_pairs(part, length_of, |pair, occurrence, _| {
                if let Some(place) = lists.table.place_mut(key_of(pair)) {
                    chunk[(place.start + place.length) as usize] = occurrence;
                    place.length += 1;
                }
            });
            progress.spend(part.positions.len())?;
        }
        lists.arena.push(chunk);
        Ok(lists)
    }

    /// Give the memory back.
    pub fn clear(&mut self) {
        *self = Self::new(self.least);
    }

    pub fn least(&self) -> u64 {
        self.least
    }

    /// Take the pair to be joined next and where its list is; `None` if every pair has a count below
    /// `least`.
    pub fn pop(&mut self) -> Option<(u64, Place)> {
        let key = self.queue.pop(|key| self.table.count(key))?;
        self.vacant = self.table.take_place(key)?;
        if let Some(place) = self.queue.peek().and_then(|next| self.table.place_mut(next)) {
            prefetch(&self.arena[place.chunk as usize], place.start as usize);
        }
        Some((key, self.vacant))
    }

    /// The occurrences at a place.
    pub fn occurrences(&self, place: Place) -> &[Occurrence] {
        &self.arena[place.chunk as usize][place.range()]
    }

    /// The same to be written.
    pub fn occurrences_mut(&mut self, place: Place) -> &mut [Occurrence] {
        &mut self.arena[place.chunk as usize][place.range()]
    }

    /// A place for the lists of pairs that were just born.
    pub fn make_room(&mut self, length: u32) -> Place {
        if length <= self.vacant.length {
            return self.vacant.take(length);
        }
        if length > self.free.length {
            let occurrences = CHUNK.max(length as usize);
            self.free = Place { chunk: self.arena.len() as u32, start: 0, length: occurrences as u32 };
            self.arena.push(ZeroedArray::new(occurrences));
        }
        self.free.take(length)
    }

    /// Add a pair that was just born, and the place of its list.
    pub fn add(&mut self, key: u64, count: u64, place: Place) {
        let (known_count, known_place) = self.table.get_or_insert(key);
        (*known_count, *known_place) = (count, place);
        self.queue.push(key, count);
    }
}

fn number_of((left, right): (u32, u32)) -> usize {
    (left << 8 | right) as usize % BYTE_PAIRS
}
