//! Counting the distinct chunks of a stream of documents, on all cores, in bounded memory.
//!
//! Each thread owns a [`ChunkCounts`]: an open-addressing table of 24-byte slots. A slot has the key of a chunk of up
//! to 15 bytes, which in text with blanks are all but one in a hundred, or where a longer one lies in a shared buffer.
//! Threads share nothing while they count. The calling thread feeds batches of documents through a bounded queue and
//! fetches the next ones while the others count.
//!
//! Memory grows with the distinct chunks: slowly in English, but as fast as the text where every clause is a chunk of
//! its own, as in Chinese. So the text is counted in rounds, and when the tables outgrow what they may take, they are
//! merged and **thinned**: a chunk counted fewer than `t` times stays with probability `count / t` and then counts `t`.
//! Every pair keeps its expected count, so that no kind of text loses its share of the vocabulary. Chance is a hash
//! of the chunk: the outcome depends on the text and its rounds alone, not on the number of threads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::error::{Error, Result};
use crate::key::{MAX_SHORT, hash_key, hash_long, key_len, short_key};
use crate::splitter::Splitter;

const FIRST_SLOTS: usize = 1 << 12;
const ROUND_SHARE: usize = 64; // a round's text is this part of the memory allowed, and its tables come on top of it
const BYTES_PER_CHUNK: usize = 96; // the most its share of a table takes: one slot in four to one in two is in use
const BYTES_PER_BYTE: usize = 24; // of learning: a slot of 4, up to three positions of 4, a share of the map of pairs
const LONG: u64 = 0xff << 56; // marks the slot of a long chunk, where a key has the length
const QUEUED_PER_THREAD: usize = 2; // batches ready for a thread, so that a slow fetch does not idle it at once

/// Some documents, end to end: document `i` is the text from `ends[i - 1]` (0 for the first) to `ends[i]`.
#[derive(Default)]
pub struct Batch {
    pub text: String,
    pub ends: Vec<usize>,
}

impl Batch {
    /// Add a document.
    pub fn push(&mut self, document: &str) {
        self.text.push_str(document);
        self.ends.push(self.text.len());
    }

    /// The documents in order.
    pub fn documents(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(&0).chain(&self.ends);
        starts.zip(&self.ends).map(|(&start, &end)| &self.text[start..end])
    }
}

#[derive(Clone, Copy, Default)]
struct Slot {
    low: u64,   // of the key; of a long chunk, where it starts
    high: u64,  // of the key; of a long chunk, its length and the mark
    count: u64, // 0 in a free slot
}

impl Slot {
    fn key(&self) -> u128 {
        (self.high as u128) << 64 | self.low as u128
    }

    /// The bytes of a long chunk; None for a short one.
    fn long<'a>(&self, long: &'a [u8]) -> Option<&'a [u8]> {
        let (start, len) = (self.low as usize, (self.high & !LONG) as usize);
        (self.high & LONG == LONG).then(|| &long[start..start + len])
    }

    fn hash(&self, long: &[u8]) -> u64 {
        self.long(long).map_or_else(|| hash_key(self.key()), hash_long)
    }
}

/// How often each distinct chunk occurred.
pub struct ChunkCounts {
    slots: Vec<Slot>, // a power of two, at most half in use
    used: usize,
    long: Vec<u8>, // the long chunks, end to end
    distinct_bytes: usize,
    threshold: u64, // chunks with lower counts are thinned
    throws: u64,    // thinnings so far, each a throw of its own
    dropped: u64,
}

impl Default for ChunkCounts {
    fn default() -> ChunkCounts {
        let slots = vec![Slot::default(); FIRST_SLOTS];
        ChunkCounts { slots, used: 0, long: Vec::new(), distinct_bytes: 0, threshold: 1, throws: 0, dropped: 0 }
    }
}

impl ChunkCounts {
    /// Count every chunk of `text`.
    pub fn add_text(&mut self, splitter: &Splitter, text: &str) -> Result<()> {
        let bytes = text.as_bytes();
        splitter.for_each_chunk(text, |start, end| {
            if end - start <= MAX_SHORT {
                self.add_short(short_key(bytes, start, end), 1);
            } else {
                self.add_long(&bytes[start..end], 1);
            }
        })
    }

