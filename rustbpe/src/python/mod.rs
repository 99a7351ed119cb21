//! The Python module `rustbpe._rustbpe`. Python's lock is released while text is counted, merges are
//! learned or words encoded, and Ctrl-C is looked for in between.

mod encoding;

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyOSError, PyUserWarning, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyDict, PyString};
use rayon::BroadcastContext;

use crate::Error;
use crate::count::arrow::{self, Fault, Offsets};
use crate::count::{Counter, Counts, Limits, Totals};
use crate::counts_file::{self, CountsFile, Header};
use crate::encode::{Encoders, SpecialTokens, Vocabulary};
use crate::merge::{self, Ties};
use crate::split::GPT4_PATTERN;

/// How long Ctrl-C may go unnoticed while counts are added up or merges learned.
const SIGNAL_CHECK: Duration = Duration::from_millis(100);

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        match error {
            Error::Invalid(message) => PyValueError::new_err(message),
            Error::Io { path, source } => {
                // With number, text and file name Python picks the subclass, e.g. FileNotFoundError.
                let reason = source.to_string();
                PyOSError::new_err((source.raw_os_error(), reason, path))
            }
        }
    }
}

/// A byte-level BPE tokenizer: ids 0-255 are the bytes, then come the merges in the order learned.
#[pyclass(module = "rustbpe")]
struct Tokenizer {
    pattern: Option<String>,
    vocabulary: Arc<Vocabulary>,
    encoders: Encoders,
    special: SpecialTokens,
}

impl Default for Tokenizer {
    fn default() -> Self {
        let vocabulary = Arc::new(Vocabulary::default());
        let encoders = Encoders::new(Arc::clone(&vocabulary), GPT4_PATTERN);
        Self { pattern: None, vocabulary, encoders, special: SpecialTokens::default() }
    }
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Learn vocab_size - 256 merges from the strings of an iterable.
    #[pyo3(signature = (iterator, vocab_size, pattern=None, buffer_size=8192, *, ties="smallest-id", progress=None))]
    #[allow(clippy::too_many_arguments)] // the signature that people know
    fn train_from_iterator(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        pattern: Option<String>,
        buffer_size: usize,
        ties: &str,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let learning = Learning::new(vocab_size, ties, progress)?;
        let pattern = pattern.unwrap_or_else(|| GPT4_PATTERN.to_owned());
        let counter = Counter::new(&pattern, Limits::default())?;
        let mut documents = iterator.try_iter()?;
        let mut number = 0;
        loop {
            let mut buffer = Vec::new();
            for document in documents.by_ref().take(buffer_size.max(1)) {
                number += 1;
                buffer.push(text_of(&document?, number)?);
            }
            if buffer.is_empty() {
                break;
            }
            py.detach(|| counter.add(&buffer))?;
            py.check_signals()?;
        }
        let (counts, _) = py.detach(|| counter.finish());
        self.learn(py, pattern, &counts, learning)
    }

