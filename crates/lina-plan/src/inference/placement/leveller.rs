//! Divides replicated experts' rows among their holders so that the slowest device is as fast as possible.
//!
//! A device that computes r rows, of which h are its own, and whose own tokens make s rows is busy for
//! `row·r + 2·wire·(max(r, s) − h)`: it receives r − h and sends s − h. With rows x of one expert, the rest fixed, that
//! is convex and piecewise linear in x, so one expert is divided exactly by pouring its rows into its holders like water.
//! Experts are poured one after another, those of the slowest device again until it gets no faster; rows are then pushed
//! from it along chains of replicas. Without a cost of the wire the result is the optimum in whole rows: a device that no
//! chain can relieve is in a set of devices that must do their work themselves.

use super::{EMPTY, LayerLoads, PlacementCosts};
use crate::split::share_range;

/// Pours have to gain this share of the slowest device's time, else rows are pushed.
const LEAST_GAIN: f64 = 1e-3;
/// The same for pushes, which only have to end.
const LEAST_PUSH_GAIN: f64 = 1e-9;
/// Most steps to the level of a pour; rows that it is off by are given out one by one.
const LEVEL_STEPS: usize = 32;
/// Pushes a device; a few are needed.
const MOST_PUSHES: usize = 64;

/// A placement that can change, and who computes how many rows of what.
pub(crate) struct Leveller<'a> {
    loads: &'a LayerLoads<'a>,
    row_ns: f64,
    /// There and back.
    wire_ns: f64,
    slots: usize,
    /// `[devices, slots]`: the expert in each, or [`EMPTY`].
    contents: Vec<u32>,
    /// `[devices, slots]`: rows of that expert that are computed there.
    rows: Vec<u64>,
    /// Slots of each expert, ascending.
    places: Vec<Vec<u32>>,
    devices: Vec<DeviceRows>,
    /// Reused between pours.
    pourings: Vec<Pouring>,
}

#[derive(Clone, Copy, Default)]
struct DeviceRows {
    rows: u64,
    /// Of these, the device's own.
    kept: u64,
}

/// One holder of the expert that is being poured: its time as a function of the rows that it takes.
#[derive(Clone, Copy, Debug, Default)]
struct Pouring {
    /// Rows at which the time is least, and that time.
    least_rows: f64,
    least_ns: f64,
    /// Beyond `least_rows`: (slope, first rows at which the next slope holds, time there).
    segments: [(f64, f64, f64); 3],
    taken: u64,
}

/// Everything that levelling changes except places.
#[derive(Default)]
pub(crate) struct RowsBefore {
    rows: Vec<u64>,
    devices: Vec<DeviceRows>,
}

impl<'a> Leveller<'a> {
    /// Starts with all rows to be divided. `contents` `[devices, slots]` has every expert.
    pub(crate) fn new(loads: &'a LayerLoads<'a>, costs: &PlacementCosts, slots: usize, contents: Vec<u32>) -> Self {
        let mut places = vec![Vec::new(); loads.experts()];
        for (slot, &expert) in contents.iter().enumerate() {
            if expert != EMPTY {
                places[expert as usize].push(slot as u32);
            }
        }
        Leveller {
            loads,
            row_ns: costs.row_ns / loads.scale(),
            wire_ns: 2.0 * costs.wire_row_ns / loads.scale(),
            slots,
            rows: vec![0; contents.len()],
            contents,
            places,
            devices: vec![DeviceRows::default(); loads.devices()],
            pourings: Vec::new(),
        }
    }

    /// Slots and what is in them.
    pub(crate) fn contents(&self) -> &[u32] {
        &self.contents
    }

    /// The slots of `device`.
    pub(crate) fn slots_of(&self, device: usize) -> std::ops::Range<usize> {
        device * self.slots..(device + 1) * self.slots
    }

    /// Time of a row's computation, in ns.
    pub(crate) fn row_ns(&self) -> f64 {
        self.row_ns
    }

    /// Rows that are computed by the expert in `slot`.
    pub(crate) fn rows_in(&self, slot: usize) -> u64 {
        self.rows[slot]
    }

