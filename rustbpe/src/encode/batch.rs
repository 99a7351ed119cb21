//! Many texts, on many threads.

use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
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

    /// The ids of each text, on up to `threads` threads. `last` as in `in_parts`.
    pub fn each<S: AsRef<str> + Send, E: From<Error>>(
        &self,
        texts: impl Iterator<Item = Result<S, E>>,
        threads: usize,
        last: impl FnOnce(&mut (dyn FnMut() + Send)),
    ) -> Result<Vec<Vec<u32>>, E> {
        let parts = self.in_parts(texts, threads, last, |encoder, texts| {
            let ids_of = |text: &S| {
                let mut ids = Vec::new();
                encoder.encode(text.as_ref(), &mut ids).map(|()| ids)
            };
            texts.iter().map(ids_of).collect::<Result<Vec<_>, Error>>()
        })?;
        Ok(parts.into_iter().flatten().collect())
    }

    /// The ids of all texts one after another, in parts; `first` before those of each text. `last` as in
    /// `in_parts`.
    pub fn joined<S: AsRef<str> + Send, E: From<Error>>(
        &self,
        texts: impl Iterator<Item = Result<S, E>>,
        first: Option<u32>,
        threads: usize,
        last: impl FnOnce(&mut (dyn FnMut() + Send)),
    ) -> Result<Vec<Vec<u32>>, E> {
        self.in_parts(texts, threads, last, |encoder, texts| {
            let bytes: usize = texts.iter().map(|text| text.as_ref().len()).sum();
            let mut ids = Vec::with_capacity(bytes / BYTES_A_TOKEN);
            for text in texts {
                ids.extend(first);
                encoder.encode(text.as_ref(), &mut ids)?;
            }
            Ok(ids)
        })
    }

    /// `work` on parts of `texts`, in their order. Other threads begin while this one still takes texts.
    /// When it has all of them, `last` is called with this thread's share of the work, which it has to do.
    fn in_parts<S: AsRef<str> + Send, T: Send, E: From<Error>>(
        &self,
        texts: impl Iterator<Item = Result<S, E>>,
        threads: usize,
        last: impl FnOnce(&mut (dyn FnMut() + Send)),
        work: impl Fn(&mut Encoder, &[S]) -> Result<T, Error> + Sync,
    ) -> Result<Vec<T>, E> {
        let (sender, receiver) = mpsc::channel::<(usize, Vec<S>)>();
        let receiver = Mutex::new(receiver);
        let next = || receiver.lock().unwrap_or_else(PoisonError::into_inner).recv().ok();
        let take_parts = || {
            self.with(|encoder| {
                let mut done = Vec::new();
                while let Some((number, texts)) = next() {
                    let result = work(encoder, &texts)?;
                    done.push((number, texts, result));
                }
                Ok(done)
            })
        };
        let outcomes = thread::scope(|scope| {
            let sender = sender; // goes however this is left, so that the others come to an end
            let mut others = Vec::new();
            for (number, part) in Parts(texts).enumerate() {
                if number > 0 && others.len() + 1 < threads {
                    others.push(scope.spawn(take_parts));
                }
                sender.send((number, part?)).expect("the receiver is kept");
            }
            drop(sender);
            let mut own = None;
            last(&mut || own = Some(take_parts()));
            let joined =
                others.into_iter().map(|other| other.join().unwrap_or_else(|panic| resume_unwind(panic)));
            own.into_iter().chain(joined).collect::<Result<Vec<_>, Error>>().map_err(E::from)
        })?;
        let mut done: Vec<_> = outcomes.into_iter().flatten().collect();
        done.sort_unstable_by_key(|(number, _, _)| *number);
        Ok(done.into_iter().map(|(_, _, result)| result).collect())
    }
}

/// Texts in a row, TASK_BYTES together or one that is longer.
struct Parts<I>(I);

impl<S: AsRef<str>, E, I: Iterator<Item = Result<S, E>>> Iterator for Parts<I> {
    type Item = Result<Vec<S>, E>;

    fn next(&mut self) -> Option<Self::Item> {
        let (mut part, mut bytes) = (Vec::new(), 0);
        while bytes < TASK_BYTES {
            match self.0.next() {
                Some(Ok(text)) => {
                    bytes += text.as_ref().len();
                    part.push(text);
                }
                Some(Err(error)) => return Some(Err(error)),
                None => break,
            }
        }
        (!part.is_empty()).then_some(Ok(part))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoders(pattern: &str) -> Encoders {
        Encoders::new(Arc::new(Vocabulary::from_merges(&[(97, 98)])), pattern)
    }

    fn given(texts: &[String]) -> impl Iterator<Item = Result<&str, Error>> {
        texts.iter().map(|text| Ok(&**text))
    }

    #[test]
    fn any_number_of_threads_gives_the_same_in_order() {
        let encoders = encoders(r"\S+|\s+");
        let texts: Vec<String> =
            (0..300).map(|number| format!("{number} ab").repeat(number * 7 % 500)).collect();
        let expected = encoders.each(given(&texts), 1, |work| work()).unwrap();
        assert_eq!(expected.len(), 300);
        for threads in [0, 2, 3, 50] {
            assert_eq!(encoders.each(given(&texts), threads, |work| work()).unwrap(), expected);
            let joined = encoders.joined(given(&texts), Some(7), threads, |work| work()).unwrap().concat();
            let wanted: Vec<u32> = expected.iter().flat_map(|ids| [&[7], &**ids].concat()).collect();
            assert_eq!(joined, wanted);
        }
        assert!(encoders.each(given(&[]), 2, |work| work()).unwrap().is_empty());
    }

    #[test]
    fn parts_hold_every_text_once() {
        let texts = ["x".repeat(TASK_BYTES * 3), "y".to_owned(), "z".repeat(TASK_BYTES), String::new()];
        let lengths: Vec<usize> = Parts(given(&texts)).map(|part| part.unwrap().len()).collect();
        assert_eq!(lengths, [1, 2, 1]);
    }

    #[test]
    fn a_failing_text_fails_the_batch() {
        let encoders = encoders(r"\S+|\s*[\r\n]|\s+(?!\S)|\s+");
        let bad = ["fine".to_owned(), format!("{}x", " ".repeat(1_500_000)), "fine".to_owned()];
        assert!(encoders.each(given(&bad), 2, |work| work()).is_err());
        let good = ["ab".to_owned()];
        assert_eq!(encoders.each(given(&good), 2, |work| work()).unwrap(), [[256]]);
    }

    #[test]
    fn a_text_that_does_not_come_ends_the_batch() {
        let encoders = encoders(r"\S+|\s+");
        let text = "ab ".repeat(TASK_BYTES);
        for before in [0, 1, 5] {
            let texts = (0..=before).map(|number| match number == before {
                true => Err(Error::Invalid("no text".to_owned())),
                false => Ok(&*text),
            });
            let error = encoders.each(texts, 3, |work| work()).unwrap_err();
            assert_eq!(error.to_string(), "no text");
        }
    }
}
