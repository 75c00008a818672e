//! The Python module: converts arguments, releases the GIL, and maps errors to exceptions. The work is done in
//! `splitter` and `scanner` (text to chunks), `count` (chunks to counts), `bpe` (counts to merges) and `encoder`.

pub mod bpe;
pub mod count;
pub mod encoder;
pub mod error;
pub mod key;
pub mod scanner;
pub mod splitter;

mod texts;

use std::time::{Duration, Instant};

use pyo3::exceptions::{PyKeyboardInterrupt, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyDict, PyString};

use crate::encoder::{Encoder, Packed, thread_count};
use crate::error::Error;
use crate::splitter::Splitter;
use crate::texts::{Source, Texts};

const DEFAULT_MAX_DIGITS: usize = 3; // GPT-4's, and that of earlier versions of this package
const DEFAULT_MAX_MEMORY: usize = 2_000_000_000; // enough for some nine million English chunks
const BETWEEN_CALLBACKS: Duration = Duration::from_millis(100);

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        match error {
            Error::Split(_) => PyRuntimeError::new_err(error.to_string()),
            Error::Stopped => PyKeyboardInterrupt::new_err(error.to_string()),
            _ => PyValueError::new_err(error.to_string()),
        }
    }
}

/// Byte-pair encoding: train a vocabulary, or take a given one, and encode and decode with it.
#[pyclass(module = "rustbpe")]
struct Tokenizer {
    pattern: String,
    ranks: Vec<(Vec<u8>, u32)>, // in ascending order of rank
    encoder: Encoder,
}

impl Tokenizer {
    fn with_ranks(mut ranks: Vec<(Vec<u8>, u32)>, pattern: String) -> error::Result<Tokenizer> {
        ranks.sort_by_key(|&(_, rank)| rank);
        let encoder = Encoder::new(&ranks, Splitter::new(&pattern)?)?;
        Ok(Tokenizer { pattern, ranks, encoder })
    }
}

#[pymethods]
impl Tokenizer {
    /// A tokenizer whose vocabulary is the 256 bytes.
    #[new]
    fn new() -> PyResult<Tokenizer> {
        let ranks = (0u8..=255).map(|byte| (vec![byte], byte as u32)).collect();
        Ok(Tokenizer::with_ranks(ranks, scanner::family_pattern(DEFAULT_MAX_DIGITS))?)
    }

    /// A tokenizer for given ranks (a dict, or pairs, of bytes and rank) and split pattern.
    #[staticmethod]
    fn from_ranks(ranks: &Bound<'_, PyAny>, pattern: String) -> PyResult<Tokenizer> {
        let items = match ranks.cast::<PyDict>() {
            Ok(dict) => dict.items().into_any(),
            Err(_) => ranks.clone(),
        };
        let pairs = items.try_iter()?.map(|item| {
            let (bytes, rank): (Bound<'_, PyBytes>, u32) = item?.extract()?;
            Ok((bytes.as_bytes().to_vec(), rank))
        });
        Ok(Tokenizer::with_ranks(pairs.collect::<PyResult<_>>()?, pattern)?)
    }

    /// Learn a vocabulary of `vocab_size` tokens from an iterator of str or Arrow string arrays.
    #[pyo3(signature = (iterator, vocab_size, buffer_size = 8192, pattern = None, *, progress = None, num_threads = 0, max_memory = DEFAULT_MAX_MEMORY))]
    #[allow(clippy::too_many_arguments)] // the interface of earlier versions of this package, and three options
    fn train_from_iterator(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: usize,
        buffer_size: usize,
        pattern: Option<String>,
        progress: Option<Py<PyAny>>,
        num_threads: usize,
        max_memory: usize,
    ) -> PyResult<u64> {
        if !(bpe::NUM_BYTES..=bpe::MAX_VOCAB).contains(&vocab_size) {
            return Err(Error::VocabSize(vocab_size).into());
        }
        let pattern = pattern.unwrap_or_else(|| scanner::family_pattern(DEFAULT_MAX_DIGITS));
        let splitter = Splitter::new(&pattern)?;
        let mut source = Source::new(iterator, buffer_size)?;
        let num_merges = vocab_size - bpe::NUM_BYTES;
        let progress = Progress::new(progress);
        let (trained, dropped) = py.detach(|| {
            let mut counted = progress.stage("count", None);
            let counts = count::count_chunks(&splitter, thread_count(num_threads), max_memory, || {
                let batch = Python::attach(|py| source.next_batch(py))?;
                counted.report(source.bytes_read(), batch.is_none())?;
                Ok::<_, PyErr>(batch)
            })?;
            let dropped = counts.dropped();
            let mut merged = progress.stage("merge", Some(num_merges));
            let mut failure = None;
            let merges = bpe::learn_merges(counts, num_merges, |done| {
                failure = merged.report(done, false).err();
                failure.is_none()
            });
            if let Some(error) = failure {
                return Err(error);
            }
            let merges = merges?;
            merged.report(merges.len(), true)?;
            let ranks = bpe::token_bytes(&merges).into_iter().zip(0..).collect();
            Ok::<_, PyErr>((Tokenizer::with_ranks(ranks, pattern)?, dropped))
        })?;
        *self = trained;
        Ok(dropped)
    }

    /// The vocabulary as a list of (bytes, rank), in order of rank.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        self.ranks.iter().map(|(bytes, rank)| (PyBytes::new(py, bytes), *rank)).collect()
    }

    /// The split pattern.
    fn get_pattern(&self) -> &str {
        &self.pattern
    }

