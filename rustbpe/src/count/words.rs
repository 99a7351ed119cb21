//! The result of counting: words and how often they occur.

use std::ops::Range;

use rayon::prelude::*;

use super::table::{ShortTable, ShortWord, Table};

/// What the first two bytes of a word may be.
const BEGINNINGS: usize = 1 << 16;

const PARTS_PER_THREAD: usize = 4;

/// Bytes of a word in most languages.
const MEAN_BYTES: usize = 8;

/// Words, each once, and how often they occur. Can be gone through any number of times.
pub trait Counts {
    /// How many different words there are.
    fn words(&self) -> usize;

    /// Call `visit` with every word and its count, until it fails.
    fn each<E>(&self, visit: impl FnMut(&[u8], u64) -> Result<(), E>) -> Result<(), E>;
}

impl<W: AsRef<[u8]>> Counts for [(W, u64)] {
    fn words(&self) -> usize {
        self.len()
    }

    fn each<E>(&self, mut visit: impl FnMut(&[u8], u64) -> Result<(), E>) -> Result<(), E> {
        self.iter().try_for_each(|(word, count)| visit(word.as_ref(), *count))
    }
}

impl Counts for WordCounts {
    fn words(&self) -> usize {
        self.len()
    }

    fn each<E>(&self, mut visit: impl FnMut(&[u8], u64) -> Result<(), E>) -> Result<(), E> {
        self.iter().try_for_each(|(word, count)| visit(word, count))
    }
}

/// How often each word occurs. Every word is there once, in the order of the words' bytes, so equal
/// counts are equal in memory too. A word takes its bytes and 16 more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WordCounts {
    bytes: Vec<u8>,
    /// Where each word ends in `bytes`; it starts where the one before ends.
    ends: Vec<usize>,
    counts: Vec<u64>,
}

impl WordCounts {
    /// How many different words there are.
    pub fn len(&self) -> usize {
        self.counts.len()
    }

    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// How often `word` occurs.
    pub fn count(&self, word: &[u8]) -> u64 {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low + (high - low) / 2;
            if self.word(middle) < word {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        if low < self.len() && self.word(low) == word { self.counts[low] } else { 0 }
    }

    /// All counts together.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Words and counts in the order of the words' bytes.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&[u8], u64)> {
        (0..self.len()).map(|at| self.get(at))
    }

    /// Append a word that follows all others in the order of bytes.
    pub fn push(&mut self, word: &[u8], count: u64) {
        debug_assert!(self.is_empty() || self.word(self.len() - 1) < word);
        self.bytes.extend_from_slice(word);
        self.ends.push(self.bytes.len());
        self.counts.push(count);
    }

    /// The word number `at` in the order of bytes, and its count.
    pub fn get(&self, at: usize) -> (&[u8], u64) {
        (self.word(at), self.counts[at])
    }

    fn word(&self, at: usize) -> &[u8] {
        let start = if at == 0 { 0 } else { self.ends[at - 1] };
        &self.bytes[start..self.ends[at]]
    }

    /// Add up tables.
    pub(super) fn from_tables(tables: Vec<Table>) -> Self {
        let (short, long): (Vec<_>, Vec<_>) =
            tables.into_iter().map(|table| (table.short, table.long)).unzip();
        let short: Vec<Laid> = short.into_par_iter().map(Laid::new).collect();
        let mut long: Vec<(&[u8], u64)> = long.iter().flat_map(|table| table.counts()).collect();
        long.par_sort_unstable();
        // A part for each thread and some more, as not all take equally long.
        let parts = ranges(&short, PARTS_PER_THREAD * rayon::current_num_threads());
        let parts: Vec<Self> =
            parts.into_par_iter().map(|beginnings| part(&short, &long, beginnings)).collect();
        Self::joined(&parts)
    }

    /// Counts whose words follow each other.
    fn joined(parts: &[Self]) -> Self {
        let mut all = Self::default();
        all.reserve(parts.iter().map(Self::len).sum(), parts.iter().map(|part| part.bytes.len()).sum());
        for part in parts {
            let start = all.bytes.len();
            all.bytes.extend_from_slice(&part.bytes);
            all.ends.extend(part.ends.iter().map(|end| start + end));
            all.counts.extend_from_slice(&part.counts);
        }
        all
    }

    fn reserve(&mut self, words: usize, bytes: usize) {
        self.ends.reserve(words);
        self.counts.reserve(words);
        self.bytes.reserve(bytes);
    }
}

impl<W: AsRef<[u8]>> FromIterator<(W, u64)> for WordCounts {
    /// Words in any order, each once.
    fn from_iter<I: IntoIterator<Item = (W, u64)>>(counts: I) -> Self {
        let mut sorted: Vec<(W, u64)> = counts.into_iter().collect();
        sorted.sort_unstable_by(|(left, _), (right, _)| left.as_ref().cmp(right.as_ref()));
        let mut all = Self::default();
        for (word, count) in sorted {
            all.push(word.as_ref(), count);
        }
        all
    }
}

