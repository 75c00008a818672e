//! Encoding with a given vocabulary, with the ids tiktoken gives for the same ranks and pattern.
//!
//! A chunk that is a token as a whole is that token. Otherwise it starts as its bytes, and the adjacent two whose
//! concatenation is the token of lowest rank are joined, leftmost first, until none is. Which two tokens join to a
//! third is looked up in a map of pairs, built once from all ways to cut each token in two.
//!
//! - Text repeats its chunks: each thread keeps a two-way set-associative cache from short chunk to ids, of fixed
//!   size, so memory is bounded whatever the text. Caches are kept between calls.
//! - Chunks of up to `SMALL` bytes are joined by scanning for the lowest rank, which is quadratic but without
//!   overhead; longer ones with a heap over a linked list, so that a chunk of megabytes takes `n log n` steps.
//! - A batch is cut into groups of documents that threads take in turn; the result does not depend on their number.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};
use std::hash::BuildHasherDefault;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::bpe::PairHasher;
use crate::error::{Error, Result};
use crate::key::{MAX_SHORT, hash_key, short_key};
use crate::splitter::Splitter;

const NONE: u32 = u32::MAX; // no token
const SMALL: usize = 128; // bytes of the longest chunk that is joined by scanning
const CACHE_SLOTS: usize = 1 << 16; // 3 MB a thread
const CACHED_IDS: usize = 7;
const GROUP_BYTES: usize = 1 << 16; // documents a thread takes at a time: long enough to outweigh the bookkeeping

type PairMap = HashMap<u64, u32, BuildHasherDefault<PairHasher>>;

/// A vocabulary, ready to encode and decode.
pub struct Encoder {
    splitter: Splitter,
    ids: HashMap<Box<[u8]>, u32>,
    tokens: HashMap<u32, Box<[u8]>>,
    byte_ids: [u32; 256],
    pairs: PairMap,
    idle: Mutex<Vec<Scratch>>, // kept from one call to the next
}

/// Tokens of many documents end to end, and where each document ends.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Packed {
    pub tokens: Vec<u32>,
    pub ends: Vec<usize>,
}

impl Encoder {
    /// The encoder for a vocabulary of (bytes, rank), where a token's rank is its id.
    pub fn new(ranks: &[(Vec<u8>, u32)], splitter: Splitter) -> Result<Encoder> {
        let mut ids: HashMap<Box<[u8]>, u32> = HashMap::new();
        let mut tokens: HashMap<u32, Box<[u8]>> = HashMap::new();
        for &(ref bytes, rank) in ranks {
            if bytes.is_empty() || rank == NONE {
                return Err(Error::Ranks(format!("token {bytes:?} of rank {rank} is empty or its rank too large")));
            }
            let bytes: Box<[u8]> = bytes.as_slice().into();
            if tokens.insert(rank, bytes.clone()).is_some() {
                return Err(Error::Ranks(format!("rank {rank} is given twice")));
            }
            if let Some(other) = ids.insert(bytes.clone(), rank) {
                return Err(Error::Ranks(format!("token {bytes:?} is given twice, with ranks {other} and {rank}")));
            }
        }
        let mut byte_ids = [NONE; 256];
        for (byte, id) in (0u8..=255).zip(&mut byte_ids) {
            *id = *ids.get(&[byte][..]).ok_or_else(|| Error::Ranks(format!("byte {byte:#04x} has no token")))?;
        }
        let pairs = all_pairs(&ids);
        Ok(Encoder { splitter, ids, tokens, byte_ids, pairs, idle: Mutex::default() })
    }

