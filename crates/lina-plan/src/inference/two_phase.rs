//! The two phases of an MoE layer: where its experts go while the layer before computes, and what is done once its gate
//! has chosen.
//!
//! Every rank holds one [`ExpertScheduler`] and feeds it the same numbers, so all decide alike without a leader.
//!
//! What a slot holds and what it will hold are kept apart: a copy *under way* overwrites its slot, which serves nobody
//! until the copy is complete. [`ExpertScheduler::settle`] says whether the layer waits for it. It need not where every
//! expert has a complete copy elsewhere, which `lina-auto` sees to as far as slots allow: a swap may then span steps.

use super::placement::{Leveller, copies_between, keep_in_place, match_devices};
use super::{
    CopyTerms, ExpertPlacement, History, LayerLoads, PlacementCosts, PlacementError, PlacementPolicy, SlotCopy,
    TokenShares, adapt, best_placement, eplb, first_fit, makespan_bound_ns, same_top_experts,
};

/// How much longer than expected a layer may take before `lina` plans again, as a factor.
const TOLERANCE: f64 = 1.25;

/// What a scheduler does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertSchedulerSettings {
    /// How places are found.
    pub placement: PlacementPolicy,
    /// Whether there is a phase one. Without, phase two plans every time, and the layer waits for the copies.
    pub estimation: bool,
    /// Whether phase two plans again where the estimate was wrong.
    pub fine_tuning: bool,
    /// Experts that each device holds of a layer.
    pub slots: usize,
    /// Experts that a token chooses. An estimate is right if its `2·top_k` most popular experts are.
    pub top_k: usize,
    /// What work and copies cost.
    pub costs: PlacementCosts,
    /// Batches between two placements of `eplb`.
    pub plan_every: usize,
    /// Where `lina` puts experts without an estimate.
    pub seed: u64,
}

/// What phase two decides.
#[derive(Clone, Debug, PartialEq)]
pub struct Settlement {
    /// New copies; the layer waits for them. They go after those under way.
    pub copies: Vec<SlotCopy>,
    /// Whether the layer waits for the copies that were under way.
    pub wait: bool,
    /// Which device computes which rows.
    pub shares: TokenShares,
    /// Whether phase two planned anew, from the real popularity.
    pub replanned: bool,
    /// Whether the most popular experts were those of the estimate; `None` without an estimate.
    pub checked: Option<bool>,
}

/// Places the experts of every MoE layer, batch after batch.
#[derive(Clone, Debug)]
pub struct ExpertScheduler {
    settings: ExpertSchedulerSettings,
    devices: usize,
    batches: u64,
    layers: Vec<LayerState>,
}

#[derive(Clone, Debug)]
struct LayerState {
    /// What serves since the layer was last settled.
    serving: ExpertPlacement,
    /// What is to serve once nothing is under way. A slot may hold more than it says, of which no use is made.
    target: ExpertPlacement,
    /// `[devices, slots]`: what is in the slots once nothing is under way.
    contents: Vec<u32>,
    /// Copies that may not be complete.
    under_way: Vec<SlotCopy>,
    /// Rows of each expert that phase one expects.
    estimate: Option<Vec<f64>>,
    /// What the layer takes if the estimate is right, in ns; 0 without one.
    expected_ns: f64,
    /// (device, rows) of each expert that phase one planned, where phase two is to keep to them.
    planned: Option<Vec<Vec<(u32, u64)>>>,
    history: History,
    /// What copies that did not pay would have gained so far, in ns.
    missed_ns: f64,
    /// Plans so far.
    plans: u64,
}

