//! Learning the merges of byte-pair encoding, exactly.
//!
//! The vocabulary starts as the 256 bytes. Again and again the pair of adjacent tokens that occurs most often over
//! all chunks (overlapping occurrences counted: `aaa` holds `a a` twice) becomes a new token, and every occurrence is
//! replaced, from left to right. **Ties go to the pair with the smaller left id, then the smaller right id.**
//!
//! Data structures, for `S` bytes of distinct chunks:
//!
//! - All chunks lie in one array of `u32`, one slot per byte, with a mark between chunks. A token that spans several
//!   slots writes its id into the first and, flagged, into the last; so both neighbours are found in one step
//!   (the right one by the token's length, the left one in the slot before), without links, also in chunks of
//!   megabytes. The slot where the right half of a merge began is emptied, so that no stale position matches.
//! - Chunks are sorted by count. The count at a position is then that of one of few runs, found through a small
//!   index instead of a number per slot.
//! - A map from pair to its count and where it occurs: a stretch of one shared, append-only array of positions.
//!   Positions are not removed when an occurrence disappears, but checked when they are used; they are in ascending
//!   order, and no pair ever lists one twice.
//! - A heap of (count, pair), refreshed lazily: **counts of pairs without the newest token only fall**, so a count
//!   taken from the heap is either current, and then the largest, or goes back in with its current value.
//!
//! A merge touches each of its occurrences once and the map once per distinct neighbour. Over a whole training at
//! most `S` occurrences are merged, each adding at most two positions: time and memory are linear in `S`, but for
//! the heap's logarithm.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

use crate::count::ChunkCounts;
use crate::error::{Error, Result};

/// Number of tokens that stand for one byte each, with the byte as id.
pub const NUM_BYTES: usize = 256;
/// Largest vocabulary: ids must stay clear of the flag.
pub const MAX_VOCAB: usize = 1 << 30;
/// Most slots, for positions of 32 bits.
pub const MAX_SYMBOLS: usize = u32::MAX as usize;

const LAST: u32 = 1 << 31; // flags the last slot of a token of several bytes
const EMPTY: u32 = u32::MAX - 1; // a slot inside a token
const BOUNDARY: u32 = u32::MAX; // between chunks
const BLOCK_BITS: u32 = 8; // one entry of the run index serves 256 slots

/// A pair as one integer: its order is that of (left id, right id).
fn pair_key(left: u32, right: u32) -> u64 {
    (left as u64) << 32 | right as u64
}

/// Hash of pair keys: one multiplication, its better half moved down to where the map looks.
#[derive(Default)]
pub struct PairHasher(u64);

impl Hasher for PairHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(self.0 ^ byte as u64);
        }
    }

    fn write_u64(&mut self, key: u64) {
        let mixed = (key ^ key >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ mixed >> 29;
    }
}

struct Pair {
    count: i64,
    start: usize, // its positions are `positions[start..start + len]`
    len: u32,
}

/// Distinct chunks of two bytes or more with their counts, as one array of slots.
struct Words {
    slots: Vec<u32>,
    runs: Vec<(u32, i64)>, // (first slot after the run, count of each of its chunks)
    run_of_block: Vec<u32>,
}

impl Words {
    fn new(counts: ChunkCounts) -> Result<Words> {
        let num_slots = counts.distinct_bytes() + counts.len() + 1;
        if num_slots > MAX_SYMBOLS {
            return Err(Error::TooMuchText(counts.distinct_bytes()));
        }
        let mut words = Words { slots: Vec::with_capacity(num_slots), runs: Vec::new(), run_of_block: Vec::new() };
        words.slots.push(BOUNDARY);
        counts.visit_ascending(|chunk, count| {
            if chunk.len() > 1 {
                words.push(count, chunk);
            }
        });
        words.index_runs();
        Ok(words)
    }

    fn push(&mut self, count: u64, chunk: &[u8]) {
        self.slots.extend(chunk.iter().map(|&byte| byte as u32));
        self.slots.push(BOUNDARY);
        let (end, count) = (self.slots.len() as u32, count as i64);
        match self.runs.last_mut() {
            Some(run) if run.1 == count => run.0 = end,
            _ => self.runs.push((end, count)),
        }
    }

    fn index_runs(&mut self) {
        let mut run = 0;
        for block in 0..=(self.slots.len() >> BLOCK_BITS) {
            while run + 1 < self.runs.len() && self.runs[run].0 as usize <= block << BLOCK_BITS {
                run += 1;
            }
            self.run_of_block.push(run as u32);
        }
    }

