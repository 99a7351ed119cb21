//! Joining the parts of one word.
//!
//! The rule asks whether a joined spelling is a token; here the question is put to pairs of ids. One
//! pair a token is enough. Whatever stands around them, two neighbours were made by joining inside
//! their own bytes only, each time the lowest rank there; so joining those bytes alone goes through the
//! same steps and arrives at the same two parts. A token's pair is therefore what its own bytes come
//! to, and any other two tokens of that spelling never meet.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use rustc_hash::FxBuildHasher;

/// No token.
const NONE: u32 = u32::MAX;

/// Words of up to this many bytes are joined in arrays on the stack, looking at every pair each time.
const SHORT: usize = 64;

/// Which two tokens join to which.
pub struct Pairs {
    /// The token of each byte.
    bytes: [u32; 256],
    /// The token that two bytes join to, or NONE, at first byte · 256 + second byte.
    of_bytes: Box<[u32]>,
    of_tokens: HashMap<u64, u32, FxBuildHasher>,
}

impl Pairs {
    /// `tokens` by id, empty where an id has none; each of the 256 bytes is a token.
    pub fn of(tokens: &[Box<[u8]>]) -> Self {
        let mut pairs = Self {
            bytes: [NONE; 256],
            of_bytes: vec![NONE; 1 << 16].into(),
            of_tokens: HashMap::with_capacity_and_hasher(tokens.len(), FxBuildHasher),
        };
        // Shorter tokens first: the parts of a token are shorter than it.
        let mut by_length: Vec<u32> = (0..tokens.len() as u32).collect();
        by_length.sort_by_key(|id| tokens[*id as usize].len());
        let mut parts = Vec::new();
        for id in by_length {
            let token = &*tokens[id as usize];
            if let [byte] = *token {
                pairs.bytes[byte as usize] = id;
                continue;
            }
            parts.clear();
            pairs.join(token, &mut parts);
            if let [left, right] = *parts {
                pairs.of_tokens.insert(key(left, right), id);
            }
            if let [first, second] = *token {
                pairs.of_bytes[two(first, second)] = id;
            }
        }
        pairs
    }

    /// (left, right, joined) of every pair, by the joined id.
    pub fn sorted(&self) -> Vec<(u32, u32, u32)> {
        let parts = |(pair, joined): (&u64, &u32)| ((pair >> 32) as u32, *pair as u32, *joined);
        let mut all: Vec<_> = self.of_tokens.iter().map(parts).collect();
        all.sort_unstable_by_key(|(_, _, joined)| *joined);
        all
    }

    /// Append what the bytes of a word join to.
    pub fn join(&self, word: &[u8], ids: &mut Vec<u32>) {
        if word.len() <= SHORT {
            self.join_short(word, ids);
        } else {
            self.join_long(word, ids);
        }
    }

    fn joined(&self, left: u32, right: u32) -> u32 {
        self.of_tokens.get(&key(left, right)).copied().unwrap_or(NONE)
    }

    /// O(n²), and faster than anything with a queue where n is small.
    fn join_short(&self, word: &[u8], ids: &mut Vec<u32>) {
        let mut parts = [NONE; SHORT];
        // What a part joins to with the part on its right; NONE for the last.
        let mut joined = [NONE; SHORT];
        let mut length = word.len();
        for (part, byte) in parts.iter_mut().zip(word) {
            *part = self.bytes[*byte as usize];
        }
        for (joined, bytes) in joined.iter_mut().zip(word.windows(2)) {
            *joined = self.of_bytes[two(bytes[0], bytes[1])];
        }
        while let Some((at, token)) = lowest(&joined[..length]) {
            parts.copy_within(at + 2..length, at + 1);
            joined.copy_within(at + 2..length, at + 1);
            length -= 1;
            parts[at] = token;
            joined[at] = if at + 1 < length { self.joined(token, parts[at + 1]) } else { NONE };
            if at > 0 {
                joined[at - 1] = self.joined(parts[at - 1], token);
            }
        }
        ids.extend_from_slice(&parts[..length]);
    }