impl ExpertScheduler {
    /// For `layers` MoE layers of `experts` experts on `devices` devices; experts start evenly spread.
    ///
    /// # Errors
    /// If the slots do not suffice for all experts, or a cost is not one.
    pub fn new(
        settings: ExpertSchedulerSettings,
        layers: usize,
        experts: usize,
        devices: usize,
    ) -> Result<Self, PlacementError> {
        settings.costs.check()?;
        if settings.plan_every == 0 || settings.top_k == 0 || settings.top_k > experts {
            return PlacementError::new(format!(
                "{} choices among {experts} experts and {} batches between placements: expected at least 1 of each, and \
                 no more choices than experts",
                settings.top_k, settings.plan_every
            ));
        }
        let spread = ExpertPlacement::spread(experts, devices, settings.slots)?;
        let layer = LayerState {
            contents: spread.contents(),
            serving: spread.clone(),
            target: spread,
            under_way: Vec::new(),
            estimate: None,
            expected_ns: 0.0,
            planned: None,
            history: History::new(experts, 1.0 - 1.0 / settings.plan_every as f64),
            missed_ns: 0.0,
            plans: 0,
        };
        Ok(ExpertScheduler { settings, devices, batches: 0, layers: vec![layer; layers] })
    }

    /// Between two batches: the copies of a placement at a cadence, by layer (`eplb`). [`ExpertScheduler::settle`] says
    /// that their layers wait for them, unless they have arrived by then.
    pub fn begin_batch(&mut self) -> Vec<(usize, Vec<SlotCopy>)> {
        let due = self.batches > 0 && self.batches.is_multiple_of(self.settings.plan_every as u64);
        self.batches += 1;
        if !due || self.settings.placement != PlacementPolicy::Eplb {
            return Vec::new();
        }
        let (devices, slots) = (self.devices, self.settings.slots);
        let planned = self.layers.iter_mut().enumerate().filter_map(|(number, layer)| {
            let loads = layer.history.popularity()?;
            if !layer.under_way.is_empty() {
                return None;
            }
            let held = eplb(&loads, devices, slots).expect("room was checked at the start");
            let copies = layer.go_to(slots, &held);
            layer.under_way = copies.clone();
            (!copies.is_empty()).then_some((number, copies))
        });
        planned.collect()
    }

    /// Phase one, while the layer before computes: `estimate` `[experts]` is the rows that each expert will get, summed
    /// over all ranks; `budget_ns` the time until the layer needs its experts. Returns copies to begin now.
    ///
    /// Nothing new is begun while copies for the layer are under way.
    ///
    /// # Panics
    /// If there is no such layer, or another number of experts.
    pub fn prepare(&mut self, layer: usize, estimate: &[f64], budget_ns: f64) -> Vec<SlotCopy> {
        let settings = self.settings;
        let layer = &mut self.layers[layer];
        assert_eq!(estimate.len(), layer.target.experts(), "one number for every expert");
        if !settings.estimation {
            return Vec::new();
        }
        layer.estimate = Some(estimate.to_vec());
        if !layer.under_way.is_empty() {
            return Vec::new();
        }
        let copies = match settings.placement {
            PlacementPolicy::Static | PlacementPolicy::Eplb | PlacementPolicy::Best => Vec::new(),
            PlacementPolicy::Lina => {
                let copies = layer.place_by_popularity(estimate, &settings);
                let loads = LayerLoads::estimated(estimate, self.devices);
                let mut leveller = Leveller::new(&loads, &settings.costs, settings.slots, layer.target.contents());
                leveller.level();
                layer.expected_ns = leveller.slowest().1;
                layer.planned = (!settings.fine_tuning).then(|| {
                    (0..estimate.len())
                        .map(|expert| {
                            let mut rows = Vec::new();
                            leveller.rows_of(expert, &mut rows);
                            rows
                        })
                        .collect()
                });
                copies
            }
            PlacementPolicy::LinaAuto => {
                let loads = LayerLoads::estimated(estimate, self.devices);
                layer.adapt(&loads, &settings.costs, budget_ns)
            }
        };
        layer.under_way = copies.clone();
        copies
    }

