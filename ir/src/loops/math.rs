//! Elementary functions as kernel IR: polynomials of fixed order, so that every emitter gives the same bits.
//!
//! Source of the reductions: Cody and Waite, Software Manual for the Elementary Functions (1980); coefficients are Taylor or
//! minimax values rounded to `f32`. Errors are stated for the whole range and checked against `f64` by tests.

use super::{Builder, Expr, Ty, f32c, f64c, i32c};

/// Adding and subtracting this rounds a float of magnitude below 2^22 to the nearest integer, ties to even.
pub const ROUND: f32 = 12_582_912.0;

/// `e^x`, at most 2 ulp for `-87 <= x <= 88`; below it stays at `e^-87` (under 1.7e-38), above it stays at `e^88`. NaN stays NaN.
pub fn exp(b: &mut Builder, x: impl Into<Expr>) -> Expr {
    // The second operand of `max` and `min` is the one that survives a NaN.
    let x = b.bind(f32c(88.0).min(f32c(-87.0).max(x)));
    let t = b.bind(x.clone().fma(f32c(std::f32::consts::LOG2_E), f32c(ROUND)));
    let n = b.bind(&t - f32c(ROUND));
    let r = b.bind(n.clone().fma(f32c(-0.693_359_4), x));
    let r = b.bind(n.fma(f32c(2.121_944_4e-4), r));
    let mut p = f32c(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = b.bind(p.fma(&r, f32c(c)));
    }
    let r2 = b.bind(&r * &r);
    let y = b.bind(p.fma(r2, &r + f32c(1.0)));
    // The low bits of `t` hold n; the scale 2^n has the exponent field n + 127.
    let scale = (t.to_bits() - i32c(ROUND.to_bits() as i32 - 127)).shl(23).from_bits();
    b.bind(y * scale)
}

/// Natural logarithm of a positive normal float, at most 2 ulp, also near 1.
pub fn ln(b: &mut Builder, x: impl Into<Expr>) -> Expr {
    let x = b.bind(x.into());
    // Bring the mantissa into [sqrt(1/2), sqrt(2)).
    let bits = b.bind(x.to_bits() - i32c(0x3f35_04f3));
    let e = b.bind(bits.clone().sar(23).cast(Ty::F32));
    let m = b.bind(((bits & i32c(0x007f_ffff)) + i32c(0x3f35_04f3)).from_bits() - f32c(1.0));
    let z = b.bind(&m * &m);
    let mut p = f32c(7.037_683_6e-2);
    for c in [
        -1.151_461e-1,
        1.167_699_9e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_8e-1,
        2.000_071_5e-1,
        -2.499_999_4e-1,
        3.333_333e-1,
    ] {
        p = b.bind(p.fma(&m, f32c(c)));
    }
    let y = b.bind(p * &m * &z);
    let y = b.bind(e.clone().fma(f32c(-2.121_944_4e-4), y));
    let y = b.bind(z.fma(f32c(-0.5), y));
    b.bind(e.fma(f32c(0.693_359_4), &m + y))
}

/// `1 / (1 + e^-x)`.
pub fn sigmoid(b: &mut Builder, x: impl Into<Expr>) -> Expr {
    let e = exp(b, -x.into());
    b.bind(f32c(1.0) / (e + f32c(1.0)))
}

/// `x / (1 + e^-x)`.
pub fn silu(b: &mut Builder, x: impl Into<Expr>) -> Expr {
    let x = b.bind(x.into());
    let e = exp(b, -x.clone());
    b.bind(x / (e + f32c(1.0)))
}

/// `ln(1 + y)` for `0 <= y <= 1`, relative error below 3e-7: `ln(u) * y / (u - 1)` with `u = 1 + y` undoes the rounding of `u`.
fn ln_1p_unit(b: &mut Builder, y: Expr) -> Expr {
    let y = b.bind(y);
    let u = b.bind(&y + f32c(1.0));
    let d = b.bind(&u - f32c(1.0));
    let l = ln(b, &u);
    let tiny = b.bind(d.clone().eq(f32c(0.0)));
    let d = b.bind(tiny.clone().select(f32c(1.0), d));
    b.bind(tiny.select(&y, l * &y / d))
}

/// `ln(1 + e^x)` without overflow.
pub fn softplus(b: &mut Builder, x: impl Into<Expr>) -> Expr {
    let x = b.bind(x.into());
    let e = exp(b, -x.clone().abs());
    let l = ln_1p_unit(b, e);
    b.bind(x.max(f32c(0.0)) + l)
}

/// `ln(1 / (1 + e^-x))`, never positive.
pub fn log_sigmoid(b: &mut Builder, x: impl Into<Expr>) -> Expr {
    let s = softplus(b, -x.into());
    b.bind(-s)
}

