//! The placements against each other on synthetic routing, and what no placement may do.

mod common;

use common::{Trace, by_expert};
use lina_plan::{
    CopyTerms, ExpertLayout, ExpertPlacement, History, LayerLoads, PlacementCosts, PlacementPolicy, adapt,
    best_placement, eplb, first_fit, makespan_bound_ns,
};
use proptest::prelude::*;

const COSTS: PlacementCosts = PlacementCosts { row_ns: 1000.0, wire_row_ns: 250.0, copy_ns: 50_000.0 };
const FREE: CopyTerms = CopyTerms { budget_ns: f64::INFINITY, credit_ns: 0.0, blocking: false };

fn placed(experts: usize, held: &[Vec<u32>], slots: usize) -> ExpertPlacement {
    let of = |experts: &Vec<u32>| (0..slots).map(|slot| experts.get(slot).copied()).collect::<Vec<_>>();
    ExpertPlacement::new(experts, held.len(), slots, held.iter().flat_map(of).collect()).unwrap()
}

#[test]
fn names_are_read_back() {
    for policy in PlacementPolicy::ALL {
        assert_eq!(policy.to_string().parse(), Ok(policy));
    }
    let error = "ideal".parse::<PlacementPolicy>().unwrap_err();
    assert_eq!(error, "placement `ideal` is unknown, expected one of static, lina, eplb, lina-auto, best");
}

#[test]
fn impossible_placements_say_why() {
    let message = |result: Result<ExpertPlacement, lina_plan::PlacementError>| result.unwrap_err().message;
    assert_eq!(
        message(ExpertPlacement::spread(9, 4, 2)),
        "2 slots on each of 4 devices hold 8 experts, but a layer has 9"
    );
    assert_eq!(message(ExpertPlacement::spread(0, 4, 2)), "0 experts on 4 devices of 2 slots: each must be at least 1");
    let new = |slots: &[Option<u32>]| message(ExpertPlacement::new(2, 2, 2, slots.to_vec()));
    assert_eq!(new(&[Some(0), Some(0), Some(1), None]), "expert 0 twice on device 0, expected once at most");
    assert_eq!(new(&[Some(0), None, None, None]), "expert 1 has no place, expected at least one");
    assert_eq!(new(&[Some(0), Some(1), Some(2), None]), "expert 2 on device 1, but a layer has 2 experts");
    assert_eq!(new(&[Some(0), Some(1)]), "the contents of 2 slots for 2 devices of 2 slots, expected 4");
}

/// Equation 1 by hand: of 4 devices, expert 0 is worth 2, 1 and 2 are worth 0.8 and 0.7, 3 and 4 are worth 0.3 and 0.2.
#[test]
fn the_papers_placement() {
    let held = first_fit(&[50.0, 20.0, 17.5, 7.5, 5.0], 4, 4, 0).unwrap();
    assert_eq!(held, [vec![0], vec![0], vec![1, 4], vec![2, 3]]);
    // Without an estimate for 3 and 4, they go to the devices that are free.
    let held = first_fit(&[50.0, 25.0, 25.0, 0.0, f64::NAN, 0.0], 8, 4, 0).unwrap();
    assert_eq!(held[..4].iter().filter(|held| **held == [0]).count(), 4);
    let held = first_fit(&[1.0, 1.0, 0.0, 0.0, 0.0, 0.0], 2, 4, 0).unwrap();
    assert!(held.iter().all(|held| held.len() <= 4) && held.iter().map(Vec::len).sum::<usize>() == 6);
}

/// By hand: the two slots beyond one an expert go to expert 0 (8, 4, 8/3); then 8/3, 8/3, 8/3, 2, 1, 1 are packed.
#[test]
fn deepseeks_placement() {
    let held = eplb(&[8.0, 2.0, 1.0, 1.0], 3, 2).unwrap();
    assert_eq!(held, [vec![0, 1], vec![0, 2], vec![0, 3]]);
    // With fewer devices than copies, some share a device and the second is left out.
    assert_eq!(eplb(&[9.0, 1.0], 2, 2).unwrap(), [vec![0], vec![0, 1]]);
}

