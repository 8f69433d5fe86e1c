//! `lina doctor`: what this machine has, and what each engine lacks on it.
//!
//! Only looks: at files, at the list of installed libraries, at the version that an MPI launcher prints, and in a build for
//! GPUs at what NVIDIA's libraries say of themselves.

mod cuda;
mod engines;
mod installed;
mod machine;

use std::fmt;

use cuda::Cuda;
use lina_report::{Align, Table};
use serde::Serialize;

use engines::{DeviceFindings, EngineFindings, Readiness};
use installed::Installed;
use machine::Machine;

/// Everything found.
#[derive(Debug, Serialize)]
pub(crate) struct Findings {
    build: Build,
    machine: Machine,
    engines: Vec<EngineFindings>,
    devices: Vec<DeviceFindings>,
    cuda: Cuda,
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
    let cuda = Cuda::examine(&installed);
    Findings {
        build: Build {
            version: env!("CARGO_PKG_VERSION"),
            target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
            optimised: !cfg!(debug_assertions),
            features: [
                ("cuda", cfg!(feature = "cuda")),
                ("mpi", cfg!(feature = "mpi")),
                ("openblas", cfg!(feature = "openblas")),
            ]
            .into_iter()
            .filter_map(|(name, built)| built.then_some(name))
            .collect(),
        },
        machine: Machine::examine(),
        engines: vec![engines::local(), engines::mpi(&installed), engines::nccl(&cuda)],
        devices: engines::devices(&cuda),
        cuda,
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Build { version, target, optimised, features } = &self.build;
        let profile = if *optimised { "optimised" } else { "not optimised: times say nothing" };
        let features = if features.is_empty() { "none".to_owned() } else { features.join(", ") };
        writeln!(f, "lina     {version}, {target}, {profile}; features: {features}")?;
        writeln!(f, "{}", self.machine)?;
        let engines: Vec<_> = self.engines.iter().map(|findings| (findings.engine, &findings.readiness)).collect();
        let devices: Vec<_> = self.devices.iter().map(|findings| (findings.device, &findings.readiness)).collect();
        writeln!(f, "{}", table("engine", &engines))?;
        write!(f, "{}", table("device", &devices))?;
        for (name, readiness) in engines.iter().chain(&devices) {
            if let Some(advice) = &readiness.advice {
                write!(f, "\n{name}: {advice}")?;
            }
        }
        Ok(())
    }
}

/// A line for each thing found or missing.
fn table(head: &str, rows: &[(&str, &Readiness)]) -> String {
    let columns = [head, "in this build", "ready", "found", "missing"];
    let mut table = Table::new(columns.map(|column| (column, Align::Left)));
    for (name, readiness) in rows {
        let lines = readiness.found.len().max(readiness.missing.len()).max(1);
        for line in 0..lines {
            let head = if line == 0 { [name, yes(readiness.built), yes(readiness.ready)] } else { [""; 3] };
            let cell = |cells: &[String]| cells.get(line).cloned().unwrap_or_default();
            let cells = [cell(&readiness.found), cell(&readiness.missing)];
            table.row(head.map(str::to_owned).into_iter().chain(cells));
        }
    }
    table.render()
}

fn yes(answer: bool) -> &'static str {
    if answer { "yes" } else { "no" }
}
