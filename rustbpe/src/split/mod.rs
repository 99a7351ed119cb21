//! Splitting text into words: byte pairs are learned and merged inside a word only.
//!
//! A pattern is a regular expression whose matches are the words; text between matches is no word.
//! The patterns of the GPT-4 family are split by hand: `blocks` finds the words of 64 bytes at once
//! from the masks that a `tier` of instructions makes, `scalar` finds one word at a time. Any other
//! pattern runs on fancy-regex, which knows look-around and possessive repeats.

#[cfg(test)]
mod automaton;
mod blocks;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
mod tier;
mod words;
#[cfg(target_arch = "x86_64")]
mod x86;

use fancy_regex::Regex;

use self::tier::FindEnds;
use self::words::WordEnds;
use crate::Error;

pub use self::tier::Tier;

/// GPT-4's pattern (tiktoken's cl100k_base).
pub const GPT4_PATTERN: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

const GPT4_BEFORE_DIGITS: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|";
const GPT4_AFTER_DIGITS: &str = r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// The most digits in a word: `\p{N}`, `\p{N}{1,2}` or `\p{N}{1,3}` in the pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MaxDigits {
    One = 1,
    Two,
    Three,
}

/// Cuts text into words. Holds scratch space, so each thread has its own.
pub struct Splitter {
    engine: Engine,
}

enum Engine {
    Gpt4 { max_digits: MaxDigits, find_ends: FindEnds, ends: Box<WordEnds> },
    Any(Box<Regex>),
}

impl Splitter {
    /// Fails when `pattern` is not a regular expression, or the environment variable `RUSTBPE_SIMD`
    /// names no tier of this processor.
    pub fn new(pattern: &str) -> Result<Self, Error> {
        Self::with_tier(pattern, Tier::chosen()?)
    }

    /// With the instructions of `tier`, which patterns outside the GPT-4 family make no use of.
    ///
    /// Fails when `pattern` is not a regular expression, or this processor cannot run the tier.
    pub fn with_tier(pattern: &str, tier: Tier) -> Result<Self, Error> {
        let find_ends = tier.find_ends().ok_or_else(|| tier.missing())?;
        let engine = match gpt4_max_digits(pattern) {
            Some(max_digits) => Engine::Gpt4 { max_digits, find_ends, ends: Box::new(WordEnds::new()) },
            None => {
                Engine::Any(Box::new(Regex::new(pattern).map_err(|reason| bad_pattern(pattern, &reason))?))
            }
        };
        Ok(Self { engine })
    }

    /// Call `visit` with every word of `text`, in order.
    ///
    /// Fails when a pattern outside the GPT-4 family backtracks without end on this text.
    pub fn words<'t>(&mut self, text: &'t str, visit: impl FnMut(&'t str)) -> Result<(), Error> {
        match &mut self.engine {
            Engine::Gpt4 { max_digits, find_ends, ends } => {
                gpt4_words(text, *max_digits, *find_ends, ends, visit);
                Ok(())
            }
            Engine::Any(regex) => any_words(regex, text, visit),
        }
    }
}

fn gpt4_words<'t>(
    text: &'t str,
    max_digits: MaxDigits,
    find_ends: FindEnds,
    ends: &mut WordEnds,
    mut visit: impl FnMut(&'t str),
) {
    let mut start = 0;
    while start < text.len() {
        ends.clear();
        find_ends(text.as_bytes(), start, max_digits, ends);
        for &end in ends.as_slice() {
            debug_assert!(text.get(start..end).is_some_and(|word| !word.is_empty()));
            // SAFETY: word ends ascend from the start given, each at a character's end within the text.
            // Tests assert it, as above, in every tier; checked slices would cost a third of the speed.
            visit(unsafe { text.get_unchecked(start..end) });
            start = end;
        }
    }
}

fn any_words<'t>(regex: &Regex, text: &'t str, mut visit: impl FnMut(&'t str)) -> Result<(), Error> {
    for found in regex.find_iter(text) {
        let word = found
            .map_err(|reason| {
                Error::Invalid(format!(
                    "the split pattern gave up on a text of {} bytes ({reason}); simplify the pattern's \
                     repeats or shorten the document",
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

/// The size of the digit group, if `pattern` is GPT-4's pattern with a digit group that we know.
fn gpt4_max_digits(pattern: &str) -> Option<MaxDigits> {
    match pattern.strip_prefix(GPT4_BEFORE_DIGITS)?.strip_suffix(GPT4_AFTER_DIGITS)? {
        r"\p{N}" => Some(MaxDigits::One),
        r"\p{N}{1,2}" => Some(MaxDigits::Two),
        r"\p{N}{1,3}" => Some(MaxDigits::Three),
        _ => None,
    }
}

fn bad_pattern(pattern: &str, reason: &dyn std::fmt::Display) -> Error {
    Error::Invalid(format!("the split pattern is not a regular expression: {reason}; pattern: {pattern}"))
}

#[cfg(test)]
mod tests;
