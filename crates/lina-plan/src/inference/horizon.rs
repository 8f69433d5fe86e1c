//! For when phase one plans: the next layer, or the same layer's next step.

/// What the placement that is prepared while a layer computes is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Horizon {
    /// The layer after it, in the same step: an expert is copied before that layer needs it, as in prefill.
    NextLayer,
    /// The layer itself, in later steps: a copy outlasts a layer, as in decode.
    NextStep,
}

impl Horizon {
    /// The horizon where a copy of one expert takes `copy_ns` and a layer with everything around it `layer_ns`; 0 if
    /// that is not known yet.
    pub fn of(copy_ns: f64, layer_ns: f64) -> Self {
        if layer_ns > 0.0 && copy_ns > layer_ns { Horizon::NextStep } else { Horizon::NextLayer }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_that_outlast_a_layer_are_for_later_steps() {
        assert_eq!(Horizon::of(10.0, 50.0), Horizon::NextLayer);
        assert_eq!(Horizon::of(60.0, 50.0), Horizon::NextStep);
        assert_eq!(Horizon::of(60.0, 0.0), Horizon::NextLayer);
    }
}