    /// Slots of `expert`, ascending.
    pub(crate) fn places(&self, expert: u32) -> &[u32] {
        &self.places[expert as usize]
    }

    /// Number of places of `expert`.
    pub(crate) fn copies(&self, expert: u32) -> usize {
        self.places[expert as usize].len()
    }

    /// Whether `device` holds `expert`.
    pub(crate) fn holds(&self, device: usize, expert: u32) -> bool {
        self.contents[self.slots_of(device)].contains(&expert)
    }

    /// Appends (device, rows) of every holder of `expert`.
    pub(crate) fn rows_of(&self, expert: usize, out: &mut Vec<(u32, u64)>) {
        out.extend(self.places[expert].iter().map(|&slot| (slot / self.slots as u32, self.rows[slot as usize])));
    }

    /// Time of `device`, in ns.
    pub(crate) fn time_ns(&self, device: usize) -> f64 {
        let DeviceRows { rows, kept } = self.devices[device];
        self.row_ns * rows as f64 + self.wire_ns * (rows.max(self.loads.sourced(device)) - kept) as f64
    }

    /// The slowest device, the first of several, and its time in ns.
    pub(crate) fn slowest(&self) -> (usize, f64) {
        let mut slowest = (0, f64::NEG_INFINITY);
        for device in 0..self.devices.len() {
            let time_ns = self.time_ns(device);
            if time_ns > slowest.1 {
                slowest = (device, time_ns);
            }
        }
        slowest
    }

    /// Keeps row counts in `before`, to come back to.
    pub(crate) fn remember(&self, before: &mut RowsBefore) {
        before.rows.clone_from(&self.rows);
        before.devices.clone_from(&self.devices);
    }

    /// Undoes pours and pushes since `before`. Places must be those of then.
    pub(crate) fn restore(&mut self, before: &RowsBefore) {
        self.rows.copy_from_slice(&before.rows);
        self.devices.copy_from_slice(&before.devices);
    }

    /// Changes what is in `slot`; the rows that were computed there are nowhere until the expert is poured again.
    pub(crate) fn put(&mut self, slot: usize, expert: u32) {
        self.set_rows(slot, 0);
        let before = std::mem::replace(&mut self.contents[slot], expert);
        if before != EMPTY {
            self.places[before as usize].retain(|&place| place as usize != slot);
        }
        if expert != EMPTY {
            let places = &mut self.places[expert as usize];
            let i = places.partition_point(|&place| (place as usize) < slot);
            places.insert(i, slot as u32);
        }
    }

    fn set_rows(&mut self, slot: usize, rows: u64) {
        let before = std::mem::replace(&mut self.rows[slot], rows);
        if before == rows {
            return;
        }
        let device = slot / self.slots;
        let own = self.loads.assigned(device, self.contents[slot] as usize);
        let sums = &mut self.devices[device];
        sums.rows = sums.rows - before + rows;
        sums.kept = sums.kept - before.min(own) + rows.min(own);
    }

    /// Divides the rows of every expert.
    pub(crate) fn level(&mut self) {
        let mut replicated: Vec<u32> = Vec::new();
        for expert in 0..self.places.len() {
            match self.places[expert][..] {
                [slot] => self.set_rows(slot as usize, self.loads.rows(expert)),
                _ => replicated.push(expert as u32),
            }
        }
        replicated.sort_unstable_by_key(|&expert| (std::cmp::Reverse(self.loads.rows(expert as usize)), expert));
        for _ in 0..2 {
            for &expert in &replicated {
                self.pour(expert as usize);
            }
        }
        self.relieve(self.devices.len());
        self.push_all();
        if self.wire_ns > 0.0 {
            self.level_from_even(&replicated);
        }
    }

    /// Pushes from the slowest device until there is no way.
    fn push_all(&mut self) {
        for _ in 0..MOST_PUSHES * self.devices.len() {
            if !self.push(self.slowest().0) {
                break;
            }
        }
    }

