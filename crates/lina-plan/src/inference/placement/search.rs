//! `lina-auto`'s placement: a local search that starts from where experts are.
//!
//! As long as the slowest device can be relieved, one of its experts gets another copy on a fast device: in a slot that
//! holds nothing, or in one whose expert has other copies; where there is none, two experts change places. After every
//! step all shares are nearly level again. Of the steps, as many are taken as pay: what the slowest device gains, less
//! what the layer waits for copies, less a little for every copy that is hidden.
//!
//! A copy that takes longer than there is time leaves its slot to nobody meanwhile. Such a slot is only given away if
//! what it held is complete elsewhere, so that nobody has to wait for the copy, as far as there are slots to spare.

use super::{
    EMPTY, ExpertPlacement, LayerLoads, Leveller, PlacementCosts, PlacementError, RowsBefore, SlotCopy, eplb, first_fit,
};

/// What a hidden copy has to gain, as a share of the layer's time: it is not quite free.
const HIDDEN_COPY_GAIN: f64 = 0.0005;
/// A step has to gain this share of the slowest device's time, else the search tries another.
const STEP_GAIN: f64 = 0.001;
/// Rounds of levelling after a step that was the first to gain enough.
const STEP_ROUNDS: usize = 4;
/// A search ends this close to the bound.
const CLOSE_ENOUGH: f64 = 1.005;
/// How far `lina-auto` looks for one of `devices` devices.
fn narrow(devices: usize) -> Width {
    Width { experts: 8, devices: (devices / 6).max(3), rounds: 1, first: true }
}

/// How far `best` looks.
fn wide(devices: usize) -> Width {
    Width { experts: 16, devices: devices.min(16), rounds: 16, first: false }
}

/// What `lina-auto` does about a layer.
#[derive(Clone, Debug)]
pub struct Adaptation {
    /// The placement once the copies are there; what was there before if none are.
    pub placement: ExpertPlacement,
    /// The copies that it takes.
    pub copies: Vec<SlotCopy>,
    /// Expected gain of the slowest device, in ns, before what the layer waits for copies.
    pub gain_ns: f64,
    /// Time that copies take beyond the budget, in ns.
    pub wait_ns: f64,
    /// What the best plan would have gained that did not pay, in ns; 0 if it was taken.
    pub missed_ns: f64,
}

/// When copies are made, and what they may cost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CopyTerms {
    /// Time until the layer needs its experts, in ns: copies of a device that fit into it are hidden.
    pub budget_ns: f64,
    /// What copies may take beyond what they gain now, in ns, because they would have gained it before.
    pub credit_ns: f64,
    /// Whether the layer waits for copies that are not hidden; else it is served by what is complete.
    pub blocking: bool,
}

/// Improves `current` for `loads`.
pub fn adapt(current: &ExpertPlacement, loads: &LayerLoads, costs: &PlacementCosts, terms: CopyTerms) -> Adaptation {
    let before = current.contents();
    let mut search = Search::new(loads, costs, current.slots(), before.clone(), terms, narrow(loads.devices()));
    let start_ns = search.leveller.slowest().1;
    let steps = search.run(loads.devices());
    let (mut paid, mut largest) = (Option::<&Step>::None, 0.0f64);
    let worth = |step: &Step| {
        let hidden_ns = HIDDEN_COPY_GAIN * start_ns * step.copies as f64;
        start_ns - step.time_ns - step.wait_ns - hidden_ns
    };
    for step in &steps {
        largest = largest.max(start_ns - step.time_ns);
        let pays = worth(step) + terms.credit_ns.min(step.wait_ns) > 0.0;
        if pays && paid.is_none_or(|best| worth(step) > worth(best)) {
            paid = Some(step);
        }
    }
    match paid {
        Some(step) => {
            let placement =
                ExpertPlacement::from_slots(current.experts(), current.devices(), current.slots(), &step.contents);
            let copies = placement.copies_from(current);
            let gain_ns = start_ns - step.time_ns;
            Adaptation { placement, copies, gain_ns, wait_ns: step.wait_ns, missed_ns: 0.0 }
        }
        None => Adaptation {
            placement: current.clone(),
            copies: Vec::new(),
            gain_ns: 0.0,
            wait_ns: 0.0,
            missed_ns: largest,
        },
    }
}

