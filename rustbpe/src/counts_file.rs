//! Counts files: the word counts of one shard, sorted, front-coded and compressed.
//!
//! Layout, all numbers little-endian:
//!
//! ```text
//! magic "BPECOUNT" | version u32
//! pattern, text column, sha256 of the input: each u32 length, then UTF-8
//! document cap, cap on all characters: each u8 (0 none, 1 some), then u64 where some
//! rows, characters, bytes, words, unique words: u64
//! zstd frames, in them unique words times, in the order of their bytes:
//!     bytes shared with the word before, bytes that follow, those bytes, count (numbers as LEB128)
//! FNV-1a of everything before: u64
//! ```
//!
//! Equal text, pattern and limits give equal bytes (from one version of this crate). Counts of several
//! files add up exactly, so that training from them equals training on their shards at once.

mod adding;
mod records;

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::Error;
use crate::count::{Limits, Totals, WordCounts};
pub use adding::add_up;
use records::Records;

pub const VERSION: u32 = 2;
const MAGIC: &[u8; 8] = b"BPECOUNT";
const CHECKSUM_BYTES: usize = 8;

/// The compressor's effort: 3 is zstd's default. Higher levels gain a few percent for several times the time.
const LEVEL: i32 = 3;

/// log2 of the bytes that a decompressor keeps. Words that are alike lie side by side, so that more
/// would gain little; and to add up files takes this memory for every one of them at once.
const WINDOW_LOG: u32 = 18;

/// Words of a frame: frames are compressed side by side, and lose little by it.
const FRAME_WORDS: usize = 1 << 15;

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

/// A counts file that has been verified. Its words stay on disk.
pub struct CountsFile {
    pub header: Header,
    path: PathBuf,
    /// Where the compressed words start and end, in bytes.
    start: u64,
    end: u64,
}

/// Write `counts` to `path`, under a temporary name first: a counts file is whole or not there.
pub fn write(path: &Path, header: &Header, counts: &WordCounts) -> Result<(), Error> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = File::create(&temporary)
        .and_then(|file| put_all(file, header, counts)?.sync_all())
        .and_then(|()| fs::rename(&temporary, path));
    written.map_err(|source| {
        // The first error is the one to report; the temporary file may not even exist.
        let _ = fs::remove_file(&temporary);
        Error::Io { path: path.to_owned(), source }
    })
}

fn put_all(file: File, header: &Header, counts: &WordCounts) -> io::Result<File> {
    // Without words there is an empty frame: a decompressor wants one.
    let frames = (0..counts.len().max(1)).into_par_iter().step_by(FRAME_WORDS);
    let frames = frames.map(|start| frame(counts, start..counts.len().min(start + FRAME_WORDS)));
    let frames = frames.collect::<io::Result<Vec<_>>>()?;
    let mut output = Hashing { inner: BufWriter::new(file), hash: Fnv::default() };
    put_header(&mut output, header, counts.len() as u64)?;
    frames.iter().try_for_each(|frame| output.write_all(frame))?;
    let Hashing { inner: mut output, hash } = output;
    output.write_all(&hash.0.to_le_bytes())?;
    output.into_inner().map_err(io::IntoInnerError::into_error)
}

/// Words by their numbers, compressed.
fn frame(counts: &WordCounts, range: Range<usize>) -> io::Result<Vec<u8>> {
    let mut words = Vec::new();
    records::put(&mut words, counts, range);
    compressed(&words)
}

/// One frame of zstd.
fn compressed(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut compressor = zstd::bulk::Compressor::new(LEVEL)?;
    compressor.window_log(WINDOW_LOG)?;
    compressor.compress(bytes)
}

