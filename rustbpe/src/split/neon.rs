//! Byte masks with the instructions of 64-bit Arm.

use std::arch::aarch64::*;
use std::arch::is_aarch64_feature_detected;

use super::MaxDigits;
use super::blocks::{
    BLOCK, BeyondAscii, ByteMasks, LATIN_1, LATIN_1_SIGNS, SURE_LETTERS, find_ends, latin_1_letters,
};
use super::tier::FindEnds;
use super::words::WordEnds;

/// `None` without NEON, which few 64-bit Arm processors lack.
pub(super) fn neon() -> Option<FindEnds> {
    is_aarch64_feature_detected!("neon").then_some(|text, start, max_digits, ends| {
        // SAFETY: the processor has the feature that the function is compiled for, as seen above.
        unsafe { find_ends_neon(text, start, max_digits, ends) }
    })
}

#[target_feature(enable = "neon")]
fn find_ends_neon(text: &[u8], start: usize, max_digits: MaxDigits, ends: &mut WordEnds) {
    find_ends(text, start, max_digits, ends, |block| look(block));
}

/// The four quarters of a block.
type Quarters = [uint8x16_t; 4];

/// The mask of the bytes that are all ones, where each byte is all ones or all zeros.
#[inline]
#[target_feature(enable = "neon")]
fn mask([a, b, c, d]: Quarters) -> u64 {
    let bit_of_lane = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
    let bits = |quarter| vandq_u8(quarter, bit_of_lane);
    // Pairwise sums bring each eight bits into a byte: 64 bytes, 32, 16, 8.
    let (first, second) = (vpaddq_u8(bits(a), bits(b)), vpaddq_u8(bits(c), bits(d)));
    let sums = vpaddq_u8(first, second);
    vgetq_lane_u64::<0>(vreinterpretq_u64_u8(vpaddq_u8(sums, sums)))
}

#[inline]
#[target_feature(enable = "neon")]
fn look(block: &[u8; BLOCK]) -> ByteMasks {
    let at = block.as_ptr();
    // SAFETY: a block has the 4 · 16 bytes that are read, and the reads need no alignment.
    let bytes = unsafe { [vld1q_u8(at), vld1q_u8(at.add(16)), vld1q_u8(at.add(32)), vld1q_u8(at.add(48))] };
    let each = |byte: u8| vdupq_n_u8(byte);
    let equal = |quarter, byte: u8| vceqq_u8(quarter, each(byte));
    let within = |quarter, first: u8, last: u8| vcleq_u8(vsubq_u8(quarter, each(first)), each(last - first));
    let spaces = mask(bytes.map(|quarter| equal(quarter, b' ')));
    let newlines = bytes.map(|quarter| vorrq_u8(equal(quarter, b'\n'), equal(quarter, b'\r')));
    let beyond_ascii = mask(bytes.map(|quarter| vcgeq_u8(quarter, each(0x80))));
    ByteMasks {
        letters: mask(bytes.map(|quarter| within(vorrq_u8(quarter, each(0x20)), b'a', b'z'))),
        digits: mask(bytes.map(|quarter| within(quarter, b'0', b'9'))),
        spaces,
        white: spaces | mask(bytes.map(|quarter| within(quarter, b'\t', b'\r'))),
        newlines: mask(newlines),
        apostrophes: mask(bytes.map(|quarter| equal(quarter, b'\''))),
        beyond_ascii: if beyond_ascii == 0 {
            BeyondAscii::default()
        } else {
            look_beyond_ascii(bytes, beyond_ascii)
        },
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn look_beyond_ascii(bytes: Quarters, beyond_ascii: u64) -> BeyondAscii {
    let equal = |byte: u8| mask(bytes.map(|quarter| vceqq_u8(quarter, vdupq_n_u8(byte))));
    let at_least = |byte: u8| mask(bytes.map(|quarter| vcgeq_u8(quarter, vdupq_n_u8(byte))));
    // SAFETY: each table has the 16 bytes that are read.
    let (low_table, high_table) =
        unsafe { (vld1q_u8(SURE_LETTERS.low.as_ptr()), vld1q_u8(SURE_LETTERS.high.as_ptr())) };
    let in_set = bytes.map(|quarter| {
        let low = vqtbl1q_u8(low_table, vandq_u8(quarter, vdupq_n_u8(0x0f)));
        vtstq_u8(low, vqtbl1q_u8(high_table, vshrq_n_u8::<4>(quarter)))
    });
    let signs = equal(LATIN_1_SIGNS[0]) | equal(LATIN_1_SIGNS[1]);
    BeyondAscii {
        bytes: beyond_ascii,
        leads: at_least(0xc0),
        wide_leads: at_least(0xe0),
        letter_leads: mask(in_set) | latin_1_letters(equal(LATIN_1), signs),
    }
}