    /// Starts once more with every `replicated` expert divided evenly, if that is better than what pours and pushes came
    /// to: where a row's way costs more than the row, the way to the optimum may need several experts at once.
    fn level_from_even(&mut self, replicated: &[u32]) {
        let mut levelled = RowsBefore::default();
        self.remember(&mut levelled);
        let levelled_ns = self.slowest().1;
        for &expert in replicated {
            let total = self.loads.rows(expert as usize) as usize;
            let copies = self.copies(expert);
            for i in 0..copies {
                let slot = self.places[expert as usize][i] as usize;
                self.set_rows(slot, share_range(total, copies, i).len() as u64);
            }
        }
        if self.slowest().1 < levelled_ns {
            self.push_all();
        } else {
            self.restore(&levelled);
        }
    }

    /// Pours what the slowest device holds, up to `rounds` times: quick, and nearly level.
    pub(crate) fn relieve(&mut self, rounds: usize) {
        for _ in 0..rounds {
            let (device, time_ns) = self.slowest();
            for slot in self.slots_of(device) {
                if self.places_of(slot) > 1 {
                    self.pour(self.contents[slot] as usize);
                }
            }
            if self.time_ns(device) >= time_ns * (1.0 - LEAST_GAIN) {
                break;
            }
        }
    }

    /// Divides the rows of one expert among its holders, the rest as it is.
    pub(crate) fn pour(&mut self, expert: usize) {
        let total = self.loads.rows(expert);
        let places = std::mem::take(&mut self.places[expert]);
        if let [slot] = places[..] {
            self.set_rows(slot as usize, total);
            self.places[expert] = places;
            return;
        }
        let mut pourings = std::mem::take(&mut self.pourings);
        pourings.clear();
        for &slot in &places {
            self.set_rows(slot as usize, 0);
            pourings.push(self.pouring(slot as usize / self.slots, expert));
        }
        let level_ns = level_ns(&pourings, total as f64);
        let mut left = total;
        for pouring in &mut pourings {
            pouring.taken = (pouring.rows_at(level_ns).0 as u64).min(left);
            left -= pouring.taken;
        }
        // Rounding leaves fewer rows than there are holders.
        while left > 0 {
            let each = (left / pourings.len() as u64).max(1);
            let next_ns = |pouring: &Pouring| pouring.time_ns((pouring.taken + each) as f64);
            let lowest = (0..pourings.len()).min_by(|&a, &b| next_ns(&pourings[a]).total_cmp(&next_ns(&pourings[b])));
            pourings[lowest.expect("an expert has a place")].taken += each;
            left -= each;
        }
        for (&slot, pouring) in places.iter().zip(&pourings) {
            self.set_rows(slot as usize, pouring.taken);
        }
        self.pourings = pourings;
        self.places[expert] = places;
    }

    /// The time of `device` as a function of the rows of `expert` that it takes; it has none of them now.
    fn pouring(&self, device: usize, expert: usize) -> Pouring {
        let DeviceRows { rows, .. } = self.devices[device];
        let own = self.loads.assigned(device, expert) as f64;
        let sending = self.loads.sourced(device).saturating_sub(rows) as f64;
        // A row of its own relieves the link while the device sends more than it receives.
        let (first, second) = (own.min(sending), own.max(sending));
        let slopes = [self.row_ns - self.wire_ns, self.row_ns, self.row_ns + self.wire_ns];
        let empty_ns = self.time_ns(device);
        let (least_rows, least_ns) =
            if slopes[0] <= 0.0 { (first, empty_ns + slopes[0] * first) } else { (0.0, empty_ns) };
        let mut segments = [(0.0, 0.0, 0.0); 3];
        let (mut at_rows, mut at_ns) = (least_rows, least_ns);
        for ((segment, slope), end) in segments.iter_mut().zip(slopes).zip([first, second, f64::INFINITY]) {
            let length = end - at_rows;
            if length > 0.0 {
                (at_rows, at_ns) = (end, at_ns + slope * length);
            }
            *segment = (slope, at_rows, at_ns);
        }
        Pouring { least_rows, least_ns, segments, taken: 0 }
    }

