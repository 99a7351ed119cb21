//! Encoding, decoding, special tokens and the formats of others, for Python.

use std::collections::BTreeMap;
use std::iter;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use pyo3::buffer::{Element, PyBuffer, PyUntypedBuffer};
use pyo3::exceptions::{PyTypeError, PyUnicodeEncodeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::sync::PyOnceLock;
use pyo3::types::{IntoPyDict, PyBytes, PyDict, PyInt, PyList, PyString, PyType};

use super::Tokenizer;
use crate::Error;
use crate::encode::{Encoders, SpecialTokens, Vocabulary};
use crate::split::GPT4_PATTERN;

/// Bytes of text that are encoded between two looks for Ctrl-C.
const WAVE_BYTES: usize = 1 << 25;

/// Python's numbers below this are made once and kept (2 MiB).
const SHARED_NUMBERS: u32 = 1 << 16;

/// What a buffer's format begins with where its numbers have the byte order of other machines.
const FOREIGN_ORDER: &[char] = if cfg!(target_endian = "little") { &['>', '!'] } else { &['<'] };

#[pymethods]
impl Tokenizer {
    /// A tokenizer with a vocabulary that is there already: pairs of bytes and id, or a dict of them.
    #[staticmethod]
    #[pyo3(signature = (ranks, pattern=None, special_tokens=None))]
    fn from_ranks(
        py: Python<'_>,
        ranks: &Bound<'_, PyAny>,
        pattern: Option<&str>,
        special_tokens: Option<BTreeMap<String, u32>>,
    ) -> PyResult<Self> {
        let pairs = if ranks.hasattr("items")? { ranks.call_method0("items")? } else { ranks.clone() };
        let ranks =
            pairs.try_iter()?.map(|pair| pair?.extract()).collect::<PyResult<Vec<(Vec<u8>, u32)>>>()?;
        let pattern = pattern.unwrap_or(GPT4_PATTERN);
        let tokenizer = py.detach(|| {
            let vocabulary = Arc::new(Vocabulary::from_ranks(ranks)?);
            let encoders = Encoders::new(Arc::clone(&vocabulary), pattern);
            encoders.with(|_| Ok(()))?; // the pattern is looked at here, not when something is encoded
            Ok::<_, Error>(Self {
                pattern: Some(pattern.to_owned()),
                vocabulary,
                encoders,
                special: SpecialTokens::default(),
            })
        })?;
        tokenizer.with_special_tokens(special_tokens.unwrap_or_default())
    }

    /// A tokenizer from a .tiktoken file: a token in base64 and its id in each line.
    #[classmethod]
    #[pyo3(signature = (path, pattern, special_tokens=None))]
    fn from_tiktoken<'py>(
        class: &Bound<'py, PyType>,
        path: PathBuf,
        pattern: &str,
        special_tokens: Option<BTreeMap<String, u32>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        interchange(class.py())?.call_method1("from_tiktoken", (path, pattern, special_tokens))
    }

    /// Write the vocabulary as a .tiktoken file, which has no place for pattern and special tokens.
    fn to_tiktoken(slf: &Bound<'_, Self>, path: PathBuf) -> PyResult<()> {
        interchange(slf.py())?.call_method1("to_tiktoken", (slf, path)).map(|_| ())
    }

    /// A tokenizer from Hugging Face's tokenizer.json.
    #[classmethod]
    fn from_huggingface<'py>(class: &Bound<'py, PyType>, path: PathBuf) -> PyResult<Bound<'py, PyAny>> {
        interchange(class.py())?.call_method1("from_huggingface", (path,))
    }

    /// Write everything as Hugging Face's tokenizer.json.
    fn to_huggingface(slf: &Bound<'_, Self>, path: PathBuf) -> PyResult<()> {
        interchange(slf.py())?.call_method1("to_huggingface", (slf, path)).map(|_| ())
    }

    /// (left, right, joined): the ids that each token is joined from, by the joined id.
    fn get_merges(&self, py: Python<'_>) -> Vec<(u32, u32, u32)> {
        py.detach(|| self.vocabulary.merges())
    }

    /// Names and ids of the tokens outside the vocabulary.
    #[getter]
    fn special_tokens<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.special.iter().into_py_dict(py)
    }

    #[setter]
    fn set_special_tokens(&mut self, tokens: BTreeMap<String, u32>) -> PyResult<()> {
        self.special = SpecialTokens::new(tokens.into_iter().collect(), &self.vocabulary)?;
        Ok(())
    }

    /// The ids of a text. The names in allowed_special ("all": every one) are their tokens.
    #[pyo3(signature = (text, allowed_special=None))]
    fn encode(
        &self,
        py: Python<'_>,
        text: &Bound<'_, PyString>,
        allowed_special: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<u32>> {
        let allowed = self.allowed(allowed_special)?;
        let text = unicode(text)?;
        let ids = py.detach(|| {
            self.encoders.with(|encoder| {
                let mut ids = Vec::new();
                encoder.encode_with_special(&text, &allowed, &mut ids)?;
                Ok(ids)
            })
        })?;
        Ok(ids)
    }

    /// The ids of each text, on several threads.
    #[pyo3(signature = (texts, *, threads=None))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyList>> {
        let mut texts = texts_of(texts)?.peekable();
        let threads = threads_of(threads)?;
        let lists = PyList::empty(py);
        while texts.peek().is_some() {
            for ids in self.encoders.each(wave(&mut texts), threads, |work| py.detach(work))? {
                lists.append(list_of(py, &ids)?)?;
            }
            py.check_signals()?;
        }
        Ok(lists)
    }

    /// Write the ids of a text or of several, one after another, into a buffer. Returns how many.
    #[pyo3(signature = (texts, out, *, bos=None, threads=None))]
    fn encode_into(
        &self,
        py: Python<'_>,
        texts: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        bos: Option<u32>,
        threads: Option<usize>,
    ) -> PyResult<usize> {
        let out = IdBuffer::of(out)?;
        self.require_room_for_ids(&out, bos)?;
        let parts = self.encode_joined(py, texts, bos, threads)?;
        out.write(&parts)
    }

    /// The ids of a text or of several, one after another, as a numpy array.
    #[pyo3(signature = (texts, dtype="uint32", *, bos=None, threads=None))]
    fn encode_to_numpy<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        dtype: &str,
        bos: Option<u32>,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyAny>> {
        if !["uint16", "uint32"].contains(&dtype) {
            return Err(PyValueError::new_err(format!(
                "dtype must be \"uint16\" or \"uint32\", got {dtype:?}"
            )));
        }
        let empty = |count: usize| py.import("numpy")?.call_method1("empty", (count, dtype));
        self.require_room_for_ids(&IdBuffer::of(&empty(0)?)?, bos)?;
        let parts = self.encode_joined(py, texts, bos, threads)?;
        let array = empty(parts.iter().map(Vec::len).sum())?;
        IdBuffer::of(&array)?.write(&parts)?;
        Ok(array)
    }

    /// The text of ids. errors is that of bytes.decode: tokens may end inside a character.
    #[pyo3(signature = (ids, errors="replace"))]
    fn decode<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        errors: &str,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.decode_bytes(py, ids)?.call_method1("decode", ("utf-8", errors))
    }

    /// The bytes of ids; a special token gives its name.
    fn decode_bytes<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let mut bytes = Vec::new();
        for id in ids.try_iter()? {
            let id = id?;
            let token = match id.extract::<u32>() {
                Ok(known) => {
                    self.vocabulary.token(known).or_else(|| self.special.name(known).map(str::as_bytes))
                }
                Err(error) if error.is_instance_of::<PyTypeError>(py) => return Err(error),
                Err(_) => None, // no number of 32 bits
            };
            let Some(token) = token else {
                return Err(PyValueError::new_err(format!(
                    "token id {id} is neither in the vocabulary of {} tokens nor a special token",
                    self.vocab_size()
                )));
            };
            bytes.extend_from_slice(token);
        }
        Ok(PyBytes::new(py, &bytes))
    }
}