    /// Phase two, once the gate has chosen: `assigned` `[devices, experts]` is the rows that each source routes to each
    /// expert; `wait_ns` the longest time that any rank still has to wait for copies under way for this layer, 0 when
    /// all have arrived.
    ///
    /// # Panics
    /// If there is no such layer, or `assigned` has another length.
    pub fn settle(&mut self, layer: usize, assigned: &[u32], wait_ns: f64) -> Settlement {
        let settings = self.settings;
        let layer = &mut self.layers[layer];
        let loads = LayerLoads::measured(assigned, self.devices);
        assert_eq!(loads.experts(), layer.target.experts(), "one number for every device and expert");
        let rows: Vec<f64> = loads.by_expert().iter().map(|&rows| rows as f64).collect();
        layer.history.add(&rows);
        let checked = layer.estimate.take().map(|estimate| same_top_experts(&estimate, &rows, 2 * settings.top_k));
        let replan = !settings.estimation || (settings.fine_tuning && checked != Some(true));
        let late = wait_ns > 0.0 && !layer.under_way.is_empty();
        let planned = layer.planned.take();
        let mut settlement = match settings.placement {
            PlacementPolicy::Static => layer.serve_target(late, assigned, &settings.costs),
            PlacementPolicy::Eplb => {
                let shares = layer.target.even_shares(assigned);
                layer.serve(late, shares)
            }
            PlacementPolicy::Lina if replan || (settings.fine_tuning && layer.is_slower(assigned, &settings.costs)) => {
                let copies = layer.place_by_popularity(&rows, &settings);
                Settlement { copies, replanned: true, ..layer.serve_target(late, assigned, &settings.costs) }
            }
            PlacementPolicy::Lina => match planned {
                Some(planned) => {
                    let shares = TokenShares::in_proportion(&loads, &planned);
                    layer.serve(late, shares)
                }
                None => layer.serve_target(late, assigned, &settings.costs),
            },
            PlacementPolicy::Best => {
                let best =
                    best_placement(&layer.target, &loads, &settings.costs).expect("room was checked at the start");
                let held: Vec<Vec<u32>> = (0..best.devices())
                    .map(|device| best.slots_of(device).iter().flatten().copied().collect())
                    .collect();
                let copies = layer.go_to(settings.slots, &held);
                Settlement { copies, replanned: true, ..layer.serve_target(late, assigned, &settings.costs) }
            }
            PlacementPolicy::LinaAuto => {
                layer.settle_cheaply(&loads, assigned, late.then_some(wait_ns), replan, &settings)
            }
        };
        settlement.checked = checked;
        settlement
    }

    /// What serves `layer` since it was last settled.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn placement(&self, layer: usize) -> &ExpertPlacement {
        &self.layers[layer].serving
    }

    /// What was asked for.
    pub fn settings(&self) -> &ExpertSchedulerSettings {
        &self.settings
    }
}

impl LayerState {
    /// Makes what `held` lists for every device the target. Returns the copies that it takes.
    fn go_to(&mut self, slots: usize, held: &[Vec<u32>]) -> Vec<SlotCopy> {
        let placed = keep_in_place(slots, &self.contents, held);
        let copies = copies_between(slots, &self.contents, &placed);
        for copy in &copies {
            self.contents[copy.device * slots + copy.slot] = copy.expert as u32;
        }
        self.target = ExpertPlacement::from_slots(self.target.experts(), held.len(), slots, &placed);
        copies
    }

    /// The paper's placement; without rows nothing moves.
    fn place_by_popularity(&mut self, rows: &[f64], settings: &ExpertSchedulerSettings) -> Vec<SlotCopy> {
        if !rows.iter().any(|&rows| rows > 0.0) {
            return Vec::new();
        }
        let seed = settings.seed.wrapping_add(self.plans);
        self.plans += 1;
        let held = first_fit(rows, self.target.devices(), settings.slots, seed).expect("room was checked at the start");
        // Which device has which part is all the same to the paper: it is the one that holds most of it.
        let held = match_devices(settings.slots, &self.contents, held);
        self.go_to(settings.slots, &held)
    }

