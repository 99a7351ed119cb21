//! What words became: text repeats its words, so most are looked up here and nowhere else.
//!
//! Words of up to 15 bytes stand in a table of fixed size, three to a cache line. Most are one token, and
//! its id stands beside them; of others the ids are in a list, where the oldest go when it is full. Longer
//! words have a map. All is small: where other programs run beside, a processor's shared cache may be left
//! with a few megabytes, and looking into memory takes as long as joining a word.

use std::collections::HashMap;

use rustc_hash::FxBuildHasher;

use super::ID_LIMIT;
use crate::memory::{Zero, ZeroedArray, prefetch};

/// Cache lines of the table: 4 MiB, and 196,608 words.
const LINES: usize = 1 << 16;
const WAYS: usize = 3;

/// Numbers in the list: 4 MiB.
const LISTED_NUMBERS: usize = 1 << 20;

/// What a word became is in the list from here on; ids are below.
const LISTED: u32 = 1 << 31;
const _: () = assert!(ID_LIMIT <= LISTED);

/// Long words, and the bytes of one, that are remembered.
const LONG_WORDS: usize = 1 << 14;
const LONG_WORD_BYTES: usize = 128;

/// A word of 1 to 15 bytes and its length, in one number: the bytes from the lowest, the length in the
/// highest. Zero is no word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ShortWord(u128);

/// The bytes of a word of each length.
const MASKS: [u128; 16] = {
    let mut masks = [0; 16];
    let mut length = 0;
    while length < 16 {
        masks[length] = (1 << (8 * length)) - 1;
        length += 1;
    }
    masks
};

impl ShortWord {
    pub fn new(word: &[u8]) -> Option<Self> {
        if word.is_empty() || word.len() > 15 {
            return None;
        }
        let mut bytes = [0; 16];
        bytes[..word.len()].copy_from_slice(word);
        bytes[15] = word.len() as u8;
        Some(Self(u128::from_le_bytes(bytes)))
    }

    /// The same for a word that is a part of `text`: one load instead of a copy.
    #[inline]
    pub fn within(text: &[u8], word: &[u8]) -> Option<Self> {
        // Where the text ends within 16 bytes, or the word is no part of it after all, `get` is None.
        let start = (word.as_ptr() as usize).wrapping_sub(text.as_ptr() as usize);
        let length = word.len();
        if length.wrapping_sub(1) < 15
            && let Some(bytes) = text.get(start..start.wrapping_add(16))
            && let Some(bytes) = bytes.first_chunk()
        {
            return Some(Self(u128::from_le_bytes(*bytes) & MASKS[length] | (length as u128) << 120));
        }
        Self::new(word)
    }

    /// The bytes, zeros behind them, and how many they are.
    pub fn bytes(self) -> ([u8; 16], usize) {
        let bytes = self.0.to_le_bytes();
        (bytes, usize::from(bytes[15]))
    }

    #[inline]
    fn line(self) -> usize {
        // Both halves multiplied with each other, folded: a bit of either moves all of the result. The
        // two constants are odd numbers without a pattern, so that neither half alone is zero often.
        let low = self.0 as u64 ^ 0x9e37_79b9_7f4a_7c15;
        let high = (self.0 >> 64) as u64 ^ 0xd1b5_4a32_d192_ed03;
        let product = u128::from(low) * u128::from(high);
        (product as u64 ^ (product >> 64) as u64) as usize % LINES
    }
}

/// The words of a cache line, and what each became: a token's id, or LISTED and a place in the list.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Line {
    words: [ShortWord; WAYS],
    values: [u32; WAYS],
    /// Whose turn it is to go.
    next: u32,
}

const _: () = assert!(size_of::<Line>() == 64);

// SAFETY: a line is made of numbers.
unsafe impl Zero for Line {}

/// Where a word may stand: what `find` and `remember` want.
#[derive(Clone, Copy, Default)]
pub struct Place {
    pub word: ShortWord,
    line: usize,
}

pub struct Cache {
    lines: ZeroedArray<Line>,
    list: List,
    /// Places in the list.
    long_words: HashMap<Box<[u8]>, u32, FxBuildHasher>,
}

impl Cache {
    pub fn new() -> Self {
        Self { lines: ZeroedArray::new(LINES), list: List::new(), long_words: HashMap::default() }
    }

    /// Where a word may stand. Its cache line is on the way from memory when this returns.
    #[inline]
    pub fn place(&self, word: ShortWord) -> Place {
        let line = word.line();
        prefetch(&self.lines, line);
        Place { word, line }
    }