/// On the same trace, slots and cadence: at most a quarter of the copies of `eplb`, and better balance.
#[test]
fn lina_auto_moves_little_and_balances_better_than_eplb() {
    const BATCHES: usize = 96;
    const CADENCE: usize = 8;
    for (experts, devices, slots) in [(16, 16, 2), (16, 4, 6), (60, 8, 10)] {
        for (skew, drift) in [(0.5, 0.02), (1.0, 0.02), (0.5, 0.1), (1.0, 0.1)] {
            let mut trace = Trace::new(experts, devices, 256, skew, drift, 5);
            let mut adapted = ExpertPlacement::spread(experts, devices, slots).unwrap();
            let mut balanced = adapted.clone();
            let mut history = History::new(experts, 1.0 - 1.0 / CADENCE as f64);
            let (mut copies, mut balance, mut missed_ns) = ([0; 2], [0.0; 2], 0.0);
            for batch in 0..BATCHES {
                if let Some(popularity) = history.popularity().filter(|_| batch % CADENCE == 0) {
                    let wanted = placed(experts, &eplb(&popularity, devices, slots).unwrap(), slots);
                    let is_new = |device: usize, expert: usize| balanced.slot_of(device, expert).is_none();
                    copies[0] += (0..devices)
                        .map(|device| wanted.held_by(device).filter(|&expert| is_new(device, expert)).count())
                        .sum::<usize>();
                    balanced = wanted;
                    let rows: Vec<f64> = popularity.iter().map(|share| share * (256 * devices) as f64).collect();
                    let terms = CopyTerms { budget_ns: 0.0, credit_ns: missed_ns, blocking: true };
                    let adaptation = adapt(&adapted, &LayerLoads::estimated(&rows, devices), &COSTS, terms);
                    missed_ns = if adaptation.copies.is_empty() { missed_ns + adaptation.missed_ns } else { 0.0 };
                    copies[1] += adaptation.copies.len();
                    adapted = adaptation.placement;
                }
                let assigned = trace.batch();
                history.add(&by_expert(&assigned, devices));
                balance[0] += balanced.even_shares(&assigned).imbalance() / BATCHES as f64;
                balance[1] += adapted.shares(&assigned, &COSTS).imbalance() / BATCHES as f64;
            }
            let what = format!("{experts} experts, {devices} devices, {slots} slots, skew {skew}, drift {drift}");
            assert!(copies[1] > 0 && 4 * copies[1] <= copies[0], "{what}: copies {copies:?}");
            assert!(balance[1] <= balance[0], "{what}: balance {balance:?}");
        }
    }
}

#[test]
fn lina_auto_is_near_the_best() {
    const BATCHES: usize = 8;
    for (experts, devices, slots) in [(16, 16, 2), (16, 4, 5), (24, 8, 4)] {
        for skew in [0.3, 0.7, 1.2] {
            let mut trace = Trace::new(experts, devices, 256, skew, 0.2, 3);
            let mut current = ExpertPlacement::spread(experts, devices, slots).unwrap();
            let mut over = 0.0;
            for _ in 0..BATCHES {
                let assigned = trace.batch();
                let loads = LayerLoads::measured(&assigned, devices);
                let before_ns = current.shares(&assigned, &COSTS).makespan_ns(&COSTS);
                current = adapt(&current, &loads, &COSTS, FREE).placement;
                let auto_ns = current.shares(&assigned, &COSTS).makespan_ns(&COSTS);
                let best = best_placement(&current, &loads, &COSTS).unwrap();
                let best_ns = best.shares(&assigned, &COSTS).makespan_ns(&COSTS);
                let bound_ns = makespan_bound_ns(&loads, slots, &COSTS);
                let ascending = [bound_ns, best_ns, auto_ns, before_ns * 1.001];
                assert!(ascending.is_sorted(), "bound, best, lina-auto, before: {ascending:?}");
                over += auto_ns / best_ns / BATCHES as f64;
            }
            assert!(over <= 1.05, "{experts} experts, {devices} devices, skew {skew}: {over}");
        }
    }
}

/// Four devices; one expert gets most rows.
fn hot() -> (ExpertPlacement, Vec<f64>) {
    (ExpertPlacement::spread(4, 4, 2).unwrap(), vec![700.0, 100.0, 100.0, 100.0])
}