    /// Ids of `text`.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut tokens = Vec::with_capacity(text.len() / 3 + 1);
        self.with_worker(|worker| worker.encode_into(text, &mut tokens))?;
        Ok(tokens)
    }

    /// Ids of all `texts`, on `num_threads` threads (0: one per core).
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T], num_threads: usize) -> Result<Packed> {
        let groups = group_by_bytes(texts);
        let num_threads = thread_count(num_threads).min(groups.len());
        if num_threads <= 1 {
            return self.with_worker(|worker| worker.encode_all(texts));
        }
        let next = AtomicUsize::new(0);
        let results: Vec<Mutex<Result<Packed>>> = groups.iter().map(|_| Mutex::new(Ok(Packed::default()))).collect();
        thread::scope(|scope| {
            for _ in 0..num_threads {
                scope.spawn(|| {
                    self.with_worker(|worker| {
                        while let Some(group) = groups.get(next.fetch_add(1, Ordering::Relaxed)) {
                            let packed = worker.encode_all(&texts[group.start..group.end]);
                            *results[group.index].lock().unwrap_or_else(PoisonError::into_inner) = packed;
                        }
                    });
                });
            }
        });
        let mut all = Packed::default();
        for result in results {
            let packed = result.into_inner().unwrap_or_else(PoisonError::into_inner)?;
            let offset = all.tokens.len();
            all.tokens.extend_from_slice(&packed.tokens);
            all.ends.extend(packed.ends.iter().map(|end| offset + end));
        }
        Ok(all)
    }

    /// The bytes that `ids` stand for.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(4 * ids.len());
        for id in ids {
            bytes.extend_from_slice(self.tokens.get(id).ok_or(Error::UnknownToken(*id))?);
        }
        Ok(bytes)
    }

    pub fn splitter(&self) -> &Splitter {
        &self.splitter
    }

    /// Run `work` with scratch space of its own, that of an earlier call when there is one.
    fn with_worker<R>(&self, work: impl FnOnce(&mut Worker) -> R) -> R {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let scratch = idle().pop();
        let mut worker = Worker { encoder: self, scratch: scratch.unwrap_or_else(|| Scratch::new(&self.splitter)) };
        let result = work(&mut worker);
        idle().push(worker.scratch);
        result
    }

    fn pair_id(&self, left: u32, right: u32) -> u32 {
        self.pairs.get(&((left as u64) << 32 | right as u64)).copied().unwrap_or(NONE)
    }
}

/// Id of the token that any two tokens join to, for all ways to cut a token in two tokens.
///
/// Only cuts that leave two lengths that occur are looked at, so a vocabulary with tokens of megabytes is fine too.
fn all_pairs(ids: &HashMap<Box<[u8]>, u32>) -> PairMap {
    let lengths: BTreeSet<usize> = ids.keys().map(|bytes| bytes.len()).collect();
    let mut pairs = PairMap::default();
    for (bytes, &id) in ids {
        for &cut in lengths.range(..bytes.len()).filter(|&cut| lengths.contains(&(bytes.len() - cut))) {
            if let (Some(&left), Some(&right)) = (ids.get(&bytes[..cut]), ids.get(&bytes[cut..])) {
                pairs.insert((left as u64) << 32 | right as u64, id);
            }
        }
    }
    pairs
}

/// `requested`, or for 0 the number of cores this process may use.
pub fn thread_count(requested: usize) -> usize {
    match requested {
        0 => thread::available_parallelism().map_or(1, |n| n.get()),
        n => n,
    }
}

struct Group {
    index: usize,
    start: usize,
    end: usize,
}

/// Neighbouring documents of together `GROUP_BYTES` or slightly more.
fn group_by_bytes<T: AsRef<str>>(texts: &[T]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (i, text) in texts.iter().enumerate() {
        bytes += text.as_ref().len();
        if bytes >= GROUP_BYTES || i + 1 == texts.len() {
            groups.push(Group { index: groups.len(), start, end: i + 1 });
            (start, bytes) = (i + 1, 0);
        }
    }
    groups
}

/// What one thread needs to itself.
struct Scratch {
    splitter: Splitter, // a regex shared by threads would make them wait for its scratch space
    cache: Cache,
    parts: Vec<Part>,
}

impl Scratch {
    fn new(splitter: &Splitter) -> Scratch {
        Scratch { splitter: splitter.clone(), cache: Cache::new(), parts: Vec::new() }
    }
}

/// A thread that encodes.
struct Worker<'e> {
    encoder: &'e Encoder,
    scratch: Scratch,
}