impl Tokenizer {
    fn with_special_tokens(mut self, tokens: BTreeMap<String, u32>) -> PyResult<Self> {
        self.set_special_tokens(tokens)?;
        Ok(self)
    }

    fn allowed(&self, names: Option<&Bound<'_, PyAny>>) -> PyResult<Vec<(&str, u32)>> {
        let Some(names) = names else {
            return Ok(Vec::new());
        };
        if let Ok(word) = names.cast::<PyString>() {
            if word == "all" {
                return Ok(self.special.iter().collect());
            }
            return Err(PyValueError::new_err(format!(
                "allowed_special must be \"all\" or a set of names, got {}",
                word.repr()?
            )));
        }
        let mut allowed = Vec::new();
        for name in names.try_iter()? {
            let name: PyBackedStr = name?.extract()?;
            match self.special.iter().find(|(known, _)| **known == *name) {
                Some(token) => allowed.push(token),
                None => {
                    let known: Vec<&str> = self.special.iter().map(|(known, _)| known).collect();
                    return Err(PyValueError::new_err(format!(
                        "{:?} is no special token; there are {known:?}",
                        &*name
                    )));
                }
            }
        }
        Ok(allowed)
    }

    /// One text or several.
    fn encode_joined(
        &self,
        py: Python<'_>,
        texts: &Bound<'_, PyAny>,
        bos: Option<u32>,
        threads: Option<usize>,
    ) -> PyResult<Vec<Vec<u32>>> {
        let texts: Box<dyn Iterator<Item = _>> = match texts.cast::<PyString>() {
            Ok(text) => Box::new(iter::once(unicode(text))),
            Err(_) => Box::new(texts_of(texts)?),
        };
        let mut texts = texts.peekable();
        let threads = threads_of(threads)?;
        let mut parts = Vec::new();
        while texts.peek().is_some() {
            parts.extend(self.encoders.joined(wave(&mut texts), bos, threads, |work| py.detach(work))?);
            py.check_signals()?;
        }
        Ok(parts)
    }

