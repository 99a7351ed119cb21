//! Work on several threads.

use std::sync::atomic::AtomicU64;

use super::words::Occurrence;

/// Call `work` with each item, the first on this thread and the others on those of the pool.
pub fn side_by_side<T: Send>(items: impl IntoIterator<Item = T>, work: impl Fn(T) + Sync) {
    let mut items = items.into_iter();
    let Some(first) = items.next() else {
        return;
    };
    let Some(second) = items.next() else {
        return work(first); // nobody to wake
    };
    let work = &work;
    rayon::in_place_scope(|scope| {
        for item in std::iter::once(second).chain(items) {
            scope.spawn(move |_| work(item));
        }
        work(first);
    });
}

/// The same memory for threads that each write to other places of it.
pub fn shared(occurrences: &mut [Occurrence]) -> &[AtomicU64] {
    const { assert!(align_of::<AtomicU64>() == align_of::<Occurrence>()) };
    let shared: *mut [Occurrence] = occurrences;
    // SAFETY: an `Occurrence` is a u64, whose size is that of an `AtomicU64`, and so is its alignment. The
    // only borrow of the memory is passed on.
    unsafe { &*(shared as *const [AtomicU64]) }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_item_is_worked_on_once() {
        for items in [0, 1, 2, 100] {
            let done: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
            side_by_side(&done, |item| {
                item.fetch_add(1, Ordering::Relaxed);
            });
            assert!(done.into_iter().all(|item| item.into_inner() == 1));
        }
    }

    #[test]
    fn what_threads_write_is_there_afterwards() {
        let mut occurrences = vec![Occurrence::default(); 1000];
        let view = shared(&mut occurrences);
        side_by_side(0..4, |thread| {
            for at in (thread..1000).step_by(4) {
                view[at].store(at as u64, Ordering::Relaxed);
            }
        });
        assert!(occurrences.iter().map(|occurrence| occurrence.0).eq(0..1000));
    }
}
