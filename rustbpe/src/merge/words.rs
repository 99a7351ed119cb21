//! The words as one flat array of symbols, by the position of their bytes.
//!
//! A token's id stands at the positions of its first and its last byte, so both neighbours of a token
//! are one look away and joining two tokens writes three symbols. What stands between is never read.
//!
//! The words lie in parts, which several threads go through side by side.

use std::ops::Range;

use super::classes::{CLASSES, class_of, least_of};
use super::progress::Progress;
use crate::Error;
use crate::count::Counts;
use crate::memory::{Zero, ZeroedArray};

/// Stands before and after every word, and where a token began that was joined to the one before it.
pub const NO_TOKEN: u32 = u32::MAX;

/// Bytes of all different words that can be trained on, with one more byte for each word. A training
/// has fewer merges than that, so that the ids stay below `NO_TOKEN`.
pub const MOST_POSITIONS: usize = (u32::MAX - 2048) as usize;

/// Positions of a part, or more where that would make too many parts.
const POSITIONS_OF_A_PART: usize = 1 << 18;
const MOST_PARTS: usize = 64;

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

/// Where the words of a class of counts go.
#[derive(Clone, Copy, Default)]
struct Place {
    /// The number of its next word.
    word: usize,
    /// Where that word's first symbol goes.
    position: usize,
    /// Where the class ends.
    end: usize,
    /// Where its last stretch begins.
    stretch: usize,
}

/// Some words of one class, by the number of the first, and its position, which is a boundary.
type Stretch = (usize, usize);

