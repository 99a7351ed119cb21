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

use super::ID_LIMIT;
use crate::memory::{ZeroedArray, prefetch};

/// No token.
const NONE: u32 = u32::MAX;

/// Words of up to this many bytes are joined in arrays on the stack, looking at every pair each time.
const SHORT: usize = 64;

/// Pairs that are looked at together.
const LANES: usize = 4;

/// Which two tokens join to which.
pub struct Pairs {
    /// The token of each byte.
    bytes: [u32; 256],
    /// The token that two bytes join to, or NONE, at first byte · 256 + second byte.
    of_bytes: Box<[u32]>,
    of_tokens: PairTable,
    /// Tokens that no joining reaches.
    unreached: HashMap<Box<[u8]>, u32, FxBuildHasher>,
}

impl Pairs {
    /// `tokens` by id, empty where an id has none; each of the 256 bytes is a token.
    pub fn of(tokens: &[Box<[u8]>]) -> Self {
        let mut pairs = Self {
            bytes: [NONE; 256],
            of_bytes: vec![NONE; 1 << 16].into(),
            of_tokens: PairTable::for_up_to(tokens.len()),
            unreached: HashMap::default(),
        };
        // Shorter tokens first: the parts of a token are shorter than it.
        let mut by_length: Vec<u32> = (0..tokens.len() as u32).collect();
        by_length.sort_by_key(|id| tokens[*id as usize].len());
        let mut parts = Vec::new();
        for id in by_length {
            let token = &*tokens[id as usize];
            parts.clear();
            match *token {
                [] => continue,
                [byte] => pairs.bytes[byte as usize] = id,
                _ => pairs.join(token, &mut parts),
            }
            match *parts {
                [] => {}
                [left, right] => pairs.of_tokens.insert(left, right, id),
                _ => {
                    pairs.unreached.insert(token.into(), id);
                }
            }
            if let [first, second] = *token {
                pairs.of_bytes[two(first, second)] = id;
            }
        }
        pairs
    }

    /// (left, right, joined) of every pair, by the joined id.
    pub fn sorted(&self) -> Vec<(u32, u32, u32)> {
        let mut all = self.of_tokens.pairs.clone();
        all.sort_unstable_by_key(|(_, _, joined)| *joined);
        all
    }

    /// The token that a word is as a whole, where joining would not find it.
    pub fn unreached(&self, word: &[u8]) -> Option<u32> {
        if self.unreached.is_empty() { None } else { self.unreached.get(word).copied() }
    }

    /// Append what the bytes of a word join to.
    pub fn join(&self, word: &[u8], ids: &mut Vec<u32>) {
        if word.len() <= SHORT {
            self.join_short(word, ids);
        } else {
            self.join_long(word, ids);
        }
    }

