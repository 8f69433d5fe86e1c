//! Which device serves which expert, and what that costs.

mod eplb;
mod first_fit;
mod leveller;
mod loads;
mod search;
mod shares;

use std::fmt;
use std::str::FromStr;

use crate::split::share_range;

pub use eplb::eplb;
pub use first_fit::first_fit;
pub(crate) use leveller::{Leveller, RowsBefore};
pub use loads::LayerLoads;
pub use search::{Adaptation, CopyTerms, adapt, best_placement, makespan_bound_ns};
pub use shares::{Share, TokenShares};

/// A slot that holds nothing, where slots are plain numbers.
pub(crate) const EMPTY: u32 = u32::MAX;

/// How the places of experts are found. The paper's Ideal is none of them: it is a gate that is forced to balance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PlacementPolicy {
    /// Experts never move.
    Static,
    /// The paper's: devices in proportion to popularity, anew for every batch.
    Lina,
    /// DeepSeek's balancer, at a cadence, from the loads of the past.
    Eplb,
    /// Ours: from where experts are, moving one only when that pays.
    LinaAuto,
    /// The best that a search finds when popularity is known and copies are free: what `lina-auto` is measured against.
    Best,
}

impl PlacementPolicy {
    /// Every policy, in the order in which tables show them.
    pub const ALL: [PlacementPolicy; 5] = [
        PlacementPolicy::Static,
        PlacementPolicy::Lina,
        PlacementPolicy::Eplb,
        PlacementPolicy::LinaAuto,
        PlacementPolicy::Best,
    ];

    /// The name in configuration files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            PlacementPolicy::Static => "static",
            PlacementPolicy::Lina => "lina",
            PlacementPolicy::Eplb => "eplb",
            PlacementPolicy::LinaAuto => "lina-auto",
            PlacementPolicy::Best => "best",
        }
    }
}

impl fmt::Display for PlacementPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for PlacementPolicy {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        PlacementPolicy::ALL.into_iter().find(|policy| policy.name() == name).ok_or_else(|| {
            let names = PlacementPolicy::ALL.map(PlacementPolicy::name).join(", ");
            format!("placement `{name}` is unknown, expected one of {names}")
        })
    }
}

/// What work costs, from measurements or from an emulated device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlacementCosts {
    /// An expert's feed-forward network on one row, in ns.
    pub row_ns: f64,
    /// One row over a device's link one way, in ns. A row that leaves its device comes back, so it is paid twice.
    pub wire_row_ns: f64,
    /// One expert from host memory into a slot, in ns.
    pub copy_ns: f64,
}

impl PlacementCosts {
    /// # Errors
    /// If a cost is negative or not a number, or if rows cost nothing.
    pub fn check(&self) -> Result<(), PlacementError> {
        let valid = |cost: f64| cost.is_finite() && cost >= 0.0;
        if !(valid(self.row_ns) && self.row_ns > 0.0 && valid(self.wire_row_ns) && valid(self.copy_ns)) {
            return PlacementError::new(format!(
                "costs of {} ns a row, {} ns a row on the wire and {} ns a copy: expected finite numbers, the first \
                 above 0 and the others at least 0",
                self.row_ns, self.wire_row_ns, self.copy_ns
            ));
        }
        Ok(())
    }
}

/// A placement that cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacementError {
    /// Found and expected, one sentence.
    pub message: String,
}

impl PlacementError {
    pub(crate) fn new<T>(message: String) -> Result<T, Self> {
        Err(PlacementError { message })
    }
}

impl fmt::Display for PlacementError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for PlacementError {}

/// An expert is copied from host memory into a slot; what the slot held is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotCopy {
    /// The device that copies.
    pub device: usize,
    /// One of its slots.
    pub slot: usize,
    /// What the slot will hold.
    pub expert: usize,
}

/// The experts in the slots of every device, for one layer. Every expert has at least one place, none two on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertPlacement {
    devices: usize,
    slots: usize,
    experts: usize,
    /// `[devices, slots]`.
    slot_experts: Vec<Option<u32>>,
    /// Devices of expert e: `holders[offsets[e] .. offsets[e + 1]]`, ascending.
    offsets: Vec<u32>,
    holders: Vec<u32>,
}

/// Fails unless `experts` have room in `slots` slots of each of `devices` devices.
pub(crate) fn check_room(experts: usize, devices: usize, slots: usize) -> Result<(), PlacementError> {
    if experts == 0 || devices == 0 || slots == 0 {
        return PlacementError::new(format!(
            "{experts} experts on {devices} devices of {slots} slots: each must be at least 1"
        ));
    }
    if experts > u16::MAX as usize + 1 || devices > u16::MAX as usize + 1 {
        return PlacementError::new(format!("{experts} experts on {devices} devices: at most 65536 of each"));
    }
    if devices.saturating_mul(slots) < experts {
        return PlacementError::new(format!(
            "{slots} slots on each of {devices} devices hold {} experts, but a layer has {experts}",
            devices * slots
        ));
    }
    Ok(())
}