    fn require_room_for_ids(&self, out: &IdBuffer, bos: Option<u32>) -> PyResult<()> {
        let highest = (self.vocabulary.tokens().len() as u32 - 1).max(bos.unwrap_or(0));
        if matches!(out, IdBuffer::Bits16(_)) && highest > u32::from(u16::MAX) {
            return Err(PyValueError::new_err(format!(
                "16 bits hold ids up to 65535, but ids go up to {highest}: use uint32"
            )));
        }
        Ok(())
    }
}

/// A buffer that ids are written into.
enum IdBuffer {
    Bits16(PyBuffer<u16>),
    Bits32(PyBuffer<u32>),
}

impl IdBuffer {
    fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let unfit = |problem: String| {
            PyTypeError::new_err(format!(
                "ids are written into a writable, contiguous buffer of uint16 or uint32, not into {problem}"
            ))
        };
        let buffer = PyUntypedBuffer::get(object).map_err(|_| unfit(object.get_type().to_string()))?;
        if buffer.readonly() {
            return Err(unfit("one that is read-only".to_owned()));
        }
        if !buffer.is_c_contiguous() {
            return Err(unfit("one with gaps".to_owned()));
        }
        let format = buffer.format().to_string_lossy().into_owned();
        // pyo3 0.30 takes numbers in the other byte order for its own.
        if format.starts_with(FOREIGN_ORDER) {
            Err(unfit(format!("one of the format {format:?}")))
        } else if buffer.as_typed::<u16>().is_ok() {
            Ok(Self::Bits16(buffer.into_typed()?))
        } else if buffer.as_typed::<u32>().is_ok() {
            Ok(Self::Bits32(buffer.into_typed()?))
        } else {
            Err(unfit(format!("one of the format {format:?}")))
        }
    }

    /// Write all ids or, where the buffer is too short, none.
    fn write(&self, parts: &[Vec<u32>]) -> PyResult<usize> {
        match self {
            Self::Bits16(buffer) => fill(buffer, parts, |id| id as u16),
            Self::Bits32(buffer) => fill(buffer, parts, |id| id),
        }
    }
}

