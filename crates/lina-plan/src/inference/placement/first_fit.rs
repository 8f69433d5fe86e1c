//! The paper's placement: devices in proportion to popularity (its equation 1).
//!
//! Expert e is worth `devices × popularity(e)` devices. Whole devices are given first; what is left over is packed
//! first-fit-decreasing onto the fewest devices, with few experts each; experts without an estimate go evenly to devices
//! that are still free, else to a random one with room. The paper plans for as many devices as it needs; here slots are
//! bounded, so a copy is only made while the slots that remain hold every expert that has no place yet.

use super::{PlacementError, check_room};

/// The paper's limit of experts on a device.
const MOST_EXPERTS: usize = 4;

/// Experts of each device, `[devices]`, for `popularity` `[experts]` in any unit. What is not a positive number is no
/// estimate. `seed` says where experts without an estimate go.
///
/// # Errors
/// If the slots do not suffice for all experts.
pub fn first_fit(popularity: &[f64], devices: usize, slots: usize, seed: u64) -> Result<Vec<Vec<u32>>, PlacementError> {
    let experts = popularity.len();
    check_room(experts, devices, slots)?;
    let mut plan = Plan {
        held: vec![Vec::new(); devices],
        filled: vec![0.0; devices],
        most: MOST_EXPERTS.min(slots).max(experts.div_ceil(devices)),
        copies: vec![0; experts],
        without_place: experts,
        taken: 0,
    };
    let estimated = |expert: usize| popularity[expert].is_finite() && popularity[expert] > 0.0;
    let total: f64 = (0..experts).filter(|&expert| estimated(expert)).map(|expert| popularity[expert]).sum();
    let mut worth: Vec<f64> = (0..experts)
        .map(|expert| if estimated(expert) { popularity[expert] / total * devices as f64 } else { 0.0 })
        .collect();
    let mut order: Vec<usize> = (0..experts).filter(|&expert| estimated(expert)).collect();
    order.sort_by(|&a, &b| worth[b].total_cmp(&worth[a]));

    let mut next_free = 0;
    for &expert in &order {
        while worth[expert] >= 1.0 && next_free < devices && plan.may_take(expert) {
            plan.take(expert, next_free, 1.0);
            worth[expert] -= 1.0;
            next_free += 1;
        }
    }

    order.sort_by(|&a, &b| worth[b].total_cmp(&worth[a]));
    let mut used = next_free;
    for &expert in &order {
        let needed = plan.copies[expert] == 0;
        if !needed && (worth[expert] < 1e-9 || !plan.may_take(expert)) {
            continue;
        }
        let fits =
            (next_free..used).find(|&d| plan.has_room(expert, d) && plan.filled[d] + worth[expert] <= 1.0 + 1e-9);
        let device = match fits {
            Some(device) => Some(device),
            None if used < devices => {
                used += 1;
                Some(used - 1)
            }
            // First-fit may use up all devices before the last fractions.
            None => plan.lightest(expert, 0..devices),
        };
        match device {
            Some(device) => plan.take(expert, device, worth[expert]),
            None => debug_assert!(!needed, "an expert without a place finds room"),
        }
    }

    let mut random = seed;
    let free = used..devices;
    let unknown: Vec<usize> = (0..experts).filter(|&expert| !estimated(expert)).collect();
    for (i, &expert) in unknown.iter().enumerate() {
        let evenly = (!free.is_empty()).then(|| free.start + i % free.len());
        let device = evenly.filter(|&device| plan.has_room(expert, device)).unwrap_or_else(|| {
            let with_room: Vec<usize> = (0..devices).filter(|&device| plan.has_room(expert, device)).collect();
            with_room[(splitmix64(&mut random) % with_room.len() as u64) as usize]
        });
        plan.take(expert, device, 0.0);
    }
    Ok(plan.held)
}

struct Plan {
    /// Experts of each device.
    held: Vec<Vec<u32>>,
    /// Devices' worth of load on each device.
    filled: Vec<f64>,
    /// Most experts on a device; more than the paper's limit where experts are too many for it.
    most: usize,
    copies: Vec<usize>,
    without_place: usize,
    /// Places that are taken.
    taken: usize,
}

impl Plan {
    /// Whether a copy of `expert` leaves room for every expert that has no place yet.
    fn may_take(&self, expert: usize) -> bool {
        let others = self.without_place - usize::from(self.copies[expert] == 0);
        self.taken + 1 + others <= self.most * self.held.len()
    }

    fn has_room(&self, expert: usize, device: usize) -> bool {
        self.held[device].len() < self.most && !self.held[device].contains(&(expert as u32))
    }

    fn lightest(&self, expert: usize, devices: std::ops::Range<usize>) -> Option<usize> {
        let with_room = devices.filter(|&device| self.has_room(expert, device));
        with_room.min_by(|&a, &b| self.filled[a].total_cmp(&self.filled[b]))
    }

    fn take(&mut self, expert: usize, device: usize, worth: f64) {
        self.held[device].push(expert as u32);
        self.filled[device] += worth;
        self.without_place -= usize::from(self.copies[expert] == 0);
        self.copies[expert] += 1;
        self.taken += 1;
    }
}

/// The next number of Steele, Lea and Flood's generator ("Fast splittable pseudorandom number generators", 2014).
pub(crate) fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
