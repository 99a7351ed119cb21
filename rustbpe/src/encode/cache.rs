//! What words became: text repeats its words, so most are looked up here and nowhere else.
//!
//! Words of up to 15 bytes stand in a table of fixed size, two to a cache line, each with its ids beside
//! it. Of two words in a line the one looked up last stays when a third comes. Longer words have a map.

use std::collections::HashMap;

use rustc_hash::FxBuildHasher;

use crate::memory::prefetch;

/// Cache lines of the table: 8 MiB, and 262,144 words.
const LINES: usize = 1 << 17;

/// Ids that stand beside their word; words of more ids have them in a list.
const BESIDE: usize = 3;

/// Ids in that list (1 MiB) before everything is forgotten.
const LISTED_IDS: usize = 1 << 18;

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

#[derive(Clone, Copy, Default)]
struct Entry {
    word: ShortWord,
    /// The ids, or the place of the first in the list where there are more than BESIDE.
    ids: [u32; BESIDE],
    count: u32,
}

#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Line([Entry; 2]);

/// Where a word may stand: what `find` and `remember` want.
#[derive(Clone, Copy, Default)]
pub struct Place {
    pub word: ShortWord,
    line: usize,
}

pub struct Cache {
    lines: Box<[Line]>,
    /// Ids of the words that have many.
    list: Vec<u32>,
    /// Start and count in the list.
    long_words: HashMap<Box<[u8]>, (u32, u32), FxBuildHasher>,
}

impl Cache {
    pub fn new() -> Self {
        Self { lines: vec![Line::default(); LINES].into(), list: Vec::new(), long_words: HashMap::default() }
    }

    /// Where a word may stand. Its cache line is on the way from memory when this returns.
    #[inline]
    pub fn place(&self, word: ShortWord) -> Place {
        let line = word.line();
        prefetch(&self.lines, line);
        Place { word, line }
    }

    /// Append the ids of a word. Returns whether it was here.
    #[inline]
    pub fn find(&mut self, place: Place, ids: &mut Vec<u32>) -> bool {
        let Line(entries) = &mut self.lines[place.line];
        if entries[0].word != place.word {
            if entries[1].word != place.word {
                return false;
            }
            entries.swap(0, 1);
        }
        let entry = &entries[0];
        if entry.count == 1 {
            ids.push(entry.ids[0]);
        } else if let Some(beside) = entry.ids.get(..entry.count as usize) {
            ids.extend_from_slice(beside);
        } else {
            let start = entry.ids[0] as usize;
            ids.extend_from_slice(&self.list[start..start + entry.count as usize]);
        }
        true
    }

    pub fn remember(&mut self, place: Place, ids: &[u32]) {
        let mut entry = Entry { word: place.word, ids: [0; BESIDE], count: ids.len() as u32 };
        match entry.ids.get_mut(..ids.len()) {
            Some(beside) => beside.copy_from_slice(ids),
            None => entry.ids[0] = self.put_in_list(ids),
        }
        let Line(entries) = &mut self.lines[place.line];
        entries[1] = entries[0];
        entries[0] = entry;
    }

    /// Append the ids of a word of more than 15 bytes. Returns whether it was here.
    pub fn find_long(&self, word: &[u8], ids: &mut Vec<u32>) -> bool {
        let Some((start, count)) = self.long_words.get(word) else {
            return false;
        };
        ids.extend_from_slice(&self.list[*start as usize..(*start + *count) as usize]);
        true
    }

    pub fn remember_long(&mut self, word: &[u8], ids: &[u32]) {
        if word.len() <= LONG_WORD_BYTES {
            if self.long_words.len() == LONG_WORDS {
                self.forget();
            }
            let start = self.put_in_list(ids);
            self.long_words.insert(word.into(), (start, ids.len() as u32));
        }
    }

    fn put_in_list(&mut self, ids: &[u32]) -> u32 {
        if self.list.len() + ids.len() > LISTED_IDS {
            self.forget();
        }
        self.list.extend_from_slice(ids);
        (self.list.len() - ids.len()) as u32
    }

    /// Forget all words whose ids are in the list, and with them all others.
    fn forget(&mut self) {
        self.lines.fill(Line::default());
        self.list.clear();
        self.long_words.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn short(word: &str) -> ShortWord {
        ShortWord::new(word.as_bytes()).unwrap()
    }

    fn found(cache: &mut Cache, word: &str) -> Option<Vec<u32>> {
        let mut ids = Vec::new();
        let place = cache.place(short(word));
        cache.find(place, &mut ids).then_some(ids)
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
            assert_eq!(found(&mut cache, &word), None);
            let place = cache.place(short(&word));
            cache.remember(place, &vec![count as u32; count]);
        }
        for count in 1..=15 {
            assert_eq!(found(&mut cache, &"x".repeat(count)), Some(vec![count as u32; count]));
        }
    }

    #[test]
    fn of_three_words_in_a_line_the_one_unused_longest_goes() {
        let mut cache = Cache::new();
        let line = short("a").line();
        let mut others =
            (0..).map(|number: u32| number.to_string()).filter(|word| short(word).line() == line);
        let (second, third) = (others.next().unwrap(), others.next().unwrap());
        for (word, id) in [("a", 1), (&second, 2)] {
            let place = cache.place(short(word));
            cache.remember(place, &[id]);
        }
        assert_eq!(found(&mut cache, "a"), Some(vec![1]));
        let place = cache.place(short(&third));
        cache.remember(place, &[3]);
        assert_eq!(found(&mut cache, "a"), Some(vec![1]));
        assert_eq!(found(&mut cache, &second), None);
        assert_eq!(found(&mut cache, &third), Some(vec![3]));
    }

    #[test]
    fn memory_is_bounded_and_what_is_found_stays_right() {
        let mut cache = Cache::new();
        for number in 0..100_000_u32 {
            let word = number.to_string();
            let place = cache.place(short(&word));
            cache.remember(place, &[number; 4]);
            assert_eq!(found(&mut cache, &word), Some(vec![number; 4]));
            let long = format!("a word of many letters {number}");
            cache.remember_long(long.as_bytes(), &[number]);
            let mut ids = Vec::new();
            assert!(cache.find_long(long.as_bytes(), &mut ids));
            assert_eq!(ids, [number]);
            assert!(cache.list.len() <= LISTED_IDS && cache.long_words.len() <= LONG_WORDS);
            if let Some(early) = found(&mut cache, "7") {
                assert_eq!(early, [7; 4]);
            }
        }
        let endless = vec![b'x'; LONG_WORD_BYTES + 1];
        cache.remember_long(&endless, &[0; 100]);
        assert!(!cache.find_long(&endless, &mut Vec::new()));
    }
}
