//! DeepSeek's expert-parallel load balancer, from its description: what production servers use.
//!
//! Every slot is used. Each slot beyond one per expert goes to the expert with most load a copy; then copies are packed,
//! heaviest first, into the lightest device with room. It starts from nothing every time.

use super::{PlacementError, check_room};

/// Experts of each device, `[devices]`, when `loads` `[experts]` are expected.
///
/// The original may put two copies of an expert on a device, where the second is of no use: it is left out here, and its
/// slot stays empty.
///
/// # Errors
/// If the slots do not suffice for all experts.
pub fn eplb(loads: &[f64], devices: usize, slots: usize) -> Result<Vec<Vec<u32>>, PlacementError> {
    check_room(loads.len(), devices, slots)?;
    let mut copies = vec![1u32; loads.len()];
    let each = |copies: &[u32], expert: usize| loads[expert] / f64::from(copies[expert]);
    for _ in loads.len()..devices * slots {
        let hottest = (0..loads.len()).max_by(|&a, &b| each(&copies, a).total_cmp(&each(&copies, b)).then(b.cmp(&a)));
        copies[hottest.expect("a layer has experts")] += 1;
    }
    let mut heaviest_first: Vec<usize> = (0..loads.len()).collect();
    heaviest_first.sort_by(|&a, &b| each(&copies, b).total_cmp(&each(&copies, a)));
    let mut held = vec![Vec::with_capacity(slots); devices];
    let mut used = vec![0; devices];
    let mut load = vec![0.0f64; devices];
    for expert in heaviest_first {
        for _ in 0..copies[expert] {
            let with_room = (0..devices).filter(|&device| used[device] < slots);
            let lightest = with_room.min_by(|&a, &b| load[a].total_cmp(&load[b])).expect("as many copies as slots");
            used[lightest] += 1;
            load[lightest] += each(&copies, expert);
            if !held[lightest].contains(&(expert as u32)) {
                held[lightest].push(expert as u32);
            }
        }
    }
    Ok(held)
}