/// `ln(1 - x)` for `0 <= x <= 0.999`.
pub fn ln_1m(b: &mut Builder, x: impl Into<Expr>) -> Expr {
    let x = b.bind(x.into());
    let u = b.bind(f32c(1.0) - &x);
    let d = b.bind(f32c(1.0) - &u);
    let l = ln(b, &u);
    let tiny = b.bind(d.clone().eq(f32c(0.0)));
    let d = b.bind(tiny.clone().select(f32c(1.0), d));
    let neg = -x.clone();
    b.bind(tiny.select(neg, l * x / d))
}

/// Hyperbolic tangent, absolute error below 3e-7: a series near 0, else `1 - 2 / (e^2x + 1)`.
pub fn tanh(b: &mut Builder, x: impl Into<Expr>) -> Expr {
    let x = b.bind(x.into());
    let a = b.bind(x.clone().abs());
    let e = exp(b, &a * f32c(2.0));
    let big = b.bind(f32c(1.0) - f32c(2.0) / (e + f32c(1.0)));
    let z = b.bind(&x * &x);
    let mut p = f32c(-5.704_988_7e-3);
    for c in [2.063_908_8e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1] {
        p = b.bind(p.fma(&z, f32c(c)));
    }
    let small = b.bind((p * z * &x) + &x);
    let signed = b.bind(x.lt(f32c(0.0)).select(-big.clone(), big));
    b.bind(a.lt(f32c(0.625)).select(small, signed))
}

/// `1 / sqrt(x)` by two correctly rounded operations.
pub fn rsqrt(x: impl Into<Expr>) -> Expr {
    f32c(1.0) / x.into().sqrt()
}

/// Cosine and sine of a `F32` angle of magnitude below 2^31, absolute error below 2e-7: reduction by quarter turns in `F64`.
pub fn cos_sin(b: &mut Builder, angle: impl Into<Expr>) -> (Expr, Expr) {
    let x = b.bind(angle.into().cast(Ty::F64));
    let n = b.bind((&x * f64c(std::f64::consts::FRAC_2_PI)).nearest());
    let t = b.bind((x - &n * f64c(std::f64::consts::FRAC_PI_2)).cast(Ty::F32));
    let q = b.bind(n.cast(Ty::I32) & i32c(3));
    let z = b.bind(&t * &t);
    let mut s = f32c(2.755_731_9e-6);
    for c in [-1.984_127e-4, 8.333_334e-3, -1.666_666_7e-1] {
        s = b.bind(s.fma(&z, f32c(c)));
    }
    let s = b.bind((s * &z * &t) + &t);
    let mut c = f32c(2.480_158_8e-5);
    for k in [-1.388_888_9e-3, 4.166_666_8e-2, -0.5, 1.0] {
        c = b.bind(c.fma(&z, f32c(k)));
    }
    let odd = b.bind((&q & i32c(1)).eq(i32c(1)));
    let cos = b.bind(odd.clone().select(&s, &c));
    let sin = b.bind(odd.select(c, s));
    let flip_cos = b.bind(((&q + i32c(1)) & i32c(2)).eq(i32c(2)));
    let flip_sin = b.bind((q & i32c(2)).eq(i32c(2)));
    (b.bind(flip_cos.select(-cos.clone(), cos)), b.bind(flip_sin.select(-sin.clone(), sin)))
}

/// `x` rounded to an integer, ties to even, as `I32`; for magnitudes below 2^22.
pub fn round_to_i32(x: impl Into<Expr>) -> Expr {
    (x.into() + f32c(ROUND)).to_bits() - i32c(ROUND.to_bits() as i32)
}

#[cfg(test)]
mod tests {
    use super::super::{Kernel, Role, Tensors, interpret, verify};
    use super::*;
    use crate::{DType, Data};

    type Function = fn(&mut Builder, Expr) -> Expr;

    fn apply(f: Function, x: &[f32]) -> Vec<f32> {
        let mut b = Builder::new("function");
        let n = x.len();
        let from = b.buf("x", DType::F32, n, Role::In);
        let to = b.buf("y", DType::F32, n, Role::Out);
        b.lanes(0, n, 1, |b, i| {
            let y = f(b, Expr::load(from, &i));
            b.store(to, &i, y);
        });
        let k: Kernel = b.finish();
        verify(&k).unwrap_or_else(|e| panic!("{e}"));
        let mut args = [Data::F32(x.to_vec()), Data::F32(vec![0.0; n])];
        interpret(&k, &mut Tensors::new(&k, &mut args), 0, 1);
        let [_, Data::F32(y)] = args else { unreachable!("arguments keep their types") };
        y
    }

    /// `n` values evenly from `lo` to `hi`.
    fn grid(lo: f64, hi: f64, n: usize) -> Vec<f32> {
        (0..=n).map(|i| (lo + (hi - lo) * i as f64 / n as f64) as f32).collect()
    }

