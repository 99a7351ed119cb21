//! The GPT-4 patterns on the automaton of regex-automata: what the tests, the fuzz target and the
//! benchmark hold the splitter against. No part of the crate.

use regex_automata::meta::{Cache, Regex};
use regex_automata::{Anchored, Input};

pub struct Automaton {
    regex: Regex,
    cache: Cache,
}

impl Automaton {
    /// `digits` is the pattern's digit group, such as `\p{N}{1,3}`.
    ///
    /// Two patterns, tried in this order at each position:
    ///
    /// 0. everything but the look-ahead. The possessive repeats go: none of them can give anything back
    ///    that would let the rest match, so greedy ones find the same.
    /// 1. `\s+`, for `\s+(?!\S)|\s+`, whose look-ahead `words` does by hand.
    pub fn new(digits: &str) -> Self {
        let words = format!(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]"
        );
        let regex = Regex::new_many(&[words.as_str(), r"\s+"]).expect("the pattern is well formed");
        let cache = regex.create_cache();
        Self { regex, cache }
    }

    pub fn words<'t>(&mut self, text: &'t str, mut visit: impl FnMut(&'t str)) {
        // Every character is a letter, a number, white space or none of these, and each kind is the
        // start of a match: so words follow each other without a gap, and an anchored search finds all.
        let mut input = Input::new(text).anchored(Anchored::Yes);
        while let Some(found) = self.regex.search_with(&mut self.cache, &input) {
            let mut end = found.end();
            if found.pattern().as_usize() == 1 && end < text.len() {
                // `\s+(?!\S)`: a run of white space leaves its last character to the word that follows,
                // unless it has only that one.
                let run = &text[found.start()..end];
                let last = run.char_indices().next_back().map_or(0, |(at, _)| at);
                if last > 0 {
                    end = found.start() + last;
                }
            }
            visit(&text[found.start()..end]);
            input.set_start(end);
        }
        assert_eq!(input.start(), text.len());
    }
}
