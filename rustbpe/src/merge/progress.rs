//! Tells the caller how far the training is, often enough for Ctrl-C to feel prompt.

/// Positions looked at between two calls of the check: a millisecond or two of work.
const WORK_BETWEEN_CHECKS: usize = 1 << 16;

/// The caller's check, and the work done since it was last called.
pub struct Progress<'c, E> {
    check: &'c mut dyn FnMut(usize) -> Result<(), E>,
    learned: usize,
    work: usize,
}

impl<'c, E> Progress<'c, E> {
    pub fn new(check: &'c mut dyn FnMut(usize) -> Result<(), E>) -> Self {
        Self { check, learned: 0, work: 0 }
    }

    /// `learned` merges are done.
    pub fn reach(&mut self, learned: usize) -> Result<(), E> {
        (self.learned, self.work) = (learned, 0);
        (self.check)(learned)
    }

    /// So many positions more were looked at.
    #[inline]
    pub fn spend(&mut self, positions: usize) -> Result<(), E> {
        self.work += positions;
        if self.work < WORK_BETWEEN_CHECKS { Ok(()) } else { self.reach(self.learned) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_is_called_after_every_stretch_of_work_and_its_error_comes_through() {
        let mut calls = Vec::new();
        let mut check = |learned| {
            calls.push(learned);
            if calls.len() < 3 { Ok(()) } else { Err("stop") }
        };
        let mut progress = Progress::new(&mut check);
        progress.reach(7).unwrap();
        for _ in 0..WORK_BETWEEN_CHECKS {
            progress.spend(1).unwrap();
        }
        assert_eq!(progress.spend(WORK_BETWEEN_CHECKS), Err("stop"));
        assert_eq!(calls, [7, 7, 7]);
    }
}
