//! Joining a pair at the places of its list, on one thread or on several.

use super::Pair;
use super::neighbours::Neighbours;
use super::words::{FrequentWords, NO_TOKEN, Occurrence, Part};
use crate::memory::prefetch;

/// Places of a list whose symbols are asked for ahead of their turn.
const AHEAD: usize = 24;

/// What is joined, and what is known of all tokens and words.
pub struct Joining<'a> {
    pub pair: Pair,
    pub joined: u32,
    /// In bytes, by id.
    pub token_lengths: &'a [u32],
    pub frequent: &'a FrequentWords,
}

/// What one thread goes through: some words that follow each other, and the places of a list in them.
pub struct Stretch<'a> {
    pub symbols: &'a mut [u32],
    /// Position of the first symbol.
    start: usize,
    /// The places that are left.
    list: &'a [Occurrence],
    left: &'a mut Neighbours,
    right: &'a mut Neighbours,
    /// How often the joined token follows itself.
    pub twins: u64,
}

impl<'a> Stretch<'a> {
    /// Cut words and places into one stretch for each of `neighbours`, all with about as many places.
    pub fn divide(
        mut symbols: &'a mut [u32],
        parts: &[Part],
        mut list: &'a [Occurrence],
        neighbours: impl ExactSizeIterator<Item = (&'a mut Neighbours, &'a mut Neighbours)>,
    ) -> Vec<Self> {
        let mut stretches = Vec::with_capacity(neighbours.len());
        let mut start = 0;
        for (left, right) in neighbours {
            let more = stretches.capacity() - stretches.len();
            let border = if more > 1 { border(list, parts, list.len() / more) } else { None };
            let (end, places) = border.unwrap_or((start + symbols.len(), list.len()));
            let (here, behind) = symbols.split_at_mut(end - start);
            let (listed, listed_behind) = list.split_at(places);
            stretches.push(Self { symbols: here, start, list: listed, left, right, twins: 0 });
            (symbols, list, start) = (behind, listed_behind, end);
        }
        stretches
    }

    /// Whether no place is left.
    pub fn is_done(&self) -> bool {
        self.list.is_empty()
    }

    /// Join the pair at up to `places` places, and note what stands beside them.
    ///
    /// The places come in order: of overlapping ones the first is joined.
    pub fn join(&mut self, places: usize, joining: &Joining<'_>) {
        let Joining { pair, joined, token_lengths, frequent } = *joining;
        let symbols = &mut *self.symbols;
        let left_length = token_lengths[pair.0 as usize] as usize;
        let length = token_lengths[joined as usize] as usize;
        let (list, behind) = self.list.split_at(places.min(self.list.len()));
        self.list = behind;
        for place in list.iter().take(AHEAD) {
            prefetch(symbols, place.position() - self.start);
            prefetch(symbols, place.position() - self.start + length);
        }
        for (number, occurrence) in list.iter().enumerate() {
            if let Some(ahead) = list.get(number + AHEAD) {
                prefetch(symbols, ahead.position() - self.start);
                prefetch(symbols, ahead.position() - self.start + length);
            }
            let at = occurrence.position() - self.start;
            if (symbols[at], symbols[at + left_length]) != pair {
                continue;
            }
            symbols[at + left_length] = NO_TOKEN;
            symbols[at] = joined;
            symbols[at + length - 1] = joined;

            let weight = frequent.count(*occurrence);
            let (before, after) = (symbols[at - 1], symbols[at + length]);
            if before != NO_TOKEN {
                if before == joined {
                    self.twins += weight;
                }
                let moved = occurrence.moved_left(token_lengths[before as usize]);
                self.left.add(before, moved, weight);
            }
            // Where the pair follows itself, the next place notes the joined token on its left.
            let pair_follows = after == pair.0 && symbols[at + length + left_length] == pair.1;
            if after != NO_TOKEN && !pair_follows {
                self.right.add(after, *occurrence, weight);
            }
        }
    }
}

/// Where a part begins that divides a list after about `places` places, and after how many it does; `None` if
/// there is no such part.
fn border(list: &[Occurrence], parts: &[Part], places: usize) -> Option<(usize, usize)> {
    let position = list.get(places)?.position();
    let next = parts.partition_point(|part| part.positions.start <= position);
    let starts = parts[next.saturating_sub(1)..].iter().take(2).map(|part| part.positions.start);
    let borders = starts.map(|start| (start, list.partition_point(|place| place.position() < start)));
    borders.min_by_key(|(_, before)| before.abs_diff(places))
}
