//! Counts in classes: up to 31 a class is one count, above it spans at most a sixteenth of its counts.

const STEPS_PER_DOUBLING: usize = 16;

/// One more than the class of the largest count.
pub const CLASSES: usize = 976;

/// The class of a count. A larger count never has a smaller class.
pub fn class_of(count: u64) -> usize {
    match count.checked_ilog2() {
        Some(doublings @ 4..) => {
            let step = (count >> (doublings - 4)) as usize % STEPS_PER_DOUBLING;
            (doublings as usize - 3) * STEPS_PER_DOUBLING + step
        }
        _ => count as usize,
    }
}

/// The least count of a class.
pub fn least_of(class: usize) -> u64 {
    let (doublings, step) = (class / STEPS_PER_DOUBLING, class % STEPS_PER_DOUBLING);
    match doublings {
        0 => class as u64,
        _ => ((STEPS_PER_DOUBLING + step) as u64) << (doublings - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_follow_the_order_of_counts_without_a_gap() {
        for class in 0..CLASSES {
            let least = least_of(class);
            assert_eq!(class_of(least), class);
            if class > 0 {
                assert_eq!(class_of(least - 1), class - 1);
            }
        }
        assert_eq!(class_of(u64::MAX), CLASSES - 1);
    }
}