    /// Number of tokens.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.ranks.len()
    }

    /// Ids of `text`.
    fn encode(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        Ok(py.detach(|| self.encoder.encode(text))?)
    }

    /// Ids of each of `texts`, a list per text.
    #[pyo3(signature = (texts, num_threads = 0))]
    fn batch_encode(&self, py: Python<'_>, texts: &Bound<'_, PyAny>, num_threads: usize) -> PyResult<Vec<Vec<u32>>> {
        let packed = self.encode_all(py, texts, num_threads)?;
        let starts = std::iter::once(&0).chain(&packed.ends);
        Ok(starts.zip(&packed.ends).map(|(&start, &end)| packed.tokens[start..end].to_vec()).collect())
    }

    /// Ids of all `texts` end to end as the bytes of uint32, and where each text starts as the bytes of int64.
    #[pyo3(signature = (texts, num_threads = 0))]
    fn encode_packed<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        num_threads: usize,
    ) -> PyResult<(Bound<'py, PyByteArray>, Bound<'py, PyByteArray>)> {
        let packed = self.encode_all(py, texts, num_threads)?;
        let tokens = PyByteArray::new_with(py, 4 * packed.tokens.len(), |buffer| {
            for (bytes, token) in buffer.chunks_exact_mut(4).zip(&packed.tokens) {
                bytes.copy_from_slice(&token.to_ne_bytes());
            }
            Ok(())
        })?;
        let offsets = PyByteArray::new_with(py, 8 * (packed.ends.len() + 1), |buffer| {
            let offsets = std::iter::once(&0).chain(&packed.ends);
            for (bytes, &offset) in buffer.chunks_exact_mut(8).zip(offsets) {
                bytes.copy_from_slice(&(offset as i64).to_ne_bytes());
            }
            Ok(())
        })?;
        Ok((tokens, offsets))
    }

    /// The text that `ids` stand for; `errors` says what to do where it is not UTF-8, as in `bytes.decode`.
    #[pyo3(signature = (ids, errors = "strict"))]
    fn decode<'py>(&self, py: Python<'py>, ids: Vec<u32>, errors: &str) -> PyResult<Bound<'py, PyAny>> {
        self.decode_bytes(py, ids)?.call_method1("decode", ("utf-8", errors))
    }

    /// The bytes that `ids` stand for.
    fn decode_bytes<'py>(&self, py: Python<'py>, ids: Vec<u32>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.encoder.decode(&ids)?))
    }

    /// The chunks of `text`; with `use_regex`, found by the regex engine whatever the pattern.
    #[pyo3(signature = (text, *, use_regex = false))]
    fn split<'py>(&self, py: Python<'py>, text: &str, use_regex: bool) -> PyResult<Vec<Bound<'py, PyString>>> {
        let chunks = match use_regex {
            true => Splitter::regex(&self.pattern)?.chunks(text)?,
            false => self.encoder.splitter().chunks(text)?,
        };
        Ok(chunks.into_iter().map(|(start, end)| PyString::new(py, &text[start..end])).collect())
    }

    /// Index of the first of `texts` that the regex engine splits otherwise than `split` does; None if there is none.
    fn first_split_difference(&self, py: Python<'_>, texts: &Bound<'_, PyAny>) -> PyResult<Option<usize>> {
        let texts = Texts::new(texts)?;
        let texts = texts.as_strs();
        let regex = Splitter::regex(&self.pattern)?;
        py.detach(|| {
            for (i, text) in texts.iter().enumerate() {
                if self.encoder.splitter().chunks(text)? != regex.chunks(text)? {
                    return Ok(Some(i));
                }
            }
            Ok(None)
        })
    }

    fn __repr__(&self) -> String {
        format!("Tokenizer(vocab_size={}, pattern={:?})", self.ranks.len(), self.pattern)
    }
}

impl Tokenizer {
    fn encode_all(&self, py: Python<'_>, texts: &Bound<'_, PyAny>, num_threads: usize) -> PyResult<Packed> {
        let texts = Texts::new(texts)?;
        let texts = texts.as_strs();
        Ok(py.detach(|| self.encoder.encode_batch(&texts, num_threads))?)
    }
}

/// The caller's progress callback, if any.
struct Progress {
    callback: Option<Py<PyAny>>,
}

/// One stage of the work, reported as `callback(stage, done, total)` and no more often than is useful.
struct Stage<'a> {
    callback: &'a Option<Py<PyAny>>,
    name: &'static str,
    total: Option<usize>,
    last: Instant,
}

impl Progress {
    fn new(callback: Option<Py<PyAny>>) -> Progress {
        Progress { callback }
    }

    fn stage(&self, name: &'static str, total: Option<usize>) -> Stage<'_> {
        Stage { callback: &self.callback, name, total, last: Instant::now() }
    }
}

impl Stage<'_> {
    /// Report, if it is time or the stage has `ended`; returns the error of the callback or of a signal handler.
    fn report(&mut self, done: usize, ended: bool) -> PyResult<()> {
        if !ended && self.last.elapsed() < BETWEEN_CALLBACKS {
            return Ok(());
        }
        self.last = Instant::now();
        Python::attach(|py| {
            py.check_signals()?;
            if let Some(callback) = self.callback {
                callback.call1(py, (self.name, done, self.total))?;
            }
            Ok(())
        })
    }
}

/// GPT-4's split pattern, with groups of at most `max_digits` digits. Patterns of this family are scanned by hand.
#[pyfunction]
#[pyo3(signature = (max_digits = DEFAULT_MAX_DIGITS))]
fn split_pattern(max_digits: usize) -> PyResult<String> {
    match max_digits {
        1..=scanner::MAX_DIGITS => Ok(scanner::family_pattern(max_digits)),
        _ => {
            Err(PyValueError::new_err(format!("max_digits is {max_digits}, but must be 1 to {}", scanner::MAX_DIGITS)))
        }
    }
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(split_pattern, module)?)?;
    module.add_class::<Tokenizer>()
}
