//! The table that words are counted in.
//!
//! Most words have up to 15 bytes. These are packed into 128 bits and live in an open-addressing table
//! whose slots are half a cache line; a probe is prefetched long before it happens. Longer words, a
//! few in a hundred, have a table of their own that points into their bytes.

use std::hash::Hasher;

use rustc_hash::FxHasher;

use crate::memory::{Zero, ZeroedArray, prefetch};

/// Words that wait between their prefetch and their probe.
const WAITING: usize = 128;

/// Slots at first: two MiB, one huge page.
const SHORT_SLOTS: usize = 1 << 16;
const LONG_SLOTS: usize = 1 << 8;

/// A word of up to 15 bytes: its bytes from the lowest up, its length in the highest byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShortWord(u128);

impl ShortWord {
    pub const MOST_BYTES: usize = 15;

    /// `text[start..start + length]`, of at most 15 bytes.
    #[inline(always)]
    fn new(text: &[u8], start: usize, length: usize) -> Self {
        debug_assert!(length <= Self::MOST_BYTES);
        let bytes = match text.get(start..start + 16).and_then(|window| window.try_into().ok()) {
            Some(window) => u128::from_le_bytes(window) & ((1 << (8 * length)) - 1),
            None => {
                let mut window = [0; 16];
                window[..length].copy_from_slice(&text[start..start + length]);
                u128::from_le_bytes(window)
            }
        };
        Self(bytes | (length as u128) << 120)
    }

    /// A number that orders words as their bytes do.
    pub fn rank(self) -> u128 {
        self.0.swap_bytes()
    }

    pub fn from_rank(rank: u128) -> Self {
        Self(rank.swap_bytes())
    }

    /// The bytes, and how many of them are the word.
    pub fn bytes(self) -> ([u8; 16], usize) {
        (self.0.to_le_bytes(), (self.0 >> 120) as usize)
    }

    #[inline(always)]
    fn hash(self) -> u64 {
        fold(self.0 as u64 ^ 0x9e37_79b9_7f4a_7c15, (self.0 >> 64) as u64 ^ 0xd1b5_4a32_d192_ed03)
    }
}

/// Multiply to 128 bits and fold them: every bit of the result depends on all bits of both.
#[inline(always)]
fn fold(left: u64, right: u64) -> u64 {
    let product = u128::from(left) * u128::from(right);
    (product >> 64) as u64 ^ product as u64
}

/// How often each word occurs.
#[derive(Default)]
pub struct Table {
    pub short: ShortTable,
    pub long: LongTable,
}

impl Table {
    /// Count `text[start..start + length]` once.
    #[inline(always)]
    pub fn add(&mut self, text: &[u8], start: usize, length: usize) {
        if length <= ShortWord::MOST_BYTES {
            self.short.add_soon(ShortWord::new(text, start, length));
        } else {
            self.long.add(&text[start..start + length], 1);
        }
    }
}

/// Words of up to 15 bytes.
pub struct ShortTable {
    slots: ZeroedArray<Slot>,
    used: usize,
    waiting: [(ShortWord, u64); WAITING],
    waits: usize,
}

/// Free where the count is 0.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Slot {
    word: ShortWord,
    count: u64,
}

// SAFETY: both fields are numbers.
unsafe impl Zero for Slot {}

impl Default for ShortTable {
    fn default() -> Self {
        let waiting = [(ShortWord(0), 0); WAITING];
        Self { slots: ZeroedArray::new(SHORT_SLOTS), used: 0, waiting, waits: 0 }
    }
}

impl ShortTable {
    #[inline(always)]
    fn add_soon(&mut self, word: ShortWord) {
        let hash = word.hash();
        prefetch(&self.slots, home(hash, self.slots.len()));
        self.waiting[self.waits] = (word, hash);
        self.waits += 1;
        if self.waits == WAITING {
            self.flush();
        }
    }

    #[inline(never)]
    fn flush(&mut self) {
        self.make_room(self.waits);
        let slots = &mut *self.slots;
        for (word, hash) in &self.waiting[..self.waits] {
            self.used += usize::from(add(slots, *word, *hash, 1));
        }
        self.waits = 0;
    }

    /// Double the table until `more` words leave a quarter of it free.
    fn make_room(&mut self, more: usize) {
        let mut length = self.slots.len();
        while (self.used + more) * 4 > length * 3 {
            length *= 2;
        }
        if length > self.slots.len() {
            let full = std::mem::replace(&mut self.slots, ZeroedArray::new(length));
            self.used = 0;
            for slot in full.iter().filter(|slot| slot.count > 0) {
                add(&mut self.slots, slot.word, slot.word.hash(), slot.count);
                self.used += 1;
            }
        }
    }

    /// What was counted.
    pub fn into_counts(mut self) -> ShortCounts {
        self.flush();
        ShortCounts(self.slots)
    }
}

/// The words of a table that takes no more.
pub struct ShortCounts(ZeroedArray<Slot>);

impl ShortCounts {
    /// Every word once, with its count.
    pub fn iter(&self) -> impl Iterator<Item = (ShortWord, u64)> {
        self.0.iter().filter(|slot| slot.count > 0).map(|slot| (slot.word, slot.count))
    }
}

/// Add to a word's count. Returns whether the word is new. There has to be a free slot.
#[inline(always)]
fn add(slots: &mut [Slot], word: ShortWord, hash: u64, count: u64) -> bool {
    let last = slots.len() - 1;
    let mut at = home(hash, slots.len());
    loop {
        let slot = &mut slots[at];
        if slot.word == word && slot.count > 0 {
            slot.count += count;
            return false;
        }
        if slot.count == 0 {
            *slot = Slot { word, count };
            return true;
        }
        at = (at + 1) & last;
    }
}