    /// Learn vocab_size - 256 merges from a text column of parquet files.
    ///
    /// doc_cap: characters of a document that are looked at. max_chars: characters in all, over the
    /// files in order; the document that crosses it is cut there.
    #[pyo3(signature = (
        parquet_paths, vocab_size, pattern=None, text_column="text", doc_cap=None, max_chars=None,
        *, ties="smallest-id", progress=None
    ))]
    #[allow(clippy::too_many_arguments)] // the signature that people know
    fn train_from_parquet_files(
        &mut self,
        py: Python<'_>,
        parquet_paths: Vec<PathBuf>,
        vocab_size: i64,
        pattern: Option<String>,
        text_column: &str,
        doc_cap: Option<i64>,
        max_chars: Option<i64>,
        ties: &str,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let learning = Learning::new(vocab_size, ties, progress)?;
        if parquet_paths.is_empty() {
            return Err(PyValueError::new_err("no parquet files were given to train on"));
        }
        let pattern = pattern.unwrap_or_else(|| GPT4_PATTERN.to_owned());
        let counter = Counter::new(&pattern, limits(doc_cap, max_chars)?)?;
        for (path, number) in parquet_paths.iter().zip(1..) {
            let more = count_parquet(py, path, text_column, &counter)?;
            learning.tell(py, "count", number, parquet_paths.len())?;
            if !more {
                break;
            }
        }
        let (counts, _) = py.detach(|| counter.finish());
        self.learn(py, pattern, &counts, learning)
    }

    /// Learn vocab_size - 256 merges from counts files. Their order makes no difference.
    ///
    /// min_count: words that occur less often, over all files, are left out. Returns how many different
    /// words are left.
    #[pyo3(signature = (paths, vocab_size, *, min_count=None, ties="smallest-id", progress=None))]
    fn train_from_counts(
        &mut self,
        py: Python<'_>,
        paths: Vec<PathBuf>,
        vocab_size: i64,
        min_count: Option<i64>,
        ties: &str,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<usize> {
        let learning = Learning::new(vocab_size, ties, progress)?;
        let min_count = at_least_one("min_count", min_count, "floor")?.unwrap_or(1);
        let (pattern, counts) = interruptible(py, |stop| counts_file::add_up(&paths, min_count, stop))?;
        self.learn(py, pattern, &counts, learning)?;
        Ok(counts.words())
    }

    /// Every token's bytes with its id, in id order.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        let tokens = self.vocabulary.tokens().iter();
        let ids = tokens.zip(0..).filter(|(token, _)| !token.is_empty());
        ids.map(|(token, id)| (PyBytes::new(py, token), id)).collect()
    }

    /// The split pattern.
    fn get_pattern(&self) -> &str {
        self.pattern.as_deref().unwrap_or(GPT4_PATTERN)
    }

    /// 256 and the merges learned; special tokens are not counted.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.vocabulary.tokens().iter().filter(|token| !token.is_empty()).count()
    }
}

impl Tokenizer {
    fn learn(
        &mut self,
        py: Python<'_>,
        pattern: String,
        counts: &(impl Counts + Sync),
        learning: Learning,
    ) -> PyResult<()> {
        if counts.words() == 0 {
            return Err(PyValueError::new_err(
                "there is no text to train on: every document is empty, or the pattern matches nowhere",
            ));
        }
        let merges = learning.merges;
        let vocabulary = py.detach(|| {
            let mut last = Instant::now();
            let check = |done| {
                if last.elapsed() < SIGNAL_CHECK {
                    return Ok::<(), PyErr>(());
                }
                last = Instant::now();
                Python::attach(|py| {
                    py.check_signals()?;
                    learning.tell(py, "merge", done, merges)
                })
            };
            let learned = merge::learn_with(counts, merges, check, learning.ties)?;
            Python::attach(|py| learning.tell(py, "merge", learned.len(), merges))?;
            Ok::<_, PyErr>(Vocabulary::from_merges(&learned))
        })?;
        let learned = vocabulary.tokens().len() - 256;
        self.vocabulary = Arc::new(vocabulary);
        self.encoders = Encoders::new(Arc::clone(&self.vocabulary), &pattern);
        self.special = SpecialTokens::default();
        self.pattern = Some(pattern);
        if learned < merges {
            let message = format!(
                "the text has only {learned} pairs to merge, {merges} were asked for: the vocabulary has {} \
                 tokens; train on more text or ask for fewer",
                256 + learned
            );
            let message = CString::new(message).expect("the message has no zero byte");
            PyErr::warn(py, &py.get_type::<PyUserWarning>(), &message, 1)?;
        }
        Ok(())
    }
}

/// What a training is asked for, whatever it learns from.
struct Learning {
    merges: usize,
    ties: Ties,
    progress: Option<Py<PyAny>>,
}

impl Learning {
    fn new(vocab_size: i64, ties: &str, progress: Option<Py<PyAny>>) -> PyResult<Self> {
        let ties = match ties {
            "smallest-id" => Ties::SmallestId,
            "huggingface" => Ties::HuggingFace,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "ties must be 'smallest-id' or 'huggingface', got '{ties}'"
                )));
            }
        };
        Ok(Self { merges: merges_of(vocab_size)?, ties, progress })
    }

    /// Call `progress(phase, done, of)`; what it raises ends the training.
    fn tell(&self, py: Python<'_>, phase: &str, done: usize, of: usize) -> PyResult<()> {
        match &self.progress {
            Some(progress) => progress.call1(py, (phase, done, of)).map(drop),
            None => Ok(()),
        }
    }
}

