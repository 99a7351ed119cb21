//! Byte masks with the instructions of x86-64.

use std::arch::x86_64::*;

use super::MaxDigits;
use super::blocks::{
    BLOCK, BeyondAscii, ByteMasks, LATIN_1, LATIN_1_SIGNS, SURE_LETTERS, find_ends, latin_1_letters,
};
use super::tier::FindEnds;
use super::words::WordEnds;

/// `None` without AVX-512BW.
pub(super) fn avx512() -> Option<FindEnds> {
    let has = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("popcnt");
    has.then_some(|text, start, max_digits, ends| {
        // SAFETY: the processor has the features that the function is compiled for, as seen above.
        unsafe { find_ends_avx512(text, start, max_digits, ends) }
    })
}

/// `None` without AVX2.
pub(super) fn avx2() -> Option<FindEnds> {
    let has = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("popcnt");
    has.then_some(|text, start, max_digits, ends| {
        // SAFETY: the processor has the features that the function is compiled for, as seen above.
        unsafe { find_ends_avx2(text, start, max_digits, ends) }
    })
}

#[target_feature(enable = "avx512f,avx512bw,bmi1,bmi2,lzcnt,popcnt")]
fn find_ends_avx512(text: &[u8], start: usize, max_digits: MaxDigits, ends: &mut WordEnds) {
    find_ends(text, start, max_digits, ends, |block| look_avx512(block));
}

