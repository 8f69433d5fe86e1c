//! How long placing takes, how good the result is, and how many experts move: `lina`, `eplb`, `lina-auto` and `best` on
//! synthetic routing.
//!
//! ```text
//! cargo run --release -p lina-plan --example expert_placement
//! ```

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::time::Instant;

use common::{Trace, by_expert};
use lina_plan::{
    CopyTerms, ExpertPlacement, ExpertScheduler, ExpertSchedulerSettings, History, LayerLoads, PlacementCosts,
    PlacementPolicy, SlotCopy, adapt, best_placement, eplb, first_fit, makespan_bound_ns,
};

/// A row's share of the link makes all-to-alls about a third of a batch.
const COSTS: PlacementCosts = PlacementCosts { row_ns: 1000.0, wire_row_ns: 250.0, copy_ns: 50_000.0 };

fn main() {
    println!("Time to place the experts of a layer and to divide a batch's rows, median of {RUNS} batches, us");
    println!(
        "{:>7} {:>7} {:>5} {:>5} {:>8} {:>8} {:>9} {:>8} | slowest device over the bound: {:>6} {:>6} {:>9} | lina-auto over best, mean and worst",
        "experts", "devices", "slots", "skew", "lina", "eplb", "lina-auto", "shares", "lina", "eplb", "lina-auto"
    );
    for (experts, devices, slots) in [(16, 16, 2), (16, 16, 4), (64, 16, 8), (256, 64, 5), (256, 64, 8)] {
        for skew in [0.3, 0.7, 1.2] {
            timings(experts, devices, slots, skew);
        }
    }
    println!();
    println!("Experts copied and balance (busiest device over mean) over {BATCHES} batches, placed every {CADENCE}");
    println!(
        "{:>7} {:>7} {:>5} {:>5} {:>6} | {:>7} {:>9} {:>6} | balance: {:>6} {:>6} {:>11} {:>9}",
        "experts",
        "devices",
        "slots",
        "skew",
        "drift",
        "eplb",
        "lina-auto",
        "share",
        "static",
        "eplb",
        "eplb, level",
        "lina-auto"
    );
    for (experts, devices, slots) in [(16, 16, 2), (64, 16, 6), (256, 64, 5)] {
        for skew in [0.5, 1.0] {
            for drift in [0.02, 0.1] {
                movement(experts, devices, slots, skew, drift);
            }
        }
    }
    println!();
    println!(
        "A layer's time over that of an even load, {BATCHES} batches of 16 experts on 16 devices of 4 slots, estimated \
         with an error; a copy takes a fifth of an even layer (modelled)"
    );
    println!("{:>26} | {:>5} {:>6} {:>6} {:>8} {:>10}", "", "skew", "median", "95%ile", "copies", "planned");
    for skew in [0.5, 1.0] {
        use PlacementPolicy::{Best, Eplb, Lina, LinaAuto, Static};
        for placement in [Static, Eplb, Lina, LinaAuto, Best] {
            layer_times(placement, true, true, skew);
        }
        for placement in [Lina, LinaAuto] {
            layer_times(placement, false, true, skew);
            layer_times(placement, true, false, skew);
        }
    }
}

/// All copies are hidden.
const FREE: CopyTerms = CopyTerms { budget_ns: f64::INFINITY, credit_ns: 0.0, blocking: false };

const RUNS: usize = 51;
const BEST_EVERY: usize = 10;
const BATCHES: usize = 160;
const CADENCE: usize = 8;

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn placed(experts: usize, held: &[Vec<u32>], slots: usize) -> ExpertPlacement {
    let of = |experts: &Vec<u32>| (0..slots).map(|slot| experts.get(slot).copied()).collect::<Vec<_>>();
    ExpertPlacement::new(experts, held.len(), slots, held.iter().flat_map(of).collect()).expect("a plan is valid")
}