    /// Makes `device` faster and no other as slow: rows are pushed to another holder of their expert, where that gains
    /// most, or along the shortest chain of replicas; where the link counts, rows of others are exchanged for rows of its
    /// own. Returns whether there was a way.
    fn push(&mut self, device: usize) -> bool {
        let slowest_ns = self.time_ns(device);
        let mut best: Option<(f64, (usize, usize), u64)> = None;
        for slot in self.slots_of(device) {
            for i in 0..self.places_of(slot) {
                let place = self.places[self.contents[slot] as usize][i] as usize;
                let to = place / self.slots;
                // A device that is as slow can only take rows of its own whose way costs more than they do.
                if to == device || (self.time_ns(to) >= slowest_ns && self.wire_ns <= self.row_ns) {
                    continue;
                }
                let half = ((slowest_ns - self.time_ns(to)) / (2.0 * self.row_ns)) as u64;
                if let Some((rows, after_ns)) = self.helps(&[(slot, place)], half.max(1), &[device, to], slowest_ns)
                    && best.is_none_or(|(least_ns, ..)| after_ns < least_ns)
                {
                    best = Some((after_ns, (slot, place), rows));
                }
            }
        }
        if let Some((_, push, rows)) = best {
            self.move_rows(&[push], rows);
            return true;
        }
        self.push_along_chain(device, slowest_ns) || (self.wire_ns > 0.0 && self.exchange(device, slowest_ns))
    }

    /// Places of the expert in `slot`, if it computes something there.
    fn places_of(&self, slot: usize) -> usize {
        if self.rows[slot] == 0 { 0 } else { self.places[self.contents[slot] as usize].len() }
    }

    fn push_along_chain(&mut self, device: usize, slowest_ns: f64) -> bool {
        // By which expert's rows a device was reached: (slot that gives, slot that takes).
        let mut reached_by: Vec<Option<(usize, usize)>> = vec![None; self.devices.len()];
        let mut queue = vec![device];
        let mut next = 0;
        while next < queue.len() {
            let from = queue[next];
            next += 1;
            for slot in self.slots_of(from) {
                for i in 0..self.places_of(slot) {
                    let place = self.places[self.contents[slot] as usize][i] as usize;
                    let to = place / self.slots;
                    if to == device || reached_by[to].is_some() {
                        continue;
                    }
                    reached_by[to] = Some((slot, place));
                    queue.push(to);
                    if self.time_ns(to) >= slowest_ns {
                        continue;
                    }
                    let mut chain = Vec::new();
                    let mut at = to;
                    while at != device {
                        let (gives, takes) = reached_by[at].expect("a chain of reached devices");
                        chain.push((gives, takes));
                        at = gives / self.slots;
                    }
                    let half = ((slowest_ns - self.time_ns(to)) / (2.0 * self.row_ns)) as u64;
                    if self.try_moves(&chain, half.max(1), &[device, to], slowest_ns) {
                        return true;
                    }
                }
            }
        }
        false
    }

    /// Gives rows of others to a device that gives rows of `device`'s own in return.
    fn exchange(&mut self, device: usize, slowest_ns: f64) -> bool {
        for slot in self.slots_of(device) {
            for i in 0..self.places_of(slot) {
                let place = self.places[self.contents[slot] as usize][i] as usize;
                let to = place / self.slots;
                let foreign = self.rows[slot].saturating_sub(self.own(slot));
                if to == device || foreign == 0 {
                    continue;
                }
                for back in self.slots_of(to) {
                    if back == place || self.rows[back] == 0 {
                        continue;
                    }
                    let expert = self.contents[back];
                    let home = self.slots_of(device).find(|&slot| self.contents[slot] == expert);
                    let Some(home) = home else { continue };
                    let missing = self.own(home).saturating_sub(self.rows[home]);
                    let most = foreign.min(missing);
                    if most > 0 && self.try_moves(&[(slot, place), (back, home)], most, &[device], slowest_ns) {
                        return true;
                    }
                }
            }
        }
        false
    }

    /// Rows that the device of `slot` itself routes to the expert in it.
    fn own(&self, slot: usize) -> u64 {
        self.loads.assigned(slot / self.slots, self.contents[slot] as usize)
    }

