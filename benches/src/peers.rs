//! Peers inside this process: the crate `gemm`, which multiplies floats.
//!
//! A peer is checked like everything else: here against a plain sum in double precision.

use anyhow::{Result, ensure};
use gemm_common::Parallelism;

use crate::measure::{Case, Setup};
use crate::peaks::FMA;
use crate::subject::sequence;

/// Elements of a result that are checked.
const CHECKED: usize = 64;

/// The row of the product of that many rows, weight rows and columns.
pub fn id([m, n, k]: [usize; 3]) -> String {
    format!("gemm_f32.{m}x{n}x{k}")
}

/// `c [m, n] = a [m, k] w [n, k]` in floats.
fn multiply([m, n, k]: [usize; 3], a: &[f32], w: &[f32], c: &mut [f32], threads: usize) {
    assert!(a.len() == m * k && w.len() == n * k && c.len() == m * n, "the slices have the extents of the product");
    let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
    let (n_stride, k_stride) = (n as isize, k as isize);
    let (read, conjugate) = (false, [false; 3]);
    // SAFETY: the three slices hold all elements that extents and strides reach, as asserted, and `c` is borrowed mutably.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n_stride,
            read,
            a.as_ptr(),
            1,
            k_stride,
            w.as_ptr(),
            k_stride,
            1,
            0.0,
            1.0,
            conjugate[0],
            conjugate[1],
            conjugate[2],
            parallelism,
        );
    }
}

/// The case of a product, with a checked answer.
///
/// # Errors
/// When the answer is wrong.
pub fn case(shape: [usize; 3], setup: &Setup) -> Result<Case> {
    let [m, n, k] = shape;
    let mut random = sequence(3);
    let mut floats = |n: usize| (0..n).map(|_| random()).collect::<Vec<f32>>();
    let (a, w) = (floats(m * k), floats(n * k));
    let (mut c, threads) = (vec![0.0; m * n], setup.threads);
    multiply(shape, &a, &w, &mut c, threads);
    for at in (0..CHECKED).map(|i| i * (m * n - 1) / (CHECKED - 1)) {
        let (row, col) = (&a[at / n * k..][..k], &w[at % n * k..][..k]);
        let want: f64 = row.iter().zip(col).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
        let off = (f64::from(c[at]) - want).abs();
        ensure!(off <= 1e-5 * (k as f64), "{}: element {at} is off by {off}", id(shape));
    }
    let work = (m * n * k) as f64 * 1e-9;
    Ok(Case {
        id: id(shape),
        unit: "GMAC/s",
        work,
        floor: vec![(FMA, 2.0 * work)],
        peer: None,
        start: Box::new(|| Ok(())),
        run: Box::new(move || {
            multiply(shape, &a, &w, &mut c, threads);
            Ok(())
        }),
    })
}
