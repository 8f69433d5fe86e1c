//! `lina doctor`: what this machine has, and what each engine lacks on it.
//!
//! Only looks: at files, at the list of installed libraries, and at the version that an MPI launcher prints.

mod engines;
mod installed;
mod machine;

use std::fmt;

use lina_report::{Align, Table};
use serde::Serialize;

use engines::EngineFindings;
use installed::Installed;
use machine::Machine;

/// Everything found.
#[derive(Debug, Serialize)]
pub(crate) struct Findings {
    build: Build,
    machine: Machine,
    engines: Vec<EngineFindings>,
}

/// This program.
#[derive(Debug, Serialize)]
struct Build {
    version: &'static str,
    target: String,
    optimised: bool,
    /// Optional parts of this build.
    features: Vec<&'static str>,
}

/// Examines this machine.
pub(crate) fn examine() -> Findings {
    let installed = Installed::list();
    Findings {
        build: Build {
            version: env!("CARGO_PKG_VERSION"),
            target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
            optimised: !cfg!(debug_assertions),
            features: [("mpi", cfg!(feature = "mpi")), ("openblas", cfg!(feature = "openblas"))]
                .into_iter()
                .filter_map(|(name, built)| built.then_some(name))
                .collect(),
        },
        machine: Machine::examine(),
        engines: vec![engines::local(), engines::mpi(&installed), engines::nccl(&installed)],
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Build { version, target, optimised, features } = &self.build;
        let profile = if *optimised { "optimised" } else { "not optimised: times say nothing" };
        let features = if features.is_empty() { "none".to_owned() } else { features.join(", ") };
        writeln!(f, "lina     {version}, {target}, {profile}; features: {features}")?;
        writeln!(f, "{}", self.machine)?;
        let mut table =
            Table::new(["engine", "in this build", "ready", "found", "missing"].map(|column| (column, Align::Left)));
        for engine in &self.engines {
            let lines = engine.found.len().max(engine.missing.len()).max(1);
            for line in 0..lines {
                let head = if line == 0 { [engine.engine, yes(engine.built), yes(engine.ready)] } else { [""; 3] };
                let cell = |cells: &[String]| cells.get(line).cloned().unwrap_or_default();
                table.row(head.map(str::to_owned).into_iter().chain([cell(&engine.found), cell(&engine.missing)]));
            }
        }
        write!(f, "{}", table.render())?;
        for engine in &self.engines {
            if let Some(advice) = &engine.advice {
                write!(f, "\n{}: {advice}", engine.engine)?;
            }
        }
        Ok(())
    }
}

fn yes(answer: bool) -> &'static str {
    if answer { "yes" } else { "no" }
}