/// A token of a chunk being joined, and the token it would make with the next one.
#[derive(Clone, Copy)]
struct Part {
    id: u32,
    joined: u32,
}

impl Worker<'_> {
    fn encode_all<T: AsRef<str>>(&mut self, texts: &[T]) -> Result<Packed> {
        let mut packed = Packed::default();
        for text in texts {
            self.encode_into(text.as_ref(), &mut packed.tokens)?;
            packed.ends.push(packed.tokens.len());
        }
        Ok(packed)
    }

    fn encode_into(&mut self, text: &str, tokens: &mut Vec<u32>) -> Result<()> {
        let encoder = self.encoder;
        let Scratch { splitter, cache, parts } = &mut self.scratch;
        let bytes = text.as_bytes();
        splitter.for_each_chunk(text, |start, end| {
            if end - start > MAX_SHORT {
                encoder.encode_chunk(&bytes[start..end], parts, tokens);
                return;
            }
            let key = short_key(bytes, start, end);
            if !cache.find(key, tokens) {
                let before = tokens.len();
                encoder.encode_chunk(&bytes[start..end], parts, tokens);
                cache.insert(key, &tokens[before..]);
            }
        })
    }
}

impl Encoder {
    /// Append the ids of one chunk.
    #[cold]
    fn encode_chunk(&self, chunk: &[u8], parts: &mut Vec<Part>, tokens: &mut Vec<u32>) {
        if let Some(&id) = self.ids.get(chunk) {
            tokens.push(id);
        } else if chunk.len() <= SMALL {
            self.join_by_scanning(chunk, parts);
            tokens.extend(parts.iter().map(|part| part.id));
        } else {
            self.join_by_heap(chunk, tokens);
        }
    }

    fn join_by_scanning(&self, chunk: &[u8], parts: &mut Vec<Part>) {
        let ids = chunk.iter().map(|&byte| self.byte_ids[byte as usize]);
        parts.clear();
        parts.extend(ids.map(|id| Part { id, joined: NONE }));
        for i in 1..parts.len() {
            parts[i - 1].joined = self.pair_id(parts[i - 1].id, parts[i].id);
        }
        loop {
            let (mut at, mut lowest) = (0, NONE);
            for (i, part) in parts.iter().enumerate() {
                if part.joined < lowest {
                    (at, lowest) = (i, part.joined);
                }
            }
            if lowest == NONE {
                return;
            }
            parts.remove(at + 1);
            parts[at].id = lowest;
            parts[at].joined = parts.get(at + 1).map_or(NONE, |next| self.pair_id(lowest, next.id));
            if at > 0 {
                parts[at - 1].joined = self.pair_id(parts[at - 1].id, lowest);
            }
        }
    }

    fn join_by_heap(&self, chunk: &[u8], tokens: &mut Vec<u32>) {
        let mut ids: Vec<u32> = chunk.iter().map(|&byte| self.byte_ids[byte as usize]).collect();
        let end = ids.len();
        let mut next: Vec<usize> = (1..=end).collect(); // `end` after the last
        let mut previous: Vec<usize> = (0..end).map(|i| i.saturating_sub(1)).collect(); // itself for the first
        let neighbours = ids.windows(2).map(|pair| self.pair_id(pair[0], pair[1])).zip(0usize..);
        let mut heap: BinaryHeap<_> = neighbours.filter(|&(joined, _)| joined != NONE).map(Reverse).collect();
        while let Some(Reverse((joined, at))) = heap.pop() {
            let second = next[at];
            if ids[at] == NONE || second == end || self.pair_id(ids[at], ids[second]) != joined {
                continue; // one of the two has been joined to another since
            }
            let third = next[second];
            (ids[at], ids[second], next[at]) = (joined, NONE, third);
            if third < end {
                previous[third] = at;
                let joined = self.pair_id(ids[at], ids[third]);
                if joined != NONE {
                    heap.push(Reverse((joined, at)));
                }
            }
            let before = previous[at];
            if before < at {
                let joined = self.pair_id(ids[before], ids[at]);
                if joined != NONE {
                    heap.push(Reverse((joined, before)));
                }
            }
        }
        tokens.extend(ids.iter().filter(|&&id| id != NONE));
    }
}

