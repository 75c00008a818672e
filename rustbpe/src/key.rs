//! Short chunks as one integer.
//!
//! Nearly every chunk of real text has at most 15 bytes. Such a chunk is a `u128`: its bytes from the low end on,
//! its length in the top byte. Tables keyed by it compare in one step and never follow a pointer.

/// Longest chunk, in bytes, that fits a key.
pub const MAX_SHORT: usize = 15;

const fn masks() -> [u128; 16] {
    let mut masks = [0; 16];
    let mut len = 1;
    while len < 16 {
        masks[len] = (masks[len - 1] << 8) | 0xff;
        len += 1;
    }
    masks
}

static MASKS: [u128; 16] = masks();

/// Key of `text[start..end]`, which must be at most `MAX_SHORT` bytes long. Never 0 for a chunk that is not empty.
#[inline(always)]
pub fn short_key(text: &[u8], start: usize, end: usize) -> u128 {
    let len = end - start;
    debug_assert!(len <= MAX_SHORT);
    let block = match text[start..].first_chunk::<16>() {
        Some(block) => u128::from_le_bytes(*block),
        None => {
            let mut block = [0; 16];
            block[..len].copy_from_slice(&text[start..end]);
            u128::from_le_bytes(block)
        }
    };
    (block & MASKS[len & 15]) | (len as u128) << 120
}

/// Number of bytes of the chunk that `key` stands for.
pub fn key_len(key: u128) -> usize {
    (key >> 120) as usize
}

/// Well-mixed 64 bits of `key` (both halves multiplied into a 128-bit product, whose halves are combined).
#[inline(always)]
pub fn hash_key(key: u128) -> u64 {
    let low = key as u64 ^ 0x9e37_79b9_7f4a_7c15;
    let high = (key >> 64) as u64 ^ 0xd1b5_4a32_d192_ed03;
    let product = low as u128 * high as u128;
    product as u64 ^ (product >> 64) as u64
}

/// Well-mixed 64 bits of a chunk too long for a key.
pub fn hash_long(chunk: &[u8]) -> u64 {
    chunk.chunks(8).fold(chunk.len() as u64, |hash, part| {
        let mut word = [0; 8];
        word[..part.len()].copy_from_slice(part);
        hash_key((hash as u128) << 64 | u64::from_le_bytes(word) as u128)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_depend_on_the_chunk_alone() {
        let text = b"the quick brown fox jumps";
        for start in 0..text.len() {
            for end in start + 1..=(start + MAX_SHORT).min(text.len()) {
                let alone = text[start..end].to_vec();
                assert_eq!(short_key(text, start, end), short_key(&alone, 0, alone.len()));
                assert_eq!(key_len(short_key(text, start, end)), end - start);
            }
        }
    }

    #[test]
    fn trailing_nul_bytes_make_another_key() {
        assert_ne!(short_key(b"a", 0, 1), short_key(b"a\0", 0, 2));
        assert_ne!(short_key(b"\0", 0, 1), 0);
    }
}
