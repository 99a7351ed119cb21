//! Where the next words end, found many at a time and then visited.

use super::blocks::BLOCK;

/// Words in a buffer that is then visited: few enough for the first-level cache.
const WORDS: usize = 1024;

/// The ends of words that follow each other, as positions in the text.
pub(super) struct WordEnds {
    len: usize,
    ends: [usize; WORDS + BLOCK],
}

impl WordEnds {
    pub fn new() -> Self {
        Self { len: 0, ends: [0; WORDS + BLOCK] }
    }

    pub fn clear(&mut self) {
        self.len = 0;
    }

    pub fn as_slice(&self) -> &[usize] {
        &self.ends[..self.len]
    }

    /// Whether the words of another block fit.
    #[inline(always)]
    pub fn has_room(&self) -> bool {
        self.len <= WORDS
    }

    #[inline(always)]
    pub fn push(&mut self, end: usize) {
        self.ends[self.len] = end;
        self.len += 1;
    }

    /// `ends` has a bit for each byte behind `base` at which a word ends.
    #[inline(always)]
    pub fn push_block(&mut self, base: usize, mut ends: u64) {
        let count = ends.count_ones() as usize;
        let slots = self.ends[self.len..].first_chunk_mut::<BLOCK>().expect("has_room keeps a block free");
        // Eight at a time, some of them for nothing: a branch for each end would cost more.
        for eight in slots.chunks_exact_mut(8) {
            for slot in eight {
                *slot = base + ends.trailing_zeros() as usize;
                ends &= ends.wrapping_sub(1);
            }
            if ends == 0 {
                break;
            }
        }
        self.len += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_any_number_of_ends_is_written_whole() {
        for count in 0..=BLOCK as u32 {
            let mut ends = WordEnds::new();
            ends.push(7);
            ends.push_block(100, u64::MAX.checked_shr(BLOCK as u32 - count).unwrap_or(0));
            ends.push(1000);
            let expected: Vec<usize> =
                std::iter::once(7).chain(100..100 + count as usize).chain([1000]).collect();
            assert_eq!(ends.as_slice(), expected);
        }
    }
}