/// The best placement that a wide search finds for `loads`, from several starts, with copies that cost nothing.
///
/// # Errors
/// If the slots do not suffice for all experts.
pub fn best_placement(
    current: &ExpertPlacement,
    loads: &LayerLoads,
    costs: &PlacementCosts,
) -> Result<ExpertPlacement, PlacementError> {
    let (experts, devices, slots) = (current.experts(), current.devices(), current.slots());
    let costs = PlacementCosts { copy_ns: 0.0, ..*costs };
    let rows: Vec<f64> = loads.by_expert().iter().map(|&rows| rows as f64).collect();
    let empty = vec![EMPTY; devices * slots];
    let starts = [
        current.contents(),
        ExpertPlacement::spread(experts, devices, slots)?.contents(),
        super::keep_in_place(slots, &empty, &eplb(&rows, devices, slots)?),
        super::keep_in_place(slots, &empty, &first_fit(&rows, devices, slots, 0)?),
    ];
    let free = CopyTerms { budget_ns: f64::INFINITY, credit_ns: 0.0, blocking: true };
    let mut best: Option<(f64, Vec<u32>)> = None;
    let mut consider = |contents: Vec<u32>| {
        let mut leveller = Leveller::new(loads, &costs, slots, contents.clone());
        leveller.level();
        let time_ns = leveller.slowest().1;
        if best.as_ref().is_none_or(|(best_ns, _)| time_ns < *best_ns) {
            best = Some((time_ns, contents));
        }
    };
    for start in starts {
        for width in [narrow(devices), wide(devices)] {
            let mut search = Search::new(loads, &costs, slots, start.clone(), free, width);
            let steps = search.run(4 * devices);
            if let Some(fastest) = steps.into_iter().min_by(|a, b| a.time_ns.total_cmp(&b.time_ns)) {
                consider(fastest.contents);
            }
        }
        consider(start);
    }
    let (_, contents) = best.expect("there are several starts");
    Ok(ExpertPlacement::from_slots(experts, devices, slots, &contents))
}

/// No placement and no shares make the slowest device faster than this, in ns.
///
/// Three bounds: the mean of all rows; what the experts of which the slots hold too few copies leave on one device; what
/// devices must send, since few of their own rows are for experts that fit into their slots.
pub fn makespan_bound_ns(loads: &LayerLoads, slots: usize, costs: &PlacementCosts) -> f64 {
    let devices = loads.devices();
    let total: u64 = loads.by_expert().iter().sum();
    let mut sent = 0u64;
    for device in 0..devices {
        let mut own: Vec<u64> = (0..loads.experts()).map(|expert| loads.assigned(device, expert)).collect();
        own.sort_unstable_by(|a, b| b.cmp(a));
        sent += own.iter().skip(slots).sum::<u64>();
    }
    let mean_ns = (costs.row_ns * total as f64 + 2.0 * costs.wire_row_ns * sent as f64) / devices as f64;
    (mean_ns / loads.scale()).max(rows_bound_ns(loads, slots, costs))
}

/// [`makespan_bound_ns`] without the wire.
fn rows_bound_ns(loads: &LayerLoads, slots: usize, costs: &PlacementCosts) -> f64 {
    let devices = loads.devices();
    let row_ns = costs.row_ns / loads.scale();
    let total: u64 = loads.by_expert().iter().sum();
    // The least number of rows a device with which enough copies fit.
    let copies_fit = |most: u64| {
        let copies: u64 = loads.by_expert().iter().map(|&rows| rows.div_ceil(most).max(1)).sum();
        copies <= (devices * slots) as u64
    };
    let mean = total.div_ceil(devices as u64);
    if mean == 0 || copies_fit(mean) {
        return row_ns * mean as f64;
    }
    let (mut too_few, mut enough) = (mean, total);
    while enough - too_few > 1 {
        let middle = too_few + (enough - too_few) / 2;
        if copies_fit(middle) { enough = middle } else { too_few = middle }
    }
    row_ns * enough as f64
}

/// How far a step looks.
#[derive(Clone, Copy)]
struct Width {
    /// Experts of the slowest device.
    experts: usize,
    /// Devices that may take one.
    devices: usize,
    /// Rounds of levelling after a change.
    rounds: usize,
    /// Whether the first change that gains enough is taken, else the best.
    first: bool,
}

