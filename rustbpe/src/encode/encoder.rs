//! Whole texts: from the splitter through the cache to ids.

use std::sync::Arc;

use super::Vocabulary;
use super::cache::{Cache, Place, ShortWord};
use super::pairs::Joining;
use crate::Error;
use crate::split::Splitter;

/// Short words that wait while their cache lines come from memory.
const WAITING: usize = 64;

/// Words that are joined together.
const JOINED: usize = 16;

/// Ids that are found before they are given.
const FOUND: usize = 1 << 12;

/// Encodes text. Holds scratch space and a cache, so each thread has its own.
pub struct Encoder {
    splitter: Splitter,
    words: WordEncoder,
}

/// Encodes the words of a text that is split already.
pub struct WordEncoder {
    vocabulary: Arc<Vocabulary>,
    cache: Cache,
    waiting: [Place; WAITING],
    count: usize,
    /// Ids of words that were in the cache.
    found: Vec<u32>,
    /// Words that were not, and how many of the ids found come before.
    missed: Vec<(usize, Place)>,
    joinings: [Joining<16>; JOINED],
}

impl Encoder {
    /// Fails when `pattern` is not a regular expression.
    pub fn new(vocabulary: Arc<Vocabulary>, pattern: &str) -> Result<Self, Error> {
        Ok(Self { splitter: Splitter::new(pattern)?, words: WordEncoder::new(vocabulary) })
    }

    /// Append the ids of `text`. Where that fails, none are appended.
    ///
    /// Fails when a pattern outside the GPT-4 family backtracks without end on this text.
    pub fn encode(&mut self, text: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        let Self { splitter, words } = self;
        let before = ids.len();
        let outcome = splitter.words(text, |word| words.add(text, word, ids));
        words.finish(ids);
        if outcome.is_err() {
            ids.truncate(before);
        }
        outcome
    }
}

impl WordEncoder {
    pub fn new(vocabulary: Arc<Vocabulary>) -> Self {
        let mut cache = Cache::new();
        // The last that are put in stay when there is no room for all: tokens of low ids are met most.
        for (id, token) in vocabulary.tokens().iter().enumerate().rev() {
            if let Some(word) = ShortWord::new(token) {
                cache.remember(cache.place(word), &[id as u32]);
            }
        }
        Self {
            vocabulary,
            cache,
            waiting: [Place::default(); WAITING],
            count: 0,
            found: Vec::new(),
            missed: Vec::new(),
            joinings: [(); JOINED].map(|()| Joining::default()),
        }
    }

    /// Take the next word. Ids come in the order of the words, when enough of them wait or at `finish`.
    /// A `word` that is a part of `text` is read faster.
    #[inline]
    pub fn add(&mut self, text: &str, word: &str, ids: &mut Vec<u32>) {
        match ShortWord::within(text.as_bytes(), word.as_bytes()) {
            Some(short) => {
                self.waiting[self.count] = self.cache.place(short);
                self.count += 1;
                if self.count == WAITING {
                    self.look_up();
                    if self.missed.len() >= JOINED || self.found.len() >= FOUND {
                        self.give(ids);
                    }
                }
            }
            None => {
                self.finish(ids);
                self.add_long(word.as_bytes(), ids);
            }
        }
    }

    /// Append the ids of the words that wait.
    pub fn finish(&mut self, ids: &mut Vec<u32>) {
        self.look_up();
        self.give(ids);
    }

    /// Look for the words that wait in the cache.
    fn look_up(&mut self) {
        // Of words in a row that are tokens, which nearly all are: appended together.
        let mut tokens = [0; WAITING];
        let mut count = 0;
        for place in &self.waiting[..self.count] {
            if let Some(id) = self.cache.find_token(*place) {
                tokens[count] = id;
                count += 1;
                continue;
            }
            self.found.extend_from_slice(&tokens[..count]);
            count = 0;
            if !self.cache.find(*place, &mut self.found) {
                self.missed.push((self.found.len(), *place));
            }
        }
        self.found.extend_from_slice(&tokens[..count]);
        self.count = 0;
    }

