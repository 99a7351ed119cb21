//! Counts files: the word counts of one shard, sorted and front-coded.
//!
//! Layout, all numbers little-endian:
//!
//! ```text
//! magic "BPECOUNT" | version u32
//! pattern, text column, sha256 of the input: each u32 length, then UTF-8
//! document cap, cap on all characters: each u8 (0 none, 1 some), then u64 where some
//! rows, characters, bytes, words, unique words: u64
//! unique words times, in the order of their bytes:
//!     bytes shared with the word before, bytes that follow, those bytes, count (numbers as LEB128)
//! FNV-1a of everything before: u64
//! ```
//!
//! Equal text, pattern and limits give equal bytes. Counts of several files add up exactly, so that
//! training from them equals training on their shards at once.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::Error;
use crate::count::{Limits, Totals, WordCounts};

pub const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"BPECOUNT";

/// What was counted, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub pattern: String,
    pub text_column: String,
    pub input_sha256: String,
    pub limits: Limits,
    pub totals: Totals,
    pub unique_words: u64,
}

/// A counts file in memory.
pub struct CountsFile {
    pub header: Header,
    path: PathBuf,
    body: Vec<u8>,
    records_at: usize,
}

/// Write `counts` to `path`, under a temporary name first: a counts file is whole or not there.
pub fn write(path: &Path, header: &Header, counts: &WordCounts) -> Result<(), Error> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    for text in [&header.pattern, &header.text_column, &header.input_sha256] {
        bytes.extend_from_slice(&(text.len() as u32).to_le_bytes());
        bytes.extend_from_slice(text.as_bytes());
    }
    for limit in [header.limits.doc_cap, header.limits.max_chars] {
        bytes.push(u8::from(limit.is_some()));
        if let Some(limit) = limit {
            bytes.extend_from_slice(&limit.to_le_bytes());
        }
    }
    let totals = &header.totals;
    for number in [totals.rows, totals.characters, totals.bytes, totals.words, counts.len() as u64] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }

    let mut sorted: Vec<(&[u8], u64)> = counts.iter().map(|(word, count)| (&**word, *count)).collect();
    sorted.sort_unstable();
    let mut previous: &[u8] = &[];
    for (word, count) in sorted {
        let shared = previous.iter().zip(word).take_while(|(left, right)| left == right).count();
        put_number(&mut bytes, shared as u64);
        put_number(&mut bytes, (word.len() - shared) as u64);
        bytes.extend_from_slice(&word[shared..]);
        put_number(&mut bytes, count);
        previous = word;
    }
    let checksum = fnv1a(&bytes);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    put_file(path, &bytes)
}

fn put_file(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = fs::File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    written.map_err(|source| {
        // The first error is the one to report; the temporary file may not even exist.
        let _ = fs::remove_file(&temporary);
        Error::Io { path: path.to_owned(), source }
    })
}

impl CountsFile {
    /// Read and verify a file. Fails when it is missing, of a newer version, torn or damaged.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let bytes = fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        let (mut reader, body_length) = open(path, &bytes)?;
        let header = reader.header()?;
        let records_at = reader.at;
        let mut body = bytes;
        body.truncate(body_length);
        Ok(Self { header, path: path.to_owned(), body, records_at })
    }

    /// Call `visit` with every word and its count, in the order of the words' bytes.
    pub fn words(&self, mut visit: impl FnMut(&[u8], u64) -> Result<(), Error>) -> Result<(), Error> {
        let mut reader = Reader { path: &self.path, bytes: &self.body, at: self.records_at };
        let mut word = Vec::new();
        for _ in 0..self.header.unique_words {
            let shared = reader.length()?;
            let rest = reader.length()?;
            if shared > word.len() {
                return Err(reader.damaged());
            }
            word.truncate(shared);
            word.extend_from_slice(reader.take(rest)?);
            visit(&word, reader.number()?)?;
        }
        if reader.at != self.body.len() {
            return Err(reader.damaged());
        }
        Ok(())
    }
}