    /// The id of a word that is one token. `None` where it is not, or not here.
    #[inline]
    pub fn find_token(&self, place: Place) -> Option<u32> {
        self.value(place).filter(|value| *value < LISTED)
    }

    /// Append the ids of a word. Returns whether it was here.
    pub fn find(&self, place: Place, ids: &mut Vec<u32>) -> bool {
        match self.value(place) {
            None => false,
            Some(id) if id < LISTED => {
                ids.push(id);
                true
            }
            Some(listed) => self.list.append_to(ids, listed % LISTED),
        }
    }

    #[inline]
    fn value(&self, place: Place) -> Option<u32> {
        let Line { words, values, .. } = &self.lines[place.line];
        // Without branches: which of the three it is cannot be foreseen.
        let at = usize::from(words[1] == place.word) + 2 * usize::from(words[2] == place.word);
        (words[at] == place.word).then_some(values[at])
    }

    /// Put in what a word is. A token goes only for another, or where there are tokens only.
    pub fn remember(&mut self, place: Place, ids: &[u32]) {
        let value = match ids {
            [id] => *id,
            _ => self.put_in_list(ids) | LISTED,
        };
        let Line { words, values, next } = &mut self.lines[place.line];
        let turn = *next as usize;
        let is_token = |at: &usize| words[*at] != ShortWord::default() && values[*at] < LISTED;
        let same = (0..WAYS).find(|at| words[*at] == place.word);
        let at = same.or_else(|| (turn..WAYS).chain(0..turn).find(|at| !is_token(at))).unwrap_or(turn);
        words[at] = place.word;
        values[at] = value;
        *next = (at as u32 + 1) % WAYS as u32;
    }

    /// Append the ids of a word of more than 15 bytes. Returns whether it was here.
    pub fn find_long(&self, word: &[u8], ids: &mut Vec<u32>) -> bool {
        self.long_words.get(word).is_some_and(|place| self.list.append_to(ids, *place))
    }

    pub fn remember_long(&mut self, word: &[u8], ids: &[u32]) {
        if word.len() <= LONG_WORD_BYTES {
            if self.long_words.len() == LONG_WORDS {
                self.long_words.clear();
            }
            let place = self.put_in_list(ids);
            self.long_words.insert(word.into(), place);
        }
    }

    fn put_in_list(&mut self, ids: &[u32]) -> u32 {
        if self.list.end + 2 * LISTED_NUMBERS as u32 > LISTED {
            // Places would come a second time.
            self.lines.fill(Line::default());
            self.long_words.clear();
            self.list.end = 0;
        }
        self.list.push(ids)
    }
}

/// The last of all ids that were ever put in, each word's behind their count. A place is how many numbers
/// were put in before.
struct List {
    numbers: Box<[u32]>,
    end: u32,
}

impl List {
    fn new() -> Self {
        Self { numbers: vec![0; LISTED_NUMBERS].into(), end: 0 }
    }

    /// Returns the place.
    fn push(&mut self, ids: &[u32]) -> u32 {
        let mut at = self.end as usize % LISTED_NUMBERS;
        if at + 1 + ids.len() > LISTED_NUMBERS {
            self.end += (LISTED_NUMBERS - at) as u32;
            at = 0;
        }
        self.numbers[at] = ids.len() as u32;
        self.numbers[at + 1..][..ids.len()].copy_from_slice(ids);
        let place = self.end;
        self.end += 1 + ids.len() as u32;
        place
    }

