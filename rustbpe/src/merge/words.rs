//! The words as one flat array of symbols, by the position of their bytes.
//!
//! A token's id stands at the positions of its first and its last byte, so both neighbours of a token
//! are one look away and joining two tokens writes three symbols. What stands between is never read.
//!
//! The words lie in parts, which several threads go through side by side.

use std::ops::Range;

use super::classes::{CLASSES, class_of, least_of};
use super::progress::Progress;
use super::threads::side_by_side;
use crate::Error;
use crate::memory::{Zero, ZeroedArray, prefetch};

/// Stands before and after every word, and where a token began that was joined to the one before it.
pub const NO_TOKEN: u32 = u32::MAX;

/// Bytes of all different words that can be trained on, with one more byte for each word. A training
/// has fewer merges than that, so that the ids stay below `NO_TOKEN`.
pub const MOST_POSITIONS: usize = (u32::MAX - 1024) as usize;

/// Positions of a part, or more where that would make too many parts.
const POSITIONS_OF_A_PART: usize = 1 << 18;
const MOST_PARTS: usize = 64;

/// Words that are asked for ahead of their turn.
const AHEAD: usize = 16;

/// A place where a pair stands or stood: the position of the first byte of the left token, and in the
/// high half how often the word occurs; `MANY` if that must be looked up.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub struct Occurrence(pub u64);

// SAFETY: it is a number.
unsafe impl Zero for Occurrence {}

const MANY: u32 = u32::MAX;

impl Occurrence {
    #[inline]
    fn new(position: usize, count: u64) -> Self {
        let count = u32::try_from(count).unwrap_or(MANY);
        Self(u64::from(count) << 32 | position as u64)
    }

    #[inline]
    pub fn position(self) -> usize {
        self.0 as u32 as usize
    }

    /// The same word, so many bytes further left.
    #[inline]
    pub fn moved_left(self, bytes: u32) -> Self {
        Self(self.0 - u64::from(bytes))
    }
}

/// Words of at least two bytes, those that occur more often first: most of the work is in few pages.
pub struct Words {
    symbols: ZeroedArray<u32>,
    /// How often each word occurs, in the order of the words.
    counts: Vec<u64>,
    parts: Vec<Part>,
    frequent: FrequentWords,
}

/// Some words that follow each other, by number, and their positions, which start with a boundary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    words: Range<usize>,
    pub positions: Range<usize>,
}

/// Position of the first byte and count of each word whose count an `Occurrence` cannot hold.
#[derive(Default)]
pub struct FrequentWords(Vec<(u32, u64)>);

impl FrequentWords {
    /// How often the word of `occurrence` occurs.
    #[inline]
    pub fn count(&self, occurrence: Occurrence) -> u64 {
        match (occurrence.0 >> 32) as u32 {
            MANY => self.look_up(occurrence.position() as u32),
            count => u64::from(count),
        }
    }

    #[cold]
    fn look_up(&self, position: u32) -> u64 {
        let after = self.0.partition_point(|(start, _)| *start <= position);
        self.0[after - 1].1
    }
}

/// A word by the place of its bytes among those of all words.
#[derive(Clone, Copy, Default)]
struct Word {
    count: u64,
    start: u32,
    length: u32,
}

/// Words as they came, to be put in order.
#[derive(Default)]
struct Gathered {
    bytes: Vec<u8>,
    words: Vec<Word>,
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
        let Gathered { bytes, words } = Gathered::new(counts, most_positions, progress)?;
        let words = in_order(words);
        let parts = parts_of(&words, POSITIONS_OF_A_PART.max(bytes.len().div_ceil(MOST_PARTS)));
        let mut symbols = ZeroedArray::new(parts.last().map_or(0, |part| part.positions.end));
        let mut rest = &mut *symbols;
        for round in parts.chunks(rayon::current_num_threads()) {
            let mut slices = Vec::with_capacity(round.len());
            for part in round {
                let (slice, behind) = rest.split_at_mut(part.positions.len());
                rest = behind;
                slices.push((&words[part.words.clone()], slice));
            }
            let positions = slices.iter().map(|(_, slice)| slice.len()).sum();
            side_by_side(slices, |(words, slice)| write_symbols(words, &bytes, symbol_of, slice));
            progress.spend(positions)?;
        }
        let frequent = frequent_words(&words, &parts);
        let counts = words.iter().map(|word| word.count).collect();
        Ok(Words { symbols, counts, parts, frequent })
    }

    /// A count that about `rank` words reach, but at least 1.
    pub fn count_at(&self, rank: usize) -> u64 {
        self.counts.get(rank).map_or(1, |count| least_of(class_of(*count)))
    }

    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Symbols to write to, where they may be divided, and counts to read meanwhile.
    pub fn split(&mut self) -> (&mut [u32], &[Part], &FrequentWords) {
        (&mut self.symbols, &self.parts, &self.frequent)
    }

    /// Call `visit` with every pair of a part, in the order of positions: where it is and how often its word
    /// occurs.
    #[inline]
    pub fn visit_pairs(
        &self,
        part: &Part,
        length_of: impl Fn(u32) -> usize,
        mut visit: impl FnMut((u32, u32), Occurrence, u64),
    ) {
        let symbols = &self.symbols[..part.positions.end];
        let mut position = part.positions.start + 1;
        for &count in &self.counts[part.words.clone()] {
            let mut left = symbols[position];
            loop {
                let next = position + length_of(left);
                let right = symbols[next];
                if right == NO_TOKEN {
                    position = next + 1;
                    break;
                }
                visit((left, right), Occurrence::new(position, count), count);
                (position, left) = (next, right);
            }
        }
    }
}