#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
fn find_ends_avx2(text: &[u8], start: usize, max_digits: MaxDigits, ends: &mut WordEnds) {
    find_ends(text, start, max_digits, ends, |block| look_avx2(block));
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn look_avx512(block: &[u8; BLOCK]) -> ByteMasks {
    // SAFETY: a block has the 64 bytes that are read, and the read needs no alignment.
    let bytes = unsafe { _mm512_loadu_si512(block.as_ptr().cast()) };
    let each = |byte: u8| _mm512_set1_epi8(byte.cast_signed());
    let equal = |byte: u8| _mm512_cmpeq_epi8_mask(bytes, each(byte));
    let within = |bytes, first: u8, last: u8| {
        _mm512_cmple_epu8_mask(_mm512_sub_epi8(bytes, each(first)), each(last - first))
    };
    let spaces = equal(b' ');
    let beyond_ascii = _mm512_movepi8_mask(bytes);
    ByteMasks {
        letters: within(_mm512_or_si512(bytes, each(0x20)), b'a', b'z'),
        digits: within(bytes, b'0', b'9'),
        spaces,
        white: spaces | within(bytes, b'\t', b'\r'),
        newlines: equal(b'\n') | equal(b'\r'),
        apostrophes: equal(b'\''),
        beyond_ascii: if beyond_ascii == 0 {
            BeyondAscii::default()
        } else {
            look_beyond_ascii_avx512(bytes, beyond_ascii)
        },
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn look_beyond_ascii_avx512(bytes: __m512i, beyond_ascii: u64) -> BeyondAscii {
    let each = |byte: u8| _mm512_set1_epi8(byte.cast_signed());
    let equal = |byte: u8| _mm512_cmpeq_epi8_mask(bytes, each(byte));
    let half = |halves| _mm512_and_si512(halves, each(0x0f));
    let table = |entries: &[u8; 16]| {
        // SAFETY: the table has the 16 bytes that are read, and the read needs no alignment.
        _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(entries.as_ptr().cast()) })
    };
    let low = _mm512_shuffle_epi8(table(&SURE_LETTERS.low), half(bytes));
    let high = _mm512_shuffle_epi8(table(&SURE_LETTERS.high), half(_mm512_srli_epi16::<4>(bytes)));
    let signs = equal(LATIN_1_SIGNS[0]) | equal(LATIN_1_SIGNS[1]);
    BeyondAscii {
        bytes: beyond_ascii,
        leads: _mm512_cmpge_epu8_mask(bytes, each(0xc0)),
        wide_leads: _mm512_cmpge_epu8_mask(bytes, each(0xe0)),
        letter_leads: _mm512_test_epi8_mask(low, high) | latin_1_letters(equal(LATIN_1), signs),
    }
}

/// The two halves of a block.
type Halves = [__m256i; 2];

/// The mask of the bytes whose highest bit is set.
#[inline]
#[target_feature(enable = "avx2")]
fn highest_bits([first, second]: Halves) -> u64 {
    let bits = |half| u64::from(_mm256_movemask_epi8(half).cast_unsigned());
    bits(first) | bits(second) << 32
}

#[inline]
#[target_feature(enable = "avx2")]
fn look_avx2(block: &[u8; BLOCK]) -> ByteMasks {
    let at: *const __m256i = block.as_ptr().cast();
    // SAFETY: a block has the 2 · 32 bytes that are read, and the reads need no alignment.
    let bytes = unsafe { [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))] };
    let each = |byte: u8| _mm256_set1_epi8(byte.cast_signed());
    let equal = |half, byte: u8| _mm256_cmpeq_epi8(half, each(byte));
    let within = |half, first: u8, last: u8| {
        let above_first = _mm256_sub_epi8(half, each(first));
        _mm256_cmpeq_epi8(_mm256_min_epu8(above_first, each(last - first)), above_first)
    };
    let spaces = highest_bits(bytes.map(|half| equal(half, b' ')));
    let newlines = bytes.map(|half| _mm256_or_si256(equal(half, b'\n'), equal(half, b'\r')));
    let beyond_ascii = highest_bits(bytes);
    ByteMasks {
        letters: highest_bits(bytes.map(|half| within(_mm256_or_si256(half, each(0x20)), b'a', b'z'))),
        digits: highest_bits(bytes.map(|half| within(half, b'0', b'9'))),
        spaces,
        white: spaces | highest_bits(bytes.map(|half| within(half, b'\t', b'\r'))),
        newlines: highest_bits(newlines),
        apostrophes: highest_bits(bytes.map(|half| equal(half, b'\''))),
        beyond_ascii: if beyond_ascii == 0 {
            BeyondAscii::default()
        } else {
            look_beyond_ascii_avx2(bytes, beyond_ascii)
        },
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn look_beyond_ascii_avx2(bytes: Halves, beyond_ascii: u64) -> BeyondAscii {
    let each = |byte: u8| _mm256_set1_epi8(byte.cast_signed());
    let equal = |byte: u8| highest_bits(bytes.map(|half| _mm256_cmpeq_epi8(half, each(byte))));
    let at_least =
        |byte: u8| highest_bits(bytes.map(|half| _mm256_cmpeq_epi8(_mm256_max_epu8(half, each(byte)), half)));
    let table = |entries: &[u8; 16]| {
        // SAFETY: the table has the 16 bytes that are read, and the read needs no alignment.
        _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(entries.as_ptr().cast()) })
    };
    let (low_table, high_table) = (table(&SURE_LETTERS.low), table(&SURE_LETTERS.high));
    let in_set = bytes.map(|half| {
        let low = _mm256_shuffle_epi8(low_table, _mm256_and_si256(half, each(0x0f)));
        let high_half = _mm256_and_si256(_mm256_srli_epi16::<4>(half), each(0x0f));
        let common = _mm256_and_si256(low, _mm256_shuffle_epi8(high_table, high_half));
        _mm256_cmpgt_epi8(common, _mm256_setzero_si256())
    });
    let signs = equal(LATIN_1_SIGNS[0]) | equal(LATIN_1_SIGNS[1]);
    BeyondAscii {
        bytes: beyond_ascii,
        leads: at_least(0xc0),
        wide_leads: at_least(0xe0),
        letter_leads: highest_bits(in_set) | latin_1_letters(equal(LATIN_1), signs),
    }
}
