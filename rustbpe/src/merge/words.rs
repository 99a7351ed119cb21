//! The words as one flat array of symbols, by the position of their bytes.
//!
//! A token's id stands at the positions of its first and its last byte, so both neighbours of a token
//! are one look away and joining two tokens writes three symbols. What stands between is never read.

use super::classes::{CLASSES, class_of, least_of};
use super::progress::Progress;
use crate::Error;

/// Stands before and after every word, and where a token began that was joined to the one before it.
pub const NO_TOKEN: u32 = u32::MAX;

/// Bytes of all different words that can be trained on, with one more byte for each word. A training
/// has fewer merges than that, so that the ids stay below `NO_TOKEN`.
pub const MOST_POSITIONS: usize = (u32::MAX - 1024) as usize;

/// A place where a pair stands or stood.
#[derive(Clone, Copy, Default)]
pub struct Occurrence {
    /// Of the first byte of the left token.
    pub position: u32,
    /// How often the word occurs; `MANY` if it must be looked up.
    count: u32,
}

const MANY: u32 = u32::MAX;

impl Occurrence {
    /// The same word, so many bytes further left.
    pub fn moved_left(self, bytes: u32) -> Self {
        Self { position: self.position - bytes, ..self }
    }
}

/// Words of at least two bytes, those that occur more often first: most of the work is in few pages.
pub struct Words {
    pub symbols: Vec<u32>,
    /// How often each word occurs, in the order of the words.
    counts: Vec<u64>,
    frequent: FrequentWords,
}

/// Position of the first byte and count of each word whose count an `Occurrence` cannot hold.
#[derive(Default)]
pub struct FrequentWords(Vec<(u32, u64)>);

impl FrequentWords {
    /// How often the word of `occurrence` occurs.
    #[inline]
    pub fn count(&self, occurrence: Occurrence) -> u64 {
        match occurrence.count {
            MANY => self.look_up(occurrence.position),
            count => u64::from(count),
        }
    }

    #[cold]
    fn look_up(&self, position: u32) -> u64 {
        let after = self.0.partition_point(|(start, _)| *start <= position);
        self.0[after - 1].1
    }
}

/// Words as they came, to be put in order.
#[derive(Default)]
struct Gathered {
    bytes: Vec<u8>,
    /// Length and count.
    words: Vec<(u32, u64)>,
}

impl Words {
    /// Take words with their counts; the byte b becomes the symbol `symbol_of[b]`.
    ///
    /// Words without a pair and words that occur zero times are left out. Fails when the counts add up
    /// to more than 64 bits hold, or when the words have more than `most_positions` bytes.
    pub fn new<W: AsRef<[u8]>, E: From<Error>>(
        counts: impl IntoIterator<Item = (W, u64)>,
        symbol_of: &[u8; 256],
        most_positions: usize,
        progress: &mut Progress<'_, E>,
    ) -> Result<Self, E> {
        let gathered = Gathered::new(counts, most_positions, progress)?;
        let positions = 1 + gathered.bytes.len() + gathered.words.len();
        let mut words = Words {
            symbols: vec![NO_TOKEN; positions],
            counts: vec![0; gathered.words.len()],
            frequent: FrequentWords::default(),
        };
        let mut places = gathered.places();
        let mut bytes = gathered.bytes.as_slice();
        for (length, count) in gathered.words {
            let (word, rest) = bytes.split_at(length as usize);
            bytes = rest;
            let (number, start) = &mut places[class_of(count)];
            words.counts[*number] = count;
            for (symbol, byte) in words.symbols[*start..].iter_mut().zip(word) {
                *symbol = u32::from(symbol_of[usize::from(*byte)]);
            }
            if count >= u64::from(MANY) {
                words.frequent.0.push((*start as u32, count));
            }
            *number += 1;
            *start += word.len() + 1;
            progress.spend(word.len() + 1)?;
        }
        words.frequent.0.sort_unstable();
        Ok(words)
    }

    /// A count that about `rank` words reach, but at least 1.
    pub fn count_at(&self, rank: usize) -> u64 {
        self.counts.get(rank).map_or(1, |count| least_of(class_of(*count)))
    }

    /// Symbols to write to, and counts to read meanwhile.
    pub fn parts(&mut self) -> (&mut [u32], &FrequentWords) {
        (&mut self.symbols, &self.frequent)
    }

    /// Call `visit` with every pair, in the order of positions: where it is and how often its word occurs.
    pub fn visit_pairs<E>(
        &self,
        token_lengths: &[u32],
        progress: &mut Progress<'_, E>,
        mut visit: impl FnMut((u32, u32), Occurrence, u64),
    ) -> Result<(), E> {
        let mut position = 1;
        for &word_count in &self.counts {
            let count = u32::try_from(word_count).unwrap_or(MANY);
            let mut left = self.symbols[position];
            loop {
                let next = position + token_lengths[left as usize] as usize;
                let right = self.symbols[next];
                if right == NO_TOKEN {
                    position = next + 1;
                    break;
                }
                visit((left, right), Occurrence { position: position as u32, count }, word_count);
                (position, left) = (next, right);
                progress.spend(1)?;
            }
        }
        Ok(())
    }
}