    /// Count of the chunk that holds slot `at`.
    fn count_at(&self, at: usize) -> i64 {
        let mut run = self.run_of_block[at >> BLOCK_BITS] as usize;
        while self.runs[run].0 as usize <= at {
            run += 1;
        }
        self.runs[run].1
    }
}

/// What one merge does to the pairs on one side of its occurrences, by neighbour.
#[derive(Default)]
struct Side {
    by_neighbour: Vec<Change>,
    touched: Vec<u32>,            // neighbours with a change
    occurrences: Vec<(u32, u32)>, // (neighbour, position of the pair it now forms with the new token)
}

#[derive(Default, Clone, Copy)]
struct Change {
    lost: i64,   // count taken from the pair of the neighbour and the merged token
    gained: i64, // count of the pair of the neighbour and the new token
    len: u32,    // positions of that pair
    next: usize, // where the next of them goes
    touched: bool,
}

impl Side {
    fn change(&mut self, neighbour: u32) -> &mut Change {
        let change = &mut self.by_neighbour[neighbour as usize];
        if !change.touched {
            change.touched = true;
            self.touched.push(neighbour);
        }
        change
    }

    /// A pair with `neighbour` is replaced by one with the new token, at `position`, `count` times.
    fn replace(&mut self, neighbour: u32, position: u32, count: i64) {
        let change = self.change(neighbour);
        change.lost += count;
        self.gain(neighbour, position, count);
    }

    fn gain(&mut self, neighbour: u32, position: u32, count: i64) {
        let change = self.change(neighbour);
        change.gained += count;
        change.len += 1;
        self.occurrences.push((neighbour, position));
    }
}

/// The state of a training.
struct Learner {
    words: Words,
    widths: Vec<u32>, // bytes of each token
    pairs: HashMap<u64, Pair, BuildHasherDefault<PairHasher>>,
    positions: Vec<u32>,
    heap: BinaryHeap<(i64, Reverse<u64>)>,
    left: Side,
    right: Side,
}

/// Learn at most `num_merges` merges from chunk counts; fewer when no pair is left.
///
/// Returns the pairs merged: the `i`-th makes token `256 + i`. `tick(done)` is called before each merge and stops the
/// training with [`Error::Stopped`] by returning false.
pub fn learn_merges(
    counts: ChunkCounts,
    num_merges: usize,
    mut tick: impl FnMut(usize) -> bool,
) -> Result<Vec<(u32, u32)>> {
    let mut learner = Learner::new(Words::new(counts)?);
    let mut merges = Vec::new();
    while merges.len() < num_merges {
        if !tick(merges.len()) {
            return Err(Error::Stopped);
        }
        match learner.most_frequent_pair() {
            Some(pair) => merges.push(pair),
            None => break,
        }
        learner.merge(merges[merges.len() - 1]);
    }
    Ok(merges)
}

/// The bytes of every token, by id, for the merges learnt.
pub fn token_bytes(merges: &[(u32, u32)]) -> Vec<Vec<u8>> {
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    for &(left, right) in merges {
        tokens.push([&tokens[left as usize][..], &tokens[right as usize][..]].concat());
    }
    tokens
}

impl Learner {
    fn new(words: Words) -> Learner {
        let mut learner = Learner {
            words,
            widths: vec![1; NUM_BYTES],
            pairs: HashMap::default(),
            positions: Vec::new(),
            heap: BinaryHeap::new(),
            left: Side { by_neighbour: vec![Change::default(); NUM_BYTES], ..Side::default() },
            right: Side { by_neighbour: vec![Change::default(); NUM_BYTES], ..Side::default() },
        };
        learner.find_byte_pairs();
        learner
    }

    /// Fill the map with the pairs of bytes: one pass to count, one to place the positions.
    fn find_byte_pairs(&mut self) {
        let index = |pair: &[u32]| (pair[0] as usize) << 8 | pair[1] as usize;
        let in_chunk = |pair: &&[u32]| pair[0] != BOUNDARY && pair[1] != BOUNDARY;
        let mut lens = vec![0usize; NUM_BYTES * NUM_BYTES];
        for pair in self.words.slots.windows(2).filter(in_chunk) {
            lens[index(pair)] += 1;
        }
        let mut next = Vec::with_capacity(lens.len());
        let mut total = 0;
        for len in &lens {
            next.push(total);
            total += len;
        }
        self.positions = vec![0; total];
        let mut counts = vec![0i64; lens.len()];
        for (at, pair) in self.words.slots.windows(2).enumerate() {
            if in_chunk(&pair) {
                let index = index(pair);
                self.positions[next[index]] = at as u32;
                next[index] += 1;
                counts[index] += self.words.count_at(at);
            }
        }
        for (index, &count) in counts.iter().enumerate().filter(|&(_, &count)| count > 0) {
            let key = pair_key((index >> 8) as u32, (index & 0xff) as u32);
            let (start, len) = (next[index] - lens[index], lens[index] as u32);
            self.pairs.insert(key, Pair { count, start, len });
            self.heap.push((count, Reverse(key)));
        }
    }

