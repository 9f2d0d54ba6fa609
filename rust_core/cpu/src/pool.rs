//! Pool: fork and join for regions of a few microseconds.
//!
//! `run(tasks, f)` calls f(0) .. f(tasks - 1), once each, on the caller and the workers, and returns
//! when all are done. Tasks are claimed one by one, so a worker that is slow or asleep costs
//! nothing but its help: the caller never waits for one that has not begun. Which thread runs a
//! task has no influence on results, as every task's arithmetic is its own.
//!
//! `run_shares` gives each thread a share of the tasks, which it claims before any of another's: what
//! one region leaves in a core's cache the next one then finds there.
//!
//! Workers spin for `SPIN` after a region, since the next one of a model's step comes within
//! microseconds, then sleep until woken; idle costs no CPU time. A region costs one atomic
//! increment per task, two to open and close it, and, if a worker sleeps, its wake-up.
//!
//! The protocol: `epoch` is odd while a region is open. A worker that sees an odd epoch counts
//! itself in `active`, then reads `epoch` again; only if that still is the same does it touch the
//! job. The caller closes the region by making `epoch` even, then waits until `active` is zero.
//! All four are sequentially consistent, so either the worker sees the region closed or the caller
//! sees the worker active. Hence the job's borrow outlives every use of it.

use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// Time a worker spins before it sleeps: longer than the gaps inside one step, far shorter than a person
/// or a meter notices.
const SPIN: Duration = Duration::from_micros(60);

type Task = dyn Fn(usize) + Sync;

struct Job {
    task: *const Task,
    /// At most one a thread.
    shares: *const [Range<usize>],
}

/// Number of claimed tasks of a share; alone in its cache line.
#[repr(align(64))]
struct Claimed(AtomicUsize);

struct Shared {
    epoch: AtomicUsize,
    active: AtomicUsize,
    claimed: Vec<Claimed>,
    sleeping: AtomicUsize,
    stop: AtomicBool,
    panicked: AtomicBool,
    job: UnsafeCell<Job>,
}

// SAFETY: `job` is written only by the thread that holds the pool's lock, with the region closed
// and nobody active, and read only by threads counted in `active` while it is open.
unsafe impl Sync for Shared {}
// SAFETY: the raw pointers in `job` are used only as above.
unsafe impl Send for Shared {}

impl Shared {
    /// Claim and run tasks until none is left, beginning with a thread's own.
    fn work(&self, thread: usize, task: &Task, shares: &[Range<usize>]) {
        let done = catch_unwind(AssertUnwindSafe(|| {
            for i in 0..shares.len() {
                let share = (thread + i) % shares.len();
                let claimed = &self.claimed[share].0;
                while let Some(i) = shares[share].clone().nth(claimed.fetch_add(1, SeqCst)) {
                    task(i);
                }
            }
        }));
        if done.is_err() {
            self.panicked.store(true, SeqCst);
            // The others need not go on.
            for (claimed, share) in self.claimed.iter().zip(shares) {
                claimed.0.store(share.len(), SeqCst);
            }
        }
    }

    fn worker(&self, thread: usize) {
        let mut seen = 0;
        loop {
            let Some(epoch) = self.wait_for_region(seen) else {
                return;
            };
            self.active.fetch_add(1, SeqCst);
            if self.epoch.load(SeqCst) == epoch {
                // SAFETY: the region is open and this thread is active: see the protocol.
                let (task, shares) = unsafe {
                    let job = &*self.job.get();
                    (&*job.task, &*job.shares)
                };
                self.work(thread, task, shares);
            }
            self.active.fetch_sub(1, SeqCst);
            seen = epoch;
        }
    }

    /// The epoch of an open region that is not `seen`; None to stop.
    fn wait_for_region(&self, seen: usize) -> Option<usize> {
        let open = || {
            let epoch = self.epoch.load(SeqCst);
            (epoch % 2 == 1 && epoch != seen).then_some(epoch)
        };
        let start = Instant::now();
        loop {
            for _ in 0..32 {
                if let Some(epoch) = open() {
                    return Some(epoch);
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= SPIN {
                break;
            }
        }
        self.sleeping.fetch_add(1, SeqCst);
        let epoch = loop {
            if self.stop.load(SeqCst) {
                break None;
            }
            if let Some(epoch) = open() {
                break Some(epoch);
            }
            std::thread::park();
        };
        self.sleeping.fetch_sub(1, SeqCst);
        epoch
    }
}

fn num_tasks(shares: &[Range<usize>]) -> usize {
    shares.iter().map(Range::len).sum()
}

/// Worker threads, stopped when dropped.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
}

impl Pool {
    /// A pool of `num_threads` threads, of which the caller of `run` is one.
    pub fn new(num_threads: usize) -> Pool {
        fn nothing(_: usize) {}
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            active: AtomicUsize::new(0),
            claimed: (0..num_threads.max(1))
                .map(|_| Claimed(AtomicUsize::new(0)))
                .collect(),
            sleeping: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            job: UnsafeCell::new(Job {
                task: &nothing,
                shares: &[],
            }),
        });
        // A worker that cannot be started is done without: the caller does its share.
        let threads: Vec<_> = (1..num_threads.max(1))
            .map_while(|i| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("octavo-cpu-{i}"))
                    .spawn(move || shared.worker(i))
                    .ok()
            })
            .collect();
        let handles = threads.iter().map(|t| t.thread().clone()).collect();
        Pool {
            shared,
            threads,
            handles,
        }
    }

    /// Threads that work on a region, the caller included.
    pub fn num_threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Run the tasks of all shares, of which thread i takes the i-th before any other; panics if a
    /// task did.
    pub fn run_shares(&mut self, shares: &[Range<usize>], task: &(dyn Fn(usize) + Sync)) {
        let tasks = num_tasks(shares);
        if self.threads.is_empty() || tasks <= 1 || shares.len() > self.num_threads() {
            shares.iter().cloned().flatten().for_each(task);
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; the reference is not used after this call, which
        // waits until nobody is active.
        let erased: &'static Task =
            unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static Task>(task) };
        // SAFETY: `&mut self` makes this the only opener; the last region is closed and left.
        unsafe {
            *shared.job.get() = Job {
                task: erased,
                shares,
            };
        }
        for claimed in &shared.claimed[..shares.len()] {
            claimed.0.store(0, SeqCst);
        }
        shared.epoch.fetch_add(1, SeqCst);
        if shared.sleeping.load(SeqCst) > 0 {
            let wanted = self.handles.len().min(tasks - 1);
            self.handles[..wanted].iter().for_each(Thread::unpark);
        }
        shared.work(0, erased, shares);
        shared.epoch.fetch_add(1, SeqCst);
        let mut spins = 0u32;
        while shared.active.load(SeqCst) != 0 {
            spins += 1;
            if spins < 4096 {
                std::hint::spin_loop();
            } else {
                // The worker has probably lost its core: let it have this one.
                std::thread::yield_now();
            }
        }
        if shared.panicked.swap(false, SeqCst) {
            resume_unwind(Box::new("a CPU kernel panicked"));
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // A worker's panic was reported by the region it happened in.
            let _ = thread.join();
        }
    }
}

