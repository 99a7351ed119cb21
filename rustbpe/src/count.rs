//! Counting words, on all threads.

pub mod arrow;
mod table;
mod words;

use std::sync::{Mutex, MutexGuard};

use rayon::prelude::*;

use crate::Error;
use crate::split::Splitter;
use table::Table;
pub use words::{Counts, WordCounts};

/// Documents handed to a thread at a time.
const DOCUMENTS_PER_TASK: usize = 16;

/// How much of the text is looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Characters of each document.
    pub doc_cap: Option<u64>,
    /// Characters in all, over the documents in order. The document that crosses it is cut there.
    pub max_chars: Option<u64>,
}

/// What was looked at, after the limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub rows: u64,
    pub characters: u64,
    pub bytes: u64,
    pub words: u64,
}

/// Counts the words of documents that arrive in batches: one after another with `add`, or each on a thread
/// of its own with `clip` and `count`.
pub struct Counter {
    limits: Limits,
    totals: Mutex<Totals>,
    workers: Vec<Mutex<Worker>>,
}

struct Worker {
    splitter: Splitter,
    table: Table,
}

/// What is looked at of a document.
pub struct Clipped<'t> {
    text: &'t str,
    characters: u64,
}

impl Counter {
    /// Fails when `pattern` is not a regular expression.
    pub fn new(pattern: &str, limits: Limits) -> Result<Self, Error> {
        let workers = (0..rayon::current_num_threads())
            .map(|_| {
                let splitter = Splitter::new(pattern)?;
                Ok(Mutex::new(Worker { splitter, table: Table::default() }))
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self { limits, totals: Mutex::default(), workers })
    }

    /// Count a batch on all threads. Returns whether `max_chars` leaves room for more.
    pub fn add(&self, documents: &[impl AsRef<str> + Sync]) -> Result<bool, Error> {
        let doc_cap = self.limits.doc_cap;
        let clipped = documents.par_iter().with_min_len(DOCUMENTS_PER_TASK);
        let mut clipped: Vec<_> = clipped.map(|text| Clipped::new(text.as_ref(), doc_cap)).collect();
        self.keep_what_has_room(&mut clipped);
        clipped.par_chunks(DOCUMENTS_PER_TASK).try_for_each(|documents| self.count(documents))?;
        Ok(self.has_room())
    }

    /// What `count` is to look at of a batch. With `max_chars`, batches are to come in order.
    pub fn clip<'t>(&self, documents: &[&'t str]) -> Vec<Clipped<'t>> {
        let mut clipped = documents.iter().map(|text| Clipped::new(text, self.limits.doc_cap)).collect();
        self.keep_what_has_room(&mut clipped);
        clipped
    }

    /// Count on this thread, one of the pool's, while others may count too.
    pub fn count(&self, documents: &[Clipped<'_>]) -> Result<(), Error> {
        // A thread has its own worker, so the lock is never waited for.
        let thread = rayon::current_thread_index().unwrap_or(0);
        let mut worker = self.workers[thread].lock().expect("no thread has panicked");
        documents.iter().try_for_each(|document| worker.count(document.text))
    }

    /// Whether `max_chars` makes the order of the documents matter.
    pub fn needs_order(&self) -> bool {
        self.limits.max_chars.is_some()
    }

    /// Whether `max_chars` leaves room for more.
    pub fn has_room(&self) -> bool {
        self.room(&self.totals()) != Some(0)
    }

    /// The counts of everything added, and the totals.
    pub fn finish(self) -> (WordCounts, Totals) {
        let totals = *self.totals();
        let worker = |worker: Mutex<Worker>| worker.into_inner().expect("no thread has panicked");
        let tables = self.workers.into_iter().map(|one| worker(one).table).collect();
        let counts = WordCounts::from_tables(tables);
        let words = counts.total();
        (counts, Totals { words, ..totals })
    }

    fn totals(&self) -> MutexGuard<'_, Totals> {
        self.totals.lock().expect("no thread has panicked")
    }

    /// Characters that `max_chars` leaves.
    fn room(&self, totals: &Totals) -> Option<u64> {
        self.limits.max_chars.map(|most| most - totals.characters)
    }

    /// Cut the documents where all characters reach `max_chars`, and add up what is left.
    fn keep_what_has_room(&self, documents: &mut Vec<Clipped<'_>>) {
        let mut totals = self.totals();
        let mut kept = 0;
        for document in &mut *documents {
            let room = self.room(&totals);
            if room == Some(0) {
                break;
            }
            if let Some(room) = room.filter(|room| *room < document.characters) {
                *document = Clipped { text: first_characters(document.text, room), characters: room };
            }
            totals.rows += 1;
            totals.characters += document.characters;
            totals.bytes += document.text.len() as u64;
            kept += 1;
        }
        documents.truncate(kept);
    }
}

