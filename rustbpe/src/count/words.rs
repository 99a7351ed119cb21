//! The result of counting: words and how often they occur.

use rayon::prelude::*;

use super::table::{ShortTable, ShortWord, Table};

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
        let (short_tables, long_tables): (Vec<_>, Vec<_>) =
            tables.into_iter().map(|table| (table.short, table.long)).unzip();
        let ranks =
            |table: ShortTable| table.into_counts().map(|(word, count)| (word.rank(), count)).collect();
        let short = sorted(short_tables.into_par_iter().map(ranks).collect());
        let mut long: Vec<(&[u8], u64)> = long_tables.iter().flat_map(|table| table.counts()).collect();
        long.par_sort_unstable();

        let mut all = Self::default();
        all.reserve(short.len() + long.len());
        let mut long = sums(&long).peekable();
        for (rank, count) in sums(&short) {
            let (bytes, length) = ShortWord::from_rank(rank).bytes();
            let word = &bytes[..length];
            while let Some((word, count)) = long.next_if(|(long_word, _)| *long_word < word) {
                all.push(word, count);
            }
            all.push(word, count);
        }
        for (word, count) in long {
            all.push(word, count);
        }
        all
    }

    fn reserve(&mut self, words: usize) {
        self.ends.reserve(words);
        self.counts.reserve(words);
        self.bytes.reserve(8 * words); // the mean length in most languages
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

/// Words by their ranks, in their order. First they are laid out by their first two bytes, which is less
/// work than to compare them all, then the threads share what begins alike.
fn sorted(lists: Vec<Vec<(u128, u64)>>) -> Vec<(u128, u64)> {
    let beginning = |(rank, _): &(u128, u64)| (rank >> 112) as usize;
    let mut places = vec![0; 1 << 16];
    lists.iter().flatten().for_each(|word| places[beginning(word)] += 1);
    let mut total = 0;
    for place in &mut places {
        total += std::mem::replace(place, total);
    }
    let mut all = vec![(0, 0); total];
    for word in lists.into_iter().flatten() {
        let place = &mut places[beginning(&word)];
        all[*place] = word;
        *place += 1;
    }
    let alike: Vec<_> = all.chunk_by_mut(|left, right| beginning(left) == beginning(right)).collect();
    alike.into_par_iter().for_each(|words| words.sort_unstable_by_key(|(rank, _)| *rank));
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
