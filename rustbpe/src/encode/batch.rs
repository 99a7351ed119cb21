//! Many texts, on many threads.

use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::{Encoder, Vocabulary};
use crate::Error;

/// Bytes of text that a thread takes at a time.
const TASK_BYTES: usize = 1 << 16;

/// Room is made for so many ids; more make their own.
const BYTES_A_TOKEN: usize = 3;

/// The encoders of one vocabulary and pattern: as many as were ever in use at once, caches filled.
pub struct Encoders {
    vocabulary: Arc<Vocabulary>,
    pattern: String,
    idle: Mutex<Vec<Encoder>>,
}

impl Encoders {
    pub fn new(vocabulary: Arc<Vocabulary>, pattern: &str) -> Self {
        Self { vocabulary, pattern: pattern.to_owned(), idle: Mutex::new(Vec::new()) }
    }

    /// Work with an encoder that nobody else uses meanwhile.
    pub fn with<T>(&self, work: impl FnOnce(&mut Encoder) -> Result<T, Error>) -> Result<T, Error> {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = idle().pop();
        let mut encoder = match waiting {
            Some(encoder) => encoder,
            None => Encoder::new(Arc::clone(&self.vocabulary), &self.pattern)?,
        };
        let result = work(&mut encoder);
        idle().push(encoder);
        result
    }

    /// The ids of each text, on up to `threads` threads.
    pub fn each<S: AsRef<str> + Sync>(&self, texts: &[S], threads: usize) -> Result<Vec<Vec<u32>>, Error> {
        let parts = self.in_parts(texts, threads, |encoder, texts| {
            let ids_of = |text: &S| {
                let mut ids = Vec::new();
                encoder.encode(text.as_ref(), &mut ids).map(|()| ids)
            };
            texts.iter().map(ids_of).collect::<Result<Vec<_>, Error>>()
        })?;
        Ok(parts.into_iter().flatten().collect())
    }

    /// The ids of all texts one after another, in parts; `first` before those of each text.
    pub fn joined<S: AsRef<str> + Sync>(
        &self,
        texts: &[S],
        first: Option<u32>,
        threads: usize,
    ) -> Result<Vec<Vec<u32>>, Error> {
        self.in_parts(texts, threads, |encoder, texts| {
            let bytes: usize = texts.iter().map(|text| text.as_ref().len()).sum();
            let mut ids = Vec::with_capacity(bytes / BYTES_A_TOKEN);
            for text in texts {
                ids.extend(first);
                encoder.encode(text.as_ref(), &mut ids)?;
            }
            Ok(ids)
        })
    }

    /// `work` on parts of `texts`, in their order.
    fn in_parts<S: AsRef<str> + Sync, T: Send>(
        &self,
        texts: &[S],
        threads: usize,
        work: impl Fn(&mut Encoder, &[S]) -> Result<T, Error> + Sync,
    ) -> Result<Vec<T>, Error> {
        let parts = parts(texts);
        let next = AtomicUsize::new(0);
        let take_parts = || {
            self.with(|encoder| {
                let mut done = Vec::new();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(part) = parts.get(number) else {
                        return Ok(done);
                    };
                    done.push((number, work(encoder, &texts[part.clone()])?));
                }
            })
        };
        let others = threads.min(parts.len()).saturating_sub(1);
        let outcomes = thread::scope(|scope| {
            let others: Vec<_> = (0..others).map(|_| scope.spawn(take_parts)).collect();
            let own = take_parts();
            let joined =
                others.into_iter().map(|other| other.join().unwrap_or_else(|panic| resume_unwind(panic)));
            [own].into_iter().chain(joined).collect::<Result<Vec<_>, Error>>()
        })?;
        let mut done: Vec<(usize, T)> = outcomes.into_iter().flatten().collect();
        done.sort_unstable_by_key(|(number, _)| *number);
        Ok(done.into_iter().map(|(_, result)| result).collect())
    }
}

/// Texts in a row, TASK_BYTES together or one that is longer.
fn parts<S: AsRef<str>>(texts: &[S]) -> Vec<Range<usize>> {
    let mut parts = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (end, text) in texts.iter().enumerate() {
        if bytes >= TASK_BYTES {
            parts.push(start..end);
            (start, bytes) = (end, 0);
        }
        bytes += text.as_ref().len();
    }
    if start < texts.len() {
        parts.push(start..texts.len());
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoders(pattern: &str) -> Encoders {
        Encoders::new(Arc::new(Vocabulary::from_merges(&[(97, 98)])), pattern)
    }

    #[test]
    fn any_number_of_threads_gives_the_same_in_order() {
        let encoders = encoders(r"\S+|\s+");
        let texts: Vec<String> =
            (0..300).map(|number| format!("{number} ab").repeat(number * 7 % 500)).collect();
        let expected = encoders.each(&texts, 1).unwrap();
        assert_eq!(expected.len(), 300);
        for threads in [0, 2, 3, 50] {
            assert_eq!(encoders.each(&texts, threads).unwrap(), expected);
            let joined = encoders.joined(&texts, Some(7), threads).unwrap().concat();
            let wanted: Vec<u32> = expected.iter().flat_map(|ids| [&[7], &**ids].concat()).collect();
            assert_eq!(joined, wanted);
        }
        assert!(encoders.each(&[""; 0], 2).unwrap().is_empty());
    }

    #[test]
    fn parts_hold_every_text_once() {
        let texts = ["x".repeat(TASK_BYTES * 3), "y".to_owned(), "z".repeat(TASK_BYTES), String::new()];
        assert_eq!(parts(&texts), [0..1, 1..3, 3..4]);
    }

    #[test]
    fn a_failing_text_fails_the_batch() {
        let encoders = encoders(r"\S+|\s*[\r\n]|\s+(?!\S)|\s+");
        let bad = format!("{}x", " ".repeat(1_500_000));
        assert!(encoders.each(&["fine", &bad, "fine"], 2).is_err());
        assert_eq!(encoders.each(&["ab"], 2).unwrap(), [[256]]);
    }
}