impl<'t> Clipped<'t> {
    fn new(document: &'t str, cap: Option<u64>) -> Self {
        let text = cap.map_or(document, |cap| first_characters(document, cap));
        Self { text, characters: characters(text.as_bytes()) }
    }
}

impl Worker {
    fn count(&mut self, document: &str) -> Result<(), Error> {
        let table = &mut self.table;
        let text = document.as_bytes();
        self.splitter.words(document, |word| {
            // A word is a part of the document. The table reads on behind it, which is faster than
            // to copy as many bytes as it has.
            let start = word.as_ptr().addr() - text.as_ptr().addr();
            table.add(text, start, word.len());
        })
    }
}

/// Bytes that are looked at at once: so few that their characters fit into eight bits, with which a
/// vector register counts the most.
const BLOCK: usize = 128;

/// How many characters start in these bytes of UTF-8.
fn characters(bytes: &[u8]) -> u64 {
    let in_block =
        |block: &[u8]| block.iter().fold(0_u8, |sum, byte| sum + u8::from(starts_character(*byte)));
    bytes.chunks(BLOCK).map(|block| u64::from(in_block(block))).sum()
}

fn starts_character(byte: u8) -> bool {
    byte & 0b1100_0000 != 0b1000_0000
}

/// The first `cap` characters of `text`.
fn first_characters(text: &str, cap: u64) -> &str {
    if text.len() as u64 <= cap {
        return text; // a character has at least one byte
    }
    let bytes = text.as_bytes();
    let (mut at, mut left) = (0, cap);
    for block in bytes.chunks(BLOCK) {
        let here = characters(block);
        if here > left {
            break;
        }
        at += block.len();
        left -= here;
    }
    // The next character behind `at` and those that are left is the first to go.
    let mut starts = (at..bytes.len()).filter(|at| starts_character(bytes[*at]));
    starts.nth(left as usize).map_or(text, |end| &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(documents: &[&str], limits: Limits) -> (Vec<(String, u64)>, Totals) {
        let counter = Counter::new(r"\S+", limits).unwrap();
        counter.add(documents).unwrap();
        let (counts, totals) = counter.finish();
        let text = |word: &[u8]| String::from_utf8(word.to_vec()).unwrap();
        (counts.iter().map(|(word, count)| (text(word), count)).collect(), totals)
    }

    fn pairs(counts: &[(&str, u64)]) -> Vec<(String, u64)> {
        counts.iter().map(|(word, count)| ((*word).to_owned(), *count)).collect()
    }

    #[test]
    fn words_are_counted_over_all_documents() {
        let (counts, totals) = count(&["a b a", "b a", ""], Limits::default());
        assert_eq!(counts, pairs(&[("a", 3), ("b", 2)]));
        assert_eq!(totals, Totals { rows: 3, characters: 8, bytes: 8, words: 5 });
    }

    #[test]
    fn a_document_is_cut_at_its_cap_in_characters_not_bytes() {
        let limits = Limits { doc_cap: Some(3), max_chars: None };
        let (counts, totals) = count(&["äöüß", "한국어로"], limits);
        assert_eq!(counts, pairs(&[("äöü", 1), ("한국어", 1)]));
        assert_eq!(totals, Totals { rows: 2, characters: 6, bytes: 15, words: 2 });
    }

    #[test]
    fn the_cap_on_all_characters_cuts_the_document_that_crosses_it_and_drops_the_rest() {
        let limits = Limits { doc_cap: Some(4), max_chars: Some(7) };
        let (counts, totals) = count(&["aaaaaaaa", "bbbbb", "c"], limits);
        assert_eq!(counts, pairs(&[("aaaa", 1), ("bbb", 1)]));
        assert_eq!(totals, Totals { rows: 2, characters: 7, bytes: 7, words: 2 });
    }

    #[test]
    fn add_says_when_there_is_no_room_left() {
        let limits = Limits { doc_cap: None, max_chars: Some(3) };
        let counter = Counter::new(r"\S+", limits).unwrap();
        assert!(counter.add(&["ab"]).unwrap());
        assert!(!counter.add(&["cd"]).unwrap());
        assert!(!counter.add(&["ef"]).unwrap());
        assert_eq!(counter.finish().1.characters, 3);
    }

    #[test]
    fn many_documents_over_many_threads_lose_nothing() {
        let documents: Vec<String> = (0..5_000).map(|i| format!("w{} all", i % 7)).collect();
        let counter = Counter::new(r"\S+", Limits::default()).unwrap();
        for batch in documents.chunks(333) {
            counter.add(batch).unwrap();
        }
        let (counts, totals) = counter.finish();
        assert_eq!(counts.count(b"all"), 5_000);
        assert_eq!(counts.count(b"w0"), 715);
        assert_eq!(totals.words, 10_000);
    }

    #[test]
    fn batches_counted_each_on_a_thread_add_up() {
        let documents: Vec<String> = (0..2_000).map(|i| format!("w{} all", i % 7)).collect();
        let documents: Vec<&str> = documents.iter().map(String::as_str).collect();
        let counter = Counter::new(r"\S+", Limits { doc_cap: Some(4), max_chars: None }).unwrap();
        let batches = documents.par_chunks(30);
        batches.for_each(|batch| counter.count(&counter.clip(batch)).unwrap());
        assert!(!counter.needs_order() && counter.has_room());
        let (counts, totals) = counter.finish();
        assert_eq!((counts.count(b"w0"), counts.count(b"a")), (286, 2_000));
        assert_eq!(totals, Totals { rows: 2_000, characters: 8_000, bytes: 8_000, words: 4_000 });
    }

    #[test]
    fn any_number_of_threads_counts_the_same() {
        let documents: Vec<String> =
            (0..3_000).map(|i| format!("w{} {} {}", i % 7, i * i, "long".repeat(i % 40))).collect();
        let count = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let limits = Limits { doc_cap: Some(100), max_chars: Some(100_000) };
                let counter = Counter::new(r"\S+", limits).unwrap();
                for batch in documents.chunks(700) {
                    counter.add(batch).unwrap();
                }
                counter.finish()
            })
        };
        let (counts, totals) = count(1);
        assert_eq!(totals.characters, 100_000);
        assert_eq!(totals.words, counts.iter().map(|(_, count)| count).sum::<u64>());
        for threads in [2, 3, 8] {
            assert_eq!(count(threads), (counts.clone(), totals));
        }
    }

    #[test]
    fn the_first_characters_are_found_across_blocks() {
        let text: String = (0..1_000).map(|i| ['a', 'é', '한', '😀'][i * i % 11 % 4]).collect();
        for cap in (0..1_010).chain([usize::MAX]) {
            let expected: String = text.chars().take(cap).collect();
            assert_eq!(first_characters(&text, cap as u64), expected, "{cap}");
        }
        assert_eq!(characters(text.as_bytes()), 1_000);
    }
}