    /// Whether the target takes more than [`TOLERANCE`] longer than phase one expected. The paper compares the most
    /// popular experts only: they may be the right ones in wrong proportions.
    fn is_slower(&self, assigned: &[u32], costs: &PlacementCosts) -> bool {
        self.expected_ns > 0.0 && self.target.shares(assigned, costs).makespan_ns(costs) > TOLERANCE * self.expected_ns
    }

    /// `lina-auto`'s placement in phase one.
    fn adapt(&mut self, loads: &LayerLoads, costs: &PlacementCosts, budget_ns: f64) -> Vec<SlotCopy> {
        let terms = CopyTerms { budget_ns, credit_ns: self.missed_ns, blocking: false };
        let adaptation = adapt(&self.target, loads, costs, terms);
        if adaptation.copies.is_empty() {
            self.missed_ns += adaptation.missed_ns;
        } else {
            self.missed_ns = 0.0;
        }
        self.contents = adaptation.placement.contents();
        self.target = adaptation.placement;
        adaptation.copies
    }

    /// What is complete now, if that is all experts.
    fn complete(&self) -> Option<ExpertPlacement> {
        let slots = self.target.slots();
        let mut complete: Vec<Option<u32>> =
            (0..self.target.devices()).flat_map(|device| self.target.slots_of(device).iter().copied()).collect();
        self.under_way.iter().for_each(|copy| complete[copy.device * slots + copy.slot] = None);
        ExpertPlacement::new(self.target.experts(), self.target.devices(), slots, complete).ok()
    }

    /// The target serves; the layer waits for copies that are `late`.
    fn serve(&mut self, late: bool, shares: TokenShares) -> Settlement {
        self.under_way.clear();
        self.serving = self.target.clone();
        Settlement { copies: Vec::new(), wait: late, shares, replanned: false, checked: None }
    }

    fn serve_target(&mut self, late: bool, assigned: &[u32], costs: &PlacementCosts) -> Settlement {
        let shares = self.target.shares(assigned, costs);
        self.serve(late, shares)
    }