/// What a rank begins with: the first two bytes of its word, zeros behind a shorter one.
fn beginning(rank: u128) -> usize {
    (rank >> 112) as usize
}

/// The short words of a table by what they begin with, which is less work than to compare them all. Those
/// that begin alike lie side by side, in any order.
struct Laid {
    words: Vec<(u128, u64)>,
    /// Where the words of each beginning start, and behind the last.
    starts: Vec<usize>,
}

impl Laid {
    fn new(table: ShortTable) -> Self {
        let slots = table.into_counts();
        let mut starts = vec![0; BEGINNINGS + 1];
        let words = || slots.iter().map(|(word, count)| (word.rank(), count));
        words().for_each(|(rank, _)| starts[beginning(rank) + 1] += 1);
        for at in 1..starts.len() {
            starts[at] += starts[at - 1];
        }
        let mut places = starts.clone();
        let mut laid = vec![(0, 0); starts[BEGINNINGS]];
        for (rank, count) in words() {
            let place = &mut places[beginning(rank)];
            laid[*place] = (rank, count);
            *place += 1;
        }
        Self { words: laid, starts }
    }

    fn beginning_with(&self, beginnings: Range<usize>) -> &[(u128, u64)] {
        &self.words[self.starts[beginnings.start]..self.starts[beginnings.end]]
    }
}

/// All beginnings in up to `most` ranges of about as many words.
fn ranges(lists: &[Laid], most: usize) -> Vec<Range<usize>> {
    let before = |beginning: usize| lists.iter().map(|list| list.starts[beginning]).sum::<usize>();
    let share = before(BEGINNINGS).div_ceil(most).max(1);
    let mut ranges = Vec::new();
    let mut start = 0;
    for end in 1..=BEGINNINGS {
        if end == BEGINNINGS || before(end) - before(start) >= share {
            ranges.push(start..end);
            start = end;
        }
    }
    ranges
}

/// The words that begin so, in their order. Of the sorted `long` words too.
fn part(lists: &[Laid], long: &[(&[u8], u64)], beginnings: Range<usize>) -> WordCounts {
    // Long words have no zeros behind: their first two bytes are what they begin with.
    let before = |beginning: usize| {
        long.partition_point(|(word, _)| usize::from(word[0]) << 8 | usize::from(word[1]) < beginning)
    };
    let mut long = sums(&long[before(beginnings.start)..before(beginnings.end)]).peekable();
    let mut all = WordCounts::default();
    let words = lists.iter().map(|list| list.beginning_with(beginnings.clone()).len()).sum();
    all.reserve(words, MEAN_BYTES * words);
    let mut alike = Vec::new();
    for beginning in beginnings {
        alike.clear();
        for list in lists {
            alike.extend_from_slice(list.beginning_with(beginning..beginning + 1));
        }
        alike.sort_unstable_by_key(|(rank, _)| *rank);
        for (rank, count) in sums(&alike) {
            let (bytes, length) = ShortWord::from_rank(rank).bytes();
            let word = &bytes[..length];
            while let Some((word, count)) = long.next_if(|(long_word, _)| *long_word < word) {
                all.push(word, count);
            }
            all.push(word, count);
        }
    }
    for (word, count) in long {
        all.push(word, count);
    }
    all
}

/// Each key of a sorted list once, with the sum of its counts.
fn sums<K: Copy + PartialEq>(sorted: &[(K, u64)]) -> impl Iterator<Item = (K, u64)> {
    sorted
        .chunk_by(|(left, _), (right, _)| left == right)
        .map(|equal| (equal[0].0, equal.iter().map(|(_, count)| count).sum()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(words: &[&str]) -> Table {
        let mut table = Table::default();
        for word in words {
            table.add(word.as_bytes(), 0, word.len());
        }
        table
    }

    #[test]
    fn tables_add_up_to_sorted_words() {
        let long = "a word beyond fifteen bytes";
        let longer = "a word beyond fifteen bytes, and more";
        let tables =
            vec![table(&["b", "", longer, "b", "ab"]), table(&[]), table(&["z", "b", long, longer, "a"])];
        let counts = WordCounts::from_tables(tables);
        let expected: Vec<(&[u8], u64)> = vec![
            (b"", 1),
            (b"a", 1),
            (long.as_bytes(), 1),
            (longer.as_bytes(), 2),
            (b"ab", 1),
            (b"b", 3),
            (b"z", 1),
        ];
        assert_eq!(counts.iter().collect::<Vec<_>>(), expected);
        assert_eq!(counts, expected.into_iter().rev().collect());
    }

    #[test]
    fn a_word_is_found_by_its_bytes() {
        let counts: WordCounts = [("b", 2), ("a", 5), ("d", 1)].into_iter().collect();
        let found = ["", "a", "b", "c", "d", "e"].map(|word| counts.count(word.as_bytes()));
        assert_eq!(found, [0, 5, 2, 0, 1, 0]);
        assert!(WordCounts::default().is_empty());
        assert_eq!(WordCounts::default().count(b"a"), 0);
    }
}
