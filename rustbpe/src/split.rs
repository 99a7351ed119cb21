//! Splitting text into words: byte pairs are learned and merged inside a word only.
//!
//! A pattern is a regular expression whose matches are the words; text between matches is no word.
//! The patterns of the GPT-4 family run on an automaton, which is faster and has no backtracking
//! limit; any other pattern runs on fancy-regex, which knows look-around and possessive repeats.

use fancy_regex::Regex as BacktrackingRegex;
use regex_automata::meta::{Cache, Regex as AutomatonRegex};
use regex_automata::{Anchored, Input};

use crate::Error;

/// GPT-4's pattern (tiktoken's cl100k_base).
pub const GPT4_PATTERN: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

const GPT4_BEFORE_DIGITS: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|";
const GPT4_AFTER_DIGITS: &str = r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const GPT4_DIGITS: [&str; 3] = [r"\p{N}", r"\p{N}{1,2}", r"\p{N}{1,3}"];

/// Cuts text into words. Holds scratch space, so each thread has its own.
pub struct Splitter {
    engine: Engine,
}

enum Engine {
    Gpt4 { regex: AutomatonRegex, cache: Box<Cache> },
    Any(Box<BacktrackingRegex>),
}

impl Splitter {
    /// Fails when `pattern` is not a regular expression.
    pub fn new(pattern: &str) -> Result<Self, Error> {
        let engine = match gpt4_digits(pattern) {
            Some(digits) => gpt4_engine(digits)?,
            None => Engine::Any(Box::new(
                BacktrackingRegex::new(pattern).map_err(|reason| bad_pattern(pattern, &reason))?,
            )),
        };
        Ok(Self { engine })
    }

    /// Call `visit` with every word of `text`, in order.
    ///
    /// Fails when a pattern outside the GPT-4 family backtracks without end on this text.
    pub fn words<'t>(&mut self, text: &'t str, mut visit: impl FnMut(&'t str)) -> Result<(), Error> {
        match &mut self.engine {
            Engine::Gpt4 { regex, cache } => {
                gpt4_words(regex, cache, text, visit);
                Ok(())
            }
            Engine::Any(regex) => {
                for found in regex.find_iter(text) {
                    let word = found
                        .map_err(|reason| {
                            Error::Invalid(format!(
                                "the split pattern gave up on a text of {} bytes ({reason}); simplify the \
                                 pattern's repeats or shorten the document",
                                text.len()
                            ))
                        })?
                        .as_str();
                    if !word.is_empty() {
                        visit(word);
                    }
                }
                Ok(())
            }
        }
    }
}

/// The digit group, if `pattern` is GPT-4's pattern with a digit group that we know.
fn gpt4_digits(pattern: &str) -> Option<&str> {
    let digits = pattern.strip_prefix(GPT4_BEFORE_DIGITS)?.strip_suffix(GPT4_AFTER_DIGITS)?;
    GPT4_DIGITS.contains(&digits).then_some(digits)
}

/// Two automaton patterns, tried in this order at each position:
///
/// 0. everything but the look-ahead. The possessive repeats go: none of them can give anything back
///    that would let the rest match, so greedy ones find the same.
/// 1. `\s+`, for `\s+(?!\S)|\s+`, whose look-ahead `gpt4_words` does by hand.
fn gpt4_engine(digits: &str) -> Result<Engine, Error> {
    let words = format!(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]"
    );
    let regex =
        AutomatonRegex::new_many(&[words.as_str(), r"\s+"]).map_err(|reason| bad_pattern(&words, &reason))?;
    let cache = Box::new(regex.create_cache());
    Ok(Engine::Gpt4 { regex, cache })
}