    /// Append the ids at a place. Returns whether they were still there.
    fn append_to(&self, ids: &mut Vec<u32>, place: u32) -> bool {
        let there = self.end - place <= LISTED_NUMBERS as u32;
        if there {
            let behind = &self.numbers[place as usize % LISTED_NUMBERS..];
            ids.extend_from_slice(&behind[1..][..behind[0] as usize]);
        }
        there
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn short(word: &str) -> ShortWord {
        ShortWord::new(word.as_bytes()).unwrap()
    }

    fn found(cache: &Cache, word: &str) -> Option<Vec<u32>> {
        let mut ids = Vec::new();
        let place = cache.place(short(word));
        cache.find(place, &mut ids).then_some(ids)
    }

    fn remember(cache: &mut Cache, word: &str, ids: &[u32]) {
        let place = cache.place(short(word));
        cache.remember(place, ids);
    }

    #[test]
    fn a_word_is_one_number_wherever_it_stands_in_its_text() {
        let text = "a bc def ghij klmno 0123456789abcde 0123456789abcdef end";
        for (start, _) in text.char_indices() {
            for length in 0..=20.min(text.len() - start) {
                let word = &text.as_bytes()[start..start + length];
                let expected = ShortWord::new(word);
                assert_eq!(ShortWord::within(text.as_bytes(), word), expected);
                assert_eq!(ShortWord::within(b"another text, long enough", word), expected);
                assert_eq!(expected.is_some(), (1..=15).contains(&length));
                if let Some(short) = expected {
                    let (bytes, count) = short.bytes();
                    assert_eq!(&bytes[..count], word);
                }
            }
        }
        assert_ne!(short("a"), short("a\0"));
    }

    #[test]
    fn words_are_found_with_their_ids_few_or_many() {
        let mut cache = Cache::new();
        for count in 1..=15 {
            let word = "x".repeat(count);
            assert_eq!(found(&cache, &word), None);
            remember(&mut cache, &word, &vec![count as u32; count]);
        }
        for count in 1..=15 {
            assert_eq!(found(&cache, &"x".repeat(count)), Some(vec![count as u32; count]));
        }
    }

    /// Words of one line.
    fn neighbours() -> impl Iterator<Item = String> {
        let line = short("a").line();
        (0..).map(|number: u32| number.to_string()).filter(move |word| short(word).line() == line)
    }

    #[test]
    fn a_full_line_forgets_words_of_several_tokens_in_turn_and_tokens_only_for_tokens() {
        let mut cache = Cache::new();
        let words: Vec<String> = neighbours().take(5).collect();
        let here = |cache: &Cache| -> Vec<usize> {
            (0..words.len()).filter(|at| found(cache, &words[*at]).is_some()).collect()
        };
        remember(&mut cache, &words[0], &[0]);
        for (word, ids) in words[1..].iter().zip([[1; 2], [2; 2], [3; 2]]) {
            remember(&mut cache, word, &ids);
        }
        assert_eq!(here(&cache), [0, 2, 3]);
        remember(&mut cache, &words[1], &[1; 2]);
        assert_eq!(here(&cache), [0, 1, 3]);
        remember(&mut cache, &words[2], &[2]);
        remember(&mut cache, &words[4], &[4]);
        assert_eq!(here(&cache), [0, 2, 4]);
        remember(&mut cache, &words[3], &[3; 2]);
        assert_eq!(here(&cache).len(), WAYS);
        assert_eq!(found(&cache, &words[3]), Some(vec![3; 2]));
        assert_eq!(found(&cache, "a"), None);
    }

    #[test]
    fn a_word_that_is_remembered_twice_takes_no_more_room() {
        let mut cache = Cache::new();
        for word in neighbours().take(WAYS) {
            remember(&mut cache, &word, &[1; 2]);
            remember(&mut cache, &word, &[1; 2]);
        }
        assert!(neighbours().take(WAYS).all(|word| found(&cache, &word).is_some()));
    }

    #[test]
    fn memory_is_bounded_and_what_is_found_stays_right() {
        let mut cache = Cache::new();
        let mut forgotten = 0;
        // Twice: places come a second time.
        for start in [0, LISTED - 3 * LISTED_NUMBERS as u32] {
            cache.list.end = cache.list.end.max(start);
            for number in 0..300_000_u32 {
                let word = number.to_string();
                let ids = vec![number; 2 + number as usize % 5];
                remember(&mut cache, &word, &ids);
                assert_eq!(found(&cache, &word), Some(ids));
                let long = format!("a word of many letters {number}");
                cache.remember_long(long.as_bytes(), &[number]);
                let mut ids = Vec::new();
                assert!(cache.find_long(long.as_bytes(), &mut ids));
                assert_eq!(ids, [number]);
                assert!(cache.long_words.len() <= LONG_WORDS);
                let early = number / 2;
                match found(&cache, &early.to_string()) {
                    Some(ids) => assert_eq!(ids, vec![early; 2 + early as usize % 5]),
                    None => forgotten += 1,
                }
            }
        }
        assert!(forgotten > 0 && cache.list.end < LISTED / 2);
        let endless = vec![b'x'; LONG_WORD_BYTES + 1];
        cache.remember_long(&endless, &[0; 100]);
        assert!(!cache.find_long(&endless, &mut Vec::new()));
    }
}