    /// `lina-auto`'s phase two: the cheapest of serving with what is complete, of waiting for what is under way, and,
    /// if it may plan anew, of waiting for more.
    fn settle_cheaply(
        &mut self,
        loads: &LayerLoads,
        assigned: &[u32],
        late_ns: Option<f64>,
        replan: bool,
        settings: &ExpertSchedulerSettings,
    ) -> Settlement {
        let costs = &settings.costs;
        let shares = self.target.shares(assigned, costs);
        let late_by_ns = late_ns.unwrap_or(0.0);
        let waiting_ns = late_by_ns + shares.makespan_ns(costs);
        let now = late_ns.and_then(|_| self.complete()).map(|placement| {
            let shares = placement.shares(assigned, costs);
            (shares.makespan_ns(costs), placement, shares)
        });
        let cheapest_ns = now.as_ref().map_or(waiting_ns, |(now_ns, ..)| now_ns.min(waiting_ns));
        // Where even the best placement would not make up for one copy there is nothing to plan.
        let bound_ns = makespan_bound_ns(loads, settings.slots, costs);
        let replan = replan && (!settings.estimation || cheapest_ns > bound_ns + costs.copy_ns);
        if replan {
            let credit_ns = if settings.estimation { 0.0 } else { self.missed_ns };
            let adaptation = adapt(&self.target, loads, costs, CopyTerms { budget_ns: 0.0, credit_ns, blocking: true });
            if !adaptation.copies.is_empty() {
                let shares = adaptation.placement.shares(assigned, costs);
                let blocked_ns = late_by_ns + adaptation.wait_ns;
                if blocked_ns - credit_ns.min(blocked_ns) + shares.makespan_ns(costs) < cheapest_ns {
                    self.missed_ns = 0.0;
                    self.contents = adaptation.placement.contents();
                    self.target = adaptation.placement;
                    let settlement = self.serve(late_ns.is_some(), shares);
                    return Settlement { copies: adaptation.copies, replanned: true, ..settlement };
                }
            } else if !settings.estimation {
                self.missed_ns += adaptation.missed_ns;
            }
        }
        let settlement = match now {
            Some((now_ns, placement, shares)) if now_ns < waiting_ns => {
                self.serving = placement;
                Settlement { copies: Vec::new(), wait: false, shares, replanned: false, checked: None }
            }
            _ => self.serve(late_ns.is_some(), shares),
        };
        Settlement { replanned: replan, ..settlement }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICES: usize = 4;

    fn settings(placement: PlacementPolicy) -> ExpertSchedulerSettings {
        ExpertSchedulerSettings {
            placement,
            estimation: true,
            fine_tuning: true,
            slots: 2,
            top_k: 1,
            costs: PlacementCosts { row_ns: 1.0, wire_row_ns: 0.0, copy_ns: 100.0 },
            plan_every: 2,
            seed: 0,
        }
    }

    fn scheduler(settings: ExpertSchedulerSettings) -> ExpertScheduler {
        ExpertScheduler::new(settings, 1, 4, DEVICES).unwrap()
    }

    /// Rows of each expert, from all devices alike.
    fn assigned(rows: [u32; 4]) -> Vec<u32> {
        (0..DEVICES).flat_map(|_| rows.map(|rows| rows / DEVICES as u32)).collect()
    }

    const HOT: [u32; 4] = [700, 180, 80, 40];
    const HOT_ESTIMATE: [f64; 4] = [690.0, 190.0, 60.0, 60.0];
    const OTHER: [u32; 4] = [40, 80, 180, 700];

    #[test]
    fn static_moves_nothing() {
        let mut scheduler = scheduler(settings(PlacementPolicy::Static));
        for _ in 0..5 {
            assert!(scheduler.begin_batch().is_empty());
            assert!(scheduler.prepare(0, &HOT_ESTIMATE, 1e9).is_empty());
            let settlement = scheduler.settle(0, &assigned(HOT), 0.0);
            assert!(settlement.copies.is_empty() && !settlement.replanned);
            assert_eq!(settlement.shares.device_rows(), [700, 180, 80, 40]);
        }
    }

    #[test]
    fn a_right_estimate_needs_no_second_plan_and_a_wrong_one_does() {
        let mut scheduler = scheduler(settings(PlacementPolicy::Lina));
        assert!(!scheduler.prepare(0, &HOT_ESTIMATE, 1e9).is_empty());
        let settlement = scheduler.settle(0, &assigned(HOT), 0.0);
        assert_eq!((settlement.checked, settlement.replanned, settlement.wait), (Some(true), false, false));
        assert!(settlement.copies.is_empty());
        // Placed for the estimate: experts 1 and 2 share a device.
        assert_eq!(settlement.shares.device_rows().into_iter().max(), Some(260));
        scheduler.prepare(0, &HOT_ESTIMATE, 1e9);
        let settlement = scheduler.settle(0, &assigned(OTHER), 10.0);
        assert_eq!((settlement.checked, settlement.replanned), (Some(false), true));
        assert!(!settlement.copies.is_empty());
        assert_eq!(settlement.shares.device_rows().into_iter().max(), Some(260));
    }

    #[test]
    fn without_fine_tuning_rows_are_divided_as_the_estimate_said() {
        let mut scheduler =
            scheduler(ExpertSchedulerSettings { fine_tuning: false, ..settings(PlacementPolicy::Lina) });
        scheduler.prepare(0, &HOT_ESTIMATE, 1e9);
        let settlement = scheduler.settle(0, &assigned(OTHER), 0.0);
        assert_eq!((settlement.checked, settlement.replanned), (Some(false), false));
        assert!(settlement.copies.is_empty());
        // The device of the expert that was expected to be cold has it all.
        assert!(settlement.shares.device_rows().into_iter().max().unwrap() >= 700);
    }

    #[test]
    fn without_estimation_every_batch_is_planned_and_waited_for() {
        let mut scheduler = scheduler(ExpertSchedulerSettings { estimation: false, ..settings(PlacementPolicy::Lina) });
        assert!(scheduler.prepare(0, &HOT_ESTIMATE, 1e9).is_empty());
        let settlement = scheduler.settle(0, &assigned(HOT), 0.0);
        assert_eq!((settlement.checked, settlement.replanned), (None, true));
        assert!(!settlement.copies.is_empty());
    }

    #[test]
    fn eplb_plans_at_its_cadence_from_what_was() {
        let mut scheduler = scheduler(settings(PlacementPolicy::Eplb));
        let mut planned = Vec::new();
        for _ in 0..6 {
            planned.push(!scheduler.begin_batch().is_empty());
            scheduler.prepare(0, &HOT_ESTIMATE, 1e9);
            assert!(scheduler.settle(0, &assigned(HOT), 0.0).copies.is_empty());
        }
        // The same popularity leads to the same placement, of which everything is there.
        assert_eq!(planned, [false, false, true, false, false, false]);
        assert!(scheduler.placement(0).holders(0).len() > 1);
    }

    #[test]
    fn lina_auto_serves_on_while_a_swap_spans_steps() {
        let mut settings = settings(PlacementPolicy::LinaAuto);
        // A copy takes as long as ten steps.
        settings.costs.copy_ns = 7000.0;
        let mut scheduler = scheduler(settings);
        let mut steps = 0;
        let copies = loop {
            let copies = scheduler.prepare(0, &HOT_ESTIMATE, 0.0);
            if !copies.is_empty() {
                break copies;
            }
            let settlement = scheduler.settle(0, &assigned(HOT), 0.0);
            assert!(settlement.copies.is_empty());
            steps += 1;
            assert!(steps < 100, "what is missed adds up until the copies pay");
        };
        assert!(steps > 10, "a swap has to pay: {steps} steps");
        for left in [6000.0, 3000.0] {
            let settlement = scheduler.settle(0, &assigned(HOT), left);
            assert!(!settlement.wait && settlement.copies.is_empty());
            assert_eq!(settlement.shares.device_rows()[0], 700, "as before");
            assert!(scheduler.prepare(0, &HOT_ESTIMATE, 0.0).is_empty(), "one swap at a time");
        }
        let settlement = scheduler.settle(0, &assigned(HOT), 0.0);
        assert!(settlement.shares.device_rows()[0] < 400);
        assert!(copies.iter().all(|copy| scheduler.placement(0).slot_of(copy.device, copy.expert) == Some(copy.slot)));
        // A short wait is worth it.
        let mut scheduler = scheduler.clone();
        let copies = scheduler.prepare(0, &[40.0, 80.0, 180.0, 700.0], 1e9);
        assert!(!copies.is_empty());
        assert!(scheduler.settle(0, &assigned(OTHER), 1.0).wait);
    }

    #[test]
    fn settings_that_make_no_sense_are_refused() {
        let message = |settings| ExpertScheduler::new(settings, 1, 4, DEVICES).map(|_| ()).unwrap_err().message;
        let good = settings(PlacementPolicy::LinaAuto);
        assert!(message(ExpertSchedulerSettings { plan_every: 0, ..good }).contains("0 batches between placements"));
        assert!(message(ExpertSchedulerSettings { slots: 0, ..good }).contains("0 slots"));
        let costs = PlacementCosts { row_ns: f64::NAN, ..good.costs };
        assert!(message(ExpertSchedulerSettings { costs, ..good }).starts_with("costs of NaN ns a row"));
    }
}
