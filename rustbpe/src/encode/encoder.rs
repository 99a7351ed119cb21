//! Whole texts: from the splitter through the cache to ids.

use std::sync::Arc;

use super::Vocabulary;
use super::cache::{Cache, Place, ShortWord};
use crate::Error;
use crate::split::Splitter;

/// Short words that wait while their cache lines come from memory.
const WAITING: usize = 64;

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
        Self { vocabulary, cache: Cache::new(), waiting: [Place::default(); WAITING], count: 0 }
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
                    self.finish(ids);
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
        ids.reserve(self.count);
        for place in &self.waiting[..self.count] {
            if !self.cache.find(*place, ids) {
                let (bytes, length) = place.word.bytes();
                let start = ids.len();
                self.vocabulary.encode_word(&bytes[..length], ids);
                self.cache.remember(*place, &ids[start..]);
            }
        }
        self.count = 0;
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
    fn a_text_that_fails_leaves_nothing_behind() {
        let mut encoder =
            Encoder::new(Arc::new(Vocabulary::default()), r"\S+|\s*[\r\n]|\s+(?!\S)|\s+").unwrap();
        let mut ids = Vec::new();
        assert!(encoder.encode(&format!("ab{}x", " ".repeat(2_000_000)), &mut ids).is_err());
        encoder.encode("c", &mut ids).unwrap();
        assert_eq!(ids, [99]);
    }
}
