//! Counting the distinct chunks of a stream of documents, on all cores.
//!
//! Each thread owns a [`ChunkCounts`]: an open-addressing table of 24-byte slots (key and count) for chunks of up to
//! 15 bytes, which are all but one in a hundred, and a hash map for longer ones. The tables are merged once at the
//! end, so threads share nothing while they count. The calling thread feeds batches of documents through a bounded
//! queue and fetches the next ones while the others count. Memory grows with the distinct chunks, not with the text.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::error::{Error, Result};
use crate::key::{MAX_SHORT, hash_key, key_len, short_key};
use crate::splitter::Splitter;

const FIRST_SLOTS: usize = 1 << 12;
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
    low: u64,
    high: u64,
    count: u64, // 0 in a free slot
}

impl Slot {
    fn key(&self) -> u128 {
        (self.high as u128) << 64 | self.low as u128
    }
}

/// How often each distinct chunk occurred.
pub struct ChunkCounts {
    slots: Vec<Slot>, // a power of two, at most half in use
    used: usize,
    long: HashMap<Box<[u8]>, u64>,
}

impl Default for ChunkCounts {
    fn default() -> ChunkCounts {
        ChunkCounts { slots: vec![Slot::default(); FIRST_SLOTS], used: 0, long: HashMap::new() }
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
                *slot = Slot { low, high, count };
                self.used += 1;
                if 2 * self.used > self.slots.len() {
                    self.grow();
                }
                return;
            }
            at = (at + 1) & mask;
        }
    }

    #[cold]
    fn grow(&mut self) {
        let slots = vec![Slot::default(); 2 * self.slots.len()];
        let old = std::mem::replace(&mut self.slots, slots);
        self.used = 0;
        for slot in old.iter().filter(|slot| slot.count > 0) {
            self.add_short(slot.key(), slot.count);
        }
    }

    #[cold]
    fn add_long(&mut self, chunk: &[u8], count: u64) {
        match self.long.get_mut(chunk) {
            Some(total) => *total += count,
            None => {
                self.long.insert(chunk.into(), count);
            }
        }
    }

    /// Add the counts of `other`.
    fn merge(&mut self, other: ChunkCounts) {
        for slot in other.slots.iter().filter(|slot| slot.count > 0) {
            self.add_short(slot.key(), slot.count);
        }
        for (chunk, count) in other.long {
            *self.long.entry(chunk).or_insert(0) += count;
        }
    }

    /// Every distinct short chunk as its key, with its count, in no particular order.
    pub fn short(&self) -> impl Iterator<Item = (u128, u64)> {
        self.slots.iter().filter(|slot| slot.count > 0).map(|slot| (slot.key(), slot.count))
    }

    /// Every distinct chunk too long for a key, with its count, in no particular order.
    pub fn long(&self) -> impl Iterator<Item = (&[u8], u64)> {
        self.long.iter().map(|(chunk, &count)| (&chunk[..], count))
    }

    /// Total length in bytes of the distinct chunks.
    pub fn distinct_bytes(&self) -> usize {
        let short: usize = self.short().map(|(key, _)| key_len(key)).sum();
        short + self.long.keys().map(|chunk| chunk.len()).sum::<usize>()
    }
}

/// Count the chunks of all documents that `next_batch` yields, on `num_threads` threads besides the calling one.
///
/// `next_batch` runs on the calling thread; its error, or that of the splitter, ends the count.
pub fn count_chunks<E: From<Error> + Send>(
    splitter: &Splitter,
    num_threads: usize,
    mut next_batch: impl FnMut() -> std::result::Result<Option<Batch>, E>,
) -> std::result::Result<ChunkCounts, E> {
    let num_threads = num_threads.max(1);
    let failed = AtomicBool::new(false);
    let (sender, receiver) = sync_channel::<Batch>(QUEUED_PER_THREAD * num_threads);
    let receiver = Mutex::new(receiver);
    thread::scope(|scope| {
        let work = || count_batches(splitter, &receiver, &failed);
        let workers: Vec<_> = (0..num_threads).map(|_| scope.spawn(work)).collect();
        let mut fed = Ok(());
        while !failed.load(Ordering::Relaxed) {
            match next_batch() {
                Ok(Some(batch)) => {
                    if sender.send(batch).is_err() {
                        break;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    failed.store(true, Ordering::Relaxed);
                    fed = Err(error);
                }
            }
        }
        drop(sender);
        let mut total: Option<ChunkCounts> = None;
        for worker in workers {
            let counts = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            match &mut total {
                Some(total) => total.merge(counts),
                None => total = Some(counts),
            }
        }
        fed.map(|()| total.unwrap_or_default())
    })
}

/// What one thread does: count the batches it gets hold of until there are no more.
///
/// After a failure of any thread it still empties the queue, so that the sender never waits for room in it.
fn count_batches(splitter: &Splitter, receiver: &Mutex<Receiver<Batch>>, failed: &AtomicBool) -> Result<ChunkCounts> {
    let splitter = splitter.clone(); // a regex shared by threads would make them wait for its scratch space
    let mut counts = ChunkCounts::default();
    let mut result = Ok(());
    loop {
        let batch = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(batch) = batch else {
            return result.map(|()| counts);
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
    use super::*;
    use crate::scanner::family_pattern;

    fn splitter() -> Splitter {
        Splitter::new(&family_pattern(2)).unwrap()
    }

    fn as_map(counts: &ChunkCounts) -> HashMap<Vec<u8>, u64> {
        let short = counts.short().map(|(key, count)| (key.to_le_bytes()[..key_len(key)].to_vec(), count));
        short.chain(counts.long().map(|(chunk, count)| (chunk.to_vec(), count))).collect()
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
            let counts = count_chunks(&splitter(), num_threads, || Ok::<_, Error>(batches.next())).unwrap();
            assert_eq!(as_map(&counts), expected);
            assert_eq!(counts.distinct_bytes(), expected.keys().map(Vec::len).sum::<usize>());
        }
    }

    #[test]
    fn the_documents_of_a_batch_are_split_one_by_one() {
        let mut batch = Batch::default();
        ["ab", "", "cd"].into_iter().for_each(|document| batch.push(document));
        assert_eq!(batch.documents().collect::<Vec<_>>(), ["ab", "", "cd"]);
        let mut batches = [batch].into_iter();
        let counts = count_chunks(&splitter(), 1, || Ok::<_, Error>(batches.next())).unwrap();
        assert_eq!(as_map(&counts), HashMap::from([(b"ab".to_vec(), 1), (b"cd".to_vec(), 1)]));
    }

    #[test]
    fn an_error_of_the_source_ends_the_count() {
        let documents = documents();
        let mut batches = batches(&documents);
        let result = count_chunks(&splitter(), 2, || batches.next().map(Some).ok_or(Error::Stopped));
        assert_eq!(result.err(), Some(Error::Stopped));
    }

    #[test]
    fn an_error_of_the_regex_engine_ends_the_count_of_an_endless_source() {
        let splitter = Splitter::regex(&family_pattern(2)).unwrap();
        let spaces = " ".repeat(2_000_000); // more than the engine's stack takes
        let result = count_chunks(&splitter, 2, || {
            let mut batch = Batch::default();
            batch.push(&spaces);
            Ok::<_, Error>(Some(batch))
        });
        assert!(matches!(result.err(), Some(Error::Split(_))));
    }
}