    /// O(n log n). A part is named by the place where it starts.
    fn join_long(&self, word: &[u8], ids: &mut Vec<u32>) {
        let length = word.len();
        let mut parts: Vec<u32> = word.iter().map(|byte| self.bytes[*byte as usize]).collect();
        let mut next: Vec<usize> = (1..=length).collect();
        let mut before: Vec<usize> = (0..length).map(|at| at.wrapping_sub(1)).collect();
        let pairs = word.windows(2).map(|bytes| self.of_bytes[two(bytes[0], bytes[1])]);
        let mut joined: Vec<u32> = pairs.chain([NONE]).collect();
        let candidates = joined.iter().zip(0..).filter(|(token, _)| **token != NONE);
        let mut queue: BinaryHeap<Reverse<(u32, usize)>> =
            candidates.map(|(token, at)| Reverse((*token, at))).collect();
        while let Some(Reverse((token, at))) = queue.pop() {
            if joined[at] != token {
                continue; // one of the two has changed since
            }
            let right = next[at];
            let after = next[right];
            joined[right] = NONE;
            parts[at] = token;
            next[at] = after;
            joined[at] = NONE;
            if after < length {
                before[after] = at;
                joined[at] = self.joined(token, parts[after]);
            }
            let left = (at > 0).then(|| before[at]);
            if let Some(left) = left {
                joined[left] = self.joined(parts[left], token);
            }
            for place in left.into_iter().chain([at]) {
                if joined[place] != NONE {
                    queue.push(Reverse((joined[place], place)));
                }
            }
        }
        let mut at = 0;
        while at < length {
            ids.push(parts[at]);
            at = next[at];
        }
    }
}

fn two(first: u8, second: u8) -> usize {
    usize::from(first) << 8 | usize::from(second)
}

fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// Where the lowest token is, the leftmost of equals.
fn lowest(joined: &[u32]) -> Option<(usize, u32)> {
    let (mut at, mut lowest) = (0, NONE);
    for (place, token) in joined.iter().enumerate() {
        if *token < lowest {
            (at, lowest) = (place, *token);
        }
    }
    (lowest != NONE).then_some((at, lowest))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rule word for word: spellings, and every pair looked at before each joining.
    fn join_slowly(tokens: &[Box<[u8]>], word: &[u8]) -> Vec<u32> {
        let rank = |bytes: &[u8]| tokens.iter().position(|token| **token == *bytes);
        let mut ends: Vec<usize> = (0..=word.len()).collect();
        loop {
            let ranks = ends.windows(3).map(|part| rank(&word[part[0]..part[2]])).enumerate();
            let Some((_, at)) = ranks.filter_map(|(at, rank)| Some((rank?, at))).min() else {
                break;
            };
            ends.remove(at + 1);
        }
        ends.windows(2).map(|part| rank(&word[part[0]..part[1]]).unwrap() as u32).collect()
    }

    #[test]
    fn any_vocabulary_joins_as_the_rule_says() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        for _ in 0..200 {
            // Spellings at random: out of order, out of reach, and with several ways to split them.
            let mut tokens: Vec<Box<[u8]>> = (0..=255_u8).map(|byte| Box::from([byte])).collect();
            for _ in 0..random(40) {
                let token: Box<[u8]> = (0..2 + random(5)).map(|_| b'a' + random(3) as u8).collect();
                if !tokens.contains(&token) {
                    tokens.push(token);
                }
            }
            let pairs = Pairs::of(&tokens);
            for _ in 0..10 {
                let word: Vec<u8> = (0..random(30)).map(|_| b'a' + random(3) as u8).collect();
                let expected = join_slowly(&tokens, &word);
                let (mut short, mut long) = (Vec::new(), Vec::new());
                pairs.join_short(&word, &mut short);
                pairs.join_long(&word, &mut long);
                assert_eq!(short, expected, "{tokens:?} {word:?}");
                assert_eq!(long, expected, "{tokens:?} {word:?}");
            }
        }
    }
}
