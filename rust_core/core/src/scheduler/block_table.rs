//! One owner's logical -> physical blocks. The table owns a reference on each; dropping it gives
//! them back, last block first, so that a prefix outlives its continuation in the cache.

use crate::scheduler::block_pool::{BlockId, SharedPool};

/// See the module doc. Growing is O(new blocks), everything else O(1).
#[derive(Debug)]
pub struct BlockTable {
    pool: SharedPool,
    blocks: Vec<BlockId>,
}

impl BlockTable {
    /// An empty table with room for `capacity` blocks.
    #[must_use]
    pub fn with_capacity(pool: SharedPool, capacity: usize) -> Self {
        Self {
            pool,
            blocks: Vec::with_capacity(capacity),
        }
    }

    /// The physical blocks in logical order.
    #[must_use]
    pub fn block_ids(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Adds references on blocks that hold the right contents already.
    pub fn share(&mut self, ids: &[BlockId]) {
        let mut pool = self.pool.lock();
        for &id in ids {
            pool.acquire(id);
            self.blocks.push(id);
        }
    }

    /// Appends one fresh block. None, and no change, if the pool has none.
    pub fn grow(&mut self) -> Option<BlockId> {
        let id = self.pool.lock().allocate()?;
        self.blocks.push(id);
        Some(id)
    }

    /// Appends `count` fresh blocks, all or none; false if the pool has too few.
    #[must_use]
    pub fn grow_by(&mut self, count: usize) -> bool {
        let mut pool = self.pool.lock();
        if pool.num_free() < count {
            return false;
        }
        self.blocks
            .extend((0..count).map_while(|_| pool.allocate()));
        true
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        if self.blocks.is_empty() {
            return;
        }
        let mut pool = self.pool.lock();
        for &id in self.blocks.iter().rev() {
            pool.release(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growing_is_all_or_nothing_and_drop_frees() {
        let pool = SharedPool::new(3);
        let mut table = BlockTable::with_capacity(pool.clone(), 3);
        assert!(table.grow_by(2));
        assert!(!table.grow_by(2));
        assert_eq!(table.block_ids(), [0, 1]);
        assert_eq!(table.grow(), Some(2));
        assert_eq!(table.grow(), None);
        drop(table);
        assert_eq!(pool.lock().num_free(), 3);
    }

    #[test]
    fn sharing_adds_references() {
        let pool = SharedPool::new(2);
        let mut a = BlockTable::with_capacity(pool.clone(), 2);
        assert!(a.grow_by(2));
        let mut b = BlockTable::with_capacity(pool.clone(), 2);
        b.share(&a.block_ids()[..1]);
        drop(a);
        assert_eq!(pool.lock().ref_count(0), 1);
        assert_eq!(pool.lock().num_free(), 1);
        drop(b);
        assert_eq!(pool.lock().num_free(), 2);
    }
}