    fn join_short(&self, word: &[u8], ids: &mut Vec<u32>) {
        let mut joining = Joining::<SHORT>::default();
        joining.begin(self, word);
        while joining.step(self) {
            joining.look(self);
        }
        ids.extend(joining.parts());
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
                joined[at] = self.of_tokens.get(token, parts[after]);
            }
            let left = (at > 0).then(|| before[at]);
            if let Some(left) = left {
                joined[left] = self.of_tokens.get(parts[left], token);
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

/// A word of up to `N` bytes, at most SHORT, while it is joined: O(n²), and faster than anything with a
/// queue where n is small. A part is named by the place where it starts.
pub struct Joining<const N: usize> {
    length: usize,
    /// A bit for each place at which a part starts.
    starts: u64,
    parts: [u32; N],
    /// What a part joins to with the part on its right, and its place in the lowest bits: the least is
    /// that of the lowest rank and, of equals, the leftmost.
    candidates: [u32; N],
    /// Candidates that come from memory until `look`.
    awaited: [(usize, Search); 2],
}

/// The place of a part, in the lowest bits of its candidate.
const PLACE_BITS: u32 = SHORT.ilog2();

/// Candidates from here on are none.
const NO_CANDIDATE: u32 = ID_LIMIT << PLACE_BITS;
const _: () = assert!(NONE << PLACE_BITS >= NO_CANDIDATE);

fn candidate(token: u32, at: usize) -> u32 {
    token << PLACE_BITS | at as u32
}

impl<const N: usize> Default for Joining<N> {
    fn default() -> Self {
        Self { length: 0, starts: 0, parts: [NONE; N], candidates: [NONE; N], awaited: [NOTHING; 2] }
    }
}

impl<const N: usize> Joining<N> {
    /// Start with the bytes of a word.
    pub fn begin(&mut self, pairs: &Pairs, word: &[u8]) {
        self.length = word.len();
        self.starts = u64::MAX.checked_shr((SHORT - word.len()) as u32).unwrap_or(0);
        self.awaited = [NOTHING; 2];
        for (part, byte) in self.parts.iter_mut().zip(word) {
            *part = pairs.bytes[*byte as usize];
        }
        self.candidates.fill(NONE);
        for (at, bytes) in word.windows(2).enumerate() {
            self.candidates[at] = candidate(pairs.of_bytes[two(bytes[0], bytes[1])], at);
        }
    }

    /// Join the two parts that are next. Returns whether there were any.
    pub fn step(&mut self, pairs: &Pairs) -> bool {
        let least = least(&self.candidates[..self.length.next_multiple_of(LANES)]);
        if least >= NO_CANDIDATE {
            return false;
        }
        let (token, at) = (least >> PLACE_BITS, (least % (1 << PLACE_BITS)) as usize);
        let right = self.starts & (u64::MAX << at << 1);
        let behind = right & (right - 1);
        let before = self.starts & ((1 << at) - 1);
        self.starts &= !(right & right.wrapping_neg());
        self.candidates[right.trailing_zeros() as usize % N] = NONE;
        self.candidates[at % N] = NONE;
        self.parts[at % N] = token;
        // Whether there are such neighbours cannot be foreseen, so no branches.
        let (next, last) = (behind.trailing_zeros() as usize % N, (before | 1).ilog2() as usize % N);
        let searched = |there: bool, left, right| {
            let search = pairs.of_tokens.search(left, right);
            Search { check: if there { search.check } else { NOTHING.1.check }, ..search }
        };
        self.awaited = [
            (at, searched(behind != 0, token, self.parts[next])),
            (if before == 0 { at } else { last }, searched(before != 0, self.parts[last], token)),
        ];
        true
    }

    /// Look what the parts joined last join to now.
    pub fn look(&mut self, pairs: &Pairs) {
        // The one on the left last: without it, its place is that of the other.
        let [(at, search), (before, search_before)] = self.awaited;
        let token = pairs.of_tokens.find(search);
        self.candidates[before % N] = candidate(pairs.of_tokens.find(search_before), before);
        self.candidates[at % N] = candidate(token, at);
    }

    pub fn parts(&self) -> impl Iterator<Item = u32> {
        let mut starts = self.starts;
        std::iter::from_fn(move || {
            let at = starts.trailing_zeros() as usize;
            starts &= starts.checked_sub(1)?;
            Some(self.parts[at])
        })
    }
}

fn two(first: u8, second: u8) -> usize {
    usize::from(first) << 8 | usize::from(second)
}

/// The least of some LANES.
fn least(candidates: &[u32]) -> u32 {
    let mut least = [NONE; LANES];
    for lanes in candidates.chunks_exact(LANES) {
        for (least, candidate) in least.iter_mut().zip(lanes) {
            *least = (*least).min(*candidate);
        }
    }
    least.into_iter().fold(NONE, u32::min)
}

/// Pairs of ids with the id they join to: a hash table, small because most of encoding a word that is
/// met for the first time is waiting for its memory.
///
/// A pair is a number of KEY_BITS bits, mixed so that every number stays another. The highest bits of it
/// say where its search starts, the lowest CHECK_BITS stand in its slot. Those are all of them, as a pair
/// stands less than REACH behind its start.
struct PairTable {
    /// From the lowest bits: the id, then the check, then one bit that is set. Zero is no pair.
    slots: ZeroedArray<u64>,
    start_bits: u32,
    pairs: Vec<(u32, u32, u32)>,
}

const ID_BITS: u32 = ID_LIMIT.ilog2();
const KEY_BITS: u32 = 2 * ID_BITS;
const CHECK_BITS: u32 = 63 - ID_BITS;
const LEAST_START_BITS: u32 = 16;
/// Slots that are looked at together.
const BUCKET: usize = 4;
const REACH: usize = 1 << (LEAST_START_BITS - (KEY_BITS - CHECK_BITS));

impl PairTable {
    fn for_up_to(pairs: usize) -> Self {
        let start_bits = (2 * pairs).next_power_of_two().ilog2().max(LEAST_START_BITS);
        Self { slots: ZeroedArray::new((1 << start_bits) + REACH), start_bits, pairs: Vec::new() }
    }

    fn insert(&mut self, left: u32, right: u32, joined: u32) {
        self.pairs.push((left, right, joined));
        let mut waiting = self.pairs.len() - 1;
        while let Some(&(left, right, joined)) = self.pairs.get(waiting) {
            let Search { start, check } = self.search(left, right);
            let free = self.slots[start..start + REACH].iter_mut().find(|slot| **slot == 0);
            if let Some(free) = free {
                *free = check << ID_BITS | u64::from(joined);
                waiting += 1;
            } else {
                // No room in reach: everything again, in twice the space.
                self.start_bits += 1;
                self.slots = ZeroedArray::new((1 << self.start_bits) + REACH);
                waiting = 0;
            }
        }
    }

    /// What two tokens join to, or NONE.
    fn get(&self, left: u32, right: u32) -> u32 {
        self.find(self.search(left, right))
    }

    /// How two tokens are found. Their slot is on the way from memory when this returns.
    #[inline]
    fn search(&self, left: u32, right: u32) -> Search {
        let key = u64::from(left) << ID_BITS | u64::from(right);
        // Odd, so no two products are the same; the highest bits depend on all of both ids.
        let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (1 << KEY_BITS);
        let start = (mixed >> (KEY_BITS - self.start_bits)) as usize / BUCKET * BUCKET;
        prefetch(&self.slots, start);
        Search { start, check: (mixed % (1 << CHECK_BITS)) | (1 << CHECK_BITS) }
    }

    #[inline]
    fn find(&self, Search { start, check }: Search) -> u32 {
        for bucket in self.slots[start..start + REACH].chunks_exact(BUCKET) {
            let mut found = NONE;
            for slot in bucket {
                found = if slot >> ID_BITS == check { *slot as u32 % ID_LIMIT } else { found };
            }
            if found != NONE || bucket[BUCKET - 1] == 0 {
                return found;
            }
        }
        NONE
    }
}

/// Where the search for a pair starts, and what its slot has besides the id.
#[derive(Clone, Copy)]
struct Search {
    start: usize,
    check: u64,
}

/// A search that finds nothing: a slot's check has its highest bit set, or is zero.
const NOTHING: (usize, Search) = (0, Search { start: 0, check: 1 });

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

    #[test]
    fn pairs_are_found_among_pairs_that_collide() {
        let mut table = PairTable::for_up_to(0);
        let slots = table.slots.len();
        // Differences of ids that move the start of the search little or not at all, more than one reach.
        let ids = || (0..60_000_u32).map(|number| (number * 279 % ID_LIMIT, number << 8 ^ number));
        for ((left, right), joined) in ids().zip(0..) {
            table.insert(left, right, joined);
        }
        for ((left, right), joined) in ids().zip(0..) {
            assert_eq!(table.get(left, right), joined);
            assert_eq!(table.get(right, left ^ 1), NONE);
        }
        assert!(table.slots.len() > slots);
        assert_eq!(table.get(ID_LIMIT - 1, ID_LIMIT - 1), NONE);
    }
}