    /// Add `count` occurrences of a chunk given by its key.
    #[inline(always)]
    pub(crate) fn add_short(&mut self, key: u128, count: u64) {
        let mask = self.slots.len() - 1;
        let (low, high) = (key as u64, (key >> 64) as u64);
        let mut at = hash_key(key) as usize & mask;
        loop {
            let slot = &mut self.slots[at];
            if slot.low == low && slot.high == high {
                slot.count += count;
                return;
            }
            if slot.count == 0 {
                self.occupy(at, Slot { low, high, count }, key_len(key));
                return;
            }
            at = (at + 1) & mask;
        }
    }

    /// Add `count` occurrences of a chunk too long for a key.
    fn add_long(&mut self, chunk: &[u8], count: u64) {
        let mask = self.slots.len() - 1;
        let mut at = hash_long(chunk) as usize & mask;
        loop {
            let slot = &mut self.slots[at];
            if slot.count == 0 {
                let (low, high) = (self.long.len() as u64, LONG | chunk.len() as u64);
                self.long.extend_from_slice(chunk);
                self.occupy(at, Slot { low, high, count }, chunk.len());
                return;
            }
            if slot.long(&self.long) == Some(chunk) {
                slot.count += count;
                return;
            }
            at = (at + 1) & mask;
        }
    }

    #[inline(always)]
    fn occupy(&mut self, at: usize, slot: Slot, len: usize) {
        self.slots[at] = slot;
        self.used += 1;
        self.distinct_bytes += len;
        if 2 * self.used > self.slots.len() {
            self.grow();
        }
    }

    #[cold]
    fn grow(&mut self) {
        let slots = vec![Slot::default(); 2 * self.slots.len()];
        let old = std::mem::replace(&mut self.slots, slots);
        let mask = self.slots.len() - 1;
        for slot in old.into_iter().filter(|slot| slot.count > 0) {
            let mut at = slot.hash(&self.long) as usize & mask;
            while self.slots[at].count > 0 {
                at = (at + 1) & mask;
            }
            self.slots[at] = slot;
        }
    }

    fn add(&mut self, slot: &Slot, long: &[u8], count: u64) {
        match slot.long(long) {
            Some(chunk) => self.add_long(chunk, count),
            None => self.add_short(slot.key(), count),
        }
    }

    /// Add the counts of `other`, of which nothing was dropped.
    fn merge(&mut self, other: ChunkCounts) {
        for slot in other.slots.iter().filter(|slot| slot.count > 0) {
            self.add(slot, &other.long, slot.count);
        }
    }

    /// What the chunks take at most, counted or learnt from.
    fn memory(&self) -> usize {
        BYTES_PER_CHUNK * self.used + BYTES_PER_BYTE * self.distinct_bytes
    }

    /// Thin, if the chunks would take more than `max_memory`, until they take at most half of it: at the threshold of
    /// before, which spares all that stayed then, and where that is not enough at one twice as high.
    fn fit(&mut self, max_memory: usize) {
        if self.memory() > max_memory {
            self.thin();
            while self.memory() > max_memory / 2 && self.used > 0 {
                self.threshold *= 2;
                self.thin();
            }
        }
    }

    /// Drop chunks with counts below the threshold so that the expected count of each is what it was.
    fn thin(&mut self) {
        let (threshold, throws) = (self.threshold, self.throws + 1);
        let mut thinned = ChunkCounts { threshold, throws, dropped: self.dropped, ..ChunkCounts::default() };
        for slot in self.slots.iter().filter(|slot| slot.count > 0) {
            let chance = hash_key((slot.hash(&self.long) as u128) << 64 | throws as u128) >> 1;
            if chance % threshold < slot.count {
                thinned.add(slot, &self.long, slot.count.max(threshold));
            } else {
                thinned.dropped += 1;
            }
        }
        *self = thinned;
    }

    /// Number of distinct chunks.
    pub fn len(&self) -> usize {
        self.used
    }

    /// Whether there are no chunks.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Total length in bytes of the distinct chunks.
    pub fn distinct_bytes(&self) -> usize {
        self.distinct_bytes
    }

    /// How many chunks were dropped to save memory.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Visit every distinct chunk with its count, in ascending order of the counts.
    pub fn visit_ascending(mut self, mut visit: impl FnMut(&[u8], u64)) {
        self.slots.retain(|slot| slot.count > 0);
        self.slots.sort_unstable_by_key(|slot| slot.count);
        for slot in &self.slots {
            match slot.long(&self.long) {
                Some(chunk) => visit(chunk, slot.count),
                None => visit(&slot.key().to_le_bytes()[..key_len(slot.key())], slot.count),
            }
        }
    }
}