    /// Positive values over all exponents from `lo` to `hi`.
    fn spread(lo: f64, hi: f64, n: usize) -> Vec<f32> {
        grid(lo.ln(), hi.ln(), n).iter().map(|x| f64::from(*x).exp() as f32).collect()
    }

    fn both_signs(x: Vec<f32>) -> Vec<f32> {
        x.iter().flat_map(|&x| [x, -x]).chain([0.0, -0.0]).collect()
    }

    /// The distance in units of the last place of the exact value.
    fn ulps(found: f32, exact: f64) -> f64 {
        let near = (exact.abs() as f32).max(f32::MIN_POSITIVE);
        let ulp = f64::from(f32::from_bits(near.to_bits() + 1)) - f64::from(near);
        (f64::from(found) - exact).abs() / ulp
    }

    /// The lesser of absolute and relative error.
    fn error(found: f32, exact: f64) -> f64 {
        let absolute = (f64::from(found) - exact).abs();
        absolute.min(absolute / exact.abs())
    }

    fn relative(found: f32, exact: f64) -> f64 {
        if f64::from(found) == exact { 0.0 } else { ((f64::from(found) - exact) / exact).abs() }
    }

    /// The greatest error stays below `bound`.
    fn check(name: &str, f: Function, exact: fn(f64) -> f64, x: &[f32], error: fn(f32, f64) -> f64, bound: f64) {
        let worst = x
            .iter()
            .zip(apply(f, x))
            .map(|(&x, y)| (error(y, exact(x.into())), x, y))
            .fold((0.0, 0.0, 0.0), |a, b| if b.0 <= a.0 { a } else { b });
        assert!(worst.0 <= bound, "{name}({}) = {}: error {}, expected at most {bound}", worst.1, worst.2, worst.0);
    }

    fn softplus_exact(x: f64) -> f64 {
        x.max(0.0) + (-x.abs()).exp().ln_1p()
    }

    #[test]
    fn functions_are_as_exact_as_stated() {
        let wide = both_signs(spread(1e-12, 80.0, 20_000));
        check("exp", exp, f64::exp, &grid(-87.0, 88.0, 100_000), ulps, 2.0);
        check("exp", exp, f64::exp, &wide, ulps, 2.0);
        let logs = [spread(1.2e-38, 3.4e38, 50_000), grid(0.5, 2.0, 50_000)].concat();
        check("ln", ln, f64::ln, &logs, ulps, 2.0);
        check("sigmoid", sigmoid, |x| 1.0 / (1.0 + (-x).exp()), &wide, relative, 5e-7);
        check("silu", silu, |x| x / (1.0 + (-x).exp()), &wide, relative, 5e-7);
        check("softplus", softplus, softplus_exact, &wide, relative, 5e-7);
        check("log_sigmoid", log_sigmoid, |x| -softplus_exact(-x), &wide, relative, 5e-7);
        let unit = [spread(1e-12, 0.999, 20_000), grid(0.0, 0.999, 20_000)].concat();
        check("ln_1m", ln_1m, |x| (-x).ln_1p(), &unit, relative, 5e-7);
        check("tanh", tanh, f64::tanh, &wide, error, 3e-7);
        check("rsqrt", |_, x| rsqrt(x), |x| 1.0 / x.sqrt(), &logs, ulps, 2.0);
        let absolute = |y: f32, e: f64| (f64::from(y) - e).abs();
        let angles = [both_signs(spread(1e-6, 1e6, 50_000)), grid(-10.0, 10.0, 50_000)].concat();
        check("cos", |b, x| cos_sin(b, x).0, f64::cos, &angles, absolute, 2e-7);
        check("sin", |b, x| cos_sin(b, x).1, f64::sin, &angles, absolute, 2e-7);
    }

    #[test]
    fn extremes_stay_finite() {
        let x = [f32::MAX, f32::MIN, 0.0, -0.0, 1e-45, 100.0, -100.0];
        let bounded: [Function; 3] = [exp, sigmoid, tanh];
        let growing: [Function; 3] = [softplus, log_sigmoid, silu];
        for f in bounded.into_iter().chain(growing) {
            let y = apply(f, &x);
            assert!(y.iter().all(|y| y.is_finite()), "{y:?}");
            assert!(apply(f, &[f32::NAN])[0].is_nan(), "NaN is not hidden");
        }
        for f in bounded {
            assert!(apply(f, &[f32::INFINITY, f32::NEG_INFINITY]).iter().all(|y| y.is_finite()));
        }
        assert!(apply(bounded[0], &x)[1] < 1.7e-38);
        assert!(apply(growing[1], &x).iter().all(|y| *y <= 0.0));
    }

    #[test]
    fn rounding_ties_to_even() {
        let x = [0.5, 1.5, 2.5, -0.5, -1.5, 2.499_999_8, 1e6 + 0.5, -4_194_303.0];
        let y = apply(|_, x| round_to_i32(x).cast(Ty::F32), &x);
        assert_eq!(y, x.map(f32::round_ties_even));
    }
}
