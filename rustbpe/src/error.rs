//! Everything that can go wrong, as one enum; `lib.rs` maps it to Python exceptions in one place.

use std::fmt;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// A vocabulary that cannot hold the 256 bytes, or more tokens than ids can number.
    VocabSize(usize),
    /// The split pattern does not compile.
    Pattern { pattern: String, reason: String },
    /// The regex engine gave up on a text.
    Split(String),
    /// More distinct text than 32-bit positions can address.
    TooMuchText(usize),
    /// A table of ranks that no encoder can be built from.
    Ranks(String),
    /// An id outside the vocabulary.
    UnknownToken(u32),
    /// A document that is not UTF-8 (from an Arrow buffer; Python's own strings are checked by Python).
    NotUtf8 { document: usize, byte: usize },
    /// The progress callback asked to stop.
    Stopped,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::VocabSize(size) => {
                write!(
                    f,
                    "vocab_size is {size}, but must be from 256 (one token per byte) to {}",
                    crate::bpe::MAX_VOCAB
                )
            }
            Error::Pattern { pattern, reason } => write!(f, "split pattern {pattern:?} is not valid: {reason}"),
            Error::Split(reason) => write!(f, "the split pattern failed on a text: {reason}"),
            Error::TooMuchText(bytes) => {
                write!(f, "the distinct chunks hold {bytes} bytes, more than the {} supported", crate::bpe::MAX_SYMBOLS)
            }
            Error::Ranks(reason) => write!(f, "these ranks are no vocabulary: {reason}"),
            Error::UnknownToken(id) => write!(f, "token id {id} is not in the vocabulary"),
            Error::NotUtf8 { document, byte } => write!(f, "document {document} is not UTF-8 at byte {byte}"),
            Error::Stopped => write!(f, "stopped"),
        }
    }
}

impl std::error::Error for Error {}

pub type Result<T> = std::result::Result<T, Error>;
