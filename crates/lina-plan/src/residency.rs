//! Which layers' experts stay in a device's memory and which wait in host memory.
//!
//! A layer's experts are idle until its tokens come. Where a device is too small for all of them, those of some layers
//! wait in host memory: weights, gradients and optimizer moments. Their weights are fetched ahead of use into one of
//! two slots, their gradients leave through two slots of their own, and they are updated where their moments are
//! ("ZeRO-Offload: Democratizing Billion-Scale Model Training", USENIX ATC 2021), so that weights never go back.
//!
//! The waiting layers take the slots in turn. A slot is fetched into as soon as its last layer's experts are done with,
//! while those of the other slot have yet to work. What forward leaves in the slots, backward begins with.

use crate::Direction;

/// Weights, gradients and two moments: what a device holds of experts that stay.
const RESIDENT_BLOCKS: u64 = 4;
/// Weights and gradients: what a slot holds.
const SLOT_BLOCKS: u64 = 2;

/// What a rank's device can hold and is to hold, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// What the device has.
    pub capacity_bytes: u64,
    /// What is there whatever waits: dense parameters with gradients and moments, activations, buffers.
    pub always_bytes: u64,
    /// Weights of the rank's experts of one layer; their gradients take as much, and so does each moment.
    pub layer_bytes: u64,
}

impl DeviceMemory {
    /// What the device holds of `layers` layers with experts when those of `waiting` of them wait in host memory.
    pub fn held_bytes(&self, layers: usize, waiting: usize) -> u64 {
        let resident = (layers - waiting) as u64 * RESIDENT_BLOCKS * self.layer_bytes;
        let slots = waiting.min(Residency::SLOTS) as u64 * SLOT_BLOCKS * self.layer_bytes;
        self.always_bytes.saturating_add(resident).saturating_add(slots)
    }
}

/// Where the experts of each layer are. By default all stay on the device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Residency {
    /// Layers whose experts wait in host memory, ascending.
    waiting: Vec<usize>,
}

impl Residency {
    /// Places for the experts of waiting layers, for weights and for gradients each.
    pub const SLOTS: usize = 2;

    /// As many of `layers` (those with experts, ascending) stay as fit `memory`. The waiting ones are spread evenly, the
    /// last layer first, so that what others compute covers their copies.
    ///
    /// # Errors
    /// If even with all of them waiting there is too little memory: the bytes that it takes at least.
    pub fn new(memory: &DeviceMemory, layers: &[usize]) -> Result<Self, u64> {
        let n = layers.len();
        let waiting = (0..=n)
            .find(|&waiting| memory.held_bytes(n, waiting) <= memory.capacity_bytes)
            .ok_or(memory.held_bytes(n, n))?;
        Ok(Residency { waiting: (1..=waiting).map(|number| layers[number * n / waiting - 1]).collect() })
    }

    /// Layers whose experts wait in host memory, ascending.
    pub fn waiting(&self) -> &[usize] {
        &self.waiting
    }

    /// The slot that a waiting layer's experts use; `None` if they stay on the device.
    pub fn slot(&self, layer: usize) -> Option<usize> {
        self.waiting.binary_search(&layer).ok().map(|number| number % Self::SLOTS)
    }

    /// Layers to fetch when a forward pass begins. What an earlier pass has left in the slots does not count: weights
    /// may have been updated since.
    pub fn first_fetches(&self) -> &[usize] {
        &self.waiting[..self.waiting.len().min(Self::SLOTS)]
    }