/// Ids of short chunks met lately, in sets of two slots of which the one used less lately is replaced.
struct Cache {
    slots: Vec<CacheSlot>,
}

#[derive(Clone, Copy, Default)]
struct CacheSlot {
    low: u64,
    high: u64, // 0 in a free slot
    len: u32,
    ids: [u32; CACHED_IDS],
}

impl Cache {
    fn new() -> Cache {
        Cache { slots: vec![CacheSlot::default(); CACHE_SLOTS] }
    }

    /// Append the ids of the chunk if they are known.
    #[inline(always)]
    fn find(&mut self, key: u128, tokens: &mut Vec<u32>) -> bool {
        let (low, high) = (key as u64, (key >> 64) as u64);
        let at = hash_key(key) as usize & (CACHE_SLOTS - 2);
        let slot = if self.slots[at].low == low && self.slots[at].high == high {
            &self.slots[at]
        } else if self.slots[at + 1].low == low && self.slots[at + 1].high == high {
            self.slots.swap(at, at + 1);
            &self.slots[at]
        } else {
            return false;
        };
        if slot.len == 1 {
            tokens.push(slot.ids[0]);
        } else {
            tokens.extend_from_slice(&slot.ids[..slot.len as usize]);
        }
        true
    }

    fn insert(&mut self, key: u128, ids: &[u32]) {
        if ids.len() > CACHED_IDS {
            return;
        }
        let at = hash_key(key) as usize & (CACHE_SLOTS - 2);
        self.slots.swap(at, at + 1);
        let slot = &mut self.slots[at];
        (slot.low, slot.high, slot.len) = (key as u64, (key >> 64) as u64, ids.len() as u32);
        slot.ids[..ids.len()].copy_from_slice(ids);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpe::{learn_merges, token_bytes};
    use crate::count::ChunkCounts;
    use crate::scanner::family_pattern;

    fn trained(text: &str, num_merges: usize) -> Vec<(Vec<u8>, u32)> {
        let mut counts = ChunkCounts::default();
        counts.add_text(&Splitter::new(&family_pattern(2)).unwrap(), text).unwrap();
        token_bytes(&learn_merges(counts, num_merges, |_| true).unwrap()).into_iter().zip(0..).collect()
    }

    fn encoder(ranks: &[(Vec<u8>, u32)]) -> Encoder {
        Encoder::new(ranks, Splitter::new(&family_pattern(2)).unwrap()).unwrap()
    }

    /// The definition, word for word.
    fn reference(ranks: &HashMap<Vec<u8>, u32>, chunk: &[u8]) -> Vec<u32> {
        if let Some(&rank) = ranks.get(chunk) {
            return vec![rank];
        }
        let mut parts: Vec<Vec<u8>> = chunk.iter().map(|&byte| vec![byte]).collect();
        loop {
            let joined = parts.windows(2).map(|two| two.concat()).enumerate();
            let Some((_, at)) = joined.filter_map(|(i, part)| Some((*ranks.get(&part)?, i))).min() else {
                return parts.iter().map(|part| ranks[part]).collect();
            };
            let second = parts.remove(at + 1);
            parts[at].extend(second);
        }
    }

    fn pseudo_random_word(state: &mut u64, len: usize) -> Vec<u8> {
        let mut next = || {
            *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            b"aaabcd"[(*state >> 33) as usize % 6]
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn both_ways_to_join_equal_the_definition() {
        let mut state = 1;
        let text = (0..300).map(|i| String::from_utf8(pseudo_random_word(&mut state, 1 + i % 20)).unwrap() + " ");
        let ranks = trained(&text.collect::<String>(), 200);
        let encoder = encoder(&ranks);
        let table: HashMap<Vec<u8>, u32> = ranks.into_iter().collect();
        for len in (2..60).chain([SMALL, SMALL + 1, 500]) {
            let chunk = pseudo_random_word(&mut state, len);
            if table.contains_key(&chunk) {
                continue;
            }
            let (mut parts, mut by_heap) = (Vec::new(), Vec::new());
            encoder.join_by_scanning(&chunk, &mut parts);
            encoder.join_by_heap(&chunk, &mut by_heap);
            let by_scanning: Vec<u32> = parts.iter().map(|part| part.id).collect();
            assert_eq!(by_scanning, reference(&table, &chunk));
            assert_eq!(by_heap, by_scanning);
        }
    }

    #[test]
    fn a_rank_table_that_no_training_gives_is_encoded_by_the_definition() {
        let mut ranks: Vec<(Vec<u8>, u32)> = (0u8..=255).map(|byte| (vec![byte], 1000 + byte as u32)).collect();
        ranks.extend([(b"abc".to_vec(), 3), (b"bc".to_vec(), 9), (b"ab".to_vec(), 7), (b"cab".to_vec(), 1)]);
        ranks.push((b"zzzz".to_vec(), 2)); // out of reach of any merge, but a whole chunk
        let encoder = encoder(&ranks);
        let table: HashMap<Vec<u8>, u32> = ranks.into_iter().collect();
        for text in ["abc", "cabc", "ababc", "bcab", "zzzz", "zzzzz", "abcabcabcabcabcabcabc"] {
            assert_eq!(encoder.encode(text).unwrap(), reference(&table, text.as_bytes()), "{text}");
        }
    }

    #[test]
    fn a_batch_does_not_depend_on_threads_and_decodes_to_its_texts() {
        let texts: Vec<String> = (0..3000).map(|i| format!("document {i}: naïve 😀 text\n").repeat(i % 7)).collect();
        let encoder = encoder(&trained(&texts.concat(), 300));
        let one = encoder.encode_batch(&texts, 1).unwrap();
        assert_eq!(encoder.encode_batch(&texts, 3).unwrap(), one);
        assert_eq!(encoder.decode(&one.tokens).unwrap(), texts.concat().as_bytes());
        let mut start = 0;
        for (text, &end) in texts.iter().zip(&one.ends) {
            assert_eq!(encoder.encode(text).unwrap(), one.tokens[start..end]);
            start = end;
        }
        assert_eq!(encoder.encode_batch::<&str>(&[], 0).unwrap(), Packed::default());
    }

    #[test]
    fn more_distinct_chunks_than_the_cache_holds_are_encoded_right() {
        let encoder = encoder(&trained("1 22 333 21 12 23 32", 20));
        for i in 0..3 * CACHE_SLOTS {
            let text = format!(" {i:b}");
            assert_eq!(encoder.decode(&encoder.encode(&text).unwrap()).unwrap(), text.as_bytes());
        }
    }

    #[test]
    fn a_token_of_a_megabyte_is_one_lookup() {
        let text = "ab".repeat(1 << 19);
        let encoder = encoder(&trained(&text, 40));
        assert_eq!(encoder.encode(&text).unwrap().len(), 1);
    }

    #[test]
    fn tables_that_are_no_vocabulary_are_refused() {
        let bytes = || (0u8..=255).map(|byte| (vec![byte], byte as u32));
        let refused = |ranks: Vec<(Vec<u8>, u32)>| {
            let result = Encoder::new(&ranks, Splitter::new(&family_pattern(2)).unwrap());
            assert!(matches!(result, Err(Error::Ranks(_))));
        };
        refused(bytes().skip(1).collect());
        refused(bytes().chain([(vec![], 256)]).collect());
        refused(bytes().chain([(b"ab".to_vec(), 255)]).collect());
        refused(bytes().chain([(b"ab".to_vec(), 256), (b"ab".to_vec(), 257)]).collect());
        refused(bytes().chain([(b"ab".to_vec(), u32::MAX)]).collect());
    }

    #[test]
    fn an_unknown_id_is_an_error() {
        assert_eq!(encoder(&trained("", 0)).decode(&[300]), Err(Error::UnknownToken(300)));
    }
}
