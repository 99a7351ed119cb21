//! Adding up counts: a merge of any number of sorted streams of words.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;
use std::path::{Path, PathBuf};
use std::sync::atomic::{self, AtomicBool};

use rayon::prelude::*;

use super::records::Sums;
use super::{CountsFile, Header, invalid};
use crate::Error;

/// Most groups of files that are added up side by side. Each holds its own sum.
const MOST_GROUPS: usize = 8;

/// Words between two looks at whether to stop.
const WORDS_PER_LOOK: u32 = 1 << 16;

/// Words in the order of their bytes, each once, with their counts.
pub trait Sorted {
    /// Go to the next word, at first to the first. Returns whether there is one.
    fn advance(&mut self) -> Result<bool, Error>;
    fn word(&self) -> &[u8];
    fn count(&self) -> u64;
}

/// Add up counts files that were made in the same way. Returns their pattern and the sums that are at
/// least `min_count`.
///
/// The files' words are read as they are needed, so memory is that of the sums (twice, on several
/// threads: some 15 bytes a word) and about a megabyte per file. Fails when two differ in pattern, text column or limits,
/// naming both files and what differs; and soon after `stop` is set.
pub fn add_up(paths: &[PathBuf], min_count: u64, stop: &AtomicBool) -> Result<(String, Sums), Error> {
    let files: Vec<Result<CountsFile, Error>> = paths.par_iter().map(|path| CountsFile::open(path)).collect();
    let files = files.into_iter().collect::<Result<Vec<_>, _>>()?;
    let Some(first) = files.first() else {
        return Err(Error::Invalid("no counts files were given to train from".to_owned()));
    };
    for file in &files {
        must_match(&first.path, &first.header, &file.path, &file.header)?;
    }
    let groups = rayon::current_num_threads().min(MOST_GROUPS).min(files.len() / 2).max(1);
    let counts = if groups == 1 {
        add_files(&files, min_count, stop)?
    } else {
        let groups = files.par_chunks(files.len().div_ceil(groups));
        let sums: Vec<Result<Sums, Error>> = groups.map(|group| add_files(group, 0, stop)).collect();
        let sums = sums.into_iter().collect::<Result<Vec<_>, _>>()?;
        merge(sums.iter().map(Sums::cursor).collect(), min_count, stop)?
    };
    Ok((first.header.pattern.clone(), counts))
}

fn add_files(files: &[CountsFile], min_count: u64, stop: &AtomicBool) -> Result<Sums, Error> {
    let records = files.iter().map(|file| file.records().map(Box::new)).collect::<Result<_, _>>()?;
    merge(records, min_count, stop)
}

/// The sum of all streams, without the words that occur less than `min_count` times.
fn merge<S: Sorted>(streams: Vec<S>, min_count: u64, stop: &AtomicBool) -> Result<Sums, Error> {
    let mut heads = BinaryHeap::with_capacity(streams.len());
    for mut stream in streams {
        if stream.advance()? {
            heads.push(Reverse(Head { rank: rank(stream.word()), stream }));
        }
    }
    let mut sums = Sums::default();
    let mut word = Vec::new();
    let mut sum = 0_u64;
    let mut looks = 0_u32;
    while let Some(mut head) = heads.peek_mut() {
        let Reverse(Head { rank: head_rank, stream }) = &mut *head;
        if stream.word() != word {
            if sum >= min_count.max(1) {
                sums.push(&word, sum);
            }
            word.clear();
            word.extend_from_slice(stream.word());
            sum = 0;
        }
        sum = sum.checked_add(stream.count()).ok_or_else(too_many)?;
        if stream.advance()? {
            *head_rank = rank(stream.word());
        } else {
            PeekMut::pop(head);
        }
        looks = looks.wrapping_add(1);
        if looks.is_multiple_of(WORDS_PER_LOOK) && stop.load(atomic::Ordering::Relaxed) {
            return Err(Error::Invalid("adding up counts files was stopped".to_owned()));
        }
    }
    if sum >= min_count.max(1) {
        sums.push(&word, sum);
    }
    Ok(sums)
}

fn too_many() -> Error {
    Error::Invalid(
        "the counts of one word add up to more than 64 bits hold; one of the counts files is wrong: count \
         its shard again"
            .to_owned(),
    )
}

/// The next word of a stream. Ordered by that word.
struct Head<S> {
    rank: u128,
    stream: S,
}

const RANKED_BYTES: usize = 15;

/// A number in the order of words: the first 15 bytes, then how many there are, of which more than 15
/// count as 16. Two of those with equal numbers have to be compared byte by byte.
fn rank(word: &[u8]) -> u128 {
    let mut bytes = [0; 16];
    let ranked = word.len().min(RANKED_BYTES);
    bytes[..ranked].copy_from_slice(&word[..ranked]);
    bytes[RANKED_BYTES] = word.len().min(RANKED_BYTES + 1) as u8;
    u128::from_be_bytes(bytes)
}

impl<S: Sorted> Ord for Head<S> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.rank.cmp(&other.rank).then_with(|| {
            let whole = self.rank as u8 as usize <= RANKED_BYTES;
            if whole { Ordering::Equal } else { self.stream.word().cmp(other.stream.word()) }
        })
    }
}

impl<S: Sorted> PartialOrd for Head<S> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<S: Sorted> PartialEq for Head<S> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<S: Sorted> Eq for Head<S> {}

impl<S: Sorted> Sorted for Box<S> {
    fn advance(&mut self) -> Result<bool, Error> {
        (**self).advance()
    }