fn timings(experts: usize, devices: usize, slots: usize, skew: f64) {
    let mut trace = Trace::new(experts, devices, 512, skew, 0.3, 7);
    let spread = ExpertPlacement::spread(experts, devices, slots).expect("slots suffice");
    let mut current = spread.clone();
    let mut times = [const { Vec::new() }; 4];
    let (mut over, mut over_best) = ([0.0f64; 4], Vec::new());
    for run in 0..RUNS {
        let assigned = trace.batch();
        let loads = LayerLoads::measured(&assigned, devices);
        let popularity = by_expert(&assigned, devices);
        let bound_ns = makespan_bound_ns(&loads, slots, &COSTS);
        let mut timed = |which: usize, place: &mut dyn FnMut() -> (ExpertPlacement, f64)| {
            let start = Instant::now();
            let (placement, makespan_ns) = black_box(place());
            times[which].push(start.elapsed().as_secs_f64() * 1e6);
            over[which] += makespan_ns / bound_ns / RUNS as f64;
            placement
        };
        timed(0, &mut || {
            let placement = placed(experts, &first_fit(&popularity, devices, slots, 1).expect("room"), slots);
            let makespan_ns = placement.shares(&assigned, &COSTS).makespan_ns(&COSTS);
            (placement, makespan_ns)
        });
        timed(1, &mut || {
            let placement = placed(experts, &eplb(&popularity, devices, slots).expect("room"), slots);
            let makespan_ns = placement.even_shares(&assigned).makespan_ns(&COSTS);
            (placement, makespan_ns)
        });
        current = timed(2, &mut || {
            let loads = LayerLoads::measured(&assigned, devices);
            let placement = adapt(&current, &loads, &COSTS, FREE).placement;
            let makespan_ns = placement.shares(&assigned, &COSTS).makespan_ns(&COSTS);
            (placement, makespan_ns)
        });
        timed(3, &mut || {
            let makespan_ns = current.shares(&assigned, &COSTS).makespan_ns(&COSTS);
            (current.clone(), makespan_ns)
        });
        // A search takes long: some of the batches.
        if run % BEST_EVERY == 0 {
            let best = best_placement(&current, &loads, &COSTS).expect("room");
            let auto_ns = current.shares(&assigned, &COSTS).makespan_ns(&COSTS);
            over_best.push(auto_ns / best.shares(&assigned, &COSTS).makespan_ns(&COSTS));
        }
    }
    let mean = over_best.iter().sum::<f64>() / over_best.len() as f64;
    let worst = over_best.iter().copied().fold(0.0, f64::max);
    let [lina, eplb, auto, shares] = times.map(|mut times| median(&mut times));
    println!(
        "{experts:>7} {devices:>7} {slots:>5} {skew:>5} {lina:>8.1} {eplb:>8.1} {auto:>9.1} {shares:>8.1} | {:>38.3} {:>6.3} {:>9.3} | {mean:>6.3} {worst:>6.3}",
        over[0], over[1], over[2]
    );
}

fn movement(experts: usize, devices: usize, slots: usize, skew: f64, drift: f64) {
    let mut trace = Trace::new(experts, devices, 512, skew, drift, 11);
    let spread = ExpertPlacement::spread(experts, devices, slots).expect("slots suffice");
    let (mut balanced, mut adapted) = (spread.clone(), spread.clone());
    let mut history = History::new(experts, 1.0 - 1.0 / CADENCE as f64);
    let (mut copies, mut missed_ns) = ([0usize; 2], 0.0);
    let mut balance = [0.0f64; 4];
    for batch in 0..BATCHES {
        if let Some(popularity) = history.popularity().filter(|_| batch % CADENCE == 0) {
            let wanted = placed(experts, &eplb(&popularity, devices, slots).expect("room"), slots);
            copies[0] += moved(&balanced, &wanted);
            balanced = wanted;
            let rows: Vec<f64> = popularity.iter().map(|share| share * (512 * devices) as f64).collect();
            let terms = CopyTerms { budget_ns: 0.0, credit_ns: missed_ns, blocking: true };
            let adaptation = adapt(&adapted, &LayerLoads::estimated(&rows, devices), &COSTS, terms);
            missed_ns = if adaptation.copies.is_empty() { missed_ns + adaptation.missed_ns } else { 0.0 };
            copies[1] += adaptation.copies.len();
            adapted = adaptation.placement;
        }
        let assigned = trace.batch();
        history.add(&by_expert(&assigned, devices));
        let shares = [
            spread.even_shares(&assigned),
            balanced.even_shares(&assigned),
            balanced.shares(&assigned, &COSTS),
            adapted.shares(&assigned, &COSTS),
        ];
        for (balance, shares) in balance.iter_mut().zip(shares) {
            *balance += shares.imbalance() / BATCHES as f64;
        }
    }
    println!(
        "{experts:>7} {devices:>7} {slots:>5} {skew:>5} {drift:>6} | {:>7} {:>9} {:>5.1}% | {:>15.3} {:>6.3} {:>11.3} {:>9.3}",
        copies[0],
        copies[1],
        100.0 * copies[1] as f64 / copies[0] as f64,
        balance[0],
        balance[1],
        balance[2],
        balance[3]
    );
}