impl Words {
    /// Take words with their counts; the byte b becomes the symbol `symbol_of[b]`.
    ///
    /// The words are gone through twice: once to see how much room each class of counts takes, once to
    /// write each where it belongs. Nothing but the symbols and the counts is held in memory.
    /// Words without a pair and words that occur zero times are left out. Fails when the counts add up
    /// to more than 64 bits hold, or when the words have more than `most_positions` bytes.
    pub fn new<C: Counts + ?Sized, E: From<Error>>(
        source: &C,
        symbol_of: &[u8; 256],
        most_positions: usize,
        progress: &mut Progress<'_, E>,
    ) -> Result<Self, E> {
        let sizes = sizes(source, most_positions, progress)?;
        let positions: usize = sizes.iter().map(|size| size.positions).sum();
        let least = POSITIONS_OF_A_PART.max(positions.div_ceil(MOST_PARTS));
        let (mut places, mut stretches, end) = places(&sizes, least);
        let mut symbols = ZeroedArray::new(end.position);
        let mut counts = vec![0; end.word];
        let mut frequent = Vec::new();
        for (_, start) in &stretches {
            symbols[*start] = NO_TOKEN;
        }
        source.each(|word, count| {
            if !has_pair(word, count) {
                return Ok(());
            }
            let place = &mut places[class_of(count)];
            if place.position - place.stretch > least {
                symbols[place.position] = NO_TOKEN;
                stretches.push((place.word, place.position));
                place.stretch = place.position;
                place.position += 1;
            }
            if count >= u64::from(MANY) {
                frequent.push((place.position as u32, count));
            }
            counts[place.word] = count;
            let here = &mut symbols[place.position..][..=word.len()];
            for (symbol, byte) in here.iter_mut().zip(word) {
                *symbol = u32::from(symbol_of[usize::from(*byte)]);
            }
            here[word.len()] = NO_TOKEN;
            place.word += 1;
            place.position += here.len();
            progress.spend(here.len())
        })?;
        for place in &places {
            symbols[place.position..place.end].fill(NO_TOKEN);
        }
        stretches.sort_unstable();
        frequent.sort_unstable();
        let parts = parts_of(&stretches, (end.word, end.position), least);
        Ok(Words { symbols, counts, parts, frequent: FrequentWords(frequent) })
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
            while left == NO_TOKEN {
                position += 1; // another stretch begins
                left = symbols[position];
            }
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

fn has_pair(word: &[u8], count: u64) -> bool {
    word.len() >= 2 && count > 0
}

/// What the words of a class need.
#[derive(Clone, Copy, Default)]
struct Size {
    words: usize,
    /// Their bytes and a boundary behind each.
    positions: usize,
}

fn sizes<C: Counts + ?Sized, E: From<Error>>(
    source: &C,
    most_positions: usize,
    progress: &mut Progress<'_, E>,
) -> Result<[Size; CLASSES], E> {
    let mut sizes = [Size::default(); CLASSES];
    let mut positions = 1; // a boundary before all of them
    let mut total = 0_u64;
    source.each(|word, count| {
        // No pair occurs more often than there are bytes in the text: this sum is the only place
        // where 64 bits could be too few.
        total = (word.len() as u64)
            .checked_mul(count)
            .and_then(|here| total.checked_add(here))
            .ok_or_else(too_many_occurrences)?;
        if !has_pair(word, count) {
            return Ok(());
        }
        if word.len() >= most_positions.saturating_sub(positions) {
            return Err(too_many_positions(most_positions).into());
        }
        let taken = word.len() + 1;
        positions += taken;
        let size = &mut sizes[class_of(count)];
        size.words += 1;
        size.positions += taken;
        progress.spend(taken)
    })?;
    Ok(sizes)
}

/// Where the words of each class go, those of the highest count first; the first stretch of each; and where
/// all of them end. A class has room for a boundary before each stretch of more than `least` positions.
fn places(sizes: &[Size; CLASSES], least: usize) -> ([Place; CLASSES], Vec<Stretch>, Place) {
    let mut places = [Place::default(); CLASSES];
    let mut stretches = Vec::new();
    let mut next = Place::default();
    for (place, size) in places.iter_mut().zip(sizes).rev() {
        if size.words > 0 {
            stretches.push((next.word, next.position));
            let end = next.position + 1 + size.positions + size.positions / least;
            *place = Place { word: next.word, position: next.position + 1, end, stretch: next.position };
            next = Place { word: next.word + size.words, position: end, ..next };
        }
    }
    (places, stretches, next)
}

/// Parts of at least `least` positions each, but for the last.
fn parts_of(stretches: &[Stretch], end: Stretch, least: usize) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut first = 0;
    for number in 1..=stretches.len() {
        let (word, position) = stretches[first];
        let (next_word, next_position) = stretches.get(number).copied().unwrap_or(end);
        if next_position - position >= least || number == stretches.len() {
            parts.push(Part { words: word..next_word, positions: position..next_position });
            first = number;
        }
    }
    parts
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
        Words::new(counts, &symbol_of, most_positions, &mut Progress::new(&mut check))
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
        assert_eq!(pairs(&words), [(b'a', b'b', 1, 5), (b'b', b'c', 2, 5), (b'x', b'y', 6, 2)]);
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
    fn parts_are_stretches_together_and_start_with_a_boundary() {
        let part = |words, positions| Part { words, positions };
        let stretches = [(0, 0), (2, 8), (4, 18)];
        assert_eq!(
            parts_of(&stretches, (5, 22), 8),
            [part(0..2, 0..8), part(2..4, 8..18), part(4..5, 18..22)]
        );
        assert_eq!(parts_of(&stretches, (5, 22), 9), [part(0..4, 0..18), part(4..5, 18..22)]);
        assert_eq!(parts_of(&[], (0, 0), 8), []);
    }

    #[test]
    fn a_class_of_many_words_is_several_parts() {
        // The first has a class of its own and the others share one, which is divided.
        let many: Vec<([u8; 4], u64)> =
            (0..400_000_u32).map(|number| (number.to_be_bytes(), 1 + u64::from(number == 7))).collect();
        let mut check = |_| Ok::<(), Error>(());
        let symbol_of = std::array::from_fn(|byte| byte as u8);
        let words =
            Words::new(&many[..], &symbol_of, MOST_POSITIONS, &mut Progress::new(&mut check)).unwrap();
        assert!(words.parts.len() > 2);
        for (part, next) in words.parts.iter().zip(&words.parts[1..]) {
            assert_eq!((part.words.end, part.positions.end), (next.words.start, next.positions.start));
            assert!(part.positions.len() >= POSITIONS_OF_A_PART);
        }
        for part in &words.parts {
            let ends = [part.positions.start, part.positions.end - 1];
            assert_eq!(ends.map(|at| words.symbols[at]), [NO_TOKEN; 2]);
        }
        let symbols: Vec<u32> = words.symbols.iter().copied().filter(|id| *id != NO_TOKEN).collect();
        let in_order = std::iter::once(7).chain((0..400_000).filter(|number| *number != 7));
        assert!(symbols.chunks(4).eq(in_order.map(|number: u32| number.to_be_bytes().map(u32::from))));
        let mut pairs = 0;
        for part in &words.parts {
            words.visit_pairs(part, |_| 1, |_, _, _| pairs += 1);
        }
        assert_eq!(pairs, 3 * many.len());
    }

    #[test]
    fn the_count_at_a_rank_is_reached_by_that_many_words() {
        let words = words(&[(b"ab", 1000), (b"cd", 10), (b"ef", 3)], 100).unwrap();
        assert_eq!([0, 1, 2, 3].map(|rank| words.count_at(rank)), [992, 10, 3, 1]);
    }
}
