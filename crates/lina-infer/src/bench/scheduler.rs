//! What is compared: placements, with what they go by, and the paper's ablations by name.

use std::fmt;
use std::str::FromStr;

use lina_plan::{Estimator, PlacementPolicy};

/// One way to schedule experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheduler {
    /// A gate that is forced to balance, on experts that never move (the paper's Ideal).
    Ideal,
    /// Experts where a policy puts them.
    Placed {
        /// How.
        placement: PlacementPolicy,
        /// What phase one goes by; `None` without a phase one.
        estimator: Option<Estimator>,
        /// Whether phase two plans again where the estimate was wrong.
        fine_tuning: bool,
    },
}

/// Names without an estimator of their own.
const ABLATIONS: [&str; 2] = ["no-estimation", "no-fine-tuning"];

impl Scheduler {
    /// Experts that never move: what others are compared with.
    pub const STATIC: Scheduler =
        Scheduler::Placed { placement: PlacementPolicy::Static, estimator: None, fine_tuning: false };

    /// What is compared unless told otherwise.
    pub fn defaults() -> Vec<Scheduler> {
        ["static", "ideal", "lina", "lina@oracle", "no-estimation", "no-fine-tuning", "eplb", "lina-auto", "best"]
            .map(|name| name.parse().expect("these names are known"))
            .to_vec()
    }

    /// The estimator that a policy has unless told otherwise: the paper's tables for the paper's placement, and for ours
    /// what needs neither tables nor work.
    fn default_estimator(placement: PlacementPolicy) -> Option<Estimator> {
        match placement {
            PlacementPolicy::Lina => Some(Estimator::Path),
            PlacementPolicy::LinaAuto => Some(Estimator::History),
            PlacementPolicy::Static | PlacementPolicy::Eplb | PlacementPolicy::Best => None,
        }
    }

    /// What phase one goes by.
    pub fn estimator(&self) -> Option<Estimator> {
        match self {
            Scheduler::Ideal => None,
            Scheduler::Placed { estimator, .. } => *estimator,
        }
    }
}

impl FromStr for Scheduler {
    type Err = String;

    /// `ideal`, a placement (`static`, `lina`, `eplb`, `lina-auto`, `best`), or an ablation of `lina` (`no-estimation`,
    /// `no-fine-tuning`); with `@path`, `@next-gate`, `@history` or `@oracle` after those that have a phase one.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, estimator) = match text.split_once('@') {
            Some((name, estimator)) => (name, Some(estimator.parse::<Estimator>()?)),
            None => (text, None),
        };
        let lina = Scheduler::default_estimator(PlacementPolicy::Lina);
        let (scheduler, takes_estimator) = match name {
            "ideal" => (Scheduler::Ideal, false),
            "no-estimation" => {
                let placement = PlacementPolicy::Lina;
                (Scheduler::Placed { placement, estimator: None, fine_tuning: true }, false)
            }
            "no-fine-tuning" => {
                let (placement, estimator) = (PlacementPolicy::Lina, estimator.or(lina));
                (Scheduler::Placed { placement, estimator, fine_tuning: false }, true)
            }
            name => {
                let placement: PlacementPolicy = name.parse().map_err(|_| {
                    let placements = PlacementPolicy::ALL.map(PlacementPolicy::name).join(", ");
                    format!(
                        "scheduler `{text}` is unknown, expected one of ideal, {placements}, {}",
                        ABLATIONS.join(", ")
                    )
                })?;
                let default = Scheduler::default_estimator(placement);
                let fine_tuning = default.is_some();
                (Scheduler::Placed { placement, estimator: estimator.or(default), fine_tuning }, default.is_some())
            }
        };
        if estimator.is_some() && !takes_estimator {
            return Err(format!("scheduler `{text}`: `{name}` has no phase one, expected it without `@`"));
        }
        Ok(scheduler)
    }
}

impl fmt::Display for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Scheduler::Placed { placement, estimator, fine_tuning } = *self else { return f.write_str("ideal") };
        let default = Scheduler::default_estimator(placement);
        match (default, estimator, fine_tuning) {
            (Some(_), None, true) => f.write_str("no-estimation")?,
            (Some(_), Some(_), false) => f.write_str("no-fine-tuning")?,
            _ => f.write_str(placement.name())?,
        }
        match estimator {
            Some(estimator) if default != Some(estimator) => write!(f, "@{estimator}"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in ["ideal", "static", "lina", "lina@oracle", "no-estimation", "no-fine-tuning@history", "lina-auto"] {
            assert_eq!(name.parse::<Scheduler>().unwrap().to_string(), name);
        }
        assert_eq!("lina@path".parse::<Scheduler>().unwrap().to_string(), "lina");
        assert!("eplb@path".parse::<Scheduler>().unwrap_err().contains("has no phase one"));
        assert!("nearest".parse::<Scheduler>().unwrap_err().contains("expected one of ideal, static, lina"));
    }
}
