//! Sizes that kernels are written for: what their registers and shared memory hold.

use crate::error::CudaError;

/// Experts that the lanes of a warp hold, and whose counters fit into a block's shared memory.
pub(crate) const MAX_EXPERTS: usize = 1024;
/// Choices of a token that the lanes of a warp hold.
const MAX_TOP_K: usize = 64;
/// Elements of a row that the threads of a block hold in the backward pass of a norm.
pub(crate) const MAX_NORM_WIDTH: usize = 8192;

/// Refuses layers whose experts no kernel routes: more than 1024, or more than 64 for a token.
///
/// # Errors
/// [`CudaError::Unsupported`], if so.
pub fn check_routing(experts: usize, top_k: usize) -> Result<(), CudaError> {
    check_experts(experts)?;
    at_most(MAX_TOP_K, top_k, "experts per token")
}

/// Refuses rows, or heads that are normed as one, for which a norm has no backward pass: those of more than 8192
/// elements. Forward passes take any width.
///
/// # Errors
/// [`CudaError::Unsupported`], if so.
pub fn check_norm_width(width: usize) -> Result<(), CudaError> {
    at_most(MAX_NORM_WIDTH, width, "elements in a norm's row")
}

pub(crate) fn check_experts(experts: usize) -> Result<(), CudaError> {
    at_most(MAX_EXPERTS, experts, "experts")
}

fn at_most(most: usize, found: usize, what: &str) -> Result<(), CudaError> {
    if found > most {
        return Err(CudaError::Unsupported(format!("{found} {what}, expected at most {most} on a GPU")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_past_the_limits_are_refused() {
        assert_eq!(check_routing(1024, 64), Ok(()));
        assert_eq!(check_norm_width(8192), Ok(()));
        let refused = [check_routing(1025, 1), check_routing(128, 65), check_norm_width(8193)];
        let sentences = refused.map(|result| result.unwrap_err().to_string());
        let expected = [
            "1025 experts, expected at most 1024 on a GPU",
            "65 experts per token, expected at most 64 on a GPU",
            "8193 elements in a norm's row, expected at most 8192 on a GPU",
        ];
        assert_eq!(sentences, expected);
    }
}
