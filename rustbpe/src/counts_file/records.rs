//! The words of a counts file, one after another.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::PathBuf;

use super::adding::Sorted;
use super::{WINDOW_LOG, damaged, unreadable};
use crate::Error;
use crate::count::{Counts, WordCounts};

/// Bytes that are read from a file at a time, and decompressed at a time.
const BUFFER: usize = 64 << 10;

/// Append the words number `range` and their counts.
pub fn put(output: &mut Vec<u8>, counts: &WordCounts, range: Range<usize>) {
    let mut previous: &[u8] = range.start.checked_sub(1).map_or(&[], |before| counts.get(before).0);
    for (word, count) in range.map(|at| counts.get(at)) {
        put_record(output, previous, word, count);
        previous = word;
    }
}

/// Append a word and its count, front-coded: how many bytes it shares with the one before it, how many
/// follow, those, the count.
fn put_record(output: &mut Vec<u8>, previous: &[u8], word: &[u8], count: u64) {
    let shared = previous.iter().zip(word).take_while(|(left, right)| left == right).count();
    put_number(output, shared as u64);
    put_number(output, (word.len() - shared) as u64);
    output.extend_from_slice(&word[shared..]);
    put_number(output, count);
}

/// As LEB128.
fn put_number(output: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        output.push(number as u8 | 0x80);
        number >>= 7;
    }
    output.push(number as u8);
}

/// Reads words and counts in the order of the words' bytes, with little memory whatever the file's size.
pub struct Records {
    path: PathBuf,
    reader: Reader<BufReader<zstd::Decoder<'static, BufReader<Part>>>>,
    left: u64,
}

impl Records {
    pub(super) fn new(path: PathBuf, span: Range<u64>, words: u64) -> Result<Self, Error> {
        let part = BufReader::with_capacity(BUFFER, Part { path: path.clone(), span });
        let mut decompressor = zstd::Decoder::with_buffer(part).map_err(|error| unreadable(&path, error))?;
        decompressor.window_log_max(WINDOW_LOG).map_err(|error| unreadable(&path, error))?;
        let reader = Reader::new(BufReader::with_capacity(BUFFER, decompressor));
        Ok(Self { path, reader, left: words })
    }
}

impl Sorted for Records {
    fn advance(&mut self) -> Result<bool, Error> {
        if self.left == 0 {
            let rest = self.reader.input.fill_buf().map_err(|error| unreadable(&self.path, error))?;
            return if rest.is_empty() { Ok(false) } else { Err(damaged(&self.path)) };
        }
        self.left -= 1;
        self.reader.read_next().map_err(|error| unreadable(&self.path, error))?;
        Ok(true)
    }

    fn word(&self) -> &[u8] {
        &self.reader.word
    }

    fn count(&self) -> u64 {
        self.reader.count
    }
}

/// Words and counts in memory as a counts file has them, uncompressed: a word takes some seven bytes.
#[derive(Default)]
pub struct Sums {
    records: Vec<u8>,
    words: usize,
    last: Vec<u8>,
}

impl Sums {
    /// Append a word that follows all others in the order of bytes.
    pub(super) fn push(&mut self, word: &[u8], count: u64) {
        debug_assert!(self.words == 0 || self.last.as_slice() < word);
        put_record(&mut self.records, &self.last, word, count);
        self.last.clear();
        self.last.extend_from_slice(word);
        self.words += 1;
    }

    /// The words one after another.
    pub(super) fn cursor(&self) -> Cursor<'_> {
        Cursor { reader: Reader::new(&self.records) }
    }
}

impl Counts for Sums {
    fn words(&self) -> usize {
        self.words
    }

    fn each<E>(&self, mut visit: impl FnMut(&[u8], u64) -> Result<(), E>) -> Result<(), E> {
        let mut reader = Reader::new(self.records.as_slice());
        while reader.advance() {
            visit(&reader.word, reader.count)?;
        }
        Ok(())
    }
}

/// Goes through sums.
pub struct Cursor<'s> {
    reader: Reader<&'s [u8]>,
}

impl Sorted for Cursor<'_> {
    fn advance(&mut self) -> Result<bool, Error> {
        Ok(self.reader.advance())
    }

    fn word(&self) -> &[u8] {
        &self.reader.word
    }

    fn count(&self) -> u64 {
        self.reader.count
    }
}

