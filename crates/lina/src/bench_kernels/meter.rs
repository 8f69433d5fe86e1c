//! Times of operations by events, with a cold cache, against ceilings that are measured first.

use lina_cuda::cudarc::driver::result::memcpy_htod_async;
use lina_cuda::testing::random;
use lina_cuda::{Addend, Buffer, CudaError, DType, Event, Gpu, Mat, MatMut, PinnedBuffer, column_sums, matmul};
use serde::Serialize;

const WARMUPS: usize = 3;
const REPETITIONS: usize = 20;
/// Read before each measurement: more than any cache holds, and enough to do for the GPU while the host enqueues the
/// operation.
const COLD_BYTES: usize = 512 << 20;
/// Columns in which it is added up.
const COLD_COLUMNS: usize = 4096;
/// Bytes that are copied for the ceiling of memory.
const COPY_BYTES: usize = 2 << 30;
/// Bytes that are copied from the host for the ceiling of that.
pub(super) const HOST_COPY_BYTES: usize = 1 << 30;
/// Rows, columns and depth of the ceiling's matrix product.
const PRODUCT: usize = 8192;
/// Distinct random numbers of a buffer; they repeat.
const RANDOM: usize = (1 << 20) - 1;

/// The group of operations between host and device.
pub(super) const HOST: &str = "host";

/// The best of this GPU.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Ceilings {
    /// A copy on the device, bytes read and bytes written, in TB/s.
    pub(super) copy_tb_per_s: f64,
    /// A square product of the measured type, in TFLOP/s.
    pub(super) product_tflops: f64,
    /// A copy from pinned host memory to the device, in GB/s.
    pub(super) host_copy_gb_per_s: f64,
}

/// What an operation has to do at least, which says what its ceiling is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work {
    /// Bytes of device memory: each input once, each output once.
    Bytes(usize),
    /// Floating-point operations of matrix products.
    Flop(f64),
    /// Bytes between host and device.
    HostBytes(usize),
}

/// A measured operation.
#[derive(Debug, Serialize)]
pub(super) struct OperationRate {
    pub(super) group: &'static str,
    pub(super) operation: &'static str,
    pub(super) size: String,
    /// Median.
    us: Option<f64>,
    gb_per_s: Option<f64>,
    tflops: Option<f64>,
    /// Of a computation beside copies: of the rate that it has alone.
    share_of_ceiling: Option<f64>,
    /// Why it was not measured.
    unsupported: Option<String>,
}

impl OperationRate {
    /// Time, rate and share, for people.
    pub(super) fn cells(&self) -> [String; 3] {
        let rate = match (self.gb_per_s, self.tflops) {
            (Some(rate), _) if self.group == HOST => format!("{rate:.1} GB/s"),
            (Some(rate), _) => format!("{:.2} TB/s", rate / 1e3),
            (_, Some(rate)) => format!("{rate:.0} TFLOP/s"),
            _ => self.unsupported.clone().unwrap_or_default(),
        };
        let share = self.share_of_ceiling.map(|share| format!("{:.0} %", share * 100.0));
        [self.us.map(|us| format!("{us:.1}")).unwrap_or_default(), rate, share.unwrap_or_default()]
    }
}

/// Measures operations one after another.
pub(super) struct Meter<'g> {
    pub(super) gpu: &'g Gpu,
    /// Type of activations and weights.
    pub(super) dtype: DType,
    cold: Buffer,
    cold_sums: Buffer,
    marks: Vec<(Event, Event)>,
    ceilings: Ceilings,
    operations: Vec<OperationRate>,
}