    /// The next pair to merge.
    fn most_frequent_pair(&mut self) -> Option<(u32, u32)> {
        while let Some((count, Reverse(key))) = self.heap.pop() {
            match self.pairs.get(&key) {
                Some(pair) if pair.count == count => return Some(((key >> 32) as u32, key as u32)),
                Some(pair) => self.heap.push((pair.count, Reverse(key))),
                None => {}
            }
        }
        None
    }

    /// Replace every occurrence of the pair `(a, b)` by a new token.
    fn merge(&mut self, (a, b): (u32, u32)) {
        let Some(pair) = self.pairs.remove(&pair_key(a, b)) else {
            return;
        };
        let (a_width, b_width) = (self.widths[a as usize] as usize, self.widths[b as usize] as usize);
        let new = self.widths.len() as u32;
        self.widths.push((a_width + b_width) as u32);
        self.left.by_neighbour.push(Change::default());
        self.right.by_neighbour.push(Change::default());

        for &position in &self.positions[pair.start..pair.start + pair.len as usize] {
            let first = position as usize;
            let middle = first + a_width;
            if self.words.slots[first] != a || self.words.slots[middle] != b {
                continue; // gone since it was listed
            }
            let end = middle + b_width;
            let count = self.words.count_at(first);
            let before = self.words.slots[first - 1];
            if before != BOUNDARY {
                let neighbour = before & !LAST;
                let at = position - self.widths[neighbour as usize];
                if neighbour == new {
                    self.right.change(a).gained -= count; // counted a moment ago, when `a` stood to its right
                    self.left.gain(neighbour, at, count);
                } else {
                    self.left.replace(neighbour, at, count);
                }
            }
            let after = self.words.slots[end];
            if after != BOUNDARY {
                self.right.replace(after, position, count);
            }
            self.words.slots[middle] = EMPTY;
            self.words.slots[first] = new;
            self.words.slots[end - 1] = new | LAST;
        }
        self.apply_left(a, new);
        self.apply_right(b, new);
    }

    /// Bring the pairs up to date in which the new token, made of `a` and another, stands on the right.
    fn apply_left(&mut self, a: u32, new: u32) {
        let mut side = std::mem::take(&mut self.left);
        self.apply(&mut side, |neighbour| pair_key(neighbour, a), |neighbour| pair_key(neighbour, new));
        self.left = side;
    }

    /// Bring the pairs up to date in which the new token, made of another and `b`, stands on the left.
    fn apply_right(&mut self, b: u32, new: u32) {
        let mut side = std::mem::take(&mut self.right);
        self.apply(&mut side, |neighbour| pair_key(b, neighbour), |neighbour| pair_key(new, neighbour));
        self.right = side;
    }

    fn apply(&mut self, side: &mut Side, old_key: impl Fn(u32) -> u64, new_key: impl Fn(u32) -> u64) {
        let mut next = self.positions.len();
        self.positions.resize(next + side.occurrences.len(), 0);
        for &neighbour in &side.touched {
            let change = &mut side.by_neighbour[neighbour as usize];
            if change.lost > 0 {
                self.lower(old_key(neighbour), change.lost);
            }
            if change.gained > 0 {
                let key = new_key(neighbour);
                self.pairs.insert(key, Pair { count: change.gained, start: next, len: change.len });
                self.heap.push((change.gained, Reverse(key)));
            }
            change.next = next;
            next += change.len as usize;
        }
        for &(neighbour, position) in &side.occurrences {
            let change = &mut side.by_neighbour[neighbour as usize];
            self.positions[change.next] = position;
            change.next += 1;
        }
        for &neighbour in &side.touched {
            side.by_neighbour[neighbour as usize] = Change::default();
        }
        side.touched.clear();
        side.occurrences.clear();
    }

