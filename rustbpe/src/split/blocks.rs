//! Many words at a time: where words start in a block of 64 bytes, by arithmetic on bit masks.
//!
//! Bit i of a mask speaks of byte i. A block begins where a word begins, so nothing before it
//! matters, and the next block begins at the last word start found in this one: what the end of a
//! block leaves open is looked at again. The idea of boundary masks over blocks is simdjson's
//! (Langdale and Lemire, 2019) and, for GPT-4's pattern, gigatoken's (Roed, 2026).

use super::MaxDigits;
use super::scalar;
use super::words::WordEnds;
use crate::unicode::{self, Class};

pub(super) const BLOCK: usize = 64;

/// What a tier's instructions say of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ByteMasks {
    /// ASCII letters.
    pub letters: u64,
    /// ASCII digits.
    pub digits: u64,
    pub spaces: u64,
    /// ASCII white space: spaces, newlines, `\t`, `\x0b`, `\x0c`.
    pub white: u64,
    /// `\r` and `\n`
    pub newlines: u64,
    pub apostrophes: u64,
    pub beyond_ascii: BeyondAscii,
}

/// The bytes of characters beyond ASCII.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct BeyondAscii {
    pub bytes: u64,
    /// Each character's first byte.
    pub leads: u64,
    /// The leads of characters of three or four bytes.
    pub wide_leads: u64,
    /// The leads of characters that `SURE_LETTERS` and the exceptions of C3 say are letters.
    pub letter_leads: u64,
}

/// Lead bytes whose characters are letters, all of them, as a set that two table look-ups test: a byte
/// is in it if the entries of its low and its high half have a bit in common. They spell the letters of
/// Latin beyond Latin-1, most of Cyrillic, and nearly all Chinese and Korean characters.
pub(super) struct LeadSet {
    pub low: [u8; 16],
    pub high: [u8; 16],
}

pub(super) const SURE_LETTERS: LeadSet = {
    let leads: [u8; 17] = [
        0xc4, 0xc5, 0xc6, 0xc7, 0xc8, 0xc9, 0xca, 0xd0, 0xd1, 0xd3, 0xe5, 0xe6, 0xe7, 0xe8, 0xe9, 0xeb, 0xec,
    ];
    let mut set = LeadSet { low: [0; 16], high: [0; 16] };
    let mut at = 0;
    while at < leads.len() {
        let row = 1 << (leads[at] / 16 - 0xc);
        set.low[leads[at] as usize % 16] |= row;
        set.high[leads[at] as usize / 16] |= row;
        at += 1;
    }
    set
};

/// The lead byte of `é` and 61 other letters, and of the two signs that are not.
pub(super) const LATIN_1: u8 = 0xc3;
/// Second bytes of × and ÷.
pub(super) const LATIN_1_SIGNS: [u8; 2] = [0x97, 0xb7];

/// The leads of the Latin-1 letters, given where the lead and the signs' second bytes are.
#[inline(always)]
pub(super) fn latin_1_letters(leads: u64, sign_bytes: u64) -> u64 {
    // The character of the last byte's lead ends in the next block, so its class is not known.
    leads & !(sign_bytes >> 1) & (u64::MAX >> 1)
}

/// The class of each byte's character. A byte in no class is not known: the block ends before its
/// character does, or something before it has to be read byte by byte.
struct Classes {
    letters: u64,
    digits: u64,
    spaces: u64,
    /// White space but newlines, so spaces too.
    blanks: u64,
    newlines: u64,
    others: u64,
    apostrophes: u64,
    /// The bytes of characters but the first ones.
    continuations: u64,
}

/// Find words from `start` on until `ends` is full or the text ends. `start` is on a word's first byte
/// and before the end of `text`, which is UTF-8.
#[inline(always)]
pub(super) fn find_ends(
    text: &[u8],
    start: usize,
    max_digits: MaxDigits,
    ends: &mut WordEnds,
    look: impl Fn(&[u8; BLOCK]) -> ByteMasks,
) {
    let mut at = start;
    while at < text.len() && ends.has_room() {
        if let Some(block) = text[at..].first_chunk::<BLOCK>() {
            let starts = Classes::new(block, look(block)).word_starts(block, max_digits) & !1;
            if starts != 0 {
                ends.push_block(at, starts);
                at += starts.ilog2() as usize;
                continue;
            }
        }
        at = scalar::word_end(text, at, max_digits);
        ends.push(at);
    }
}

impl Classes {
    #[inline(always)]
    fn new(block: &[u8; BLOCK], masks: ByteMasks) -> Self {
        let ByteMasks { letters, digits, spaces, white, newlines, apostrophes, beyond_ascii } = masks;
        let classes = Self {
            letters,
            digits,
            spaces,
            blanks: white & !newlines,
            newlines,
            others: !(letters | digits | white | beyond_ascii.bytes),
            apostrophes,
            continuations: 0,
        };
        if beyond_ascii.bytes == 0 { classes } else { classes.with_beyond_ascii(block, beyond_ascii) }
    }

