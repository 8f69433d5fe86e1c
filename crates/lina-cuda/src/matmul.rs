//! To be written.

use crate::error::CudaError;
use crate::stream::Stream;

pub(crate) struct Blas;

impl Blas {
    pub(crate) fn new(_stream: &Stream) -> Result<Blas, CudaError> {
        Ok(Blas)
    }
}