    /// Take `lost` from the count of a pair, which may be the one just merged and then is no longer there.
    fn lower(&mut self, key: u64, lost: i64) {
        if let Some(pair) = self.pairs.get_mut(&key) {
            pair.count -= lost;
            if pair.count == 0 {
                self.pairs.remove(&key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::short_key;
    use crate::scanner::family_pattern;
    use crate::splitter::Splitter;

    fn count(text: &str) -> ChunkCounts {
        let mut counts = ChunkCounts::default();
        counts.add_text(&Splitter::new(&family_pattern(2)).unwrap(), text).unwrap();
        counts
    }

    fn learn(text: &str, num_merges: usize) -> Vec<(u32, u32)> {
        learn_merges(count(text), num_merges, |_| true).unwrap()
    }

    fn tokens(text: &str, num_merges: usize) -> Vec<String> {
        let tokens = token_bytes(&learn(text, num_merges));
        tokens[256..].iter().map(|token| String::from_utf8_lossy(token).into_owned()).collect()
    }

    /// The definition: count all pairs of all chunks afresh before each merge.
    fn reference(text: &str, num_merges: usize) -> Vec<(u32, u32)> {
        let counts = count(text);
        let mut words: Vec<(Vec<u32>, u64)> = Vec::new();
        counts.visit_ascending(|chunk, count| words.push((chunk.iter().map(|&byte| byte as u32).collect(), count)));
        let mut merges = Vec::new();
        while merges.len() < num_merges {
            let mut pairs: HashMap<(u32, u32), u64> = HashMap::new();
            for (word, count) in &words {
                word.windows(2).for_each(|pair| *pairs.entry((pair[0], pair[1])).or_default() += count);
            }
            let Some((&pair, _)) = pairs.iter().max_by_key(|&(&pair, &count)| (count, Reverse(pair))) else {
                break;
            };
            let new = (NUM_BYTES + merges.len()) as u32;
            for (word, _) in &mut words {
                let mut at = 0;
                while at + 1 < word.len() {
                    if (word[at], word[at + 1]) == pair {
                        word.splice(at..at + 2, [new]);
                    }
                    at += 1;
                }
            }
            merges.push(pair);
        }
        merges
    }

    fn pseudo_random_text(seed: u64, alphabet: &[char], len: usize) -> String {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            alphabet[(state >> 33) as usize % alphabet.len()]
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn merges_equal_those_of_counting_afresh() {
        let alphabets: [&[char]; 5] =
            [&['a', ' '], &['a', 'b'], &['a', 'a', 'b', ' '], &['=', '-', ' ', '\n'], &['a', 'b', 'c', 'é', '😀', ' ']];
        for seed in 0..60 {
            let text = pseudo_random_text(seed, alphabets[seed as usize % 5], 50 + 20 * seed as usize);
            assert_eq!(learn(&text, 60), reference(&text, 60), "seed {seed}");
        }
    }

    #[test]
    fn the_textbook_example_is_reproduced() {
        // Sennrich et al. (arXiv 1508.07909), with a blank in front of each word instead of a mark at its end.
        let text = " low".repeat(5) + &" lower".repeat(2) + &" newest".repeat(6) + &" widest".repeat(3);
        assert_eq!(tokens(&text, 5), ["es", "est", " l", "ow", " low"]);
    }

    #[test]
    fn ties_go_to_the_pair_with_the_smaller_ids() {
        assert_eq!(tokens("zz yy xx", 9), [" x", " y", "zz", " xx", " yy"]);
    }

    #[test]
    fn overlapping_pairs_count_and_are_merged_from_the_left() {
        assert_eq!(tokens("aaa aaa aaa", 9), ["aa", "aaa", " aaa"]);
    }

    #[test]
    fn a_text_without_pairs_teaches_nothing() {
        assert_eq!(learn("", 10), []);
        assert_eq!(learn("a", 10), []);
        assert_eq!(learn("ab", 0), []);
    }

    #[test]
    fn counts_beyond_32_bits_are_kept() {
        let mut counts = count("ab cd cd");
        counts.add_short(short_key(b"ab", 0, 2), 1 << 40);
        let words = Words::new(counts).unwrap();
        assert_eq!([1, 5].map(|at| words.count_at(at)), [2, (1 << 40) + 1]); // ` cd`, then `ab`
    }

    #[test]
    fn the_callback_stops_the_training() {
        let result = learn_merges(count(&pseudo_random_text(3, &['a', 'b', 'c', ' '], 5000)), 500, |done| done < 100);
        assert_eq!(result, Err(Error::Stopped));
    }

    #[test]
    fn words_of_megabytes_are_learnt_in_time_linear_in_their_length() {
        let text = pseudo_random_text(5, &['a', 'b', 'c', 'd', 'e'], 2_000_000);
        assert_eq!(learn(&text, 300).len(), 300);
        assert_eq!(learn(&"a".repeat(1 << 22), 300).len(), 22); // each merge joins all there is in pairs
    }
}