/// What is in the slots after some steps.
struct Step {
    contents: Vec<u32>,
    /// Time of the slowest device.
    time_ns: f64,
    /// Time that the layer waits for copies.
    wait_ns: f64,
    /// Number of copies.
    copies: usize,
}

struct Search<'a> {
    leveller: Leveller<'a>,
    before: Vec<u32>,
    copy_ns: f64,
    budget_ns: f64,
    /// Whether copies that are not hidden may leave an expert without a complete copy. Without slots to spare there is no
    /// other way.
    uncovers: bool,
    bound_ns: f64,
    width: Width,
    /// `[devices]`: slots that have changed.
    changed: Vec<usize>,
    /// Rows at the start of a step.
    start: RowsBefore,
    /// Slots of the slowest device, those with most rows first.
    giving: Vec<usize>,
    /// Time and number of the others, the fastest first.
    fast: Vec<(f64, usize)>,
}

/// A change of one or two slots.
#[derive(Clone, Copy, Debug)]
struct Change {
    /// What `slot` gets.
    expert: u32,
    slot: usize,
    /// What was there.
    evicted: u32,
    /// The slot that gets what was there, if they change places.
    swapped: Option<usize>,
}

impl<'a> Search<'a> {
    fn new(
        loads: &'a LayerLoads<'a>,
        costs: &PlacementCosts,
        slots: usize,
        contents: Vec<u32>,
        terms: CopyTerms,
        width: Width,
    ) -> Self {
        let contents_len = contents.len();
        let mut leveller = Leveller::new(loads, costs, slots, contents.clone());
        leveller.level();
        Search {
            leveller,
            changed: vec![0; loads.devices()],
            before: contents,
            copy_ns: costs.copy_ns,
            budget_ns: terms.budget_ns,
            uncovers: terms.blocking || loads.experts() == contents_len,
            bound_ns: rows_bound_ns(loads, slots, costs),
            width,
            start: RowsBefore::default(),
            giving: Vec::new(),
            fast: Vec::new(),
        }
    }

    /// Takes at most `limit` steps. What is there after each, in order.
    fn run(&mut self, limit: usize) -> Vec<Step> {
        let mut steps = Vec::new();
        while steps.len() < limit && self.leveller.slowest().1 > self.bound_ns * CLOSE_ENOUGH {
            if !self.step() {
                break;
            }
            let copies = self.changed.iter().sum();
            let most = self.changed.iter().copied().max().unwrap_or(0);
            steps.push(Step {
                contents: self.leveller.contents().to_vec(),
                time_ns: self.leveller.slowest().1,
                wait_ns: (most as f64 * self.copy_ns - self.budget_ns).max(0.0),
                copies,
            });
        }
        steps
    }

    /// Relieves the slowest device by one change, the first that gains enough or the best.
    fn step(&mut self) -> bool {
        let (slowest, slowest_ns) = self.leveller.slowest();
        self.giving.clear();
        self.giving.extend(self.leveller.slots_of(slowest).filter(|&slot| self.leveller.rows_in(slot) > 0));
        self.giving.sort_unstable_by_key(|&slot| (std::cmp::Reverse(self.leveller.rows_in(slot)), slot));
        self.fast.clear();
        for device in (0..self.changed.len()).filter(|&device| device != slowest) {
            self.fast.push((self.leveller.time_ns(device) + self.next_wait_ns(device), device));
        }
        self.fast.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        self.leveller.remember(&mut self.start);
        let mut best: Option<((f64, f64), Change)> = None;
        for i in 0..self.giving.len().min(self.width.experts) {
            let from = self.giving[i];
            let expert = self.leveller.contents()[from];
            let mut tried = 0;
            for j in 0..self.fast.len() {
                let to = self.fast[j].1;
                if tried == self.width.devices || self.leveller.time_ns(to) >= slowest_ns {
                    break;
                }
                if self.leveller.holds(to, expert) {
                    continue;
                }
                let Some(change) = self.change(from, to, slowest_ns) else { continue };
                tried += 1;
                self.apply(change);
                let after_ns = self.leveller.slowest().1;
                // Where several devices are equally slow, it is progress that one of them is relieved.
                let times_ns = (after_ns, self.leveller.time_ns(slowest));
                let enough = after_ns <= slowest_ns && times_ns.1 < slowest_ns * (1.0 - STEP_GAIN);
                if enough && self.width.first {
                    self.leveller.relieve(STEP_ROUNDS);
                    self.count_changes(change);
                    return true;
                }
                if enough && best.is_none_or(|(best_ns, _)| times_ns < best_ns) {
                    best = Some((times_ns, change));
                }
                self.undo(change);
            }
        }
        if let Some((_, change)) = best {
            self.apply(change);
            self.count_changes(change);
        }
        best.is_some()
    }