/// Merge the tables of all threads into that of the first.
fn merge_all(tables: &mut [ChunkCounts]) -> &mut ChunkCounts {
    let (total, others) = tables.split_first_mut().expect("there is a table for each of at least one thread");
    others.iter_mut().for_each(|counts| total.merge(std::mem::take(counts)));
    total
}

/// Count the chunks of all documents that `next_batch` yields, on `num_threads` threads besides the calling one, and
/// thin them where they would take more than `max_memory` bytes.
///
/// `next_batch` runs on the calling thread; its error, or that of the splitter, ends the count.
pub fn count_chunks<E: From<Error> + Send>(
    splitter: &Splitter,
    num_threads: usize,
    max_memory: usize,
    mut next_batch: impl FnMut() -> std::result::Result<Option<Batch>, E>,
) -> std::result::Result<ChunkCounts, E> {
    let mut tables: Vec<_> = (0..num_threads.max(1)).map(|_| ChunkCounts::default()).collect();
    let round_bytes = max_memory / ROUND_SHARE + 1;
    while count_round(splitter, &mut tables, round_bytes, &mut next_batch)? {
        // merged they take no more than apart, so that below this sum there is nothing to thin
        if tables.iter().map(ChunkCounts::memory).sum::<usize>() > max_memory {
            merge_all(&mut tables).fit(max_memory);
        }
    }
    merge_all(&mut tables).fit(max_memory);
    Ok(tables.swap_remove(0))
}