// ------------------------------------------------------------------------- the process's own pool

static POOL: Mutex<Option<Pool>> = Mutex::new(None);

fn default_num_threads() -> usize {
    // Heeds the affinity mask and the cgroup's quota.
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

fn lock() -> MutexGuard<'static, Option<Pool>> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Use `n` threads (0: as many as this process may) from the next region on.
pub fn set_num_threads(n: usize) {
    let n = if n == 0 { default_num_threads() } else { n };
    let mut pool = lock();
    if pool.as_ref().map(Pool::num_threads) != Some(n) {
        *pool = Some(Pool::new(n));
    }
}

/// Threads of the pool, or of the one that would be made.
fn threads_of(pool: Option<&Pool>) -> usize {
    pool.map_or_else(default_num_threads, Pool::num_threads)
}

/// Threads that regions use.
pub fn num_threads() -> usize {
    threads_of(lock().as_ref())
}

/// Threads that a region opened now would have: one where the pool is taken, as inside a task.
pub fn free_threads() -> usize {
    match POOL.try_lock() {
        Ok(pool) => threads_of(pool.as_ref()),
        Err(TryLockError::Poisoned(pool)) => threads_of(pool.into_inner().as_ref()),
        Err(TryLockError::WouldBlock) => 1,
    }
}

/// Run tasks 0..tasks on the process's pool. While another thread is in a region, alone.
pub fn run(tasks: usize, task: impl Fn(usize) + Sync) {
    run_shares(std::slice::from_ref(&(0..tasks)), task);
}

/// The same for tasks of which each thread takes its share first; at most as many as threads.
pub fn run_shares(shares: &[Range<usize>], task: impl Fn(usize) + Sync) {
    let free = match POOL.try_lock() {
        _ if num_tasks(shares) <= 1 => None,
        Ok(pool) => Some(pool),
        // Left by a task's panic, which has been reported; the pool itself is whole.
        Err(TryLockError::Poisoned(pool)) => Some(pool.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    };
    match free {
        Some(mut pool) => pool
            .get_or_insert_with(|| Pool::new(default_num_threads()))
            .run_shares(shares, &task),
        None => shares.iter().cloned().flatten().for_each(task),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let mut pool = Pool::new(threads);
            let rounds = if cfg!(miri) { 3 } else { 300 };
            for round in 0..rounds {
                let tasks = round % 37;
                let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                // One share, or a few that are uneven.
                let cut = |i: usize| i * i * tasks / (round % threads + 1).pow(2);
                let shares: Vec<_> = (0..round % threads + 1)
                    .map(|i| cut(i)..cut(i + 1))
                    .collect();
                pool.run_shares(&shares, &|i| {
                    counts[i].fetch_add(1, SeqCst);
                });
                assert!(counts.iter().all(|c| c.load(SeqCst) == 1), "{threads}");
                if round % 50 == 0 && !cfg!(miri) {
                    // Long enough for the workers to fall asleep.
                    std::thread::sleep(4 * SPIN);
                }
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(3);
        let failed = catch_unwind(AssertUnwindSafe(|| {
            pool.run_shares(&[0..5, 5..16], &|i| assert!(i != 7, "task 7"));
        }));
        assert!(failed.is_err());
        let sum = AtomicUsize::new(0);
        pool.run_shares(std::slice::from_ref(&(0..16)), &|i| {
            sum.fetch_add(i, SeqCst);
        });
        assert_eq!(sum.load(SeqCst), 120);
    }

    #[test]
    fn nested_and_concurrent_regions_do_not_deadlock() {
        set_num_threads(2);
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    run(4, |_| {
                        run(4, |_| {
                            sum.fetch_add(1, SeqCst);
                        });
                    });
                });
            }
        });
        assert_eq!(sum.load(SeqCst), 48);
    }
}
