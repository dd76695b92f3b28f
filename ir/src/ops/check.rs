//! Checks of operand types that several operations share.
//!
//! Every failure names the operation, the operand and what was expected.

use super::InferError;
use crate::{DType, Type};

/// The operand count is one of `counts`.
pub(super) fn count(op: &'static str, ins: &[Type], counts: std::ops::RangeInclusive<usize>) -> Result<(), InferError> {
    if counts.contains(&ins.len()) {
        return Ok(());
    }
    let (lo, hi) = (counts.start(), counts.end());
    let want = if lo == hi { format!("{lo}") } else { format!("{lo} to {hi}") };
    Err(InferError::new(op, format!("takes {want} operands, found {}", ins.len())))
}

/// The element type is `dtype` and the number of dimensions is in `ranks`.
pub(super) fn is(
    op: &'static str,
    what: &str,
    ty: &Type,
    dtype: DType,
    ranks: std::ops::RangeInclusive<usize>,
) -> Result<(), InferError> {
    if ty.dtype == dtype && ranks.contains(&ty.dims.len()) && ty.numel() > 0 {
        return Ok(());
    }
    let (lo, hi) = (ranks.start(), ranks.end());
    let rank = if lo == hi { format!("{lo}") } else { format!("{lo} to {hi}") };
    Err(InferError::new(op, format!("{what} wants {} of {rank} dimensions, found {ty}", dtype.name())))
}

/// The number of groups of a weight of `rank` dimensions that may have one more in front; the groups divide the leading dimension
/// of `rows`.
pub(super) fn groups(op: &'static str, what: &str, ty: &Type, rank: usize, rows: &Type) -> Result<usize, InferError> {
    is(op, what, ty, ty.dtype, rank..=rank + 1)?;
    if ty.dims.len() == rank {
        return Ok(1);
    }
    let (g, leading) = (ty.dims[0], rows.dims.first().copied().unwrap_or(1));
    if leading.is_multiple_of(g) {
        return Ok(g);
    }
    Err(InferError::new(op, format!("{what} has {g} groups, which do not divide the {leading} rows of {rows}")))
}