/// Add up counts files that were made in the same way.
///
/// Fails when two differ in pattern, text column or limits, naming both files and what differs.
pub fn add_up(paths: &[PathBuf]) -> Result<(String, WordCounts), Error> {
    let mut counts = WordCounts::default();
    let mut first: Option<(&PathBuf, Header)> = None;
    for path in paths {
        let file = CountsFile::read(path)?;
        match &first {
            None => first = Some((path, file.header.clone())),
            Some((first_path, header)) => must_match(first_path, header, path, &file.header)?,
        }
        file.words(|word, count| {
            if let Some(sum) = counts.get_mut(word) {
                *sum = sum.checked_add(count).ok_or_else(|| {
                    invalid(
                        path,
                        "its counts overflow 64 bits when added to the others; count its shard again",
                    )
                })?;
            } else {
                counts.insert(word.into(), count);
            }
            Ok(())
        })?;
    }
    let (_, header) =
        first.ok_or_else(|| Error::Invalid("no counts files were given to train from".to_owned()))?;
    Ok((header.pattern, counts))
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

fn invalid(path: &Path, reason: &str) -> Error {
    Error::Invalid(format!("{}: {reason}", path.display()))
}

/// Check magic, version and checksum; return a reader behind the version, and where records end.
fn open<'b>(path: &'b Path, bytes: &'b [u8]) -> Result<(Reader<'b>, usize), Error> {
    if !bytes.starts_with(MAGIC) {
        return Err(invalid(path, "is not a counts file; pass files that count_words wrote"));
    }
    let mut reader = Reader { path, bytes, at: MAGIC.len() };
    let version = u32::from_le_bytes(reader.array()?);
    if version != VERSION {
        return Err(invalid(
            path,
            &format!(
                "is a counts file of version {version}, this rustbpe reads version {VERSION}; update rustbpe \
                 or count the shard again"
            ),
        ));
    }
    let body_length = bytes.len().checked_sub(8).ok_or_else(|| reader.damaged())?;
    let (body, checksum) = bytes.split_at(body_length);
    if fnv1a(body).to_le_bytes() != checksum {
        return Err(reader.damaged());
    }
    Ok((Reader { bytes: body, ..reader }, body_length))
}

struct Reader<'b> {
    path: &'b Path,
    bytes: &'b [u8],
    at: usize,
}

impl<'b> Reader<'b> {
    fn damaged(&self) -> Error {
        invalid(self.path, "is torn or damaged; delete it and count its shard again")
    }

    fn take(&mut self, length: usize) -> Result<&'b [u8], Error> {
        let end = self.at.checked_add(length).ok_or_else(|| self.damaged())?;
        let taken = self.bytes.get(self.at..end).ok_or_else(|| self.damaged())?;
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let taken = self.take(N)?;
        taken.try_into().map_err(|_| self.damaged())
    }

    fn u64(&mut self) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<String, Error> {
        let length = u32::from_le_bytes(self.array()?) as usize;
        let bytes = self.take(length)?.to_vec();
        String::from_utf8(bytes).map_err(|_| self.damaged())
    }

    fn limit(&mut self) -> Result<Option<u64>, Error> {
        match self.array()? {
            [0] => Ok(None),
            [1] => Ok(Some(self.u64()?)),
            _ => Err(self.damaged()),
        }
    }

    fn header(&mut self) -> Result<Header, Error> {
        Ok(Header {
            pattern: self.text()?,
            text_column: self.text()?,
            input_sha256: self.text()?,
            limits: Limits { doc_cap: self.limit()?, max_chars: self.limit()? },
            totals: Totals {
                rows: self.u64()?,
                characters: self.u64()?,
                bytes: self.u64()?,
                words: self.u64()?,
            },
            unique_words: self.u64()?,
        })
    }

    /// LEB128.
    fn number(&mut self) -> Result<u64, Error> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let [byte] = self.array()?;
            let bits = u64::from(byte & 0x7f);
            if (bits << shift) >> shift != bits {
                break;
            }
            number |= bits << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(self.damaged())
    }

    fn length(&mut self) -> Result<usize, Error> {
        usize::try_from(self.number()?).map_err(|_| self.damaged())
    }
}

