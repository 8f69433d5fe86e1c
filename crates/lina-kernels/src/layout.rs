//! Where the heads of a projection lie within rows that hold several projections.

/// Heads side by side within each row of a `[tokens, row_stride]` buffer, such as the queries in a fused query-key-value projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLayout {
    /// Elements from the start of a row to the first head.
    pub offset: usize,
    /// Number of heads.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements of a row.
    pub row_stride: usize,
}

impl HeadLayout {
    /// The range of a row that the heads take.
    pub(crate) fn columns(&self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.heads * self.head_dim
    }

    /// Rows in a buffer of `len` elements.
    pub(crate) fn rows(&self, len: usize) -> usize {
        assert!(
            self.columns().end <= self.row_stride && self.row_stride > 0,
            "{self:?}: the heads do not fit in a row"
        );
        assert!(len.is_multiple_of(self.row_stride), "{len} elements are not rows of {}", self.row_stride);
        len / self.row_stride
    }
}
