//! Tokens of a text, given the merges.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use rustc_hash::FxBuildHasher;

use crate::merge::Pair;

/// Every token's bytes, in id order. A token's id is its rank: lower ranks merge first.
pub struct Vocabulary {
    tokens: Vec<Box<[u8]>>,
    ranks: HashMap<Box<[u8]>, u32, FxBuildHasher>,
}

impl Default for Vocabulary {
    fn default() -> Self {
        Self::from_merges(&[])
    }
}

impl Vocabulary {
    /// The 256 bytes, then the merges in order.
    pub fn from_merges(merges: &[Pair]) -> Self {
        let mut tokens: Vec<Box<[u8]>> = (0..=255_u8).map(|byte| Box::from([byte])).collect();
        for &(left, right) in merges {
            let joined = [&*tokens[left as usize], &*tokens[right as usize]].concat();
            tokens.push(joined.into());
        }
        let ranks = tokens.iter().cloned().zip(0..).collect();
        Self { tokens, ranks }
    }

    pub fn tokens(&self) -> &[Box<[u8]>] {
        &self.tokens
    }

    /// Append the tokens of one word: join neighbours of the lowest rank, leftmost first, until none
    /// of the joined spellings is a token. O(n log n).
    pub fn encode_word(&self, word: &[u8], ids: &mut Vec<u32>) {
        if let Some(rank) = self.ranks.get(word) {
            ids.push(*rank);
            return;
        }
        // A part is word[at..end[at]]; `before[at]` is the start of the part on its left. A candidate
        // that names a part which has changed since is passed over.
        let length = word.len();
        let mut end: Vec<usize> = (1..=length).collect();
        let mut before: Vec<usize> = (0..length).map(|at| at.wrapping_sub(1)).collect();
        let mut alive = vec![true; length];
        let mut candidates = BinaryHeap::new();
        let offer = |candidates: &mut BinaryHeap<_>, left: usize, right: usize, stop: usize| {
            if let Some(rank) = self.ranks.get(&word[left..stop]) {
                candidates.push(Reverse((*rank, left, right, stop)));
            }
        };
        for left in 0..length.saturating_sub(1) {
            offer(&mut candidates, left, left + 1, left + 2);
        }
        while let Some(Reverse((_, left, right, stop))) = candidates.pop() {
            if !alive[left] || end[left] != right || !alive[right] || end[right] != stop {
                continue;
            }
            end[left] = stop;
            alive[right] = false;
            if stop < length {
                before[stop] = left;
                offer(&mut candidates, left, stop, end[stop]);
            }
            if left > 0 {
                offer(&mut candidates, before[left], left, stop);
            }
        }
        let mut at = 0;
        while at < length {
            ids.push(self.ranks[&word[at..end[at]]]);
            at = end[at];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(vocabulary: &Vocabulary, word: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        vocabulary.encode_word(word.as_bytes(), &mut ids);
        ids
    }

    fn spelled(vocabulary: &Vocabulary, ids: &[u32]) -> Vec<u8> {
        ids.iter().flat_map(|id| vocabulary.tokens()[*id as usize].to_vec()).collect()
    }

    #[test]
    fn without_merges_a_word_is_its_bytes() {
        assert_eq!(encode(&Vocabulary::default(), "aé"), [97, 0xc3, 0xa9]);
        assert_eq!(encode(&Vocabulary::default(), ""), [] as [u32; 0]);
    }

    #[test]
    fn lower_ranks_join_first_and_the_leftmost_of_equals() {
        let (a, b, c) = (97, 98, 99);
        // 256 = bc, 257 = ab, 258 = aa, 259 = aa·aa
        let vocabulary = Vocabulary::from_merges(&[(b, c), (a, b), (a, a), (258, 258)]);
        assert_eq!(encode(&vocabulary, "abc"), [a, 256]);
        assert_eq!(encode(&vocabulary, "abab"), [257, 257]);
        assert_eq!(encode(&vocabulary, "aaaaaaa"), [259, 258, a]);
    }

    #[test]
    fn a_long_word_is_encoded_whole() {
        let vocabulary = Vocabulary::from_merges(&[(97, 97), (256, 256)]);
        let word = "a".repeat(100_001);
        let ids = encode(&vocabulary, &word);
        assert_eq!(ids.len(), 25_001);
        assert_eq!(spelled(&vocabulary, &ids), word.as_bytes());
    }
}