fn gpt4_words<'t>(regex: &AutomatonRegex, cache: &mut Cache, text: &'t str, mut visit: impl FnMut(&'t str)) {
    // Every character is a letter, a number, white space or none of these, and each kind is the start
    // of a match: so words follow each other without a gap, and an anchored search finds them all.
    let mut input = Input::new(text).anchored(Anchored::Yes);
    while let Some(found) = regex.search_with(cache, &input) {
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
    debug_assert_eq!(input.start(), text.len());
}

fn bad_pattern(pattern: &str, reason: &dyn std::fmt::Display) -> Error {
    Error::Invalid(format!("the split pattern is not a regular expression: {reason}; pattern: {pattern}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(pattern: &str, text: &str) -> Vec<String> {
        let mut words = Vec::new();
        Splitter::new(pattern).unwrap().words(text, |word| words.push(word.to_owned())).unwrap();
        words
    }

    fn gpt4(digits: &str) -> String {
        format!("{GPT4_BEFORE_DIGITS}{digits}{GPT4_AFTER_DIGITS}")
    }

    #[test]
    fn the_gpt4_pattern_splits_as_published() {
        assert_eq!(
            split(GPT4_PATTERN, "Hello world, it's 12345!\n\n  x = 1"),
            ["Hello", " world", ",", " it", "'s", " ", "123", "45", "!\n\n", " ", " x", " =", " ", "1"]
        );
        assert_eq!(split(&gpt4(r"\p{N}{1,2}"), "12345"), ["12", "34", "5"]);
        assert_eq!(split(&gpt4(r"\p{N}"), "123"), ["1", "2", "3"]);
    }

    #[test]
    fn the_known_patterns_run_on_the_automaton_and_others_do_not() {
        for digits in GPT4_DIGITS {
            assert!(matches!(Splitter::new(&gpt4(digits)).unwrap().engine, Engine::Gpt4 { .. }));
        }
        assert!(matches!(Splitter::new(&gpt4(r"\p{N}{1,4}")).unwrap().engine, Engine::Any(_)));
    }

    #[test]
    fn the_automaton_splits_exactly_as_the_backtracking_engine() {
        // The characters at which the alternatives meet: apostrophes, case folding (ſ), digits and
        // spaces of several scripts, every kind of line end, combining marks, beyond the first plane.
        let alphabet = [
            "'", "s", "S", "ſ", "l", "ll", "v", "e", "r", "R", "é", "e\u{301}", "日", "한", "я", "0", "7",
            "٣", "Ⅷ", "½", " ", "  ", "\t", "\n", "\r", "\r\n", "\u{b}", "\u{85}", "\u{a0}", "\u{2028}",
            "\u{3000}", "\u{200b}", "!", "?!", "_", "-", "😀", "\u{1d400}", "\u{10ffff}", "\0",
        ];
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        let patterns = GPT4_DIGITS.map(gpt4);
        let mut engines = patterns
            .each_ref()
            .map(|pattern| (Splitter::new(pattern).unwrap(), BacktrackingRegex::new(pattern).unwrap()));
        for round in 0..20_000 {
            let text: String = (0..random(14))
                .map(|_| match char::from_u32(random(4 * 0x11_0000) as u32) {
                    Some(any) => any.to_string(),
                    None => alphabet[random(alphabet.len())].to_owned(),
                })
                .collect();
            let (automaton, backtracking) = &mut engines[round % 3];
            let mut words = Vec::new();
            automaton.words(&text, |word| words.push(word)).unwrap();
            let expected: Vec<&str> =
                backtracking.find_iter(&text).map(|found| found.unwrap().as_str()).collect();
            assert_eq!(words, expected, "{text:?}");
        }
    }

    #[test]
    fn any_other_pattern_is_taken_at_its_word_and_empty_matches_are_no_words() {
        assert_eq!(split(r"[a-z]*", "ab1cd"), ["ab", "cd"]);
        assert_eq!(split(r"\w+(?=!)", "yes! no"), ["yes"]);
    }

    #[test]
    fn long_runs_neither_fail_nor_take_forever() {
        for filler in [" ", "\n", "a", "1", "!"] {
            let text = format!("{}x", filler.repeat(2_000_000));
            let bytes: usize = split(GPT4_PATTERN, &text).iter().map(String::len).sum();
            assert_eq!(bytes, text.len());
        }
    }

    #[test]
    fn a_bad_pattern_is_an_error_that_shows_it() {
        let error = Splitter::new("(").err().unwrap().to_string();
        assert!(error.contains("not a regular expression") && error.ends_with("pattern: ("), "{error}");
    }

    #[test]
    fn a_pattern_that_backtracks_too_far_is_an_error() {
        let text = format!("{}x", " ".repeat(2_000_000));
        let pattern = r"\S+|\s*[\r\n]|\s+(?!\S)|\s+";
        let error = Splitter::new(pattern).unwrap().words(&text, |_| ()).err();
        assert!(error.unwrap().to_string().contains("gave up"));
    }
}
