//! Copies of experts into slots while the device computes.

use std::sync::Arc;

use lina_cuda::pace::Pace;
use lina_cuda::testing::{gpu, random, round_bf16};
use lina_cuda::{DType, Element, ExpertSlots, PinnedBuffer, measure_slot_copy};

const ELEMENTS: usize = 1003;

#[test]
fn a_slot_holds_what_was_copied_last() {
    let Some(gpu) = gpu() else { return };
    for dtype in [DType::F32, DType::Bf16] {
        let experts: Vec<Vec<f32>> = (0..4).map(|expert| round_bf16(&random(expert, ELEMENTS))).collect();
        let block = ELEMENTS * dtype.bytes();
        let mut pinned = PinnedBuffer::zeros(gpu.device(), experts.len() * block).unwrap();
        experts.iter().zip(pinned.chunks_mut(block)).for_each(|(expert, bytes)| f32::encode(expert, dtype, bytes));
        let pinned = Arc::new(pinned);
        let mut slots = ExpertSlots::new(&gpu, 2, 2, ELEMENTS, dtype).unwrap();
        for (layer, slot) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            slots.load(&gpu, layer, slot, &experts[2 * layer + slot]).unwrap();
            assert!(slots.serves(layer, slot));
        }
        // Kernels that read the slots are still to run when the copies are begun.
        let mut pace = Pace::new(&gpu).unwrap();
        pace.begin().unwrap();
        let mut before = gpu.uninit(2 * ELEMENTS, dtype).unwrap();
        pace.hold(50_000_000).unwrap();
        gpu.copy(slots.layer(0), before.whole_mut()).unwrap();
        slots.used(0).unwrap();
        let first = slots.begin_copy(0, 1, &pinned, 3 * block..4 * block).unwrap();
        let second = slots.begin_copy(0, 1, &pinned, 2 * block..3 * block).unwrap();
        assert!(!slots.serves(0, 1) && slots.serves(0, 0) && slots.serves(1, 1));
        assert_eq!(slots.left(second).unwrap(), 2);
        slots.wait(0).unwrap();
        assert!(slots.serves(0, 1));
        let after = gpu.to_host::<f32>(slots.layer(0)).unwrap();
        assert_eq!(gpu.to_host::<f32>(before.whole()).unwrap(), [experts[0].clone(), experts[1].clone()].concat());
        assert_eq!(after, [experts[0].clone(), experts[2].clone()].concat());
        assert!(slots.ready(first).unwrap() && slots.ready(second).unwrap());
        assert_eq!(gpu.to_host::<f32>(slots.layer(1)).unwrap(), [experts[2].clone(), experts[3].clone()].concat());
    }
}

#[test]
fn copies_run_beside_computation() {
    let Some(gpu) = gpu() else { return };
    let rates = measure_slot_copy(&gpu, 12 << 20, 20.0).unwrap();
    println!("{rates:?}");
    assert!(rates.beside_bytes_per_s > 0.5 * rates.alone_bytes_per_s, "{rates:?}");
    assert!(rates.compute_beside_ms < 1.5 * rates.compute_ms, "{rates:?}");
}