fn put_header(output: &mut impl Write, header: &Header, unique_words: u64) -> io::Result<()> {
    output.write_all(MAGIC)?;
    output.write_all(&VERSION.to_le_bytes())?;
    for text in [&header.pattern, &header.text_column, &header.input_sha256] {
        let length = u32::try_from(text.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        output.write_all(&length.to_le_bytes())?;
        output.write_all(text.as_bytes())?;
    }
    for limit in [header.limits.doc_cap, header.limits.max_chars] {
        output.write_all(&[u8::from(limit.is_some())])?;
        if let Some(limit) = limit {
            output.write_all(&limit.to_le_bytes())?;
        }
    }
    let totals = &header.totals;
    for number in [totals.rows, totals.characters, totals.bytes, totals.words, unique_words] {
        output.write_all(&number.to_le_bytes())?;
    }
    Ok(())
}

impl CountsFile {
    /// Verify a file and read how it was made. Fails when it is missing, of another version, torn or
    /// damaged.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |error| unreadable(path, error);
        let mut file = File::open(path).map_err(failed)?;
        let end = verify(path, &file)?;
        file.rewind().map_err(failed)?;
        let mut body = BufReader::new(file).take(end);
        let header = skip_version(&mut body).and_then(|()| read_header(&mut body)).map_err(failed)?;
        Ok(Self { header, path: path.to_owned(), start: end - body.limit(), end })
    }

    /// The words and their counts, from the first.
    fn records(&self) -> Result<Records, Error> {
        Records::new(self.path.clone(), self.start..self.end, self.header.unique_words)
    }
}

/// Check magic, version and checksum. Returns the number of bytes before the checksum.
fn verify(path: &Path, file: &File) -> Result<u64, Error> {
    let failed = |error| unreadable(path, error);
    let mut start = Vec::new();
    file.take(MAGIC.len() as u64 + 4).read_to_end(&mut start).map_err(failed)?;
    let Some(version) = start.strip_prefix(MAGIC) else {
        return Err(invalid(path, "is not a counts file; pass files that count_words wrote"));
    };
    require_our_version(path, version)?;

    let mut hash = Fnv::default();
    hash.add(&start);
    let mut bytes = start.len() as u64;
    // The last bytes read are held back: they may be the checksum.
    let mut held = Vec::with_capacity(CHECKSUM_BYTES + (64 << 10));
    loop {
        let read = file.take(64 << 10).read_to_end(&mut held).map_err(failed)?;
        let safe = held.len().saturating_sub(CHECKSUM_BYTES);
        hash.add(&held[..safe]);
        bytes += safe as u64;
        held.drain(..safe);
        if read == 0 {
            break;
        }
    }
    if held == hash.0.to_le_bytes() { Ok(bytes) } else { Err(damaged(path)) }
}

fn require_our_version(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let version = u32::from_le_bytes(bytes.try_into().map_err(|_| damaged(path))?);
    let remedy = match version {
        VERSION => return Ok(()),
        0..VERSION => "count its shard again",
        _ => "update rustbpe or count its shard again",
    };
    let reason =
        format!("is a counts file of version {version}, this rustbpe reads version {VERSION}; {remedy}");
    Err(invalid(path, &reason))
}

fn skip_version(input: &mut impl Read) -> io::Result<()> {
    take::<{ MAGIC.len() + 4 }>(input).map(|_| ())
}

fn read_header(input: &mut impl Read) -> io::Result<Header> {
    Ok(Header {
        pattern: take_text(input)?,
        text_column: take_text(input)?,
        input_sha256: take_text(input)?,
        limits: Limits { doc_cap: take_limit(input)?, max_chars: take_limit(input)? },
        totals: Totals {
            rows: take_u64(input)?,
            characters: take_u64(input)?,
            bytes: take_u64(input)?,
            words: take_u64(input)?,
        },
        unique_words: take_u64(input)?,
    })
}