/// Experts that a device did not hold before.
fn moved(before: &ExpertPlacement, after: &ExpertPlacement) -> usize {
    (0..after.devices())
        .map(|device| after.held_by(device).filter(|&expert| before.slot_of(device, expert).is_none()).count())
        .sum()
}

/// Time that the copies take on the device that has most.
fn copying_ns(copies: &[SlotCopy], devices: usize, costs: &PlacementCosts) -> f64 {
    let of = |device: usize| copies.iter().filter(|copy| copy.device == device).count();
    (0..devices).map(of).max().unwrap_or(0) as f64 * costs.copy_ns
}

fn layer_times(placement: PlacementPolicy, estimation: bool, fine_tuning: bool, skew: f64) {
    let (experts, devices, rows) = (16, 16, 512);
    let even_ns = rows as f64 * (COSTS.row_ns + 2.0 * COSTS.wire_row_ns * 15.0 / 16.0);
    let free = matches!(placement, PlacementPolicy::Best);
    let costs = PlacementCosts { copy_ns: if free { 0.0 } else { even_ns / 5.0 }, ..COSTS };
    let settings = ExpertSchedulerSettings {
        placement,
        estimation,
        fine_tuning,
        slots: 4,
        top_k: 1,
        costs,
        plan_every: CADENCE,
        seed: 1,
    };
    let mut scheduler = ExpertScheduler::new(settings, 1, experts, devices).expect("slots suffice");
    let mut trace = Trace::new(experts, devices, rows, skew, 0.3, 13);
    let mut noise = common::Random(17);
    let (mut times, mut copies, mut planned) = (Vec::new(), 0, 0);
    for _ in 0..BATCHES {
        let between: Vec<SlotCopy> = scheduler.begin_batch().into_iter().flat_map(|(_, copies)| copies).collect();
        let between_ns = copying_ns(&between, devices, &costs);
        let assigned = trace.batch();
        let estimate: Vec<f64> =
            by_expert(&assigned, devices).iter().map(|rows| rows * (0.85 + 0.3 * noise.unit())).collect();
        let hidden = scheduler.prepare(0, &estimate, even_ns);
        let wait_ns = between_ns + (copying_ns(&hidden, devices, &costs) - even_ns).max(0.0);
        let settlement = scheduler.settle(0, &assigned, wait_ns);
        let waited_ns = if settlement.wait { wait_ns } else { 0.0 };
        let blocked_ns = waited_ns + copying_ns(&settlement.copies, devices, &costs);
        times.push((blocked_ns + settlement.shares.makespan_ns(&costs)) / even_ns);
        copies += between.len() + hidden.len() + settlement.copies.len();
        planned += usize::from(settlement.replanned);
    }
    times.sort_by(f64::total_cmp);
    let what = match (estimation, fine_tuning) {
        (false, _) => format!("{placement}, no estimation"),
        (_, false) => format!("{placement}, no fine-tuning"),
        _ => placement.to_string(),
    };
    println!(
        "{what:>26} | {skew:>5} {:>6.3} {:>6.3} {copies:>8} {:>9.0}%",
        times[BATCHES / 2],
        times[BATCHES * 95 / 100],
        100.0 * planned as f64 / BATCHES as f64
    );
}
