//! One at a time for each name, names side by side.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// A lock for each name that somebody holds or waits for; no others are kept.
#[derive(Debug)]
pub(crate) struct OneEach<K>(Mutex<HashMap<K, Arc<Mutex<()>>>>);

impl<K> Default for OneEach<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<K: Clone + Eq + Hash> OneEach<K> {
    /// Runs `work` while nobody else works under this name.
    pub(crate) fn alone<T>(&self, name: &K, work: impl FnOnce() -> T) -> T {
        let user = User::new(self, name);
        let _guard = lock(&user.mutex);
        work()
    }

    /// Runs `work` at once and tells it whether nobody else works under this name; if so nobody begins meanwhile.
    pub(crate) fn at_once<T>(&self, name: &K, work: impl FnOnce(bool) -> T) -> T {
        let user = User::new(self, name);
        let guard = match user.mutex.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        work(guard.is_some())
    }
}

/// One that uses a name's lock; the last of them takes it out of the table.
struct User<'a, K: Clone + Eq + Hash> {
    all: &'a OneEach<K>,
    name: K,
    mutex: Arc<Mutex<()>>,
}

impl<'a, K: Clone + Eq + Hash> User<'a, K> {
    fn new(all: &'a OneEach<K>, name: &K) -> Self {
        let mutex = Arc::clone(lock(&all.0).entry(name.clone()).or_default());
        Self { all, name: name.clone(), mutex }
    }
}

impl<K: Clone + Eq + Hash> Drop for User<'_, K> {
    fn drop(&mut self) {
        let mut all = lock(&self.all.0);
        // The table's and ours; others come by only under the table's lock.
        if Arc::strong_count(&self.mutex) <= 2 {
            all.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_in_use_is_told_and_another_is_free() {
        let each = OneEach::default();

        each.alone(&1, || {
            assert!(!each.at_once(&1, |alone| alone));
            assert!(each.at_once(&2, |alone| alone));
        });

        assert!(each.at_once(&1, |alone| alone));
    }

    #[test]
    fn a_name_nobody_uses_is_not_kept() {
        let each = OneEach::default();

        each.alone(&1, || each.at_once(&1, |_| ()));

        assert!(lock(&each.0).is_empty());
    }
}
