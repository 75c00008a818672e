//! Documents as Python hands them over: str objects, or Arrow string arrays by their buffers.
//!
//! An Arrow array is recognised by its `buffers()` method (a chunked one by `chunks`), as pyarrow has it, and read
//! through the buffer protocol: one copy of the text, no Python object per document.

use std::collections::VecDeque;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyIterator, PyMemoryView, PySlice, PyString};

use crate::count::Batch;
use crate::error::Error;

const BATCH_BYTES: usize = 1 << 20; // a few milliseconds of work for a thread

/// An iterator of documents, read in batches.
pub struct Source {
    iterator: Py<PyIterator>,
    buffer_size: usize,
    ready: VecDeque<Batch>, // of an array larger than a batch
    documents_read: usize,
    bytes_read: usize,
}

impl Source {
    /// Reads from `iterator`, at most `buffer_size` str documents a batch.
    pub fn new(iterator: &Bound<'_, PyAny>, buffer_size: usize) -> PyResult<Source> {
        if iterator.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("expected an iterator of documents, got a single str"));
        }
        Ok(Source {
            iterator: iterator.try_iter()?.unbind(),
            buffer_size: buffer_size.max(1),
            ready: VecDeque::new(),
            documents_read: 0,
            bytes_read: 0,
        })
    }

    /// Bytes of all batches so far.
    pub fn bytes_read(&self) -> usize {
        self.bytes_read
    }

    /// The next batch; None at the end. Errors are those of the iterator, unchanged, or of a document.
    pub fn next_batch(&mut self, py: Python<'_>) -> PyResult<Option<Batch>> {
        py.check_signals()?;
        let mut batch = self.ready.pop_front().unwrap_or_default();
        while self.ready.is_empty() && batch.text.len() < BATCH_BYTES && batch.ends.len() < self.buffer_size {
            let Some(item) = self.iterator.bind(py).clone().next() else {
                break;
            };
            let item = item?;
            if let Ok(document) = item.cast::<PyString>() {
                let text = document.to_str().map_err(|error| self.in_document(py, error))?;
                batch.push(text);
                self.documents_read += 1;
            } else {
                let batches = arrow_batches(&item, BATCH_BYTES).map_err(|error| self.in_document(py, error))?;
                self.documents_read += batches.iter().map(|batch| batch.ends.len()).sum::<usize>();
                self.ready.extend(batches);
                if batch.ends.is_empty() {
                    batch = self.ready.pop_front().unwrap_or_default();
                }
            }
        }
        self.bytes_read += batch.text.len();
        Ok((!batch.ends.is_empty()).then_some(batch))
    }

    /// `error` with a note that says where it happened.
    fn in_document(&self, py: Python<'_>, error: PyErr) -> PyErr {
        let note = format!("while reading document {} (counted from 0)", self.documents_read);
        match error.value(py).call_method1("add_note", (note,)) {
            Ok(_) => error,
            Err(other) => other,
        }
    }
}

/// Texts to encode, held while the GIL is released.
pub enum Texts {
    Strings(Vec<PyBackedStr>),
    Arrow(Vec<Batch>),
}

impl Texts {
    /// From an iterable of str, or an Arrow string array.
    pub fn new(texts: &Bound<'_, PyAny>) -> PyResult<Texts> {
        if texts.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("expected a list of str, got a single str"));
        }
        if texts.hasattr("buffers")? || texts.hasattr("chunks")? {
            return Ok(Texts::Arrow(arrow_batches(texts, usize::MAX)?));
        }
        let strings = texts.try_iter()?.map(|item| item?.extract::<PyBackedStr>());
        Ok(Texts::Strings(strings.collect::<PyResult<_>>()?))
    }

    pub fn as_strs(&self) -> Vec<&str> {
        match self {
            Texts::Strings(strings) => strings.iter().map(|text| &**text).collect(),
            Texts::Arrow(batches) => batches.iter().flat_map(Batch::documents).collect(),
        }
    }
}

/// The documents of an Arrow array in batches of about `batch_bytes`.
fn arrow_batches(array: &Bound<'_, PyAny>, batch_bytes: usize) -> PyResult<Vec<Batch>> {
    if let Ok(chunks) = array.getattr("chunks") {
        let mut batches = Vec::new();
        for chunk in chunks.try_iter()? {
            batches.extend(arrow_batches(&chunk?, batch_bytes)?);
        }
        return Ok(batches);
    }
    let Ok(buffers) = array.call_method0("buffers") else {
        let kind = array.get_type().name()?;
        return Err(PyTypeError::new_err(format!("expected str or an Arrow string array, got {kind}")));
    };
    let offset_bytes = match array.getattr("type")?.str()?.to_str()? {
        "string" => 4,
        "large_string" => 8,
        kind => return Err(PyTypeError::new_err(format!("expected an Arrow array of string, got one of {kind}"))),
    };
    if array.getattr("null_count")?.extract::<usize>()? > 0 {
        return Err(PyValueError::new_err("the Arrow array holds nulls: drop or fill them first"));
    }
    let len = array.len()?;
    if len == 0 {
        return Ok(Vec::new());
    }
    let first: usize = array.getattr("offset")?.extract()?;
    let offsets = copy_bytes(&buffers.get_item(1)?, first * offset_bytes, (first + len + 1) * offset_bytes)?;
    let offsets: Vec<usize> = offsets.chunks_exact(offset_bytes).map(read_offset).collect();
    batches_between(&offsets, &buffers.get_item(2)?, batch_bytes)
}

/// Batches of the documents that lie in `data` between neighbouring `offsets`.
fn batches_between(offsets: &[usize], data: &Bound<'_, PyAny>, batch_bytes: usize) -> PyResult<Vec<Batch>> {
    let mut batches = Vec::new();
    let (mut first, last) = (0, offsets.len() - 1);
    while first < last {
        let start = offsets[first];
        let mut end = first + 1;
        while end < last && offsets[end] - start < batch_bytes {
            end += 1;
        }
        let ends: Vec<usize> = offsets[first + 1..=end].iter().map(|offset| offset - start).collect();
        let bytes = if offsets[end] > start { copy_bytes(data, start, offsets[end])? } else { Vec::new() };
        let text = String::from_utf8(bytes).map_err(|error| {
            let byte = error.utf8_error().valid_up_to();
            Error::NotUtf8 { document: ends.partition_point(|&end| end <= byte), byte }
        })?;
        if let Some(document) = ends.iter().position(|&end| !text.is_char_boundary(end)) {
            return Err(Error::NotUtf8 { document, byte: ends[document] }.into());
        }
        batches.push(Batch { text, ends });
        first = end;
    }
    Ok(batches)
}

fn read_offset(bytes: &[u8]) -> usize {
    match bytes {
        [a, b, c, d] => u32::from_ne_bytes([*a, *b, *c, *d]) as usize,
        _ => bytes.try_into().map_or(0, u64::from_ne_bytes) as usize,
    }
}

/// A copy of the bytes from `start` to `end` of an object with the buffer protocol.
fn copy_bytes(buffer: &Bound<'_, PyAny>, start: usize, end: usize) -> PyResult<Vec<u8>> {
    let py = buffer.py();
    let slice = PySlice::new(py, start as isize, end as isize, 1);
    let bytes = PyMemoryView::from(buffer)?.call_method1("cast", ("B",))?; // pyarrow's buffers are of signed bytes
    PyBuffer::<u8>::get(&bytes.get_item(slice)?)?.to_vec(py)
}
