//! One word at a time, byte by byte: the plain reading of the pattern, for every processor.
//!
//! The block tiers use it too, where a block cannot say where a word ends.

use super::MaxDigits;
use crate::unicode::{self, Class};

/// The end of the word that starts at `start`. `text` is UTF-8, `start` is before its end and on a
/// character's first byte.
pub(super) fn word_end(text: &[u8], start: usize, max_digits: MaxDigits) -> usize {
    let Some((class, length)) = unicode::class_at(text, start) else { return text.len() };
    let next = start + length;
    match class {
        Class::Letter => letters_end(text, next),
        Class::Number => numbers_end(text, next, max_digits),
        Class::Newline => white_end(text, start),
        Class::Blank | Class::Other => {
            if text[start] == b'\''
                && let Some(length) = contraction_length(&text[next..])
            {
                return next + length;
            }
            match (class, unicode::class_at(text, next)) {
                (_, Some((Class::Letter, length))) => letters_end(text, next + length),
                (Class::Other, _) => others_end(text, next),
                (_, Some((Class::Other, length))) if text[start] == b' ' => others_end(text, next + length),
                _ => white_end(text, start),
            }
        }
    }
}

/// The bytes of s, d, m, t, ll, ve or re at the start of what follows an apostrophe. Without regard
/// to case, of which Unicode has one more for the s: ſ, U+017F.
pub(super) fn contraction_length(after: &[u8]) -> Option<usize> {
    let lower = |at: usize| after.get(at).map(|byte| byte | 0x20);
    match (lower(0)?, lower(1)) {
        (b's' | b'd' | b'm' | b't', _) => Some(1),
        (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) => Some(2),
        _ => after.starts_with("ſ".as_bytes()).then_some(2),
    }
}

fn letters_end(text: &[u8], mut at: usize) -> usize {
    loop {
        while let Some(eight) = text.get(at..).and_then(|rest| rest.first_chunk::<8>()) {
            let letters = leading_ascii_letters(u64::from_le_bytes(*eight));
            at += letters;
            if letters < 8 {
                break;
            }
        }
        match unicode::class_at(text, at) {
            Some((Class::Letter, length)) => at += length,
            _ => return at,
        }
        // A text that has left ASCII stays outside, so do not try eight letters after each character.
        while text.get(at).is_some_and(|byte| *byte >= 0x80) {
            match unicode::class_at(text, at) {
                Some((Class::Letter, length)) => at += length,
                _ => return at,
            }
        }
    }
}

/// How many of eight bytes, the lowest first, are ASCII letters before one is not.
fn leading_ascii_letters(eight: u64) -> usize {
    const EACH: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x80 * EACH;
    // Seven bits and a constant below 0x80 add up inside their byte, so the sums' high bits compare.
    let lower = (eight | (0x20 * EACH)) & !HIGH;
    let from_a = lower + (0x80 - u64::from(b'a')) * EACH;
    let after_z = lower + (0x7f - u64::from(b'z')) * EACH;
    let letters = from_a & !after_z & !eight & HIGH;
    ((!letters & HIGH).trailing_zeros() / 8) as usize
}

fn numbers_end(text: &[u8], mut at: usize, max_digits: MaxDigits) -> usize {
    for _ in 1..max_digits as u32 {
        match unicode::class_at(text, at) {
            Some((Class::Number, length)) => at += length,
            _ => break,
        }
    }
    at
}

fn others_end(text: &[u8], mut at: usize) -> usize {
    while let Some((Class::Other, length)) = unicode::class_at(text, at) {
        at += length;
    }
    while matches!(text.get(at), Some(b'\r' | b'\n')) {
        at += 1;
    }
    at
}

/// `\s*[\r\n]|\s+(?!\S)|\s+`: up to the run's last newline, else all but the run's last character,
/// which goes to the word that follows, else the run.
fn white_end(text: &[u8], start: usize) -> usize {
    let mut after_newline = None;
    let mut last = start;
    let mut at = start;
    while let Some((class @ (Class::Blank | Class::Newline), length)) = unicode::class_at(text, at) {
        last = at;
        at += length;
        if class == Class::Newline {
            after_newline = Some(at);
        }
    }
    match after_newline {
        Some(end) => end,
        None if at == text.len() || last == start => at,
        None => last,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_told_apart_from_a_letter_in_every_lane() {
        for lane in 0..8 {
            for byte in 0..=255_u8 {
                let mut eight = *b"aZzAmMqQ";
                eight[lane] = byte;
                let expected = if byte.is_ascii_alphabetic() { 8 } else { lane };
                assert_eq!(leading_ascii_letters(u64::from_le_bytes(eight)), expected, "{eight:?}");
            }
        }
    }

    #[test]
    fn contractions_ignore_case_and_know_the_long_s() {
        for (after, length) in [("s", 1), ("Tx", 1), ("LL", 2), ("vE", 2), ("re", 2), ("ſx", 2)] {
            assert_eq!(contraction_length(after.as_bytes()), Some(length), "{after}");
        }
        for after in ["", "l", "le", "v", "x", "é", "\u{17e}"] {
            assert_eq!(contraction_length(after.as_bytes()), None, "{after}");
        }
    }
}
