//! Names for the contents of full blocks: chained, keyed 128-bit hashes.
//!
//! A block's name covers its tokens and the name of the block before it, so equal names mean equal
//! prefixes. The key is a secret of the process: no outsider can construct two prompts whose
//! names collide, which would let one request read another's cache. An optional salt enters before
//! the first block and splits the cache between tenants.
//!
//! One block costs one SipHash-1-3 over `16 + 4 * block_size` bytes, far less than computing them.
//! A request's names are kept, so nothing is hashed twice.

use std::hash::{BuildHasher, Hasher, RandomState};

use siphasher::sip128::{Hasher128, SipHasher13};

/// The name of a full block's contents, with everything before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(u128);

/// Computes block names under one secret key.
#[derive(Debug, Clone)]
pub struct BlockHasher {
    key: (u64, u64),
}

impl BlockHasher {
    /// A hasher with a secret of its own.
    #[must_use]
    pub fn new() -> Self {
        // RandomState is seeded by the operating system; its SipHash whitens the counter that
        // distinguishes two states of one thread.
        let word = || RandomState::new().build_hasher().finish();
        Self {
            key: (word(), word()),
        }
    }

    /// A hasher with a fixed key, for reproducible tests.
    #[must_use]
    pub fn with_key(key: (u64, u64)) -> Self {
        Self { key }
    }

    /// The name before the first block's: empty, or the salt's.
    #[must_use]
    pub fn root(&self, salt: Option<&str>) -> BlockHash {
        let mut hasher = self.hasher();
        if let Some(salt) = salt {
            // The length byte keeps the empty salt apart from no salt.
            hasher.write_u8(1);
            hasher.write(salt.as_bytes());
        }
        BlockHash(hasher.finish128().as_u128())
    }

    /// The name of the block that holds `tokens` and follows `parent`. O(tokens).
    #[must_use]
    pub fn extend(&self, parent: BlockHash, tokens: impl IntoIterator<Item = u32>) -> BlockHash {
        let mut hasher = self.hasher();
        hasher.write_u64(parent.0 as u64);
        hasher.write_u64((parent.0 >> 64) as u64);
        for token in tokens {
            hasher.write_u32(token);
        }
        BlockHash(hasher.finish128().as_u128())
    }

    fn hasher(&self) -> SipHasher13 {
        SipHasher13::new_with_keys(self.key.0, self.key.1)
    }
}

impl Default for BlockHasher {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_prefixes_have_equal_names_and_nothing_else_has() {
        let hasher = BlockHasher::with_key((1, 2));
        let root = hasher.root(None);
        let a = hasher.extend(root, [1, 2]);
        assert_eq!(a, hasher.extend(root, [1, 2]));
        assert_ne!(a, hasher.extend(root, [2, 1]));
        assert_ne!(hasher.extend(a, [3, 4]), hasher.extend(root, [3, 4]));
    }

    #[test]
    fn salts_split_the_cache() {
        let hasher = BlockHasher::with_key((1, 2));
        let roots = [None, Some(""), Some("a"), Some("b")].map(|salt| hasher.root(salt));
        for (i, a) in roots.iter().enumerate() {
            for b in &roots[..i] {
                assert_ne!(a, b);
            }
        }
    }

    #[test]
    fn every_process_has_its_own_key() {
        let (a, b) = (BlockHasher::new(), BlockHasher::new());
        assert_ne!(a.extend(a.root(None), [1]), b.extend(b.root(None), [1]));
    }
}
