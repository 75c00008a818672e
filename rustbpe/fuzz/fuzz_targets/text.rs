//! Any text: scanner and regex cut it alike, and encoding with a vocabulary learnt from it comes back.
//!
//! Run with `cargo +nightly fuzz run text`.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rustbpe::bpe::{learn_merges, token_bytes};
use rustbpe::count::ChunkCounts;
use rustbpe::encoder::Encoder;
use rustbpe::error::Result;
use rustbpe::scanner::family_pattern;
use rustbpe::splitter::Splitter;

/// One of each kind of character the pattern tells apart, or that has been got wrong somewhere.
const ALPHABET: [char; 32] = [
    'a', 'L', 's', 'T', 'v', 'e', 'r', 'é', 'ſ', '中', 'ʰ', '1', '9', '²', '٣', '𝟘', ' ', ' ', '\n', '\r', '\t',
    '\u{a0}', '\u{2028}', '\u{85}', '\'', '\'', '’', '.', '-', '\u{301}', '😀', '\0',
];

/// Scanner and regex engine for groups of at most one, two and three digits.
static SPLITTERS: LazyLock<Vec<(Splitter, Splitter)>> = LazyLock::new(|| {
    let both = |pattern: String| Ok((Splitter::new(&pattern)?, Splitter::regex(&pattern)?));
    (1..=3).map(family_pattern).map(both).collect::<Result<_>>().expect("valid patterns")
});

fuzz_target!(|data: &[u8]| {
    // Bytes below 128 pick from the alphabet; a text with others is taken as it is.
    let text: String = match data.is_ascii() {
        true => data.iter().map(|&byte| ALPHABET[byte as usize % ALPHABET.len()]).collect(),
        false => String::from_utf8_lossy(data).into_owned(),
    };
    for (scanner, regex) in &*SPLITTERS {
        assert_eq!(scanner.chunks(&text), regex.chunks(&text));
    }
    let (scanner, _) = &SPLITTERS[1];
    let mut counts = ChunkCounts::default();
    counts.add_text(scanner, &text).expect("the scanner never fails");
    let merges = learn_merges(counts, 50, |_| true).expect("the text is small");
    let ranks: Vec<(Vec<u8>, u32)> = token_bytes(&merges).into_iter().zip(0..).collect();
    let encoder = Encoder::new(&ranks, scanner.clone()).expect("tokens learnt are distinct");
    let ids = encoder.encode(&text).expect("the scanner never fails");
    assert_eq!(encoder.decode(&ids).expect("ids just encoded"), text.as_bytes());
});