    /// The layer to fetch once `layer`'s experts have worked in `direction`, into the slot that they leave.
    pub fn fetch_after(&self, layer: usize, direction: Direction) -> Option<usize> {
        let number = self.waiting.binary_search(&layer).ok()?;
        let next = match direction {
            Direction::Forward => number + Self::SLOTS,
            Direction::Backward => number.checked_sub(Self::SLOTS)?,
        };
        self.waiting.get(next).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Goes through `layers` in `direction` and checks that each use finds its weights in its slot.
    fn pass(residency: &Residency, slots: &mut [Option<usize>], layers: &[usize], direction: Direction) -> usize {
        let mut fetches = 0;
        for &layer in layers {
            let next = residency.fetch_after(layer, direction);
            let Some(slot) = residency.slot(layer) else {
                assert_eq!(next, None, "a layer that stays frees no slot");
                continue;
            };
            assert_eq!(slots[slot], Some(layer), "fetched before use, and not yet overwritten");
            if let Some(next) = next {
                assert_eq!(residency.slot(next), Some(slot), "into the slot that has become free");
                slots[slot] = Some(next);
                fetches += 1;
            }
        }
        fetches
    }

    proptest! {
        #[test]
        fn as_many_stay_as_fit_and_never_more(
            always_bytes in 0u64..1000, layer_bytes in 1u64..100, capacity_bytes in 0u64..6000, n in 0usize..20,
        ) {
            let memory = DeviceMemory { capacity_bytes, always_bytes, layer_bytes };
            let layers: Vec<usize> = (0..n).map(|number| 2 * number + 1).collect();
            match Residency::new(&memory, &layers) {
                Ok(residency) => {
                    let waiting = residency.waiting().len();
                    prop_assert!(memory.held_bytes(n, waiting) <= capacity_bytes);
                    prop_assert!(waiting == 0 || memory.held_bytes(n, waiting - 1) > capacity_bytes);
                    prop_assert!(residency.waiting().windows(2).all(|pair| pair[0] < pair[1]));
                    prop_assert!(residency.waiting().iter().all(|layer| layers.contains(layer)));
                }
                Err(least_bytes) => {
                    prop_assert!(least_bytes > capacity_bytes);
                    prop_assert!((0..=n).all(|waiting| memory.held_bytes(n, waiting) >= least_bytes));
                }
            }
        }

        #[test]
        fn each_use_is_preceded_by_its_fetch(n in 1usize..20, waiting in 0usize..20) {
            let waiting = waiting.min(n);
            let mut memory = DeviceMemory { capacity_bytes: 0, always_bytes: 5, layer_bytes: 7 };
            memory.capacity_bytes = memory.held_bytes(n, waiting);
            let mut layers: Vec<usize> = (0..n).collect();
            let residency = Residency::new(&memory, &layers).unwrap();
            prop_assert_eq!(residency.waiting().len(), waiting);
            let mut slots = [None; Residency::SLOTS];
            for _ in 0..2 {
                let first = residency.first_fetches();
                first.iter().for_each(|&layer| slots[residency.slot(layer).unwrap()] = Some(layer));
                let forward = first.len() + pass(&residency, &mut slots, &layers, Direction::Forward);
                layers.reverse();
                let backward = pass(&residency, &mut slots, &layers, Direction::Backward);
                layers.reverse();
                prop_assert_eq!((forward, backward), (waiting, waiting.saturating_sub(Residency::SLOTS)));
            }
        }
    }

    #[test]
    fn layers_that_wait_are_spread() {
        let layers = [1, 3, 5, 7, 9, 11];
        let of = |waiting| {
            let mut memory = DeviceMemory { capacity_bytes: 0, always_bytes: 100, layer_bytes: 10 };
            memory.capacity_bytes = memory.held_bytes(6, waiting);
            Residency::new(&memory, &layers).unwrap().waiting
        };
        assert!(of(0).is_empty());
        assert_eq!(of(1), [11]);
        assert_eq!(of(2), [5, 11]);
        assert_eq!(of(3), [3, 7, 11]);
        assert_eq!(of(4), [1, 5, 7, 11]);
        assert_eq!(of(6), layers);
        // Two slots with weights and gradients remain of six layers.
        let memory = DeviceMemory { capacity_bytes: 139, always_bytes: 100, layer_bytes: 10 };
        assert_eq!(Residency::new(&memory, &layers), Err(140));
    }
}