impl ExpertPlacement {
    /// The placement with `slot_experts` `[devices, slots]`.
    ///
    /// # Errors
    /// If there is an expert without a place, one that is twice on a device, one that does not exist, or if the number
    /// of slots is another.
    pub fn new(
        experts: usize,
        devices: usize,
        slots: usize,
        slot_experts: Vec<Option<u32>>,
    ) -> Result<Self, PlacementError> {
        check_room(experts, devices, slots)?;
        if slot_experts.len() != devices * slots {
            return PlacementError::new(format!(
                "the contents of {} slots for {devices} devices of {slots} slots, expected {}",
                slot_experts.len(),
                devices * slots
            ));
        }
        let mut offsets = vec![0u32; experts + 1];
        for (device, held) in slot_experts.chunks_exact(slots).enumerate() {
            for (slot, &expert) in held.iter().enumerate() {
                let Some(expert) = expert else { continue };
                if expert as usize >= experts {
                    return PlacementError::new(format!(
                        "expert {expert} on device {device}, but a layer has {experts} experts"
                    ));
                }
                if held[..slot].contains(&Some(expert)) {
                    return PlacementError::new(format!(
                        "expert {expert} twice on device {device}, expected once at most"
                    ));
                }
                offsets[expert as usize + 1] += 1;
            }
        }
        for expert in 0..experts {
            if offsets[expert + 1] == 0 {
                return PlacementError::new(format!("expert {expert} has no place, expected at least one"));
            }
            offsets[expert + 1] += offsets[expert];
        }
        let mut next = offsets.clone();
        let mut holders = vec![0u32; offsets[experts] as usize];
        for (device, held) in slot_experts.chunks_exact(slots).enumerate() {
            for &expert in held.iter().flatten() {
                holders[next[expert as usize] as usize] = device as u32;
                next[expert as usize] += 1;
            }
        }
        Ok(ExpertPlacement { devices, slots, experts, slot_experts, offsets, holders })
    }

    /// [`ExpertPlacement::new`] of slots that the callers know to be complete.
    pub(crate) fn from_slots(experts: usize, devices: usize, slots: usize, contents: &[u32]) -> Self {
        let slot_experts = contents.iter().map(|&expert| (expert != EMPTY).then_some(expert)).collect();
        ExpertPlacement::new(experts, devices, slots, slot_experts).expect("planners place every expert")
    }

    /// Even shares in order of their numbers; where experts are fewer than devices, every device holds one. This is
    /// [`ExpertLayout::new`](crate::ExpertLayout::new) without packing.
    ///
    /// # Errors
    /// If the slots do not suffice.
    pub fn spread(experts: usize, devices: usize, slots: usize) -> Result<Self, PlacementError> {
        check_room(experts, devices, slots)?;
        let mut slot_experts = vec![None; devices * slots];
        for device in 0..devices {
            let held = &mut slot_experts[device * slots..(device + 1) * slots];
            if experts < devices {
                held[0] = Some((device % experts) as u32);
                continue;
            }
            for (slot, expert) in held.iter_mut().zip(share_range(experts, devices, device)) {
                *slot = Some(expert as u32);
            }
        }
        ExpertPlacement::new(experts, devices, slots, slot_experts)
    }

    /// Number of devices.
    pub fn devices(&self) -> usize {
        self.devices
    }

    /// Number of slots of every device.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// The slots of `device`.
    pub fn slots_of(&self, device: usize) -> &[Option<u32>] {
        &self.slot_experts[device * self.slots..(device + 1) * self.slots]
    }

    /// Experts of `device`, in the order of its slots.
    pub fn held_by(&self, device: usize) -> impl Iterator<Item = usize> {
        self.slots_of(device).iter().flatten().map(|&expert| expert as usize)
    }

    /// The slot of `device` that holds `expert`.
    pub fn slot_of(&self, device: usize, expert: usize) -> Option<usize> {
        self.slots_of(device).iter().position(|&held| held == Some(expert as u32))
    }

    /// Devices that hold `expert`, ascending; at least one.
    pub fn holders(&self, expert: usize) -> &[u32] {
        &self.holders[self.offsets[expert] as usize..self.offsets[expert + 1] as usize]
    }

    /// The contents of all slots, `[devices, slots]`, with [`EMPTY`] for none.
    pub(crate) fn contents(&self) -> Vec<u32> {
        self.slot_experts.iter().map(|expert| expert.unwrap_or(EMPTY)).collect()
    }

