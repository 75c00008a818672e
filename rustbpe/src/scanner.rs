//! Hand-written scanner for the GPT-4 family of split patterns.
//!
//! The family is the pattern string of [`family_pattern`], whose only parameter is the longest group of digits. At
//! any position exactly one alternative of the pattern decides, by the classes of a few characters ahead; so a chunk
//! is found in one pass without backtracking, at the speed of a table lookup per character. The alternatives are:
//!
//! 1. an apostrophe with one of the contractions s d m t ll ve re (any case; `ſ` counts as s);
//! 2. letters, after at most one character that is neither letter, digit nor line break;
//! 3. one to `max_digits` numerals;
//! 4. punctuation (all that is neither white space, letter nor numeral) after at most one blank, with the line breaks
//!    that follow;
//! 5. white space up to the last line break of its run;
//! 6. white space without its last character, or all of it at the end of the text;
//! 7. white space.
//!
//! Classes of characters come from `regex-syntax`, which the regex engine itself uses: a flat table of one byte per
//! code point (1.1 MB, of which text touches a few cache lines), built at first use.

use std::sync::OnceLock;

use regex_syntax::hir::{Class as HirClass, HirKind};

/// What the pattern distinguishes. Space is white space other than line breaks and the blank (U+0020).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Class {
    Other,
    Letter,
    Number,
    Space,
    Blank,
    Newline,
    End,
}

const HEAD: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,";
const TAIL: &str = r"}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
pub const MAX_DIGITS: usize = 99; // far beyond use; keeps the regex of every member of the family compilable

/// GPT-4's split pattern with groups of at most `max_digits` digits (GPT-4 itself: 3).
pub fn family_pattern(max_digits: usize) -> String {
    format!("{HEAD}{max_digits}{TAIL}")
}

/// Splits as the pattern `family_pattern(max_digits)` does.
#[derive(Clone)]
pub struct Scanner {
    classes: &'static [Class],
    max_digits: usize,
}

impl Scanner {
    /// The scanner for `pattern`, if it is a member of the family.
    pub fn for_pattern(pattern: &str) -> Option<Scanner> {
        let max_digits = pattern.strip_prefix(HEAD)?.strip_suffix(TAIL)?.parse().ok()?;
        ((1..=MAX_DIGITS).contains(&max_digits) && family_pattern(max_digits) == pattern)
            .then(|| Scanner { classes: classes(), max_digits })
    }

    /// End of the chunk that starts at byte `start` of `text`; `start` is a character boundary before the end.
    #[inline(always)]
    pub fn chunk_end(&self, text: &str, start: usize) -> usize {
        let bytes = text.as_bytes();
        let (class, next) = self.class_at(bytes, start);
        match class {
            Class::Letter => self.skip(bytes, next, Class::Letter),
            Class::Number => self.digits_end(bytes, next),
            Class::Newline => self.space_end(bytes, start),
            _ => self.prefixed_end(bytes, start, class, next),
        }
    }

    /// End of a chunk whose first character, of `class` and ending at `next`, may be a prefix of what follows.
    #[inline(always)]
    fn prefixed_end(&self, bytes: &[u8], start: usize, class: Class, next: usize) -> usize {
        if bytes[start] == b'\'' {
            if let Some(end) = contraction_end(bytes, next) {
                return end;
            }
        }
        let (second, after) = self.class_at(bytes, next);
        if second == Class::Letter {
            return self.skip(bytes, after, Class::Letter);
        }
        if class == Class::Other {
            return self.punctuation_end(bytes, next);
        }
        if class == Class::Blank && second == Class::Other {
            return self.punctuation_end(bytes, after);
        }
        self.space_end(bytes, start)
    }

    /// End of a run of punctuation that reaches at least to `at`, with the line breaks after it.
    #[inline]
    fn punctuation_end(&self, bytes: &[u8], at: usize) -> usize {
        let mut end = self.skip(bytes, at, Class::Other);
        while matches!(bytes.get(end), Some(b'\r' | b'\n')) {
            end += 1;
        }
        end
    }

    /// End of a group of numerals whose first ends at `at`.
    #[inline]
    fn digits_end(&self, bytes: &[u8], mut at: usize) -> usize {
        for _ in 1..self.max_digits {
            match self.class_at(bytes, at) {
                (Class::Number, next) => at = next,
                _ => break,
            }
        }
        at
    }