fn put_number(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// The 64-bit FNV-1a hash (Fowler, Noll, Vo): finds torn and damaged files, not forged ones.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("rustbpe-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn header(pattern: &str) -> Header {
        Header {
            pattern: pattern.to_owned(),
            text_column: "text".to_owned(),
            input_sha256: "0".repeat(64),
            limits: Limits { doc_cap: Some(10_000), max_chars: None },
            totals: Totals { rows: 1, characters: 2, bytes: 3, words: 4 },
            unique_words: 0,
        }
    }

    fn counts(words: &[(&str, u64)]) -> WordCounts {
        words.iter().map(|(word, count)| (word.as_bytes().into(), *count)).collect()
    }

    fn read(path: &Path) -> Vec<(String, u64)> {
        let mut words = Vec::new();
        let visit = |word: &[u8], count| {
            words.push((String::from_utf8(word.to_vec()).unwrap(), count));
            Ok(())
        };
        CountsFile::read(path).unwrap().words(visit).unwrap();
        words
    }

    #[test]
    fn what_is_written_is_read_in_the_order_of_bytes() {
        let path = folder("round-trip").join("a.counts");
        let words = [("", 1), (" the", 1 << 40), (" then", 127), ("z", 128), ("é", u64::MAX)];
        write(&path, &header("p"), &counts(&words)).unwrap();
        let expected: Vec<_> = words.iter().map(|(word, count)| ((*word).to_owned(), *count)).collect();
        assert_eq!(read(&path), expected);
        assert_eq!(CountsFile::read(&path).unwrap().header, Header { unique_words: 5, ..header("p") });
    }

    #[test]
    fn equal_counts_give_equal_bytes() {
        let folder = folder("equal");
        let words: Vec<String> = (0..500).map(|i| format!("word{i}")).collect();
        let forward: WordCounts = words.iter().map(|word| (word.as_bytes().into(), 7)).collect();
        let backward: WordCounts = words.iter().rev().map(|word| (word.as_bytes().into(), 7)).collect();
        write(&folder.join("a"), &header("p"), &forward).unwrap();
        write(&folder.join("b"), &header("p"), &backward).unwrap();
        assert_eq!(fs::read(folder.join("a")).unwrap(), fs::read(folder.join("b")).unwrap());
    }

    #[test]
    fn files_add_up() {
        let folder = folder("add");
        let (a, b) = (folder.join("a"), folder.join("b"));
        write(&a, &header("p"), &counts(&[("x", 1), ("y", 2)])).unwrap();
        write(&b, &header("p"), &counts(&[("y", 3), ("z", 4)])).unwrap();
        let (pattern, sum) = add_up(&[a, b]).unwrap();
        assert_eq!(pattern, "p");
        assert_eq!(sum, counts(&[("x", 1), ("y", 5), ("z", 4)]));
    }

    #[test]
    fn files_counted_differently_do_not_add_up() {
        let folder = folder("differ");
        let (a, b) = (folder.join("a"), folder.join("b"));
        write(&a, &header("p"), &counts(&[("x", 1)])).unwrap();
        write(&b, &header("q"), &counts(&[("x", 1)])).unwrap();
        let error = add_up(&[a, b]).unwrap_err().to_string();
        assert!(error.contains("counted with pattern q") && error.contains("with p; count both"), "{error}");
        assert!(add_up(&[]).unwrap_err().to_string().contains("no counts files"));
    }

    #[test]
    fn a_file_torn_anywhere_or_with_any_byte_changed_is_refused() {
        let folder = folder("damage");
        let path = folder.join("a");
        write(&path, &header("p"), &counts(&[("abc", 300), ("abd", 5)])).unwrap();
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(CountsFile::read(&path).is_err(), "cut to {length} bytes");
        }
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x11;
            fs::write(&path, &damaged).unwrap();
            assert!(CountsFile::read(&path).is_err(), "byte {at} changed");
        }
    }

    #[test]
    fn an_unknown_version_is_refused_by_number() {
        let path = folder("version").join("a");
        write(&path, &header("p"), &counts(&[("x", 1)])).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes[8] = 9;
        fs::write(&path, bytes).unwrap();
        let error = CountsFile::read(&path).err().unwrap().to_string();
        assert!(error.contains("of version 9") && error.contains("reads version 1"), "{error}");
    }

    #[test]
    fn a_file_that_cannot_be_written_leaves_nothing_behind() {
        let folder = folder("unwritable");
        let path = folder.join("taken");
        fs::create_dir_all(path.join("inside")).unwrap();
        assert!(write(&path, &header("p"), &counts(&[("x", 1)])).is_err());
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    }
}