/// The slot to look at first: the hash's highest bits, of which a multiplication has the best.
#[inline(always)]
fn home(hash: u64, slots: usize) -> usize {
    debug_assert!(slots.is_power_of_two() && slots > 1);
    (hash >> (64 - slots.trailing_zeros())) as usize
}

/// Words of any length.
pub struct LongTable {
    slots: Vec<LongSlot>,
    used: usize,
    bytes: Vec<u8>,
}

/// Free where the count is 0.
#[derive(Clone, Copy, Default)]
struct LongSlot {
    hash: u64,
    start: usize,
    length: usize,
    count: u64,
}

impl Default for LongTable {
    fn default() -> Self {
        Self { slots: vec![LongSlot::default(); LONG_SLOTS], used: 0, bytes: Vec::new() }
    }
}

impl LongTable {
    #[inline(never)]
    fn add(&mut self, word: &[u8], count: u64) {
        if self.used * 2 >= self.slots.len() {
            self.grow();
        }
        let mut hasher = FxHasher::default();
        hasher.write(word);
        let hash = fold(hasher.finish() ^ 0x9e37_79b9_7f4a_7c15, 0xd1b5_4a32_d192_ed03);
        let last = self.slots.len() - 1;
        let mut at = home(hash, self.slots.len());
        loop {
            let slot = &mut self.slots[at];
            if slot.count == 0 {
                *slot = LongSlot { hash, start: self.bytes.len(), length: word.len(), count };
                self.bytes.extend_from_slice(word);
                self.used += 1;
                return;
            }
            if slot.hash == hash && self.bytes[slot.start..slot.start + slot.length] == *word {
                slot.count += count;
                return;
            }
            at = (at + 1) & last;
        }
    }

    fn grow(&mut self) {
        let length = self.slots.len() * 2;
        let full = std::mem::replace(&mut self.slots, vec![LongSlot::default(); length]);
        for slot in full.into_iter().filter(|slot| slot.count > 0) {
            let mut at = home(slot.hash, length);
            while self.slots[at].count > 0 {
                at = (at + 1) & (length - 1);
            }
            self.slots[at] = slot;
        }
    }

    /// Every word once, with its count.
    pub fn counts(&self) -> impl Iterator<Item = (&[u8], u64)> {
        let used = self.slots.iter().filter(|slot| slot.count > 0);
        used.map(|slot| (&self.bytes[slot.start..slot.start + slot.length], slot.count))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn counts(table: Table) -> BTreeMap<Vec<u8>, u64> {
        let long: Vec<_> = table.long.counts().map(|(word, count)| (word.to_vec(), count)).collect();
        let mut all = BTreeMap::new();
        let short = table.short.into_counts();
        let short = short.iter().map(|(word, count)| {
            let (bytes, length) = word.bytes();
            (bytes[..length].to_vec(), count)
        });
        for (word, count) in short.chain(long) {
            assert!(all.insert(word, count).is_none(), "a word is there once");
        }
        all
    }

    #[test]
    fn words_of_every_length_are_told_apart_wherever_they_lie_in_a_text() {
        let text: Vec<u8> = (0..3000).map(|at| [0, b'a', 0xff][at * at % 7 % 3]).collect();
        let mut table = Table::default();
        let mut expected = BTreeMap::new();
        for length in (0..=40).chain([1000]) {
            for start in [0, 1, 2, 500, text.len() - length] {
                for _ in 0..=length % 3 {
                    table.add(&text, start, length);
                    *expected.entry(text[start..start + length].to_vec()).or_insert(0) += 1;
                }
            }
        }
        assert_eq!(counts(table), expected);
    }

    #[test]
    fn tables_grow_and_lose_nothing() {
        let mut table = Table::default();
        let mut expected = BTreeMap::new();
        for number in 0..200_000_u64 {
            let number = number % 150_000;
            for word in [format!("{number}"), format!("a word beyond fifteen bytes {}", number % 5000)] {
                table.add(word.as_bytes(), 0, word.len());
                *expected.entry(word.into_bytes()).or_insert(0) += 1;
            }
        }
        assert!(table.short.slots.len() > SHORT_SLOTS);
        assert!(table.long.slots.len() > LONG_SLOTS);
        assert_eq!(counts(table), expected);
    }

    #[test]
    fn counts_go_past_32_bits() {
        let mut table = Table::default();
        let word = ShortWord::new(b"the", 0, 3);
        for _ in 0..3 {
            add(&mut table.short.slots, word, word.hash(), u64::from(u32::MAX));
            table.long.add(b"a word of more bytes", u64::from(u32::MAX));
        }
        table.add(b"the", 0, 3);
        let most = 3 * u64::from(u32::MAX);
        let expected = [(b"a word of more bytes".to_vec(), most), (b"the".to_vec(), most + 1)];
        assert_eq!(counts(table), BTreeMap::from(expected));
    }

    #[test]
    fn ranks_order_words_as_their_bytes_do() {
        let mut words: Vec<&[u8]> =
            vec![b"", b"\0", b"\0\0", b"a", b"a\0", b"ab", b"b", b"\xff", b"123456789012345"];
        words.sort_unstable();
        let ranks: Vec<u128> = words.iter().map(|word| ShortWord::new(word, 0, word.len()).rank()).collect();
        assert!(ranks.is_sorted());
        for (word, rank) in words.iter().zip(ranks) {
            let (bytes, length) = ShortWord::from_rank(rank).bytes();
            assert_eq!(bytes[..length], **word);
        }
    }
}
