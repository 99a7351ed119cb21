//! Counting words, on all threads.

use std::collections::HashMap;
use std::sync::Mutex;

use rayon::prelude::*;
use rustc_hash::FxBuildHasher;

use crate::Error;
use crate::split::Splitter;

/// How often each word occurs.
pub type WordCounts = HashMap<Box<[u8]>, u64, FxBuildHasher>;

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

/// Counts the words of documents that arrive in batches.
pub struct Counter {
    limits: Limits,
    totals: Totals,
    workers: Vec<Mutex<Worker>>,
}

struct Worker {
    splitter: Splitter,
    counts: WordCounts,
    words: u64,
}

impl Counter {
    /// Fails when `pattern` is not a regular expression.
    pub fn new(pattern: &str, limits: Limits) -> Result<Self, Error> {
        let workers = (0..rayon::current_num_threads())
            .map(|_| {
                Ok(Mutex::new(Worker {
                    splitter: Splitter::new(pattern)?,
                    counts: WordCounts::default(),
                    words: 0,
                }))
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self { limits, totals: Totals::default(), workers })
    }

    /// Count a batch. Returns whether `max_chars` leaves room for more.
    pub fn add(&mut self, documents: &[impl AsRef<str> + Sync]) -> Result<bool, Error> {
        let mut clipped = Vec::with_capacity(documents.len());
        for document in documents {
            if !self.has_room() {
                break;
            }
            clipped.push(self.clip(document.as_ref()));
        }
        let workers = &self.workers;
        clipped.par_chunks(DOCUMENTS_PER_TASK).try_for_each(|documents| {
            // A thread has its own worker, so the lock is never waited for.
            let thread = rayon::current_thread_index().unwrap_or(0);
            let mut worker = workers[thread].lock().expect("no thread has panicked");
            documents.iter().try_for_each(|document| worker.count(document))
        })?;
        Ok(self.has_room())
    }

    /// The counts of everything added, and the totals.
    pub fn finish(self) -> (WordCounts, Totals) {
        let mut totals = self.totals;
        let mut all = WordCounts::default();
        for worker in self.workers {
            let worker = worker.into_inner().expect("no thread has panicked");
            totals.words += worker.words;
            let (mut larger, smaller) =
                if worker.counts.len() > all.len() { (worker.counts, all) } else { (all, worker.counts) };
            for (word, count) in smaller {
                *larger.entry(word).or_insert(0) += count;
            }
            all = larger;
        }
        (all, totals)
    }

    fn has_room(&self) -> bool {
        self.limits.max_chars.is_none_or(|most| self.totals.characters < most)
    }

    fn clip<'t>(&mut self, document: &'t str) -> &'t str {
        let room = self.limits.max_chars.map(|most| most - self.totals.characters);
        let cap = [self.limits.doc_cap, room].into_iter().flatten().min();
        let text = cap.map_or(document, |cap| first_characters(document, cap));
        self.totals.rows += 1;
        self.totals.characters += text.chars().count() as u64;
        self.totals.bytes += text.len() as u64;
        text
    }
}

impl Worker {
    fn count(&mut self, document: &str) -> Result<(), Error> {
        let (counts, words) = (&mut self.counts, &mut self.words);
        self.splitter.words(document, |word| {
            *words += 1;
            match counts.get_mut(word.as_bytes()) {
                Some(count) => *count += 1,
                None => {
                    counts.insert(word.as_bytes().into(), 1);
                }
            }
        })
    }
}

/// The first `cap` characters of `text`.
fn first_characters(text: &str, cap: u64) -> &str {
    let cap = usize::try_from(cap).unwrap_or(usize::MAX);
    if text.len() <= cap {
        return text; // a character has at least one byte
    }
    text.char_indices().nth(cap).map_or(text, |(end, _)| &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(documents: &[&str], limits: Limits) -> (Vec<(String, u64)>, Totals) {
        let mut counter = Counter::new(r"\S+", limits).unwrap();
        counter.add(documents).unwrap();
        let (counts, totals) = counter.finish();
        let mut counts: Vec<_> = counts
            .into_iter()
            .map(|(word, count)| (String::from_utf8(word.into()).unwrap(), count))
            .collect();
        counts.sort();
        (counts, totals)
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
        let mut counter = Counter::new(r"\S+", limits).unwrap();
        assert!(counter.add(&["ab"]).unwrap());
        assert!(!counter.add(&["cd"]).unwrap());
        assert!(!counter.add(&["ef"]).unwrap());
        assert_eq!(counter.finish().1.characters, 3);
    }

    #[test]
    fn many_documents_over_many_threads_lose_nothing() {
        let documents: Vec<String> = (0..5_000).map(|i| format!("w{} all", i % 7)).collect();
        let mut counter = Counter::new(r"\S+", Limits::default()).unwrap();
        for batch in documents.chunks(333) {
            counter.add(batch).unwrap();
        }
        let (counts, totals) = counter.finish();
        assert_eq!(counts[b"all".as_slice()], 5_000);
        assert_eq!(counts[b"w0".as_slice()], 715);
        assert_eq!(totals.words, 10_000);
    }
}