/// Count the words of a shard into a counts file, and return its totals.
#[pyfunction]
#[pyo3(signature = (parquet_path, counts_path, pattern=None, *, text_column="text", doc_cap=None, max_chars=None))]
fn count_words<'py>(
    py: Python<'py>,
    parquet_path: PathBuf,
    counts_path: PathBuf,
    pattern: Option<String>,
    text_column: &str,
    doc_cap: Option<i64>,
    max_chars: Option<i64>,
) -> PyResult<Bound<'py, PyDict>> {
    let pattern = pattern.unwrap_or_else(|| GPT4_PATTERN.to_owned());
    let limits = limits(doc_cap, max_chars)?;
    let counter = Counter::new(&pattern, limits)?;
    let digest = reading(py)?.call_method1("start_digest", (&parquet_path,))?;
    count_parquet(py, &parquet_path, text_column, &counter)?;
    let input_sha256 = digest.call_method0("result")?.extract()?;
    let header = py.detach(|| {
        let (counts, totals) = counter.finish();
        if totals.words == 0 {
            return Err(Error::Invalid(format!(
                "{}: has no words to count ({} rows, {} characters); fetch or write it again",
                parquet_path.display(),
                totals.rows,
                totals.characters
            )));
        }
        let header = Header {
            pattern,
            text_column: text_column.to_owned(),
            input_sha256,
            limits,
            totals,
            unique_words: counts.len() as u64,
        };
        counts_file::write(&counts_path, &header, &counts)?;
        Ok(header)
    })?;
    describe(py, &header)
}

/// How a counts file was made, and its totals.
#[pyfunction]
fn counts_info<'py>(py: Python<'py>, counts_path: PathBuf) -> PyResult<Bound<'py, PyDict>> {
    let file = py.detach(|| CountsFile::open(&counts_path))?;
    describe(py, &file.header)
}

fn describe<'py>(py: Python<'py>, header: &Header) -> PyResult<Bound<'py, PyDict>> {
    let Totals { rows, characters, bytes, words } = header.totals;
    let result = PyDict::new(py);
    result.set_item("pattern", &header.pattern)?;
    result.set_item("text_column", &header.text_column)?;
    result.set_item("doc_cap", header.limits.doc_cap)?;
    result.set_item("max_chars", header.limits.max_chars)?;
    result.set_item("input_sha256", &header.input_sha256)?;
    result.set_item("rows", rows)?;
    result.set_item("characters", characters)?;
    result.set_item("bytes", bytes)?;
    result.set_item("words", words)?;
    result.set_item("unique_words", header.unique_words)?;
    Ok(result)
}

fn merges_of(vocab_size: i64) -> PyResult<usize> {
    let merges = vocab_size.checked_sub(256).and_then(|merges| u32::try_from(merges).ok());
    merges.map(|merges| merges as usize).ok_or_else(|| {
        PyValueError::new_err(format!(
            "vocab_size must be from 256 (the bytes alone) to 2^32 - 1, got {vocab_size}"
        ))
    })
}

fn limits(doc_cap: Option<i64>, max_chars: Option<i64>) -> PyResult<Limits> {
    Ok(Limits {
        doc_cap: at_least_one("doc_cap", doc_cap, "cap")?,
        max_chars: at_least_one("max_chars", max_chars, "cap")?,
    })
}

fn at_least_one(name: &str, value: Option<i64>, what: &str) -> PyResult<Option<u64>> {
    match value {
        Some(value) if value < 1 => Err(PyValueError::new_err(format!(
            "{name} must be at least 1, or None for no {what}; got {value}"
        ))),
        value => Ok(value.map(|value| value as u64)),
    }
}

/// Run `work` on a thread of its own while this one looks for Ctrl-C, which sets the flag that `work` is
/// given to stop by.
fn interruptible<T: Send, E: Send>(
    py: Python<'_>,
    work: impl FnOnce(&AtomicBool) -> Result<T, E> + Send,
) -> PyResult<T>
where
    PyErr: From<E>,
{
    let stop = AtomicBool::new(false);
    let (sender, mut receiver) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            // Nobody listens any more after Ctrl-C.
            let _ = sender.send(work(&stop));
        });
        loop {
            let receiver = &mut receiver;
            match py.detach(move || receiver.recv_timeout(SIGNAL_CHECK)) {
                Ok(result) => return Ok(result?),
                Err(RecvTimeoutError::Disconnected) => unreachable!("the work sends its result"),
                Err(RecvTimeoutError::Timeout) => {
                    py.check_signals().inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
                }
            }
        }
    })
}

