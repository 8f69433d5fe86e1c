//! A rank's parameters and gradients on its device, as far as what the model is for needs them.

use std::ops::Range;

use lina_comm::SharedBuffer;
use lina_cuda::{self as cuda, Buffer as DeviceBuffer, CudaError, DType, Gpu, Slice, SliceMut};

use crate::params::{Buffer, ParameterLayout, Parameters};
use crate::purpose::Purpose;

/// How a flat buffer of parameters is stored: the type of the parameters themselves, and that of a rounded copy for products,
/// if there is one.
type Storage = (DType, Option<DType>);

/// Storage of the dense parameters, of which norms read f32.
fn dense_storage(dtype: DType) -> Storage {
    (DType::F32, (dtype != DType::F32).then_some(dtype))
}

/// Storage of the experts' parameters, which nothing but products reads where they are not updated.
fn experts_storage(dtype: DType, purpose: Purpose) -> Storage {
    match purpose {
        Purpose::Training => dense_storage(dtype),
        Purpose::Evaluation => (dtype, None),
    }
}

/// One flat buffer of parameters.
#[derive(Debug)]
struct Flat {
    master: DeviceBuffer,
    /// The parameters rounded, where products read that.
    copy: Option<DeviceBuffer>,
}

impl Flat {
    fn zeros(gpu: &Gpu, len: usize, (master, copy): Storage) -> Result<Self, CudaError> {
        let copy = copy.map(|dtype| gpu.zeros(len, dtype)).transpose()?;
        Ok(Flat { master: gpu.zeros(len, master)?, copy })
    }

    fn load(&mut self, gpu: &Gpu, values: &[f32]) -> Result<(), CudaError> {
        gpu.upload(values, self.master.whole_mut())?;
        match &mut self.copy {
            Some(copy) => cuda::cast(gpu, self.master.whole(), copy.whole_mut()),
            None => Ok(()),
        }
    }

    fn read(&self) -> &DeviceBuffer {
        self.copy.as_ref().unwrap_or(&self.master)
    }
}

/// A rank's parameters on its device, laid out by a [`ParameterLayout`].
#[derive(Debug)]
pub struct DeviceWeights {
    dense: Flat,
    experts: Flat,
}

/// Parameters under an update: the f32 ones, and their copy in bf16 if there is one.
pub type Updated<'a> = (SliceMut<'a>, Option<SliceMut<'a>>);

impl DeviceWeights {
    /// Bytes that the parameters of `layout` take.
    pub fn bytes(layout: &ParameterLayout, dtype: DType, purpose: Purpose) -> usize {
        let bytes = |(master, copy): Storage| master.bytes() + copy.map_or(0, DType::bytes);
        layout.dense_len() * bytes(dense_storage(dtype)) + layout.experts_len() * bytes(experts_storage(dtype, purpose))
    }

    /// No parameters.
    pub(crate) fn none(gpu: &Gpu) -> Result<Self, CudaError> {
        let nothing = || Flat::zeros(gpu, 0, (DType::F32, None));
        Ok(DeviceWeights { dense: nothing()?, experts: nothing()? })
    }

    pub(crate) fn zeros(
        gpu: &Gpu,
        layout: &ParameterLayout,
        dtype: DType,
        purpose: Purpose,
    ) -> Result<Self, CudaError> {
        Ok(DeviceWeights {
            dense: Flat::zeros(gpu, layout.dense_len(), dense_storage(dtype))?,
            experts: Flat::zeros(gpu, layout.experts_len(), experts_storage(dtype, purpose))?,
        })
    }

    pub(crate) fn load(&mut self, gpu: &Gpu, parameters: &Parameters) -> Result<(), CudaError> {
        self.dense.load(gpu, &parameters.dense)?;
        self.experts.load(gpu, &parameters.experts)
    }

    pub(crate) fn store(&self, gpu: &Gpu, parameters: &mut Parameters) -> Result<(), CudaError> {
        gpu.download(self.dense.master.whole(), &mut parameters.dense)?;
        gpu.download(self.experts.master.whole(), &mut parameters.experts)
    }

    /// Elements of a dense matrix, as products read them.
    pub(crate) fn matrix(&self, range: &Range<usize>) -> Slice<'_> {
        self.dense.read().slice(range.clone())
    }

    /// Elements of a dense vector in f32: of a norm.
    pub(crate) fn vector(&self, range: &Range<usize>) -> Slice<'_> {
        self.dense.master.slice(range.clone())
    }

    /// Elements of experts' matrices, as products read them.
    pub(crate) fn experts(&self, range: Range<usize>) -> Slice<'_> {
        self.experts.read().slice(range)
    }

    /// A range of one of the two buffers, to be updated; not of a model for evaluation.
    pub fn update(&mut self, buffer: Buffer, range: Range<usize>) -> Updated<'_> {
        let flat = match buffer {
            Buffer::Dense => &mut self.dense,
            Buffer::Experts => &mut self.experts,
        };
        let copy = flat.copy.as_mut().map(|copy| copy.slice_mut(range.clone()));
        (flat.master.slice_mut(range), copy)
    }
}

/// The gradients of [`DeviceWeights`], f32, of a model for evaluation empty; ranges are in flight between backward and
/// `Comm::finish_gradients`.
#[derive(Debug)]
pub struct DeviceGradients {
    /// `[dense_len]`.
    pub dense: SharedBuffer,
    /// `[experts_len]`.
    pub experts: SharedBuffer,
}

impl DeviceGradients {
    /// No gradients.
    pub(crate) fn none(gpu: &Gpu) -> Result<Self, CudaError> {
        let empty = || gpu.zeros(0, DType::F32).map(SharedBuffer::on_device);
        Ok(DeviceGradients { dense: empty()?, experts: empty()? })
    }

    /// What a model for `purpose` has of them.
    pub(crate) fn zeros(gpu: &Gpu, layout: &ParameterLayout, purpose: Purpose) -> Result<Self, CudaError> {
        if purpose == Purpose::Evaluation {
            return Self::none(gpu);
        }
        Ok(DeviceGradients {
            dense: SharedBuffer::on_device(gpu.zeros(layout.dense_len(), DType::F32)?),
            experts: SharedBuffer::on_device(gpu.zeros(layout.experts_len(), DType::F32)?),
        })
    }

    /// One of the two buffers.
    pub fn buffer(&self, buffer: Buffer) -> &SharedBuffer {
        match buffer {
            Buffer::Dense => &self.dense,
            Buffer::Experts => &self.experts,
        }
    }
}
