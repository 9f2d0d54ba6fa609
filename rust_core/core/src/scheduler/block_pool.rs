//! The KV blocks: reference counts, the names of full ones, and the free list.
//!
//! A block with no reference is free. A free block that still has a name keeps its contents and can
//! be revived by a prefix hit until it is handed out again; the list is in order of release, so the
//! least recently used goes first. Nameless blocks go to the front, since they hold nothing worth
//! keeping.
//!
//! Every verb is O(1) in the pool's size. The map of names has room for twice the blocks from the
//! start, so that it neither grows nor rehashes in service.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::scheduler::free_list::FreeList;
use crate::scheduler::prefix_cache::BlockHash;

/// Index of a physical block.
pub(super) type BlockId = u32;

#[derive(Debug, Clone, Copy, Default)]
struct Block {
    ref_count: u32,
    hash: Option<BlockHash>,
}

/// Block names are keyed hashes already: hashing them again would be waste.
#[derive(Debug, Default, Clone)]
struct PassThrough(u64);

impl Hasher for PassThrough {
    fn write(&mut self, bytes: &[u8]) {
        let mut low = [0; 8];
        low.copy_from_slice(&bytes[..8]);
        self.0 = u64::from_ne_bytes(low);
    }
    fn write_u128(&mut self, value: u128) {
        self.0 = value as u64;
    }
    fn finish(&self) -> u64 {
        self.0
    }
}

/// See the module doc.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    free: FreeList,
    by_hash: HashMap<BlockHash, BlockId, BuildHasherDefault<PassThrough>>,
}

impl BlockPool {
    /// A pool of `num_blocks` free, nameless blocks.
    #[must_use]
    pub fn new(num_blocks: usize) -> Self {
        Self {
            blocks: vec![Block::default(); num_blocks],
            free: FreeList::full(num_blocks),
            by_hash: HashMap::with_capacity_and_hasher(2 * num_blocks, Default::default()),
        }
    }

    /// All blocks, free or not.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks without a reference, named ones included.
    #[must_use]
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Blocks whose contents have a name.
    #[must_use]
    pub fn num_cached(&self) -> usize {
        self.by_hash.len()
    }

    /// Hands out a block with one reference, forgetting its old contents. None: all are in use.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let id = self.free.pop_front()?;
        let block = &mut self.blocks[id as usize];
        debug_assert_eq!(block.ref_count, 0);
        if let Some(hash) = block.hash.take() {
            self.by_hash.remove(&hash);
        }
        block.ref_count = 1;
        Some(id)
    }

    /// Adds a reference; a free block is revived.
    pub fn acquire(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        if block.ref_count == 0 {
            self.free.remove(id);
        }
        block.ref_count += 1;
    }

    /// Gives a reference back. The last one frees the block.
    ///
    /// # Panics
    /// If the block has no holder.
    pub fn release(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        assert!(block.ref_count > 0, "block {id} is released twice");
        block.ref_count -= 1;
        if block.ref_count == 0 {
            if block.hash.is_some() {
                self.free.push_back(id);
            } else {
                self.free.push_front(id);
            }
        }
    }

    /// References held on a block.
    #[must_use]
    pub fn ref_count(&self, id: BlockId) -> u32 {
        self.blocks[id as usize].ref_count
    }

    /// The name of a block's contents, if it has one.
    #[must_use]
    pub fn hash_of(&self, id: BlockId) -> Option<BlockHash> {
        self.blocks[id as usize].hash
    }

    /// The block that holds the named contents.
    #[must_use]
    pub fn lookup(&self, hash: BlockHash) -> Option<BlockId> {
        self.by_hash.get(&hash).copied()
    }

    /// Names a block in use. The first block of a name keeps it: a duplicate stays nameless and
    /// goes back to the front of the free list when it is released.
    pub fn set_hash(&mut self, id: BlockId, hash: BlockHash) {
        let block = &mut self.blocks[id as usize];
        debug_assert!(block.ref_count > 0, "naming free block {id}");
        debug_assert!(
            block.hash.is_none_or(|old| old == hash),
            "renaming block {id}"
        );
        if let std::collections::hash_map::Entry::Vacant(entry) = self.by_hash.entry(hash) {
            entry.insert(id);
            block.hash = Some(hash);
        }
    }

    /// Forgets the name of a block; a free one is handed out next.
    pub fn forget(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        if let Some(hash) = block.hash.take() {
            self.by_hash.remove(&hash);
        }
        if block.ref_count == 0 {
            self.free.remove(id);
            self.free.push_front(id);
        }
    }

    /// Forgets every name; blocks in use stay in use. O(pool).
    pub fn reset_cache(&mut self) {
        self.by_hash.clear();
        for block in &mut self.blocks {
            block.hash = None;
        }
    }

    /// Checks that blocks are conserved and names agree. `references[id]` is how often tables hold
    /// the block. O(pool).
    pub fn check_integrity(&self, references: &[u32]) -> Result<()> {
        self.free.check_integrity()?;
        let mut named = 0;
        for (id, (block, &expected)) in self.blocks.iter().zip(references).enumerate() {
            if block.ref_count != expected {
                return Err(Error::integrity(format!(
                    "block {id}: ref_count {}, but {expected} references in tables",
                    block.ref_count
                )));
            }
            if (block.ref_count == 0) != self.free.contains(id as u32) {
                return Err(Error::integrity(format!(
                    "block {id}: ref_count {} disagrees with the free list",
                    block.ref_count
                )));
            }
            if let Some(hash) = block.hash {
                named += 1;
                if self.lookup(hash) != Some(id as u32) {
                    return Err(Error::integrity(format!(
                        "block {id}: its name leads elsewhere"
                    )));
                }
            }
        }
        if named != self.by_hash.len() {
            return Err(Error::integrity(format!(
                "{} names, but {named} named blocks",
                self.by_hash.len()
            )));
        }
        Ok(())
    }
}