fn text_of(document: &Bound<'_, PyAny>, number: usize) -> PyResult<PyBackedStr> {
    let text = document.cast::<PyString>().map_err(|_| {
        let kind = document.get_type();
        PyValueError::new_err(format!("document {number} of the iterator is not a string but {kind}"))
    })?;
    text.clone().try_into().map_err(|_: PyErr| {
        PyValueError::new_err(format!(
            "document {number} of the iterator is not valid Unicode (it holds half of a surrogate pair)"
        ))
    })
}

/// The Python file that reads parquet through pyarrow.
fn reading(py: Python<'_>) -> PyResult<Bound<'_, PyModule>> {
    py.import("rustbpe.parquet")
}

/// What `rustbpe.parquet` gives of a batch: offsets, text, whether offsets have 64 bits, first offset, rows,
/// rows of the file before it.
type Batch = (PyBuffer<i8>, Option<PyBuffer<i8>>, bool, usize, usize, usize);

/// Count a text column of a parquet file. Returns whether the limits leave room for more.
///
/// Every thread reads row groups of its own and counts what it has read. Where the order matters, or no
/// row groups are left, threads read in turns.
fn count_parquet(py: Python<'_>, path: &Path, column: &str, counter: &Counter) -> PyResult<bool> {
    let most = if counter.needs_order() { 1 } else { rayon::current_num_threads() };
    let readers: Vec<Py<PyAny>> = reading(py)?.call_method1("readers", (path, column, most))?.extract()?;
    let readers: Vec<_> = readers.into_iter().map(Mutex::new).collect();
    interruptible(py, |stop| {
        let work = |thread: BroadcastContext<'_>| {
            let own = thread.index() % readers.len();
            let (others, first) = readers.split_at(own);
            let mut readers = first.iter().chain(others);
            let counted = readers.try_for_each(|reader| count_batches(path, reader, counter, stop));
            counted.inspect_err(|_| stop.store(true, Ordering::Relaxed))
        };
        rayon::broadcast(work).into_iter().collect::<PyResult<()>>()
    })?;
    Ok(counter.has_room())
}

/// Count batches of a reader until it has no more.
fn count_batches(
    path: &Path,
    reader: &Mutex<Py<PyAny>>,
    counter: &Counter,
    stop: &AtomicBool,
) -> PyResult<()> {
    loop {
        let turn = reader.lock().expect("no thread has panicked");
        if stop.load(Ordering::Relaxed) || !counter.has_room() {
            break;
        }
        let batch = Python::attach(|py| -> PyResult<Option<Batch>> {
            let batch = turn.bind(py).try_iter()?.next().transpose()?;
            batch.map(|batch| batch.extract()).transpose()
        });
        let Some((offsets, text, wide, start, rows, rows_before)) = batch? else { break };
        let width = if wide { Offsets::Wide } else { Offsets::Narrow };
        let (offsets, text) = (bytes_of(&offsets), text.as_ref().map_or(&[][..], bytes_of));
        let documents = arrow::documents(width, offsets, text, start, rows)
            .map_err(|fault| not_text(path, rows_before, fault))?;
        let documents = counter.clip(&documents);
        drop(turn);
        counter.count(&documents)?;
    }
    Ok(())
}

fn not_text(path: &Path, rows_before: usize, fault: Fault) -> Error {
    let (row, what) = match fault {
        Fault::Offsets => (rows_before, "cannot be found in its batch"),
        Fault::Document(number) => (rows_before + number, "is not valid UTF-8"),
    };
    Error::Invalid(format!(
        "{}: row {row} (from 0) {what}; write the file again with text only",
        path.display()
    ))
}

/// The bytes of an Arrow buffer.
fn bytes_of(buffer: &PyBuffer<i8>) -> &[u8] {
    if buffer.len_bytes() == 0 {
        return &[]; // its pointer may be null
    }
    // SAFETY: the buffer is held for as long as the slice lives. It belongs to an Arrow array, so it is
    // contiguous and nobody writes to it any more.
    unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast(), buffer.len_bytes()) }
}

#[pymodule]
fn _rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("GPT4_PATTERN", GPT4_PATTERN)?;
    module.add("COUNTS_VERSION", counts_file::VERSION)?;
    module.add_class::<Tokenizer>()?;
    module.add_function(wrap_pyfunction!(count_words, module)?)?;
    module.add_function(wrap_pyfunction!(counts_info, module)?)?;
    Ok(())
}