/// Count batches of `round_bytes` or a little more, a thread for each of the `tables`; false when there are no more batches.
fn count_round<E: From<Error> + Send>(
    splitter: &Splitter,
    tables: &mut [ChunkCounts],
    round_bytes: usize,
    next_batch: &mut impl FnMut() -> std::result::Result<Option<Batch>, E>,
) -> std::result::Result<bool, E> {
    let failed = AtomicBool::new(false);
    let (sender, receiver) = sync_channel::<Batch>(QUEUED_PER_THREAD * tables.len());
    let receiver = Mutex::new(receiver);
    thread::scope(|scope| {
        let (receiver, failed) = (&receiver, &failed);
        let spawn = |counts| scope.spawn(move || count_batches(splitter, counts, receiver, failed));
        let workers: Vec<_> = tables.iter_mut().map(spawn).collect();
        let (mut fed, mut bytes) = (Ok(true), 0);
        while bytes < round_bytes && matches!(fed, Ok(true)) && !failed.load(Ordering::Relaxed) {
            match next_batch() {
                Ok(Some(batch)) => {
                    bytes += batch.text.len();
                    if sender.send(batch).is_err() {
                        break;
                    }
                }
                Ok(None) => fed = Ok(false),
                Err(error) => {
                    failed.store(true, Ordering::Relaxed);
                    fed = Err(error);
                }
            }
        }
        drop(sender);
        for worker in workers {
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        fed
    })
}

/// What one thread does: count the batches it gets hold of until there are no more.
///
/// After a failure of any thread it still empties the queue, so that the sender never waits for room in it.
fn count_batches(
    splitter: &Splitter,
    counts: &mut ChunkCounts,
    receiver: &Mutex<Receiver<Batch>>,
    failed: &AtomicBool,
) -> Result<()> {
    let splitter = splitter.clone(); // a regex shared by threads would make them wait for its scratch space
    let mut result = Ok(());
    loop {
        let batch = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(batch) = batch else {
            return result;
        };
        if !failed.load(Ordering::Relaxed) {
            result = batch.documents().try_for_each(|document| counts.add_text(&splitter, document));
            if result.is_err() {
                failed.store(true, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::scanner::family_pattern;

    fn splitter() -> Splitter {
        Splitter::new(&family_pattern(2)).unwrap()
    }

    const NO_LIMIT: usize = usize::MAX;

    fn as_map(counts: ChunkCounts) -> HashMap<Vec<u8>, u64> {
        let mut map = HashMap::new();
        counts.visit_ascending(|chunk, count| {
            map.insert(chunk.to_vec(), count);
        });
        map
    }

    fn documents() -> Vec<String> {
        (0..5000).map(|i| format!("word{i} again\0 {}", "averyverylongwordindeed".repeat(i % 3))).collect()
    }

    /// Batches of ten documents each.
    fn batches(documents: &[String]) -> impl Iterator<Item = Batch> {
        documents.chunks(10).map(|documents| {
            let mut batch = Batch::default();
            documents.iter().for_each(|document| batch.push(document));
            batch
        })
    }

    #[test]
    fn counts_equal_those_of_a_plain_map_on_any_number_of_threads() {
        let documents = documents();
        let mut expected: HashMap<Vec<u8>, u64> = HashMap::new();
        for document in &documents {
            for (start, end) in splitter().chunks(document).unwrap() {
                *expected.entry(document.as_bytes()[start..end].to_vec()).or_default() += 1;
            }
        }
        for num_threads in [1, 2, 5] {
            let mut batches = batches(&documents);
            let counts = count_chunks(&splitter(), num_threads, NO_LIMIT, || Ok::<_, Error>(batches.next())).unwrap();
            assert_eq!(counts.distinct_bytes(), expected.keys().map(Vec::len).sum::<usize>());
            assert_eq!((counts.len(), counts.dropped()), (expected.len(), 0));
            assert_eq!(as_map(counts), expected);
        }
    }

    #[test]
    fn the_documents_of_a_batch_are_split_one_by_one() {
        let mut batch = Batch::default();
        ["ab", "", "cd"].into_iter().for_each(|document| batch.push(document));
        assert_eq!(batch.documents().collect::<Vec<_>>(), ["ab", "", "cd"]);
        let mut batches = [batch].into_iter();
        let counts = count_chunks(&splitter(), 1, NO_LIMIT, || Ok::<_, Error>(batches.next())).unwrap();
        assert_eq!(as_map(counts), HashMap::from([(b"ab".to_vec(), 1), (b"cd".to_vec(), 1)]));
    }

    fn pairs_of_bytes(counts: ChunkCounts) -> u64 {
        let mut pairs = 0;
        counts.visit_ascending(|chunk, count| pairs += (chunk.len() as u64 - 1) * count);
        pairs
    }

    #[test]
    fn memory_is_bounded_and_what_stays_stands_for_what_was_dropped() {
        let letters = |i: usize| (0..6).map(|place| (b'a' + (i >> (3 * place) & 7) as u8) as char).collect::<String>();
        let documents: Vec<String> =
            (0..40_000).map(|i| format!(" {} often {}", letters(i), "long".repeat(i % 7))).collect();
        let count = |num_threads, max_memory| {
            let mut batches = batches(&documents);
            count_chunks(&splitter(), num_threads, max_memory, || Ok::<_, Error>(batches.next())).unwrap()
        };
        let all = count(1, NO_LIMIT);
        let max_memory = all.memory() / 8;
        let (one, three) = (count(1, max_memory), count(3, max_memory));
        assert!(one.memory() <= max_memory && one.dropped() > 0);
        assert_eq!((all.dropped(), three.dropped()), (0, one.dropped()));
        let (one, three) = (as_map(one), as_map(three));
        assert_eq!(one, three);
        assert_eq!(one[&b" often"[..]], 40_000); // a frequent chunk keeps its count
        let exact = pairs_of_bytes(all) as f64;
        assert!((pairs_of_bytes(count(1, max_memory)) as f64 / exact - 1.0).abs() < 0.02);
    }

    #[test]
    fn without_memory_nothing_is_left() {
        let documents = documents();
        let mut batches = batches(&documents[..30]);
        let counts = count_chunks(&splitter(), 2, 0, || Ok::<_, Error>(batches.next())).unwrap();
        assert!(counts.is_empty());
    }

    #[test]
    fn an_error_of_the_source_ends_the_count() {
        let documents = documents();
        let mut batches = batches(&documents);
        let result = count_chunks(&splitter(), 2, NO_LIMIT, || batches.next().map(Some).ok_or(Error::Stopped));
        assert_eq!(result.err(), Some(Error::Stopped));
    }

    #[test]
    fn an_error_of_the_regex_engine_ends_the_count_of_an_endless_source() {
        let splitter = Splitter::regex(&family_pattern(2)).unwrap();
        let spaces = " ".repeat(2_000_000); // more than the engine's stack takes
        let result = count_chunks(&splitter, 2, NO_LIMIT, || {
            let mut batch = Batch::default();
            batch.push(&spaces);
            Ok::<_, Error>(Some(batch))
        });
        assert!(matches!(result.err(), Some(Error::Split(_))));
    }
}