    /// What another copy on `device` would make the layer wait.
    fn next_wait_ns(&self, device: usize) -> f64 {
        ((self.changed[device] + 1) as f64 * self.copy_ns - self.budget_ns).max(0.0)
    }

    /// Whether nobody has to wait if `slot` is given away: the copy into it is hidden, or what it holds has a complete
    /// copy elsewhere.
    fn may_give(&self, slot: usize) -> bool {
        let contents = self.leveller.contents();
        let expert = contents[slot];
        let complete = |place: usize| self.before[place] == expert && contents[place] == expert;
        self.uncovers
            || self.next_wait_ns(slot / self.leveller.slots_of(0).len()) == 0.0
            || !complete(slot)
            || self.leveller.places(expert).iter().any(|&place| place as usize != slot && complete(place as usize))
    }

    /// How the expert in slot `from` comes to `device`.
    fn change(&self, from: usize, device: usize, slowest_ns: f64) -> Option<Change> {
        let leveller = &self.leveller;
        let expert = leveller.contents()[from];
        let slots = leveller.slots_of(device);
        let simply = |slot: usize| Some(Change { expert, slot, evicted: leveller.contents()[slot], swapped: None });
        // A slot that held the expert before costs no copy.
        let spare = |slot: usize| {
            let held = leveller.contents()[slot];
            held == EMPTY || (leveller.copies(held) > 1 && self.may_give(slot))
        };
        if let Some(slot) = slots.clone().find(|&slot| self.before[slot] == expert && spare(slot)) {
            return simply(slot);
        }
        if let Some(slot) = slots.clone().find(|&slot| leveller.contents()[slot] == EMPTY) {
            return simply(slot);
        }
        let worthless = slots.clone().filter(|&slot| spare(slot));
        if let Some(slot) = worthless.min_by_key(|&slot| leveller.rows_in(slot)) {
            return simply(slot);
        }
        let giver = from / slots.len();
        if !self.may_give(from) {
            return None;
        }
        let half = (slowest_ns - leveller.time_ns(device)) / 2.0;
        let difference = |slot: usize| {
            let rows = leveller.rows_in(from) as f64 - leveller.rows_in(slot) as f64;
            (rows * leveller.row_ns() - half).abs()
        };
        let tradable = slots.filter(|&slot| {
            let held = leveller.contents()[slot];
            leveller.rows_in(slot) < leveller.rows_in(from) && !leveller.holds(giver, held) && self.may_give(slot)
        });
        let slot = tradable.min_by(|&a, &b| difference(a).total_cmp(&difference(b)))?;
        Some(Change { expert, slot, evicted: leveller.contents()[slot], swapped: Some(from) })
    }

    /// Changes the slots and levels around them.
    fn apply(&mut self, change: Change) {
        if let Some(from) = change.swapped {
            self.leveller.put(from, EMPTY);
            self.leveller.put(change.slot, change.expert);
            self.leveller.put(from, change.evicted);
        } else {
            self.leveller.put(change.slot, change.expert);
        }
        if change.evicted != EMPTY {
            self.leveller.pour(change.evicted as usize);
        }
        self.leveller.pour(change.expert as usize);
        self.leveller.relieve(self.width.rounds);
    }

    /// Undoes the only change since the step began.
    fn undo(&mut self, change: Change) {
        if let Some(from) = change.swapped {
            self.leveller.put(from, EMPTY);
            self.leveller.put(change.slot, change.evicted);
            self.leveller.put(from, change.expert);
        } else {
            self.leveller.put(change.slot, change.evicted);
        }
        self.leveller.restore(&self.start);
    }

    fn count_changes(&mut self, change: Change) {
        let slots = self.leveller.slots_of(0).len();
        for slot in std::iter::once(change.slot).chain(change.swapped) {
            let device = slot / slots;
            let changed = self.leveller.slots_of(device).filter(|&slot| {
                let now = self.leveller.contents()[slot];
                now != self.before[slot] && now != EMPTY
            });
            self.changed[device] = changed.count();
        }
    }
}