impl<'g> Meter<'g> {
    /// Measures the ceilings.
    pub(super) fn new(gpu: &'g Gpu, dtype: DType) -> Result<Self, CudaError> {
        let marks = (0..REPETITIONS).map(|_| Ok((gpu.event()?, gpu.event()?))).collect::<Result<_, CudaError>>()?;
        let mut meter = Meter {
            gpu,
            dtype,
            cold: gpu.zeros(COLD_BYTES / DType::F32.bytes(), DType::F32)?,
            cold_sums: gpu.zeros(COLD_COLUMNS, DType::F32)?,
            marks,
            ceilings: Ceilings { copy_tb_per_s: f64::NAN, product_tflops: f64::NAN, host_copy_gb_per_s: f64::NAN },
            operations: Vec::new(),
        };
        meter.ceilings = meter.measure_ceilings()?;
        Ok(meter)
    }

    fn measure_ceilings(&mut self) -> Result<Ceilings, CudaError> {
        let gpu = self.gpu;
        let from = self.random_of(COPY_BYTES / DType::F32.bytes(), DType::F32)?;
        let mut to = gpu.uninit(from.len(), DType::F32)?;
        let copy_us = self.median_us(|| gpu.copy(from.whole(), to.whole_mut()))?;
        drop((from, to));
        let (a, b) = (self.random(PRODUCT * PRODUCT)?, self.random(PRODUCT * PRODUCT)?);
        let mut d = gpu.uninit(PRODUCT * PRODUCT, self.dtype)?;
        let product_us = self.median_us(|| {
            let (a, b) = (Mat::new(a.whole(), PRODUCT, PRODUCT), Mat::new(b.whole(), PRODUCT, PRODUCT));
            matmul(gpu, MatMut::new(d.whole_mut(), PRODUCT, PRODUCT), a, b.t(), Addend::None)
        })?;
        let host = PinnedBuffer::zeros(gpu.device(), HOST_COPY_BYTES)?;
        let to = gpu.uninit(HOST_COPY_BYTES / DType::F32.bytes(), DType::F32)?;
        let host_copy_us = self.median_us(|| {
            // SAFETY: the device's buffer has as many bytes, and both live until the measurement has waited.
            unsafe { memcpy_htod_async(to.whole().ptr(), &host, gpu.stream().raw()) }
                .map_err(|error| CudaError::Call { call: "cuMemcpyHtoDAsync", reason: format!("{error:?}") })
        })?;
        Ok(Ceilings {
            copy_tb_per_s: 2.0 * COPY_BYTES as f64 / copy_us / 1e6,
            product_tflops: 2.0 * (PRODUCT as f64).powi(3) / product_us / 1e6,
            host_copy_gb_per_s: HOST_COPY_BYTES as f64 / host_copy_us / 1e3,
        })
    }

    /// Measures `run`, which does `work` each time it is called; `size` says of what size.
    pub(super) fn measure(
        &mut self,
        group: &'static str,
        operation: &'static str,
        size: impl Into<String>,
        work: Work,
        run: impl FnMut() -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let (us, unsupported) = match self.median_us(run) {
            Ok(us) => (Some(us), None),
            Err(CudaError::Unsupported(reason)) => (None, Some(reason)),
            // A kernel that fails is noticed by a later call, which does not know which it was.
            Err(CudaError::Call { call, reason }) => {
                return Err(CudaError::Call { call, reason: format!("{reason} ({operation})") });
            }
            Err(error) => return Err(error),
        };
        let measured = OperationRate { unsupported, ..self.rated(group, operation, size, work, us) };
        self.operations.push(measured);
        Ok(())
    }

    /// Notes a copy from the host of `bytes` bytes that was measured elsewhere.
    pub(super) fn host_copy(&mut self, operation: &'static str, bytes: usize, bytes_per_s: f64) {
        let us = bytes as f64 / bytes_per_s * 1e6;
        let measured = self.rated(HOST, operation, mib(bytes), Work::HostBytes(bytes), Some(us));
        self.operations.push(measured);
    }

    /// Notes a computation beside copies, and what it takes alone, in milliseconds.
    pub(super) fn beside_copies(&mut self, operation: &'static str, ms: f64, alone_ms: f64) {
        self.operations.push(OperationRate {
            group: HOST,
            operation,
            size: format!("{alone_ms:.1} ms alone"),
            us: Some(ms * 1e3),
            gb_per_s: None,
            tflops: None,
            share_of_ceiling: Some(alone_ms / ms),
            unsupported: None,
        });
    }