#[test]
fn a_copy_that_costs_more_than_it_gains_is_not_made_until_enough_was_missed() {
    let (current, rows) = hot();
    let loads = LayerLoads::estimated(&rows, 4);
    // Leveled, the slowest device has 250 rows instead of 700.
    let costs = PlacementCosts { row_ns: 1.0, wire_row_ns: 0.0, copy_ns: 10_000.0 };
    let terms = CopyTerms::default();
    let adaptation = adapt(&current, &loads, &costs, terms);
    assert!(adaptation.copies.is_empty() && adaptation.placement == current);
    assert!((adaptation.missed_ns - 450.0).abs() < 5.0, "{}", adaptation.missed_ns);
    let patient = CopyTerms { credit_ns: 20_000.0, ..terms };
    assert!(!adapt(&current, &loads, &costs, patient).copies.is_empty());
    let hidden = CopyTerms { budget_ns: 10_000.0, ..terms };
    let adaptation = adapt(&current, &loads, &costs, hidden);
    assert!((adaptation.gain_ns - 450.0).abs() < 5.0 && adaptation.wait_ns == 0.0);
    // Every other device gets the hot expert, and nothing else moves.
    let devices: Vec<usize> = adaptation.copies.iter().map(|copy| copy.device).collect();
    assert_eq!(devices, [1, 2, 3]);
    assert!(adaptation.copies.iter().all(|copy| copy.expert == 0 && copy.slot == 1));
}

#[test]
fn what_serves_stays_complete_where_copies_are_not_hidden() {
    // Two spare slots hold replicas that are of no use; the only copies of 1 and 3 must stay.
    let slots = [Some(0), Some(1), Some(1), Some(2), Some(3), Some(2)];
    let current = ExpertPlacement::new(4, 3, 2, slots.to_vec()).unwrap();
    let costs = PlacementCosts { row_ns: 1.0, wire_row_ns: 0.0, copy_ns: 1e6 };
    let terms = CopyTerms { budget_ns: 0.0, credit_ns: 1e9, blocking: false };
    let adaptation = adapt(&current, &LayerLoads::estimated(&[900.0, 50.0, 30.0, 20.0], 3), &costs, terms);
    assert!(!adaptation.copies.is_empty());
    let mut complete = slots;
    adaptation.copies.iter().for_each(|copy| complete[copy.device * 2 + copy.slot] = None);
    assert!(ExpertPlacement::new(4, 3, 2, complete.to_vec()).is_ok(), "{:?}", adaptation.copies);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_expert_has_a_place_and_none_two_on_a_device(
        devices in 1usize..10, experts in 1usize..40, spare in 0usize..4, seed in any::<u64>(),
        rows in prop::collection::vec(prop_oneof![Just(0.0f64), 0.0f64..10.0, 10.0f64..2000.0], 40),
        budget_ns in 0.0f64..1e6,
    ) {
        let slots = experts.div_ceil(devices) + spare;
        let rows = &rows[..experts];
        // `placed` validates.
        placed(experts, &first_fit(rows, devices, slots, seed).unwrap(), slots);
        placed(experts, &eplb(rows, devices, slots).unwrap(), slots);
        let current = ExpertPlacement::spread(experts, devices, slots).unwrap();
        let loads = LayerLoads::estimated(rows, devices);
        for terms in [FREE, CopyTerms { budget_ns, credit_ns: 1e5, blocking: seed % 2 == 0 }] {
            let adaptation = adapt(&current, &loads, &COSTS, terms);
            prop_assert_eq!(adaptation.placement.copies_from(&current), adaptation.copies);
            prop_assert!(adaptation.gain_ns >= 0.0);
        }
    }

    #[test]
    fn static_placement_is_that_of_training(devices in 1usize..20, experts in 1usize..40) {
        let slots = experts.div_ceil(devices);
        let placement = ExpertPlacement::spread(experts, devices, slots).unwrap();
        let layout = ExpertLayout::new(experts, devices, None).unwrap();
        for device in 0..devices {
            prop_assert_eq!(placement.held_by(device).collect::<Vec<_>>(), layout.held_by(device));
        }
        for expert in 0..experts {
            let holders: Vec<usize> = placement.holders(expert).iter().map(|&device| device as usize).collect();
            prop_assert_eq!(&holders, layout.holders(expert));
        }
    }
}