    /// End of a chunk of white space: alternatives 5 to 7.
    #[inline]
    fn space_end(&self, bytes: &[u8], start: usize) -> usize {
        let (mut at, mut last_start, mut after_newline) = (start, start, None);
        loop {
            let (class, next) = self.class_at(bytes, at);
            match class {
                Class::Newline => after_newline = Some(next),
                Class::Blank | Class::Space => {}
                _ => break,
            }
            (last_start, at) = (at, next);
        }
        if let Some(end) = after_newline {
            end
        } else if at == bytes.len() || last_start == start {
            at
        } else {
            last_start // the last one is left as a prefix for what follows
        }
    }

    /// First position from `at` on where a character is not of `class`.
    #[inline(always)]
    fn skip(&self, bytes: &[u8], mut at: usize, class: Class) -> usize {
        loop {
            let (found, next) = self.class_at(bytes, at);
            if found != class {
                return at;
            }
            at = next;
        }
    }

    /// Class of the character at byte `at` and the position after it.
    #[inline(always)]
    fn class_at(&self, bytes: &[u8], at: usize) -> (Class, usize) {
        match bytes.get(at) {
            Some(&byte) if byte < 0x80 => (ASCII[byte as usize], at + 1),
            Some(_) => {
                let (code, next) = decode(bytes, at);
                (self.classes[code], next)
            }
            None => (Class::End, at),
        }
    }
}

/// Code point of the multi-byte character at `at` of valid UTF-8, and the position after it.
#[inline]
fn decode(bytes: &[u8], at: usize) -> (usize, usize) {
    let byte = |i: usize| bytes[at + i] as usize;
    let low = |i: usize| byte(i) & 0x3f;
    match byte(0) {
        ..0xe0 => ((byte(0) & 0x1f) << 6 | low(1), at + 2),
        0xe0..0xf0 => ((byte(0) & 0x0f) << 12 | low(1) << 6 | low(2), at + 3),
        _ => ((byte(0) & 0x07) << 18 | low(1) << 12 | low(2) << 6 | low(3), at + 4),
    }
}

/// End of the contraction that starts at `at`, right after an apostrophe.
#[inline]
fn contraction_end(bytes: &[u8], at: usize) -> Option<usize> {
    let lower = |i: usize| bytes.get(at + i).map(|byte| byte.to_ascii_lowercase());
    match (lower(0)?, lower(1)) {
        (b's' | b'd' | b'm' | b't', _) => Some(at + 1),
        (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) => Some(at + 2),
        (0xc5, Some(0xbf)) => Some(at + 2), // U+017F, long s: the only other character that folds to one of these
        _ => None,
    }
}

const fn ascii_classes() -> [Class; 128] {
    let mut table = [Class::Other; 128];
    let mut byte = 0;
    while byte < 128 {
        table[byte] = match byte as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => Class::Letter,
            b'0'..=b'9' => Class::Number,
            b'\r' | b'\n' => Class::Newline,
            b' ' => Class::Blank,
            b'\t' | 0x0b | 0x0c => Class::Space,
            _ => Class::Other,
        };
        byte += 1;
    }
    table
}

static ASCII: [Class; 128] = ascii_classes();

/// Class of every code point, by the regex engine's own tables.
fn classes() -> &'static [Class] {
    static TABLE: OnceLock<Vec<Class>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table = vec![Class::Other; 0x11_0000];
        for (pattern, class) in [(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\s", Class::Space)] {
            for (first, last) in ranges(pattern) {
                table[first..=last].fill(class);
            }
        }
        table[..128].copy_from_slice(&ASCII);
        table
    })
}

/// Ranges of code points that the one-class `pattern` matches.
fn ranges(pattern: &str) -> Vec<(usize, usize)> {
    let hir = regex_syntax::parse(pattern).expect("a constant pattern of one Unicode class");
    match hir.kind() {
        HirKind::Class(HirClass::Unicode(class)) => {
            class.iter().map(|range| (range.start() as usize, range.end() as usize)).collect()
        }
        kind => unreachable!("{pattern} parsed to {kind:?}"),
    }
}