    /// Divides `assigned` `[devices, experts]`, the rows that each source routes to each expert, so that the slowest
    /// device is done as early as possible.
    ///
    /// # Panics
    /// If `assigned` has another length.
    pub fn shares(&self, assigned: &[u32], costs: &PlacementCosts) -> TokenShares {
        let loads = LayerLoads::measured(assigned, self.devices);
        assert_eq!(loads.experts(), self.experts, "one number for every device and expert");
        let mut leveller = Leveller::new(&loads, costs, self.slots, self.contents());
        leveller.level();
        TokenShares::divide(&loads, |expert, rows| leveller.rows_of(expert, rows))
    }

    /// Divides every expert's rows evenly among its holders, whatever else they do.
    ///
    /// # Panics
    /// If `assigned` has another length than `[devices, experts]`.
    pub fn even_shares(&self, assigned: &[u32]) -> TokenShares {
        let loads = LayerLoads::measured(assigned, self.devices);
        assert_eq!(loads.experts(), self.experts, "one number for every device and expert");
        TokenShares::divide(&loads, |expert, rows| {
            let holders = self.holders(expert);
            let total = loads.rows(expert) as usize;
            rows.extend(
                holders
                    .iter()
                    .enumerate()
                    .map(|(i, &device)| (device, share_range(total, holders.len(), i).len() as u64)),
            );
        })
    }

    /// The copies that turn `before` into this placement.
    pub fn copies_from(&self, before: &ExpertPlacement) -> Vec<SlotCopy> {
        copies_between(self.slots, &before.contents(), &self.contents())
    }
}

/// The copies that turn the slots `before` into `after`.
pub(crate) fn copies_between(slots: usize, before: &[u32], after: &[u32]) -> Vec<SlotCopy> {
    let changed = before.iter().zip(after).enumerate().filter(|(_, (before, after))| before != after);
    changed
        .filter(|(_, (_, after))| **after != EMPTY)
        .map(|(i, (_, &expert))| SlotCopy { device: i / slots, slot: i % slots, expert: expert as usize })
        .collect()
}

/// Gives the parts of a placement to the devices that hold most of them already: greedily, the largest overlap first.
pub(crate) fn match_devices(slots: usize, contents: &[u32], parts: Vec<Vec<u32>>) -> Vec<Vec<u32>> {
    let devices = parts.len();
    let mut overlaps = Vec::new();
    for (part, wanted) in parts.iter().enumerate() {
        for (device, held) in contents.chunks_exact(slots).enumerate() {
            let overlap = wanted.iter().filter(|expert| held.contains(expert)).count();
            if overlap > 0 {
                // A part that is there as a whole comes before one that is not.
                overlaps.push((wanted.len() - overlap, device != part, part, device, overlap));
            }
        }
    }
    overlaps.sort_unstable_by_key(|&(missing, moves, part, device, overlap)| {
        (std::cmp::Reverse(overlap), missing, moves, part, device)
    });
    let mut device_of = vec![None; devices];
    let mut taken = vec![false; devices];
    for (_, _, part, device, _) in overlaps {
        if device_of[part].is_none() && !taken[device] {
            device_of[part] = Some(device);
            taken[device] = true;
        }
    }
    let mut free = (0..devices).filter(|&device| !taken[device]).collect::<Vec<_>>().into_iter();
    let mut matched = vec![Vec::new(); devices];
    for (part, device) in parts.into_iter().zip(device_of) {
        let device = device.or_else(|| free.next()).expect("as many devices as parts");
        matched[device] = part;
    }
    matched
}

/// Puts what `wanted` lists for every device into its slots, so that what is there stays where it is.
///
/// Returns the slots with [`EMPTY`] where the plan wants nothing. New experts take slots that hold nothing before they
/// take those that hold something which the plan does not want.
pub(crate) fn keep_in_place(slots: usize, contents: &[u32], wanted: &[Vec<u32>]) -> Vec<u32> {
    let mut placed = vec![EMPTY; contents.len()];
    for (device, wanted) in wanted.iter().enumerate() {
        let held = &contents[device * slots..(device + 1) * slots];
        let placed = &mut placed[device * slots..(device + 1) * slots];
        for (slot, expert) in held.iter().enumerate() {
            if *expert != EMPTY && wanted.contains(expert) {
                placed[slot] = *expert;
            }
        }
        for &expert in wanted {
            if placed.contains(&expert) {
                continue;
            }
            let free =
                |emptiness: bool| (0..slots).find(|&slot| placed[slot] == EMPTY && (held[slot] == EMPTY) == emptiness);
            let slot = free(true).or_else(|| free(false)).expect("a plan never wants more than the slots hold");
            placed[slot] = expert;
        }
    }
    placed
}