    fn word(&self) -> &[u8] {
        (**self).word()
    }

    fn count(&self) -> u64 {
        (**self).count()
    }
}

fn must_match(path: &Path, header: &Header, other_path: &Path, other: &Header) -> Result<(), Error> {
    let cap = |cap: Option<u64>| cap.map_or("none".to_owned(), |cap| cap.to_string());
    let ways = |header: &Header| {
        [
            ("pattern", header.pattern.clone()),
            ("text column", header.text_column.clone()),
            ("document cap", cap(header.limits.doc_cap)),
            ("cap on all characters", cap(header.limits.max_chars)),
        ]
    };
    for ((what, ours), (_, theirs)) in ways(header).into_iter().zip(ways(other)) {
        if ours != theirs {
            let reason = format!(
                "was counted with {what} {theirs}, {} with {ours}; count both shards in the same way",
                path.display()
            );
            return Err(invalid(other_path, &reason));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{counts, folder, header};
    use super::super::write;
    use super::*;
    use crate::count::{Counts, WordCounts};

    fn sum(paths: &[PathBuf]) -> Result<(String, WordCounts), Error> {
        add_up(paths, 0, &AtomicBool::new(false)).map(|(pattern, sums)| (pattern, all(&sums)))
    }

    fn all(sums: &Sums) -> WordCounts {
        let mut counts = WordCounts::default();
        let copy = |word: &[u8], count| {
            counts.push(word, count);
            Ok::<_, Error>(())
        };
        sums.each(copy).unwrap();
        assert_eq!(counts.len(), sums.words());
        counts
    }

    #[test]
    fn files_add_up() {
        let folder = folder("add");
        let (a, b) = (folder.join("a"), folder.join("b"));
        write(&a, &header("p"), &counts(&[("x", 1), ("y", 2)])).unwrap();
        write(&b, &header("p"), &counts(&[("y", 3), ("z", 4)])).unwrap();
        let (pattern, sum) = sum(&[a, b]).unwrap();
        assert_eq!(pattern, "p");
        assert_eq!(sum, counts(&[("x", 1), ("y", 5), ("z", 4)]));
    }

    #[test]
    fn any_number_of_files_in_any_order_on_any_number_of_threads_adds_up_to_the_same() {
        let folder = folder("orders");
        let mut expected = std::collections::BTreeMap::new();
        let mut paths: Vec<PathBuf> = Vec::new();
        for file in 0..23_u64 {
            let word =
                |number: u64| ["", "w", "fifteen bytes a", "more than fifteen bytes "][number as usize % 4];
            let words: WordCounts = (file..file + 200)
                .map(|number| (format!("{}{}", word(number), number / 4 * (number % 7)), number + file))
                .collect::<std::collections::BTreeMap<_, _>>()
                .into_iter()
                .collect();
            for (word, count) in words.iter() {
                *expected.entry(word.to_vec()).or_insert(0) += count;
            }
            paths.push(folder.join(file.to_string()));
            write(&paths[file as usize], &header("p"), &words).unwrap();
        }
        expected.retain(|_, count| *count > 0);
        let expected: WordCounts = expected.into_iter().collect();
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            paths.rotate_left(threads);
            assert_eq!(pool.install(|| sum(&paths)).unwrap().1, expected);
            paths.reverse();
            assert_eq!(pool.install(|| sum(&paths)).unwrap().1, expected);
        }
    }

    #[test]
    fn a_floor_is_that_of_the_sums() {
        let folder = folder("floor");
        let paths = ["a", "b", "c", "d"].map(|name| folder.join(name));
        for path in &paths {
            let name = path.file_name().unwrap().to_str().unwrap();
            write(path, &header("p"), &counts(&[(name, 3), ("x", 1)])).unwrap();
        }
        let floor = |floor| all(&add_up(&paths, floor, &AtomicBool::new(false)).unwrap().1);
        assert_eq!(floor(3).len(), 5);
        assert_eq!(floor(4), counts(&[("x", 4)]));
        assert!(floor(5).is_empty());
    }

    #[test]
    fn sums_beyond_64_bits_are_refused() {
        let folder = folder("overflow");
        let paths = ["a", "b"].map(|name| folder.join(name));
        for path in &paths {
            write(path, &header("p"), &counts(&[("x", u64::MAX / 2 + 1)])).unwrap();
        }
        assert!(sum(&paths).unwrap_err().to_string().contains("64 bits"));
    }

    #[test]
    fn adding_up_stops_when_told_to() {
        let folder = folder("stop");
        let path = folder.join("a");
        let words: WordCounts = (0..2 * WORDS_PER_LOOK).map(|number| (number.to_string(), 1)).collect();
        write(&path, &header("p"), &words).unwrap();
        assert!(add_up(&[path], 0, &AtomicBool::new(true)).err().unwrap().to_string().contains("stopped"));
    }

    #[test]
    fn files_counted_differently_do_not_add_up() {
        let folder = folder("differ");
        let (a, b) = (folder.join("a"), folder.join("b"));
        write(&a, &header("p"), &counts(&[("x", 1)])).unwrap();
        write(&b, &header("q"), &counts(&[("x", 1)])).unwrap();
        let error = sum(&[a, b]).unwrap_err().to_string();
        assert!(error.contains("counted with pattern q") && error.contains("with p; count both"), "{error}");
        assert!(sum(&[]).unwrap_err().to_string().contains("no counts files"));
    }
}