/// Puts front-coded words together again.
struct Reader<R> {
    input: R,
    first: bool,
    word: Vec<u8>,
    count: u64,
}

impl Reader<&[u8]> {
    /// Go to the next of the words that `put_record` wrote. Returns whether there is one.
    fn advance(&mut self) -> bool {
        let more = !self.input.is_empty();
        if more {
            self.read_next().expect("the records were written here");
        }
        more
    }
}

impl<R: BufRead> Reader<R> {
    fn new(input: R) -> Self {
        Self { input, first: true, word: Vec::new(), count: 0 }
    }

    fn read_next(&mut self) -> io::Result<()> {
        let shared = self.number()?;
        let rest = self.number()?;
        let follows = usize::try_from(shared).ok().filter(|shared| *shared <= self.word.len());
        let shared = follows.ok_or(io::ErrorKind::InvalidData)?;
        let replaced = self.word.get(shared).copied();
        self.word.truncate(shared);
        self.append(rest)?;
        // Sorted, each word once: behind the shared bytes the word goes on with a higher byte.
        if self.word.get(shared).copied() <= replaced && !self.first {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.first = false;
        self.count = self.number()?;
        Ok(())
    }

    /// Append bytes to the word. Takes no memory for bytes that are not there.
    fn append(&mut self, mut bytes: u64) -> io::Result<()> {
        while bytes > 0 {
            let there = self.input.fill_buf()?;
            let taken = there.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
            if taken == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.word.extend_from_slice(&there[..taken]);
            self.input.consume(taken);
            bytes -= taken as u64;
        }
        Ok(())
    }

    /// Of LEB128.
    fn number(&mut self) -> io::Result<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = *self.input.fill_buf()?.first().ok_or(io::ErrorKind::UnexpectedEof)?;
            self.input.consume(1);
            let bits = u64::from(byte & 0x7f);
            if (bits << shift) >> shift != bits {
                break;
            }
            number |= bits << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }
}

/// A part of a file. The file is open only while bytes are read, so that any number of them can be
/// read side by side.
struct Part {
    path: PathBuf,
    span: Range<u64>,
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.span.end - self.span.start).unwrap_or(usize::MAX);
        let most = left.min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.span.start))?;
        let read = file.read(&mut buffer[..most])?;
        self.span.start += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::super::compressed;
    use super::*;

    /// What reading says of a file that holds only these records.
    fn read(name: &str, records: &[u8], words: u64) -> Result<Vec<u64>, Error> {
        let path = std::env::temp_dir().join(format!("rustbpe-records-{name}-{}", std::process::id()));
        let compressed = compressed(records).unwrap();
        std::fs::write(&path, &compressed).unwrap();
        let mut records = Records::new(path, 0..compressed.len() as u64, words).unwrap();
        let mut counts = Vec::new();
        while records.advance()? {
            counts.push(records.count());
        }
        Ok(counts)
    }

    #[test]
    fn records_that_no_counts_file_has_are_damage_and_no_panic() {
        assert_eq!(read("good", b"\0\x01a\x05\x01\x01b\x06", 2).unwrap(), [5, 6]);
        assert_eq!(read("empty", b"\0\0\x05", 1).unwrap(), [5]);
        let most = b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01";
        let long = [b"\0".as_slice(), most, b"a\x05"].concat();
        let wide = [b"\0\x01a\xff".as_slice(), most].concat();
        let damage: [(&str, &[u8], u64); 9] = [
            ("shares too much", b"\x01\x01a\x05", 1),
            ("not sorted", b"\0\x01b\x05\0\x01a\x05", 2),
            ("twice", b"\0\x01b\x05\0\x01b\x05", 2),
            ("twice by sharing", b"\0\x01b\x05\x01\0\x05", 2),
            ("longer than memory", &long, 1),
            ("beyond 64 bits", &wide, 1),
            ("more than announced", b"\0\x01a\x05\0\x01b\x05", 1),
            ("fewer than announced", b"\0\x01a\x05", 2),
            ("cut off", b"\0\x05a", 1),
        ];
        for (name, records, words) in damage {
            let error = read(name, records, words).expect_err(name).to_string();
            assert!(error.contains("torn or damaged"), "{name}: {error}");
        }
    }
}