    fn rated(
        &self,
        group: &'static str,
        operation: &'static str,
        size: impl Into<String>,
        work: Work,
        us: Option<f64>,
    ) -> OperationRate {
        let rate = |per_us: f64, unit: f64| us.map(|us| per_us / us / unit);
        let (gb_per_s, tflops) = match work {
            Work::Bytes(bytes) | Work::HostBytes(bytes) => (rate(bytes as f64, 1e3), None),
            Work::Flop(flop) => (None, rate(flop, 1e6)),
        };
        let share_of_ceiling = match work {
            Work::Bytes(_) => gb_per_s.map(|rate| rate / 1e3 / self.ceilings.copy_tb_per_s),
            Work::Flop(_) => tflops.map(|rate| rate / self.ceilings.product_tflops),
            Work::HostBytes(_) => gb_per_s.map(|rate| rate / self.ceilings.host_copy_gb_per_s),
        };
        OperationRate { group, operation, size: size.into(), us, gb_per_s, tflops, share_of_ceiling, unsupported: None }
    }

    /// Median time of `run`, in microseconds, each time with a cold cache.
    fn median_us(&mut self, mut run: impl FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
        for _ in 0..WARMUPS {
            run()?;
        }
        let stream = self.gpu.stream();
        for (begin, end) in &self.marks {
            column_sums(self.gpu, self.cold.whole(), self.cold_sums.whole_mut())?;
            begin.record(stream)?;
            run()?;
            end.record(stream)?;
        }
        self.gpu.synchronize()?;
        let times = self.marks.iter().map(|(begin, end)| end.elapsed_ms_since(begin));
        let mut times = times.collect::<Result<Vec<f32>, CudaError>>()?;
        times.sort_by(f32::total_cmp);
        Ok(f64::from(times[REPETITIONS / 2 - 1] + times[REPETITIONS / 2]) / 2.0 * 1e3)
    }

    /// The ceilings, and what was measured.
    pub(super) fn finish(self) -> (Ceilings, Vec<OperationRate>) {
        (self.ceilings, self.operations)
    }

    /// Bytes of elements of the measured type.
    pub(super) fn bytes(&self, elements: usize) -> usize {
        elements * self.dtype.bytes()
    }

    /// Numbers in -1..1 of the measured type.
    pub(super) fn random(&self, elements: usize) -> Result<Buffer, CudaError> {
        self.random_of(elements, self.dtype)
    }

    /// Numbers in -1..1.
    pub(super) fn random_of(&self, elements: usize, dtype: DType) -> Result<Buffer, CudaError> {
        let block = self.gpu.buffer_from(&random(elements as u64, RANDOM), dtype)?;
        let mut buffer = self.gpu.uninit(elements, dtype)?;
        for start in (0..elements).step_by(RANDOM) {
            let end = elements.min(start + RANDOM);
            self.gpu.copy(block.slice(0..end - start), buffer.slice_mut(start..end))?;
        }
        Ok(buffer)
    }

    /// Zeros of the measured type.
    pub(super) fn zeros(&self, elements: usize) -> Result<Buffer, CudaError> {
        self.gpu.zeros(elements, self.dtype)
    }

    /// Zeros that are statistics, weights of norms or gradients of weights.
    pub(super) fn zeros_f32(&self, elements: usize) -> Result<Buffer, CudaError> {
        self.gpu.zeros(elements, DType::F32)
    }
}

/// A size in MiB, for people.
pub(super) fn mib(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Random numbers below `bound`.
pub(super) fn random_ids(count: usize, bound: usize) -> Vec<u32> {
    let below = |value: &f32| (((value + 1.0) / 2.0 * bound as f32) as u32).min(bound as u32 - 1);
    random(bound as u64, count).iter().map(below).collect()
}
