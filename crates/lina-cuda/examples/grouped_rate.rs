//! Rates of the products of a layer's experts: by every grouped kernel, and as one plain product of as many operations.
//!
//! `cargo run --release -p lina-cuda --example grouped_rate [LAYER]`, where `LAYER` is a part of a layer's name. Prints
//! TFLOP/s in bf16, from the median of 20 runs.

use lina_cuda::{
    Addend, BLayout, Buffer, CudaError, DType, Gpu, GroupedB, GroupedKernel, GroupedReduction, GroupedRows, Mat,
    MatMut, TileWidth, grouped_matmul_with, grouped_weight_gradient_with, matmul, testing,
};

const WARM_UP: usize = 3;
const RUNS: usize = 20;

struct Layer {
    name: &'static str,
    experts: usize,
    /// Rows of an expert, on average.
    rows: usize,
    hidden: usize,
    /// Rows of the first matrix: of gate and up together.
    up: usize,
    /// Columns of the second matrix.
    inner: usize,
}

const LAYERS: [Layer; 5] = [
    Layer { name: "64x2048x1024", experts: 64, rows: 2048, hidden: 2048, up: 2048, inner: 1024 },
    Layer { name: "128x2048x768", experts: 128, rows: 1024, hidden: 2048, up: 1536, inner: 768 },
    Layer { name: "16x768x3072", experts: 16, rows: 2048, hidden: 768, up: 3072, inner: 3072 },
    Layer { name: "8x4096x14336", experts: 8, rows: 2048, hidden: 4096, up: 28672, inner: 14336 },
    // So few tiles that narrow ones use more of the GPU in some of the products.
    Layer { name: "3x2048x1024", experts: 3, rows: 512, hidden: 2048, up: 2048, inner: 1024 },
];

enum Product {
    Rows { n: usize, k: usize, layout: BLayout },
    Gradient { m: usize, n: usize, accumulate: bool },
}

impl Layer {
    fn products(&self) -> [(&'static str, Product); 8] {
        let Layer { hidden, up, inner, .. } = *self;
        let rows = |n, k, layout| Product::Rows { n, k, layout };
        let gradient = |m, n, accumulate| Product::Gradient { m, n, accumulate };
        [
            ("forward up", rows(up, hidden, BLayout::Nk)),
            ("forward down", rows(hidden, inner, BLayout::Nk)),
            ("gradient of inner", rows(inner, hidden, BLayout::Kn)),
            ("gradient of input", rows(hidden, up, BLayout::Kn)),
            ("gradient of down", gradient(hidden, inner, false)),
            ("gradient of up", gradient(up, hidden, false)),
            ("added: of down", gradient(hidden, inner, true)),
            ("added: of up", gradient(up, hidden, true)),
        ]
    }

    /// Rows of each expert: the same for all, or between half and one and a half times as many.
    fn rows(&self, ragged: bool) -> Vec<u32> {
        let mut rows = vec![self.rows as u32; self.experts];
        if ragged {
            for pair in rows.chunks_exact_mut(2).enumerate() {
                let (number, [one, other]) = pair else { unreachable!("pairs") };
                let moved = (number * 2_654_435_761 % (self.rows / 2)) as u32;
                (*one, *other) = (*one - moved, *other + moved);
            }
        }
        rows
    }
}

fn main() -> Result<(), CudaError> {
    let wanted = std::env::args().nth(1).unwrap_or_default();
    let gpu = Gpu::open(0)?;
    let kernels = [
        ("wide", GroupedKernel::Hopper(TileWidth::Wide)),
        ("narrow", GroupedKernel::Hopper(TileWidth::Narrow)),
        ("cuBLASLt", GroupedKernel::Blas),
    ];
    println!("{}, TFLOP/s; wide and narrow tiles of the kernel for Hopper", gpu.device().facts().name);
    for layer in LAYERS.iter().filter(|layer| layer.name.contains(&wanted)) {
        print!("\n{:<14}{:<20}{:<8}", layer.name, "", "rows");
        kernels.iter().for_each(|(name, _)| print!("{name:>12}"));
        println!("{:>12}", "one plain");
        for (name, product) in layer.products() {
            let mut operands = Operands::new(&gpu, layer, &product)?;
            for ragged in [false, true] {
                print!("{:<14}{name:<20}{:<8}", "", if ragged { "ragged" } else { "even" });
                let rows = layer.rows(ragged);
                for (_, kernel) in kernels {
                    let ms = median_ms(&gpu, || operands.grouped(&gpu, kernel, &product, &rows))?;
                    print!("{:>12.0}", operands.flop / ms / 1e9);
                }
                if !ragged {
                    let ms = median_ms(&gpu, || operands.plain(&gpu, &product))?;
                    print!("{:>12.0}", operands.flop / ms / 1e9);
                }
                println!();
            }
        }
    }
    Ok(())
}

fn median_ms(gpu: &Gpu, mut run: impl FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
    let mut times = Vec::with_capacity(RUNS);
    for number in 0..WARM_UP + RUNS {
        let (start, end) = (gpu.event()?, gpu.event()?);
        start.record(gpu.stream())?;
        run()?;
        end.record(gpu.stream())?;
        if number >= WARM_UP {
            times.push((start, end));
        }
    }
    gpu.synchronize()?;
    let mut times: Vec<f32> = times.iter().map(|(start, end)| end.elapsed_ms_since(start)).collect::<Result<_, _>>()?;
    times.sort_by(f32::total_cmp);
    Ok(f64::from(times[RUNS / 2]))
}

struct Operands {
    a: Buffer,
    b: Buffer,
    c: Buffer,
    rows: usize,
    flop: f64,
}

impl Operands {
    fn new(gpu: &Gpu, layer: &Layer, product: &Product) -> Result<Operands, CudaError> {
        let rows = layer.experts * layer.rows;
        let pattern = gpu.buffer_from(&testing::random(1, 4 << 20), DType::Bf16)?;
        let random = |elements: usize| {
            let mut buffer = gpu.uninit(elements, DType::Bf16)?;
            for start in (0..elements).step_by(pattern.len()) {
                let end = elements.min(start + pattern.len());
                gpu.copy(pattern.slice(0..end - start), buffer.slice_mut(start..end))?;
            }
            Ok::<_, CudaError>(buffer)
        };
        Ok(match *product {
            Product::Rows { n, k, .. } => Operands {
                a: random(rows * k)?,
                b: random(layer.experts * n * k)?,
                c: gpu.zeros(rows * n, DType::Bf16)?,
                rows,
                flop: 2.0 * (rows * n * k) as f64,
            },
            Product::Gradient { m, n, .. } => Operands {
                a: random(rows * m)?,
                b: random(rows * n)?,
                c: gpu.zeros(layer.experts * m * n, DType::F32)?,
                rows,
                flop: 2.0 * (rows * m * n) as f64,
            },
        })
    }