impl Gathered {
    fn new<W: AsRef<[u8]>, E: From<Error>>(
        counts: impl IntoIterator<Item = (W, u64)>,
        most_positions: usize,
        progress: &mut Progress<'_, E>,
    ) -> Result<Self, E> {
        let mut gathered = Gathered::default();
        let mut total = 0_u64;
        for (word, count) in counts {
            let bytes = word.as_ref();
            // No pair occurs more often than there are bytes in the text: this sum is the only place
            // where 64 bits could be too few.
            total = (bytes.len() as u64)
                .checked_mul(count)
                .and_then(|here| total.checked_add(here))
                .ok_or_else(too_many_occurrences)?;
            if bytes.len() < 2 || count == 0 {
                continue;
            }
            let before = 1 + gathered.bytes.len() + gathered.words.len();
            if bytes.len() >= most_positions.saturating_sub(before) {
                return Err(too_many_positions(most_positions).into());
            }
            gathered.words.push((bytes.len() as u32, count));
            gathered.bytes.extend_from_slice(bytes);
            progress.spend(bytes.len() + 1)?;
        }
        Ok(gathered)
    }

    /// For each class of counts, the number of its first word and the position where that starts.
    fn places(&self) -> Vec<(usize, usize)> {
        let mut places = vec![(0, 0); CLASSES];
        for (length, count) in &self.words {
            let (words, positions) = &mut places[class_of(*count)];
            *words += 1;
            *positions += *length as usize + 1;
        }
        let mut next = (0, 1);
        for place in places.iter_mut().rev() {
            let (words, positions) = std::mem::replace(place, next);
            next = (next.0 + words, next.1 + positions);
        }
        places
    }
}

fn too_many_occurrences() -> Error {
    Error::Invalid(
        "the word counts add up to more than 64 bits hold; one of the counts files is wrong: count its \
         shard again"
            .to_owned(),
    )
}

fn too_many_positions(most: usize) -> Error {
    Error::Invalid(format!(
        "the different words have more than {most} bytes in all (one more counted for each word), which is \
         the most that merges can be learned from; train on fewer shards"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(counts: &[(&[u8], u64)], most_positions: usize) -> Result<Words, Error> {
        let symbol_of: [u8; 256] = std::array::from_fn(|byte| byte as u8);
        let mut check = |_| Ok(());
        Words::new(counts.iter().copied(), &symbol_of, most_positions, &mut Progress::new(&mut check))
    }

    fn pairs(words: &Words) -> Vec<(u8, u8, u32, u64)> {
        let mut pairs = Vec::new();
        let mut check = |_| Ok::<(), Error>(());
        words
            .visit_pairs(&[1; 256], &mut Progress::new(&mut check), |(left, right), occurrence, count| {
                assert_eq!(words.frequent.count(occurrence), count);
                pairs.push((left as u8, right as u8, occurrence.position, count));
            })
            .unwrap();
        pairs
    }

    #[test]
    fn frequent_words_come_first_and_words_without_a_pair_not_at_all() {
        let words = words(&[(b"xy", 2), (b"a", 9), (b"", 9), (b"abc", 5), (b"no", 0)], 100).unwrap();
        assert_eq!(pairs(&words), [(b'a', b'b', 1, 5), (b'b', b'c', 2, 5), (b'x', b'y', 5, 2)]);
    }

    #[test]
    fn counts_around_32_bits_are_exact() {
        let most = u64::from(u32::MAX);
        let counts: [(&[u8], u64); 5] =
            [(b"ab", most - 1), (b"cd", most), (b"ef", most + 1), (b"gh", 1 << 40), (b"ij", 1)];
        let mut found: Vec<u64> =
            pairs(&words(&counts, 100).unwrap()).into_iter().map(|pair| pair.3).collect();
        found.sort_unstable();
        assert_eq!(found, [1, most - 1, most, most + 1, 1 << 40]);
    }

    #[test]
    fn words_fit_to_the_last_position_and_one_byte_more_is_refused() {
        // The array starts with a boundary, and each word ends with one.
        assert!(words(&[(b"abc", 1), (b"abcd", 1)], 10).is_ok());
        let error = words(&[(b"abc", 1), (b"abcd", 1)], 9).err().unwrap();
        assert!(error.to_string().contains("fewer shards"));
    }

    #[test]
    fn the_count_at_a_rank_is_reached_by_that_many_words() {
        let words = words(&[(b"ab", 1000), (b"cd", 10), (b"ef", 3)], 100).unwrap();
        assert_eq!([0, 1, 2, 3].map(|rank| words.count_at(rank)), [992, 10, 3, 1]);
    }
}