    /// Append what was found, and between it what the words come to that were not.
    fn give(&mut self, ids: &mut Vec<u32>) {
        let pairs = self.vocabulary.pairs();
        let mut given = 0;
        for missed in self.missed.chunks(JOINED) {
            let joinings = &mut self.joinings[..missed.len()];
            for (joining, (_, place)) in joinings.iter_mut().zip(missed) {
                let (bytes, length) = place.word.bytes();
                joining.begin(pairs, &bytes[..length]);
            }
            // A step of each in turn: what its next one needs comes from memory meanwhile.
            let mut open: [usize; JOINED] = std::array::from_fn(|number| number);
            let mut count = missed.len();
            while count > 0 {
                let mut left = 0;
                for at in 0..count {
                    let number = open[at];
                    open[left] = number;
                    left += usize::from(joinings[number].step(pairs));
                }
                count = left;
                for number in &open[..count] {
                    joinings[*number].look(pairs);
                }
            }
            for (joining, (before, place)) in joinings.iter().zip(missed) {
                ids.extend_from_slice(&self.found[given..*before]);
                given = *before;
                let start = ids.len();
                let (bytes, length) = place.word.bytes();
                match pairs.unreached(&bytes[..length]) {
                    Some(id) => ids.push(id),
                    None => ids.extend(joining.parts()),
                }
                self.cache.remember(*place, &ids[start..]);
            }
        }
        ids.extend_from_slice(&self.found[given..]);
        self.found.clear();
        self.missed.clear();
    }

    fn add_long(&mut self, word: &[u8], ids: &mut Vec<u32>) {
        if !self.cache.find_long(word, ids) {
            let start = ids.len();
            self.vocabulary.encode_word(word, ids);
            self.cache.remember_long(word, &ids[start..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_the_ids_of_its_words_in_order_cached_or_not() {
        let vocabulary = Arc::new(Vocabulary::from_merges(&[(97, 98), (32, 256), (257, 99)]));
        let mut encoder = Encoder::new(Arc::clone(&vocabulary), r"\s?\S+").unwrap();
        let long = "ab".repeat(50_000);
        let text = format!("ab abc {} abc {long} a {} ab", "abcabcabcabcabcabc", "éabé ".repeat(500));
        let mut expected = Vec::new();
        Splitter::new(r"\s?\S+")
            .unwrap()
            .words(&text, |word| vocabulary.encode_word(word.as_bytes(), &mut expected))
            .unwrap();
        for _ in 0..2 {
            let mut ids = vec![7];
            encoder.encode(&text, &mut ids).unwrap();
            assert_eq!(ids[0], 7);
            assert_eq!(ids[1..], expected);
        }
    }

    #[test]
    fn words_that_the_cache_has_forgotten_come_to_the_same() {
        // No two letters of "xyz" are a token.
        let bytes = (0..=255_u8).map(|byte| (vec![byte], u32::from(byte)));
        let tokens = [("ab", 256), ("abc", 257), ("xyz", 258)];
        let tokens = tokens.map(|(token, id)| (token.as_bytes().to_vec(), id));
        let vocabulary = Arc::new(Vocabulary::from_ranks(bytes.chain(tokens)).unwrap());
        let mut encoder = Encoder::new(vocabulary, r"\w+").unwrap();
        for _ in 0..2 {
            let mut ids = Vec::new();
            encoder.encode("abc xyz xyzabc", &mut ids).unwrap();
            assert_eq!(ids, [257, 258, 120, 121, 122, 257]);
            encoder.words.cache = Cache::new();
        }
    }

    #[test]
    fn a_text_that_fails_leaves_nothing_behind() {
        let mut encoder =
            Encoder::new(Arc::new(Vocabulary::default()), r"\S+|\s*[\r\n]|\s+(?!\S)|\s+").unwrap();
        let mut ids = Vec::new();
        assert!(encoder.encode(&format!("ab{}x", " ".repeat(2_000_000)), &mut ids).is_err());
        encoder.encode("c", &mut ids).unwrap();
        assert_eq!(ids, [99]);
    }
}
