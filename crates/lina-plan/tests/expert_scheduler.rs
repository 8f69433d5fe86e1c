//! Whatever comes in whatever order: every row goes to a device that has a complete copy of its expert, and every rank
//! decides alike.

use lina_plan::{
    ExpertPlacement, ExpertScheduler, ExpertSchedulerSettings, PlacementCosts, PlacementPolicy, Settlement, SlotCopy,
};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Event {
    Begin,
    Prepare {
        layer: usize,
        estimate: Vec<f64>,
        budget_ns: f64,
    },
    /// `late` if copies have not arrived.
    Settle {
        layer: usize,
        assigned: Vec<u32>,
        late: bool,
    },
}

const LAYERS: usize = 2;

fn events(devices: usize, experts: usize) -> impl Strategy<Value = Vec<Event>> {
    let estimate =
        prop::collection::vec(prop_oneof![2 => Just(0.0), 3 => 0.0f64..100.0, 1 => 500.0f64..5000.0], experts);
    let assigned =
        prop::collection::vec(prop_oneof![2 => Just(0u32), 3 => 0u32..30, 1 => 100u32..1000], devices * experts);
    let budget_ns = prop_oneof![Just(0.0), 0.0f64..20_000.0];
    let event = prop_oneof![
        1 => Just(Event::Begin),
        3 => (0..LAYERS, estimate, budget_ns).prop_map(|(layer, estimate, budget_ns)| {
            Event::Prepare { layer, estimate, budget_ns }
        }),
        3 => (0..LAYERS, assigned, any::<bool>()).prop_map(|(layer, assigned, late)| {
            Event::Settle { layer, assigned, late }
        }),
    ];
    prop::collection::vec(event, 1..40)
}

fn settings() -> impl Strategy<Value = ExpertSchedulerSettings> {
    let policy = prop::sample::select(PlacementPolicy::ALL.to_vec());
    let costs = (0.0f64..30.0, prop_oneof![Just(0.0), 0.0f64..20_000.0]);
    (policy, any::<bool>(), any::<bool>(), costs, 1usize..4, any::<u64>()).prop_map(
        |(placement, estimation, fine_tuning, (wire_row_ns, copy_ns), plan_every, seed)| ExpertSchedulerSettings {
            placement,
            estimation,
            fine_tuning,
            slots: 0,
            top_k: 1,
            costs: PlacementCosts { row_ns: 10.0, wire_row_ns, copy_ns },
            plan_every,
            seed,
        },
    )
}

fn scenario() -> impl Strategy<Value = (ExpertSchedulerSettings, usize, usize, Vec<Event>)> {
    (settings(), 1usize..6, 1usize..12, 0usize..3).prop_flat_map(|(mut settings, devices, experts, spare)| {
        settings.slots = experts.div_ceil(devices) + spare;
        events(devices, experts).prop_map(move |events| (settings, devices, experts, events))
    })
}

/// The slots of a layer as a body has them: an expert and whether its copy is complete.
struct Slots(Vec<Vec<Option<(usize, bool)>>>);

impl Slots {
    fn new(placement: &ExpertPlacement) -> Self {
        let of =
            |device| placement.slots_of(device).iter().map(|held| held.map(|expert| (expert as usize, true))).collect();
        Slots((0..placement.devices()).map(of).collect())
    }

    fn begin(&mut self, copies: &[SlotCopy]) {
        for copy in copies {
            self.0[copy.device][copy.slot] = Some((copy.expert, false));
        }
        for device in &self.0 {
            for (i, held) in device.iter().enumerate() {
                let twice = device[..i].iter().flatten().any(|other| Some(other.0) == held.map(|held| held.0));
                assert!(!twice, "an expert twice on a device: {device:?}");
            }
        }
    }

    fn arrive(&mut self) {
        self.0.iter_mut().flatten().flatten().for_each(|held| held.1 = true);
    }

    fn under_way(&self) -> bool {
        self.0.iter().flatten().flatten().any(|held| !held.1)
    }

    fn serves(&self, device: usize, expert: usize) -> bool {
        self.0[device].contains(&Some((expert, true)))
    }
}

fn check(slots: &mut Slots, settlement: &Settlement, late: bool, devices: usize, assigned: &[u32]) {
    if settlement.wait {
        assert!(late, "nobody waits for what has arrived");
        slots.arrive();
    }
    if !settlement.copies.is_empty() {
        assert!(settlement.wait || !slots.under_way(), "new copies are behind those under way");
        slots.begin(&settlement.copies);
        slots.arrive();
    }
    let experts = assigned.len() / devices;
    for source in 0..devices {
        for expert in 0..experts {
            let parts = settlement.shares.of(source, expert);
            assert_eq!(parts.iter().map(|part| part.rows).sum::<u32>(), assigned[source * experts + expert]);
            for part in parts {
                assert!(slots.serves(part.device as usize, expert), "expert {expert} is not on device {}", part.device);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn rows_go_where_experts_are((settings, devices, experts, events) in scenario()) {
        let mut scheduler = ExpertScheduler::new(settings, LAYERS, experts, devices).unwrap();
        let mut other_rank = scheduler.clone();
        let mut slots: Vec<Slots> = (0..LAYERS).map(|layer| Slots::new(scheduler.placement(layer))).collect();
        for event in events {
            match event {
                Event::Begin => {
                    let copies = scheduler.begin_batch();
                    prop_assert_eq!(&copies, &other_rank.begin_batch());
                    copies.iter().for_each(|(layer, copies)| slots[*layer].begin(copies));
                }
                Event::Prepare { layer, estimate, budget_ns } => {
                    let copies = scheduler.prepare(layer, &estimate, budget_ns);
                    prop_assert_eq!(&copies, &other_rank.prepare(layer, &estimate, budget_ns));
                    prop_assert!(copies.is_empty() || !slots[layer].under_way(), "one swap at a time");
                    slots[layer].begin(&copies);
                }
                Event::Settle { layer, assigned, late } => {
                    let late = late && slots[layer].under_way();
                    if !late {
                        slots[layer].arrive();
                    }
                    let wait_ns = if late { 1000.0 } else { 0.0 };
                    let settlement = scheduler.settle(layer, &assigned, wait_ns);
                    prop_assert_eq!(&settlement, &other_rank.settle(layer, &assigned, wait_ns));
                    check(&mut slots[layer], &settlement, late, devices, &assigned);
                    let serving = scheduler.placement(layer);
                    for device in 0..devices {
                        for expert in serving.held_by(device) {
                            prop_assert!(slots[layer].serves(device, expert));
                        }
                    }
                }
            }
        }
    }
}