fn fill<T: Element>(buffer: &PyBuffer<T>, parts: &[Vec<u32>], as_item: impl Fn(u32) -> T) -> PyResult<usize> {
    let room = buffer.item_count();
    let count = parts.iter().map(Vec::len).sum();
    if room < count {
        return Err(PyValueError::new_err(format!(
            "the buffer has room for {room} ids, the texts have {count}: {} too few; nothing was written",
            count - room
        )));
    }
    if let Some(items) = buffer.as_slice_ptr() {
        let mut start = 0;
        for part in parts {
            for (at, id) in part.iter().enumerate() {
                // SAFETY: the buffer is writable and contiguous (`IdBuffer::of`), and Python keeps it in
                // place while `buffer` is held; `start + at` is below `count`, which it has room for. No
                // reference to its items is made, so it does not matter who else looks at them.
                unsafe { items.cast::<T>().add(start + at).write(as_item(*id)) };
            }
            start += part.len();
        }
    }
    Ok(count)
}

/// A list of ids. It shares the numbers with all other such lists: making one anew costs more than
/// encoding what it stands for.
fn list_of<'py>(py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
    static NUMBERS: PyOnceLock<Vec<Py<PyInt>>> = PyOnceLock::new();
    let number = |id: u32| {
        let Ok(number) = id.into_pyobject(py);
        number
    };
    let shared = NUMBERS.get_or_init(py, || (0..SHARED_NUMBERS).map(|id| number(id).unbind()).collect());
    PyList::new(
        py,
        ids.iter().map(|id| match shared.get(*id as usize) {
            Some(shared) => shared.bind(py).clone(),
            None => number(*id),
        }),
    )
}

/// The Python file that reads and writes the formats of others.
fn interchange(py: Python<'_>) -> PyResult<Bound<'_, PyModule>> {
    py.import("rustbpe.interchange")
}

fn threads_of(threads: Option<usize>) -> PyResult<usize> {
    match threads {
        Some(0) => Err(PyValueError::new_err("threads must be at least 1, or None for one a processor")),
        Some(threads) => Ok(threads),
        None => Ok(thread::available_parallelism().map_or(1, usize::from)),
    }
}

fn texts_of<'py>(
    texts: &Bound<'py, PyAny>,
) -> PyResult<impl Iterator<Item = PyResult<PyBackedStr>> + use<'py>> {
    if texts.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err("texts must be several strings, not one"));
    }
    let text_of = |(number, text): (usize, PyResult<Bound<'_, PyAny>>)| {
        let text = text?;
        let text = text.cast::<PyString>().map_err(|_| {
            PyTypeError::new_err(format!("text {number} (from 0) is not a string but {}", text.get_type()))
        })?;
        unicode(text)
    };
    Ok(texts.try_iter()?.enumerate().map(text_of))
}

/// A string as UTF-8. Half a surrogate pair, which has no UTF-8, becomes U+FFFD, as tiktoken has it.
fn unicode(text: &Bound<'_, PyString>) -> PyResult<PyBackedStr> {
    match text.clone().try_into() {
        Err(error) if PyErr::is_instance_of::<PyUnicodeEncodeError>(&error, text.py()) => {
            let utf16 = text.call_method1("encode", ("utf-16", "surrogatepass"))?;
            utf16.call_method1("decode", ("utf-16", "replace"))?.extract()
        }
        other => other,
    }
}

/// The next texts, WAVE_BYTES together or one that is longer.
fn wave(
    texts: &mut impl Iterator<Item = PyResult<PyBackedStr>>,
) -> impl Iterator<Item = PyResult<PyBackedStr>> {
    let mut bytes = 0;
    iter::from_fn(move || {
        let text = if bytes < WAVE_BYTES { texts.next() } else { None };
        bytes += text.as_ref().and_then(|text| text.as_ref().ok()).map_or(0, |text| text.len());
        text
    })
}
