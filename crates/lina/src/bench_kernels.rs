//! `lina bench kernels`: each operation on a GPU at the sizes of one model, beside what the GPU's memory and its matrix
//! units do at best on this machine.

mod attention;
mod copies;
mod few;
mod layers;
mod meter;
mod products;
mod routing;

use lina_cuda::{CudaError, Gpu};
use lina_report::{Align, Table};
use lina_train::Scalar;
use serde::Serialize;

use crate::arguments::BenchKernelsArguments;
use crate::commands::Failure;
use crate::output;
use meter::{Ceilings, Meter, OperationRate};

/// Tokens of a step.
const TOKENS: usize = 16384;
/// Width of the residual stream.
const HIDDEN: usize = 2048;
/// Query heads.
const HEADS: usize = 16;
/// Key and value heads.
const KV_HEADS: usize = 4;
/// Width of a head.
const HEAD_DIM: usize = 128;
/// Width of a row of queries, keys and values.
const QKV_WIDTH: usize = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
/// Tokens of a sequence.
const SEQUENCE: usize = 2048;
/// Experts of a layer.
const EXPERTS: usize = 64;
/// Experts of a token.
const TOP_K: usize = 8;
/// Hidden width of an expert.
const EXPERT_HIDDEN: usize = 1024;
/// Rows of all experts.
const EXPERT_ROWS: usize = TOKENS * TOP_K;
/// Token ids.
const VOCABULARY: usize = 32000;

/// Measures some operations.
type Part = fn(&mut Meter<'_>) -> Result<(), CudaError>;
/// The parts of the measurement, by the names that the command line has for them.
const PARTS: [(&str, Part); 6] = [
    ("layers", layers::measure),
    ("routing", routing::measure),
    ("attention", attention::measure),
    ("products", products::measure),
    ("few", few::measure),
    ("copies", copies::measure),
];

/// Names of the parts of the measurement.
pub(crate) fn parts() -> [&'static str; PARTS.len()] {
    PARTS.map(|(name, _)| name)
}

/// What was measured.
#[derive(Debug, Serialize)]
struct KernelsSummary {
    gpu: String,
    dtype: Scalar,
    ceilings: Ceilings,
    operations: Vec<OperationRate>,
}

impl KernelsSummary {
    fn table(&self) -> String {
        let columns = [("", Align::Left), ("operation", Align::Left), ("size", Align::Left)];
        let numbers = [("us", Align::Right), ("rate", Align::Right), ("of ceiling", Align::Right)];
        let mut table = Table::new(columns.into_iter().chain(numbers));
        let mut group = "";
        for operation in &self.operations {
            let head = if group == operation.group { "" } else { operation.group };
            group = operation.group;
            let [us, rate, share] = operation.cells();
            table.row([head.to_owned(), operation.operation.to_owned(), operation.size.clone(), us, rate, share]);
        }
        let Ceilings { copy_tb_per_s, product_tflops, host_copy_gb_per_s } = self.ceilings;
        format!(
            "{}, {}; ceilings: device copy {copy_tb_per_s:.2} TB/s, matrix product {product_tflops:.0} TFLOP/s, copy from \
             the host {host_copy_gb_per_s:.1} GB/s\n\n{}",
            self.gpu,
            self.dtype.name(),
            table.render()
        )
    }
}

/// Carries the command out.
pub(crate) fn run(arguments: BenchKernelsArguments) -> Result<(), Failure> {
    let summary = measure(arguments.gpu, arguments.dtype, &arguments.only).map_err(|error| {
        // All but a call that fails is something that is missing or does not suffice.
        let exit_code = if matches!(error, CudaError::Call { .. }) { 1 } else { 2 };
        Failure::new(error, exit_code)
    })?;
    Ok(output::table_or_json(arguments.output.json, arguments.output.quiet, &summary.table(), &summary)?)
}

/// Measures the parts that `only` names, or all.
fn measure(ordinal: usize, dtype: Scalar, only: &[String]) -> Result<KernelsSummary, CudaError> {
    let gpu = Gpu::open(ordinal)?;
    let mut meter = Meter::new(&gpu, dtype.into())?;
    for (_, measure) in PARTS.iter().filter(|(name, _)| only.is_empty() || only.iter().any(|wanted| wanted == name)) {
        measure(&mut meter)?;
    }
    let name = gpu.device().facts().name.clone();
    let (ceilings, operations) = meter.finish();
    Ok(KernelsSummary { gpu: name, dtype, ceilings, operations })
}