    /// Moves up to `most` rows from each slot to its partner, if that makes the devices `faster` than `slowest_ns` and
    /// none slower than that.
    fn try_moves(&mut self, moves: &[(usize, usize)], most: u64, faster: &[usize], slowest_ns: f64) -> bool {
        let found = self.helps(moves, most, faster, slowest_ns);
        if let Some((rows, _)) = found {
            self.move_rows(moves, rows);
        }
        found.is_some()
    }

    /// How many rows [`try_moves`](Leveller::try_moves) moves, and the time in ns of the slowest of the devices `faster`
    /// after that. All stays as it was.
    fn helps(&mut self, moves: &[(usize, usize)], most: u64, faster: &[usize], slowest_ns: f64) -> Option<(u64, f64)> {
        let given = moves.iter().map(|&(gives, _)| self.rows[gives]).min().unwrap_or(0);
        let most = most.min(given);
        let mut amount = most;
        while amount > 0 {
            self.move_rows(moves, amount);
            let slower = moves.iter().any(|&(_, takes)| self.time_ns(takes / self.slots) > slowest_ns);
            let after_ns = faster.iter().map(|&device| self.time_ns(device)).fold(0.0, f64::max);
            self.move_back(moves, amount);
            if !slower && after_ns < slowest_ns * (1.0 - LEAST_PUSH_GAIN) {
                return Some((amount, after_ns));
            }
            // Times are convex in the amount: if one row does not help, none of the amounts does.
            if amount == most && amount > 2 && !self.one_helps(moves, faster, slowest_ns) {
                return None;
            }
            amount /= 2;
        }
        None
    }

    /// Whether moving one row makes no device slower than `slowest_ns` and those in `faster` not as slow.
    fn one_helps(&mut self, moves: &[(usize, usize)], faster: &[usize], slowest_ns: f64) -> bool {
        self.move_rows(moves, 1);
        let helps = faster.iter().all(|&device| self.time_ns(device) < slowest_ns);
        self.move_back(moves, 1);
        helps
    }

    fn move_rows(&mut self, moves: &[(usize, usize)], amount: u64) {
        for &(gives, takes) in moves {
            self.set_rows(gives, self.rows[gives] - amount);
            self.set_rows(takes, self.rows[takes] + amount);
        }
    }

    fn move_back(&mut self, moves: &[(usize, usize)], amount: u64) {
        for &(gives, takes) in moves {
            self.set_rows(takes, self.rows[takes] - amount);
            self.set_rows(gives, self.rows[gives] + amount);
        }
    }
}

impl Pouring {
    /// Most rows that it takes without being busy for longer than `level_ns`, and how many more for a longer time.
    fn rows_at(&self, level_ns: f64) -> (f64, f64) {
        let (mut rows, mut from_ns) = (self.least_rows, self.least_ns);
        if level_ns < from_ns {
            return (rows, 0.0);
        }
        for &(slope, until_rows, until_ns) in &self.segments {
            if level_ns < until_ns {
                return (rows + (level_ns - from_ns) / slope, 1.0 / slope);
            }
            (rows, from_ns) = (until_rows, until_ns);
        }
        (rows, 0.0)
    }

    /// Time with `rows` rows, at least [`Pouring::least_rows`].
    fn time_ns(&self, rows: f64) -> f64 {
        let (mut from, mut from_ns) = (self.least_rows, self.least_ns);
        for &(slope, until, until_ns) in &self.segments {
            if rows <= until {
                return from_ns + slope * (rows - from).max(0.0);
            }
            (from, from_ns) = (until, until_ns);
        }
        from_ns
    }
}