    #[inline(always)]
    fn with_beyond_ascii(mut self, block: &[u8; BLOCK], beyond: BeyondAscii) -> Self {
        let sure = beyond.letter_leads;
        self.letters |= sure | sure << 1 | (sure & beyond.wide_leads) << 2;
        self.continuations = beyond.bytes & !beyond.leads;
        let mut open = beyond.leads & !sure;
        while open != 0 {
            let at = open.trailing_zeros();
            open &= open - 1;
            let (class, length) = match unicode::class_at(block, at as usize) {
                Some((class @ (Class::Letter | Class::Other), length)) => (class, length),
                // Digits and white space beyond ASCII are rare: left to the byte-by-byte reading.
                _ => {
                    self.forget_from(at);
                    break;
                }
            };
            let bytes = ((1 << length) - 1) << at;
            self.letters |= if class == Class::Letter { bytes } else { 0 };
            self.others |= if class == Class::Other { bytes } else { 0 };
        }
        self
    }

    /// Leave the classes of byte `at` and all behind it open.
    fn forget_from(&mut self, at: u32) {
        let known = (1 << at) - 1;
        self.letters &= known;
        self.digits &= known;
        self.spaces &= known;
        self.blanks &= known;
        self.newlines &= known;
        self.others &= known;
        self.apostrophes &= known;
    }

    /// The first bytes of words. Bytes up to the last of these that are not in the mask start no word;
    /// bytes behind it may.
    #[inline(always)]
    fn word_starts(&self, block: &[u8; BLOCK], max_digits: MaxDigits) -> u64 {
        // ` ?[^\s\p{L}\p{N}]++[\r\n]*`: a run of others starts a word unless a space before it does.
        let other_starts = self.others & !(self.others << 1) & !(self.spaces << 1);
        // `[^\r\n\p{L}\p{N}]?+\p{L}+`: a letter run starts a word, unless a blank is before it or a
        // single other that starts a word. The sum carries each start over its character's bytes.
        let behind_first_other = (self.continuations.wrapping_add(other_starts << 1)) & !self.continuations;
        let letter_starts = self.letters & !((self.letters | self.blanks) << 1) & !behind_first_other;

        other_starts
            | letter_starts
            | self.digit_starts(max_digits)
            | self.white_starts()
            | self.starts_behind_contractions(block, other_starts)
    }

    /// `\p{N}{1,3}`: the first of a run of digits, and every third from there.
    #[inline(always)]
    fn digit_starts(&self, max_digits: MaxDigits) -> u64 {
        let digits = self.digits;
        let inner = digits & (digits << 1);
        let mut starts = digits & !inner;
        if inner == 0 {
            return starts;
        }
        // Where all digits since the one `max_digits` before are of one run.
        let reachable = match max_digits {
            MaxDigits::One => return digits,
            MaxDigits::Two => inner,
            MaxDigits::Three => inner & (inner << 1),
        };
        let mut last = starts;
        while last != 0 {
            last = (last << max_digits as u32) & reachable;
            starts |= last;
        }
        starts
    }

    /// `\s*[\r\n]|\s+(?!\S)|\s+`, and the blank that a word of letters or others begins with.
    #[inline(always)]
    fn white_starts(&self) -> u64 {
        // Newlines directly behind others belong to their word. The sum clears the runs it starts in.
        let behind_others = self.newlines & (self.others << 1);
        let newlines = self.newlines & self.newlines.wrapping_add(behind_others);
        let white = self.blanks | newlines;
        let visible = self.letters | self.digits | self.others;
        let first = white & !(white << 1);
        let last = self.blanks & (visible >> 1);
        // Of a run with newlines, the blanks behind the last newline are a word. One blank is `last`.
        let mut behind_last_newline = 0;
        let mut indents = self.blanks & (newlines << 1) & (self.blanks >> 1);
        while indents != 0 {
            let at = indents.trailing_zeros();
            indents &= indents - 1;
            let length = (self.blanks >> at).trailing_ones();
            behind_last_newline |= u64::from(visible >> at >> length & 1 == 1) << at;
        }
        first | last | behind_last_newline
    }

    /// `'(?i:[sdmt]|ll|ve|re)`: the letters that go on behind a contraction are a word of their own.
    #[inline(always)]
    fn starts_behind_contractions(&self, block: &[u8; BLOCK], other_starts: u64) -> u64 {
        let mut starts = 0;
        let mut apostrophes = self.apostrophes & other_starts & (self.letters >> 1);
        while apostrophes != 0 {
            let at = apostrophes.trailing_zeros() as usize;
            apostrophes &= apostrophes - 1;
            if let Some(length) = scalar::contraction_length(&block[at + 1..]) {
                starts |= (1_u64 << at << length << 1) & self.letters;
            }
        }
        starts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sure_leads_start_letters_only() {
        let mut sure = 0;
        for character in ('\u{80}'..=char::MAX).filter(|character| *character != char::REPLACEMENT_CHARACTER)
        {
            let mut bytes = [0; 4];
            character.encode_utf8(&mut bytes);
            let [lead, second, ..] = bytes;
            let in_set =
                SURE_LETTERS.low[usize::from(lead % 16)] & SURE_LETTERS.high[usize::from(lead / 16)] != 0;
            if in_set || (lead == LATIN_1 && !LATIN_1_SIGNS.contains(&second)) {
                assert_eq!(unicode::class(character as u32), Class::Letter, "{character:?}");
                sure += 1;
            }
        }
        assert_eq!(sure, 10 * 64 + 7 * 4096 + 62);
    }
}
