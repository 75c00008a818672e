//! Cutting text into chunks, within which pairs are merged: the scanner where the pattern is of its family, a regex
//! engine for any other. Both give the chunks that `find_iter` of the pattern gives; text it skips belongs to none.

use fancy_regex::{Regex, RegexBuilder};

use crate::error::{Error, Result};
use crate::scanner::Scanner;

#[derive(Clone)]
pub enum Splitter {
    Scanner(Scanner),
    Regex(Box<Regex>),
}

impl Splitter {
    /// The fastest way to split by `pattern`.
    pub fn new(pattern: &str) -> Result<Splitter> {
        match Scanner::for_pattern(pattern) {
            Some(scanner) => Ok(Splitter::Scanner(scanner)),
            None => Splitter::regex(pattern),
        }
    }

    /// The regex engine, whatever the pattern.
    pub fn regex(pattern: &str) -> Result<Splitter> {
        RegexBuilder::new(pattern)
            .backtrack_limit(usize::MAX) // a long run of white space is legitimate input
            .build()
            .map(|regex| Splitter::Regex(Box::new(regex)))
            .map_err(|error| Error::Pattern { pattern: pattern.to_owned(), reason: error.to_string() })
    }

    /// Call `visit(start, end)` for each chunk of `text` in order; chunks are never empty.
    #[inline(always)]
    pub fn for_each_chunk(&self, text: &str, mut visit: impl FnMut(usize, usize)) -> Result<()> {
        match self {
            Splitter::Scanner(scanner) => {
                let mut start = 0;
                while start < text.len() {
                    let end = scanner.chunk_end(text, start);
                    visit(start, end);
                    start = end;
                }
            }
            Splitter::Regex(regex) => {
                for found in regex.find_iter(text) {
                    let found = found.map_err(|error| Error::Split(error.to_string()))?;
                    if found.start() < found.end() {
                        visit(found.start(), found.end());
                    }
                }
            }
        }
        Ok(())
    }

    /// The chunks of `text` as byte ranges.
    pub fn chunks(&self, text: &str) -> Result<Vec<(usize, usize)>> {
        let mut chunks = Vec::new();
        self.for_each_chunk(text, |start, end| chunks.push((start, end)))?;
        Ok(chunks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scanner::family_pattern;

    fn split<'t>(splitter: &Splitter, text: &'t str) -> Vec<&'t str> {
        splitter.chunks(text).unwrap().into_iter().map(|(start, end)| &text[start..end]).collect()
    }

    fn both(max_digits: usize) -> (Splitter, Splitter) {
        let pattern = family_pattern(max_digits);
        let scanner = Splitter::new(&pattern).unwrap();
        assert!(matches!(scanner, Splitter::Scanner(_)));
        (scanner, Splitter::regex(&pattern).unwrap())
    }

    #[test]
    fn chunks_are_those_worked_out_by_hand() {
        let (scanner, _) = both(2);
        let text = "I'll pay $12345, don't\n\n  worry?!\r\n x";
        let expected =
            ["I", "'ll", " pay", " $", "12", "34", "5", ",", " don", "'t", "\n\n", " ", " worry", "?!\r\n", " x"];
        assert_eq!(split(&scanner, text), expected);
        assert_eq!(split(&scanner, "a  \n \t"), ["a", "  \n", " \t"]);
    }

    #[test]
    fn every_character_is_classed_as_the_regex_does() {
        let (scanner, regex) = both(2);
        for c in '\0'..=char::MAX {
            let text = format!("a{c}{c}b '{c} {c}1{c}");
            assert_eq!(scanner.chunks(&text), regex.chunks(&text), "{:?}", text);
        }
    }

    #[test]
    fn all_short_strings_over_the_classes_are_split_as_the_regex_does() {
        let alphabet = ['a', 'L', 's', '1', '²', ' ', '\u{a0}', '\n', '\r', '\'', '.', 'ſ', 'é', '\u{301}', '😀'];
        for max_digits in [1, 2, 3] {
            let (scanner, regex) = both(max_digits);
            let mut texts = vec![String::new()];
            for _ in 0..4 {
                texts = texts.iter().flat_map(|t| alphabet.iter().map(move |c| format!("{t}{c}"))).collect();
                for text in &texts {
                    assert_eq!(scanner.chunks(text), regex.chunks(text), "{text:?}");
                }
            }
        }
    }

    #[test]
    fn chunks_of_the_scanner_cover_the_text() {
        let (scanner, _) = both(2);
        let text = "  Ça va?\u{2028}\u{2028}x１２３ 😀😀\n";
        assert_eq!(split(&scanner, text).concat(), text);
    }

    #[test]
    fn only_the_exact_pattern_gets_the_scanner() {
        assert!(Scanner::for_pattern(&family_pattern(1)).is_some());
        assert!(Scanner::for_pattern(&family_pattern(0)).is_none());
        assert!(Scanner::for_pattern(&family_pattern(2).replace("{1,2}", "{1,02}")).is_none());
        assert!(Scanner::for_pattern(r"\w+").is_none());
    }

    #[test]
    fn a_broken_pattern_is_an_error() {
        assert!(matches!(Splitter::new("("), Err(Error::Pattern { .. })));
    }

    #[test]
    fn matches_of_nothing_are_no_chunks() {
        assert_eq!(split(&Splitter::new("a*").unwrap(), "baab"), ["aa"]);
    }

    #[test]
    fn ten_megabytes_of_one_class_are_one_chunk() {
        let (scanner, _) = both(2);
        for unit in ["a", " ", "!", "\n", "é"] {
            let text = unit.repeat(10_000_000 / unit.len());
            assert_eq!(scanner.chunks(&text).unwrap(), [(0, text.len())]);
        }
    }

    #[test]
    fn what_exceeds_the_regex_engines_stack_is_an_error() {
        let (_, regex) = both(2);
        assert!(matches!(regex.chunks(&" ".repeat(2_000_000)), Err(Error::Split(_))));
    }
}