/// The time up to which all holders are filled when they take `total` rows: Newton's method, which ends in the right
/// piece of a piecewise linear function, kept between bounds, since the function is neither convex nor concave.
fn level_ns(pourings: &[Pouring], total: f64) -> f64 {
    let mut below = pourings.iter().map(|pouring| pouring.least_ns).fold(f64::INFINITY, f64::min);
    let mut above = f64::INFINITY;
    let mut level_ns = below;
    for _ in 0..LEVEL_STEPS {
        let (mut rows, mut growth) = (0.0, 0.0);
        for pouring in pourings {
            let (taken, more) = pouring.rows_at(level_ns);
            rows += taken;
            growth += more;
        }
        if (rows - total).abs() < 0.25 {
            break;
        }
        if rows < total {
            below = level_ns
        } else {
            above = level_ns
        }
        let next_ns = level_ns + (total - rows) / growth;
        level_ns = if next_ns > below && next_ns < above { next_ns } else { (below + above) / 2.0 };
    }
    level_ns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ExpertPlacement;
    use proptest::prelude::*;

    /// A placement of all experts with some replicas, and rows by source and expert.
    fn layer() -> impl Strategy<Value = (ExpertPlacement, Vec<u32>)> {
        (1usize..9, 1usize..6, 0u32..3).prop_flat_map(|(devices, slots, skew)| {
            let experts = 1..=devices * slots;
            (experts, Just((devices, slots, skew))).prop_flat_map(|(experts, (devices, slots, skew))| {
                let wishes = prop::collection::vec(0..experts, devices * slots);
                let rows = prop::collection::vec(0u32..200, devices * experts);
                (wishes, rows).prop_map(move |(wishes, mut rows)| {
                    for (i, rows) in rows.iter_mut().enumerate() {
                        *rows /= (i % experts) as u32 * skew + 1;
                    }
                    let mut slot_experts: Vec<Option<u32>> = ExpertPlacement::spread(experts, devices, slots)
                        .unwrap()
                        .contents()
                        .into_iter()
                        .map(|expert| (expert != EMPTY).then_some(expert))
                        .collect();
                    for (i, &expert) in wishes.iter().enumerate() {
                        let device = i / slots * slots;
                        if slot_experts[i].is_none()
                            && !slot_experts[device..device + slots].contains(&Some(expert as u32))
                        {
                            slot_experts[i] = Some(expert as u32);
                        }
                    }
                    (ExpertPlacement::new(experts, devices, slots, slot_experts).unwrap(), rows)
                })
            })
        })
    }

    /// The least possible rows of the busiest device, by Hall's condition: devices that are the only holders of some
    /// experts must compute all their rows.
    fn least_rows(placement: &ExpertPlacement, loads: &LayerLoads) -> u64 {
        let subsets = 1u32..1 << placement.devices();
        let bound = subsets.map(|subset| {
            let theirs = |expert: &usize| placement.holders(*expert).iter().all(|&device| subset >> device & 1 == 1);
            let rows: u64 = (0..placement.experts()).filter(theirs).map(|expert| loads.rows(expert)).sum();
            rows.div_ceil(u64::from(subset.count_ones()))
        });
        bound.max().unwrap()
    }

    /// Experts poured one after another come to 1403 ns here, from where no push helps.
    #[test]
    fn even_shares_are_a_start_where_a_rows_way_costs_more_than_the_row() {
        let (o, a, b, c) = (None, Some(0), Some(1), Some(2));
        let placement = ExpertPlacement::new(3, 4, 3, vec![a, o, o, b, o, c, c, b, o, a, o, c]).unwrap();
        let assigned = [27, 117, 48, 102, 106, 134, 17, 94, 145, 190, 105, 8];
        let costs = PlacementCosts { row_ns: 2.0, wire_row_ns: 2.740032795516816, copy_ns: 0.0 };
        let level_ns = placement.shares(&assigned, &costs).makespan_ns(&costs);
        let even_ns = placement.even_shares(&assigned).makespan_ns(&costs);
        assert!(level_ns < even_ns && even_ns < 1330.0, "{level_ns} ns, even shares {even_ns} ns");
    }

    /// Of several ways, the first that gains anything may gain next to nothing: 813 ns after as many pushes as there may be.
    #[test]
    fn rows_are_pushed_where_that_gains_most() {
        let holders = [[0, 2, -1, -1], [1, 4, 0, -1], [2, 1, 0, 5], [3, -1, 0, 5], [4, 0, 3, -1], [5, 0, 3, 1]];
        let slots = holders.as_flattened().iter().map(|&expert| u32::try_from(expert).ok()).collect();
        let placement = ExpertPlacement::new(6, 6, 4, slots).unwrap();
        let assigned = [
            [2, 28, 10, 7, 25, 2],
            [158, 19, 44, 24, 36, 5],
            [188, 72, 11, 27, 7, 25],
            [38, 73, 30, 3, 10, 10],
            [189, 91, 23, 5, 13, 24],
            [173, 10, 22, 48, 16, 7],
        ];
        let costs = PlacementCosts { row_ns: 2.0, wire_row_ns: 0.9892794446066394, copy_ns: 0.0 };
        let level_ns = placement.shares(assigned.as_flattened(), &costs).makespan_ns(&costs);
        assert!(level_ns < 781.0, "{level_ns} ns");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn without_a_wire_the_busiest_device_has_the_least_possible_rows((placement, assigned) in layer()) {
            let costs = PlacementCosts { row_ns: 3.0, wire_row_ns: 0.0, copy_ns: 0.0 };
            let shares = placement.shares(&assigned, &costs);
            let least = least_rows(&placement, &LayerLoads::measured(&assigned, placement.devices()));
            let most = shares.device_rows().into_iter().max().unwrap();
            prop_assert_eq!(most, least);
        }

        #[test]
        fn shares_add_up_and_reach_holders_only((placement, assigned) in layer(), wire in 0.0f64..4.0) {
            let costs = PlacementCosts { row_ns: 2.0, wire_row_ns: wire, copy_ns: 0.0 };
            for shares in [placement.shares(&assigned, &costs), placement.even_shares(&assigned)] {
                for source in 0..placement.devices() {
                    for expert in 0..placement.experts() {
                        let parts = shares.of(source, expert);
                        let sum: u32 = parts.iter().map(|part| part.rows).sum();
                        prop_assert_eq!(sum, assigned[source * placement.experts() + expert]);
                        for part in parts {
                            prop_assert!(part.rows > 0);
                            prop_assert!(placement.holders(expert).contains(&part.device));
                        }
                    }
                }
            }
            let (level, even) = (placement.shares(&assigned, &costs), placement.even_shares(&assigned));
            let (level_ns, even_ns) = (level.makespan_ns(&costs), even.makespan_ns(&costs));
            prop_assert!(level_ns <= even_ns * (1.0 + LEAST_PUSH_GAIN), "{level_ns} ns, even shares {even_ns} ns");
        }

        #[test]
        fn with_a_wire_no_single_move_of_rows_helps((placement, assigned) in layer(), wire in 0.0f64..4.0) {
            let costs = PlacementCosts { row_ns: 2.0, wire_row_ns: wire, copy_ns: 0.0 };
            let loads = LayerLoads::measured(&assigned, placement.devices());
            let mut leveller = Leveller::new(&loads, &costs, placement.slots(), placement.contents());
            leveller.level();
            let (slowest, slowest_ns) = leveller.slowest();
            let rounding = 2.0 * (costs.row_ns + 2.0 * wire);
            for slot in leveller.slots_of(slowest) {
                let expert = leveller.contents()[slot];
                if expert == EMPTY { continue; }
                for place in leveller.places[expert as usize].clone() {
                    let to = place as usize / placement.slots();
                    for rows in 1..=leveller.rows_in(slot).min(20) {
                        let mut before = RowsBefore::default();
                        leveller.remember(&mut before);
                        leveller.set_rows(slot, leveller.rows_in(slot) - rows);
                        leveller.set_rows(place as usize, leveller.rows_in(place as usize) + rows);
                        let after_ns = leveller.time_ns(slowest).max(leveller.time_ns(to));
                        leveller.restore(&before);
                        let least_ns = slowest_ns * (1.0 - 2.0 * LEAST_GAIN) - rounding;
                        prop_assert!(to == slowest || after_ns >= least_ns, "{slowest_ns} {after_ns} {rows} {slowest} {to}");
                    }
                }
            }
        }
    }
}