    fn grouped(&mut self, gpu: &Gpu, kernel: GroupedKernel, product: &Product, rows: &[u32]) -> Result<(), CudaError> {
        let mut row = 0;
        let places = rows.iter().enumerate().map(|(slot, &rows)| {
            row += rows;
            (slot as u32, row - rows, rows)
        });
        let (a, c) = (self.a.whole(), self.c.whole_mut());
        match *product {
            Product::Rows { n, k, layout } => {
                let groups: Vec<_> =
                    places.map(|(slot, row, rows)| GroupedRows { slot, a_row: row, c_row: row, rows }).collect();
                let b = GroupedB { data: self.b.whole(), offset: 0, stride: n * k, n, k, layout };
                grouped_matmul_with(gpu, kernel, &groups, a, b, c)
            }
            Product::Gradient { m, n, accumulate } => {
                let groups: Vec<_> = places.map(|(slot, row, rows)| GroupedReduction { slot, row, rows }).collect();
                let b = self.b.whole();
                grouped_weight_gradient_with(gpu, kernel, &groups, a, m, b, n, c, 0, m * n, accumulate)
            }
        }
    }

    /// The product of all rows with one expert's matrix, or one gradient of them.
    fn plain(&mut self, gpu: &Gpu, product: &Product) -> Result<(), CudaError> {
        let (rows, b) = (self.rows, &self.b);
        match *product {
            Product::Rows { n, k, layout } => {
                let b = match layout {
                    BLayout::Nk => Mat::new(b.slice(0..n * k), n, k).t(),
                    BLayout::Kn => Mat::new(b.slice(0..n * k), k, n),
                };
                let c = MatMut::new(self.c.whole_mut(), rows, n);
                matmul(gpu, c, Mat::new(self.a.whole(), rows, k), b, Addend::None)
            }
            Product::Gradient { m, n, accumulate } => {
                let addend = if accumulate { Addend::Accumulate } else { Addend::None };
                let c = MatMut::new(self.c.slice_mut(0..m * n), m, n);
                let (a, b) = (Mat::new(self.a.whole(), rows, m), Mat::new(b.whole(), rows, n));
                matmul(gpu, c, a.t(), b, addend)
            }
        }
    }
}