/// The pool as its owners share it: block tables give their references back when they drop.
///
/// One thread drives the core, so the lock is never contended; it is taken when a
/// request crosses a block boundary, not per token. Never drop a table while holding the guard.
#[derive(Debug, Clone)]
pub struct SharedPool(Arc<Mutex<BlockPool>>);

impl SharedPool {
    /// Wraps a new pool.
    #[must_use]
    pub fn new(num_blocks: usize) -> Self {
        Self(Arc::new(Mutex::new(BlockPool::new(num_blocks))))
    }

    /// Exclusive access. A panic elsewhere does not poison it: `check_integrity` is the judge.
    pub fn lock(&self) -> MutexGuard<'_, BlockPool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::prefix_cache::BlockHasher;

    fn names(count: u32) -> Vec<BlockHash> {
        let hasher = BlockHasher::with_key((0, 0));
        (0..count)
            .map(|i| hasher.extend(hasher.root(None), [i]))
            .collect()
    }

    #[test]
    fn named_free_blocks_are_revived_or_evicted_in_order_of_release() {
        let mut pool = BlockPool::new(3);
        let names = names(3);
        let ids: Vec<_> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        assert_eq!(pool.allocate(), None);
        for i in [1, 0, 2] {
            pool.set_hash(ids[i], names[i]);
            pool.release(ids[i]);
        }
        assert_eq!((pool.num_free(), pool.num_cached()), (3, 3));
        pool.acquire(pool.lookup(names[1]).unwrap());
        // 0 was released before 2.
        assert_eq!(pool.allocate(), Some(ids[0]));
        assert_eq!(pool.lookup(names[0]), None);
        assert_eq!(pool.lookup(names[2]), Some(ids[2]));
        pool.check_integrity(&[1, 1, 0]).unwrap();
    }

    #[test]
    fn nameless_blocks_are_reused_first() {
        let mut pool = BlockPool::new(2);
        let (a, b) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        pool.set_hash(a, names(1)[0]);
        pool.release(a);
        pool.release(b);
        assert_eq!(pool.allocate(), Some(b));
    }

    #[test]
    fn forgotten_blocks_are_reused_first() {
        let mut pool = BlockPool::new(3);
        let ids: Vec<_> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        for (&id, &name) in ids.iter().zip(&names(3)) {
            pool.set_hash(id, name);
        }
        pool.release(ids[0]);
        pool.release(ids[1]);
        pool.forget(ids[1]);
        pool.forget(ids[2]);
        assert_eq!(pool.num_cached(), 1);
        assert_eq!(pool.allocate(), Some(ids[1]));
        pool.check_integrity(&[0, 1, 1]).unwrap();
    }

    #[test]
    fn a_name_belongs_to_its_first_block() {
        let mut pool = BlockPool::new(2);
        let (a, b) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        let name = names(1)[0];
        pool.set_hash(a, name);
        pool.set_hash(b, name);
        assert_eq!((pool.lookup(name), pool.hash_of(b)), (Some(a), None));
        pool.check_integrity(&[1, 1]).unwrap();
    }

    #[test]
    fn shared_blocks_are_freed_by_the_last_owner() {
        let mut pool = BlockPool::new(1);
        let id = pool.allocate().unwrap();
        pool.acquire(id);
        pool.release(id);
        assert_eq!(pool.num_free(), 0);
        pool.release(id);
        assert_eq!(pool.num_free(), 1);
    }

    #[test]
    #[should_panic(expected = "released twice")]
    fn double_release_panics() {
        let mut pool = BlockPool::new(1);
        let id = pool.allocate().unwrap();
        pool.release(id);
        pool.release(id);
    }

    #[test]
    fn integrity_notices_a_leak() {
        let mut pool = BlockPool::new(2);
        pool.allocate().unwrap();
        assert!(pool.check_integrity(&[0, 0]).is_err());
    }
}