/// Words by the class of their count, the highest first.
fn in_order(words: Vec<Word>) -> Vec<Word> {
    if words.is_sorted_by(|word, next| class_of(word.count) >= class_of(next.count)) {
        return words;
    }
    let mut places = [0; CLASSES];
    for word in &words {
        places[class_of(word.count)] += 1;
    }
    let mut next = 0;
    for place in places.iter_mut().rev() {
        next += std::mem::replace(place, next);
    }
    let mut ordered = vec![Word::default(); words.len()];
    for word in words {
        let place = &mut places[class_of(word.count)];
        ordered[*place] = word;
        *place += 1;
    }
    ordered
}

/// Parts of at least `least` positions each, but for the last.
fn parts_of(words: &[Word], least: usize) -> Vec<Part> {
    let mut parts = Vec::new();
    let (mut first, mut start, mut end) = (0, 0, 1);
    for (word, number) in words.iter().zip(1..) {
        end += word.length as usize + 1;
        if end - start >= least || number == words.len() {
            parts.push(Part { words: first..number, positions: start..end });
            (first, start, end) = (number, end, end + 1);
        }
    }
    parts
}

/// Write the symbols of the words of a part: a boundary, and after each word another.
fn write_symbols(words: &[Word], bytes: &[u8], symbol_of: &[u8; 256], symbols: &mut [u32]) {
    let (first, mut symbols) = symbols.split_at_mut(1);
    first[0] = NO_TOKEN;
    for (number, word) in words.iter().enumerate() {
        if let Some(ahead) = words.get(number + AHEAD) {
            prefetch(bytes, ahead.start as usize);
        }
        let (here, behind) = symbols.split_at_mut(word.length as usize + 1);
        for (symbol, byte) in here.iter_mut().zip(&bytes[word.start as usize..][..word.length as usize]) {
            *symbol = u32::from(symbol_of[usize::from(*byte)]);
        }
        here[word.length as usize] = NO_TOKEN;
        symbols = behind;
    }
}

fn frequent_words(words: &[Word], parts: &[Part]) -> FrequentWords {
    let mut frequent = Vec::new();
    for part in parts {
        let mut start = part.positions.start + 1;
        for word in &words[part.words.clone()] {
            if class_of(word.count) < class_of(u64::from(MANY)) {
                return FrequentWords(frequent); // no word behind it occurs as often
            }
            if word.count >= u64::from(MANY) {
                frequent.push((start as u32, word.count));
            }
            start += word.length as usize + 1;
        }
    }
    FrequentWords(frequent)
}

impl Gathered {
    fn new<W: AsRef<[u8]>, E: From<Error>>(
        counts: impl IntoIterator<Item = (W, u64)>,
        most_positions: usize,
        progress: &mut Progress<'_, E>,
    ) -> Result<Self, E> {
        let counts = counts.into_iter();
        let mut gathered = Gathered { bytes: Vec::new(), words: Vec::with_capacity(counts.size_hint().0) };
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
            let (start, length) = (gathered.bytes.len() as u32, bytes.len() as u32);
            gathered.words.push(Word { count, start, length });
            gathered.bytes.extend_from_slice(bytes);
            progress.spend(bytes.len() + 1)?;
        }
        Ok(gathered)
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
        for part in words.parts() {
            words.visit_pairs(
                part,
                |_| 1,
                |(left, right), occurrence, count| {
                    assert_eq!(words.frequent.count(occurrence), count);
                    pairs.push((left as u8, right as u8, occurrence.position() as u32, count));
                },
            );
        }
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
    fn every_part_starts_with_a_boundary_and_ends_with_one() {
        let lengths = [3, 2, 5, 2, 2];
        let words = lengths.map(|length| Word { count: 1, start: 0, length });
        let part = |words, positions| Part { words, positions };
        assert_eq!(parts_of(&words, 8), [part(0..2, 0..8), part(2..4, 8..18), part(4..5, 18..22)]);
        assert_eq!(parts_of(&words, 100), [part(0..5, 0..20)]);
        assert_eq!(parts_of(&[], 100), []);

        let many = (0..200_000_u32).map(|number| (number.to_be_bytes(), 1));
        let mut check = |_| Ok::<(), Error>(());
        let symbol_of = std::array::from_fn(|byte| byte as u8);
        let words = Words::new(many, &symbol_of, MOST_POSITIONS, &mut Progress::new(&mut check)).unwrap();
        assert!(words.parts.len() > 2);
        for part in &words.parts {
            let ends = [part.positions.start, part.positions.end - 1];
            assert_eq!(ends.map(|at| words.symbols[at]), [NO_TOKEN; 2]);
        }
        let symbols: Vec<u32> = words.symbols.iter().copied().filter(|id| *id != NO_TOKEN).collect();
        assert!(symbols.chunks(4).eq((0..200_000_u32).map(|number| number.to_be_bytes().map(u32::from))));
    }

    #[test]
    fn the_count_at_a_rank_is_reached_by_that_many_words() {
        let words = words(&[(b"ab", 1000), (b"cd", 10), (b"ef", 3)], 100).unwrap();
        assert_eq!([0, 1, 2, 3].map(|rank| words.count_at(rank)), [992, 10, 3, 1]);
    }
}