fn take<const N: usize>(input: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn take_u64(input: &mut impl Read) -> io::Result<u64> {
    take(input).map(u64::from_le_bytes)
}

fn take_text(input: &mut impl Read) -> io::Result<String> {
    let length = u32::from_le_bytes(take(input)?);
    let mut text = String::new();
    input.take(length.into()).read_to_string(&mut text)?;
    if text.len() == length as usize { Ok(text) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

fn take_limit(input: &mut impl Read) -> io::Result<Option<u64>> {
    match take(input)? {
        [0] => Ok(None),
        [1] => take_u64(input).map(Some),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// What to say of a file that cannot be read: the system's reason, or that its content makes no sense.
fn unreadable(path: &Path, error: io::Error) -> Error {
    if error.raw_os_error().is_some() {
        Error::Io { path: path.to_owned(), source: error }
    } else {
        damaged(path)
    }
}

fn damaged(path: &Path) -> Error {
    invalid(path, "is torn or damaged; delete it and count its shard again")
}

fn invalid(path: &Path, reason: &str) -> Error {
    Error::Invalid(format!("{}: {reason}", path.display()))
}

/// The 64-bit FNV-1a hash (Fowler, Noll, Vo): finds torn and damaged files, not forged ones.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    fn add(&mut self, bytes: &[u8]) {
        self.0 = bytes
            .iter()
            .fold(self.0, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    }
}

/// Hashes what is written through it.
struct Hashing<W> {
    inner: W,
    hash: Fnv,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.add(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::adding::Sorted;
    use super::*;

    pub fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("rustbpe-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    pub fn header(pattern: &str) -> Header {
        Header {
            pattern: pattern.to_owned(),
            text_column: "text".to_owned(),
            input_sha256: "0".repeat(64),
            limits: Limits { doc_cap: Some(10_000), max_chars: None },
            totals: Totals { rows: 1, characters: 2, bytes: 3, words: 4 },
            unique_words: 0,
        }
    }

    pub fn counts(words: &[(&str, u64)]) -> WordCounts {
        words.iter().copied().collect()
    }

    fn read(path: &Path) -> Vec<(String, u64)> {
        let mut records = CountsFile::open(path).unwrap().records().unwrap();
        let mut words = Vec::new();
        while records.advance().unwrap() {
            words.push((String::from_utf8(records.word().to_vec()).unwrap(), records.count()));
        }
        words
    }

    #[test]
    fn what_is_written_is_read_in_the_order_of_bytes() {
        let path = folder("round-trip").join("a.counts");
        let words = [("", 1), (" the", 1 << 40), (" then", 127), ("z", 128), ("é", u64::MAX)];
        write(&path, &header("p"), &counts(&words)).unwrap();
        let expected: Vec<_> = words.iter().map(|(word, count)| ((*word).to_owned(), *count)).collect();
        assert_eq!(read(&path), expected);
        assert_eq!(CountsFile::open(&path).unwrap().header, Header { unique_words: 5, ..header("p") });
    }

    #[test]
    fn words_of_every_length_come_back() {
        let path = folder("lengths").join("a.counts");
        let words: Vec<String> = [0, 1, 15, 16, 17, 1000, 300_000].map(|length| "é".repeat(length)).into();
        let expected: Vec<(String, u64)> = words.into_iter().zip(1..).collect();
        write(&path, &header("p"), &expected.iter().cloned().collect()).unwrap();
        assert_eq!(read(&path), expected);
    }

    #[test]
    fn words_of_several_frames_come_back() {
        let path = folder("frames").join("a.counts");
        let mut expected: Vec<(String, u64)> =
            (0..3 * FRAME_WORDS + 1).map(|number| (format!("word {number}"), number as u64)).collect();
        write(&path, &header("p"), &expected.iter().cloned().collect()).unwrap();
        expected.sort_unstable();
        assert_eq!(read(&path), expected);
    }

    #[test]
    fn a_file_without_words_is_a_file() {
        let path = folder("no-words").join("a.counts");
        write(&path, &header("p"), &WordCounts::default()).unwrap();
        assert_eq!(read(&path), []);
    }

    #[test]
    fn equal_counts_give_equal_bytes() {
        let folder = folder("equal");
        let words: Vec<(String, u64)> = (0..50_000).map(|i| (format!("word{i}"), i % 300)).collect();
        let forward: WordCounts = words.iter().cloned().collect();
        let backward: WordCounts = words.into_iter().rev().collect();
        write(&folder.join("a"), &header("p"), &forward).unwrap();
        write(&folder.join("b"), &header("p"), &backward).unwrap();
        assert_eq!(fs::read(folder.join("a")).unwrap(), fs::read(folder.join("b")).unwrap());
    }

    #[test]
    fn a_file_torn_anywhere_or_with_any_byte_changed_is_refused() {
        let folder = folder("damage");
        let path = folder.join("a");
        write(&path, &header("p"), &counts(&[("abc", 300), ("abd", 5)])).unwrap();
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(CountsFile::open(&path).is_err(), "cut to {length} bytes");
        }
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x11;
            fs::write(&path, &damaged).unwrap();
            assert!(CountsFile::open(&path).is_err(), "byte {at} changed");
        }
    }

    #[test]
    fn another_version_is_refused_by_number() {
        let path = folder("version").join("a");
        write(&path, &header("p"), &counts(&[("x", 1)])).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        for (version, remedy) in [(1, "; count its shard again"), (9, "; update rustbpe or count")] {
            bytes[8] = version;
            fs::write(&path, &bytes).unwrap();
            let error = CountsFile::open(&path).err().unwrap().to_string();
            assert!(error.contains(&format!("of version {version}")) && error.contains(remedy), "{error}");
        }
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
