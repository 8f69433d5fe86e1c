//! lina-kernels
