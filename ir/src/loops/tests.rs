//! Tests of the kernel IR: what kernels mean, which ones are refused, and that text gives them back.

use super::tile::Product;
use super::*;
use crate::Data;
use crate::sexpr::Sexpr;

/// A deterministic generator of 64-bit numbers.
struct Lcg(u64);

impl Lcg {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 ^ (self.0 >> 29)
    }

    fn below(&mut self, n: usize) -> usize {
        ((self.next() >> 8) % n as u64) as usize
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.below(1 << 20) as f32 - 524_288.0) / 65_536.0).collect()
    }
}

/// Verify, compare with the kernel of its own text and bytes, and run all instances.
fn run(kernel: &Kernel, args: &mut [Data]) {
    verify(kernel).unwrap_or_else(|e| panic!("{e}"));
    round_trip(kernel);
    interpret(kernel, &mut Tensors::new(kernel, args), 0, kernel.grid as i64);
}

fn round_trip(kernel: &Kernel) {
    let s = print(kernel);
    let text = s.to_text();
    let tree = Sexpr::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    assert_eq!(tree, s);
    let again = parse(&tree).unwrap_or_else(|e| panic!("{e}\n{text}"));
    // Equality of trees is equality of bits, also of NaN and of the sign of zero.
    assert_eq!(print(&again), s);
    assert_eq!(
        (&again.name, &again.contract, &again.variant, &again.bufs),
        (&kernel.name, &kernel.contract, &kernel.variant, &kernel.bufs)
    );
    assert_eq!((&again.vars, again.grid), (&kernel.vars, kernel.grid));
    let bytes = s.to_bytes();
    assert_eq!(Sexpr::from_bytes(&bytes), Ok(tree));
}

fn f32s(d: &Data) -> &[f32] {
    match d {
        Data::F32(v) => v,
        other => panic!("expected f32, found {other:?}"),
    }
}

#[test]
fn map_with_grid() {
    let mut b = Builder::new("axpy");
    let x = b.buf("x", DType::F32, 20, Role::In);
    let y = b.buf("y", DType::F32, 20, Role::InOut);
    let g = b.grid(4);
    b.contract(Contract::new("axpy", &[("n", 20)]));
    b.variant(Variant::new(&[("tile", 5), ("k", 0)]));
    b.lanes(0, 5, 2, |b, i| {
        let at = b.bind(&g * 5 + i);
        b.store(y, &at, f32c(0.1).fma(Expr::load(x, &at), Expr::load(y, &at)));
    });
    let k = b.finish();
    let mut r = Lcg(1);
    let (xs, ys) = (r.floats(20), r.floats(20));
    let mut args = [Data::F32(xs.clone()), Data::F32(ys.clone())];
    run(&k, &mut args);
    let expected: Vec<f32> = xs.iter().zip(&ys).map(|(x, y)| 0.1f32.mul_add(*x, *y)).collect();
    assert_eq!(f32s(&args[1]), expected);
    assert!(unproven(&k).is_empty());
    let mut args = [Data::F32(xs), Data::F32(ys.clone())];
    interpret(&k, &mut Tensors::new(&k, &mut args), 1, 3);
    assert_eq!((&f32s(&args[1])[..5], &f32s(&args[1])[15..]), (&ys[..5], &ys[15..]));
    assert_eq!(f32s(&args[1])[5..15], expected[5..15]);
}

#[test]
fn prefetches_are_hints() {
    let kernel = |index: &dyn Fn(Buf) -> Expr| {
        let mut b = Builder::new("hint");
        let x = b.buf("x", DType::I32, 4, Role::In);
        let y = b.buf("y", DType::I32, 4, Role::Out);
        let at = index(x);
        b.prefetch(x, at);
        b.lanes(0, 4, 1, |b, i| b.store(y, &i, Expr::load(x, &i)));
        b.finish()
    };
    let k = kernel(&|_| int(1 << 20));
    let mut args = [Data::I32(vec![1, 2, 3, 4]), Data::I32(vec![0; 4])];
    run(&k, &mut args);
    assert_eq!(args[1], args[0], "what lies outside is not read");
    assert!(unproven(&k).is_empty(), "{:?}", unproven(&k));
    let tree = print(&k);
    assert!(tree.to_text().contains("(prefetch x 1048576)"), "{}", tree.to_text());
    assert_eq!(parse(&tree).unwrap(), k);
    let e = verify(&kernel(&|x| Expr::load(x, 0).cast(Ty::I64))).unwrap_err().to_string();
    assert!(e.contains("prefetch of x") && e.contains("the index has a load"), "{e}");
    let e = verify(&kernel(&|_| f32c(1.0))).unwrap_err().to_string();
    assert!(e.contains("the index is F32"), "{e}");
}

#[test]
fn product_by_tiles() {
    for (m, n, k) in [(1, 1, 1), (4, 8, 3), (7, 5, 9), (9, 17, 4)] {
        for dynamic in [false, true] {
            let mut b = Builder::new("product");
            let a = b.buf("a", DType::F32, m * k, Role::In);
            let w = b.buf("w", DType::F32, k * n, Role::In);
            let y = b.buf("y", DType::F32, m * n, Role::Out);
            let rows = b.buf("rows", DType::I32, 1, Role::In);
            let count = Expr::load(rows, 0).cast(Ty::I64).max(0).min(m);
            let product = Product {
                m: if dynamic { count.into() } else { m.into() },
                n: n.into(),
                k: k.into(),
                a: &|_, i, l| Expr::load(a, i * k + l),
                b: &|_, l, j| Expr::load(w, l * n + j),
                init: None,
            };
            product.emit(&mut b, &|b, i, j, v| b.store(y, i * n + j, v));
            let kernel = b.finish();
            let mut r = Lcg(2);
            let (av, wv) = (r.floats(m * k), r.floats(k * n));
            let rows = Data::I32(vec![m as i32]);
            let mut args = [Data::F32(av.clone()), Data::F32(wv.clone()), Data::F32(vec![0.0; m * n]), rows];
            run(&kernel, &mut args);
            let cell = |i: usize, j: usize| (0..k).fold(0.0, |s, l| av[i * k + l].mul_add(wv[l * n + j], s));
            let expected: Vec<f32> = (0..m * n).map(|at| cell(at / n, at % n)).collect();
            assert_eq!(f32s(&args[2]), expected);
            assert!(dynamic || unproven(&kernel).is_empty(), "{:?}", unproven(&kernel));
        }
    }
}

#[test]
fn reductions_are_striped() {
    for n in [0, 1, 3, 8, 13, 16, 37] {
        let mut b = Builder::new("reductions");
        let x = b.buf("x", DType::F32, n + 1, Role::In);
        let q = b.buf("q", DType::I8, n + 1, Role::In);
        let y = b.buf("y", DType::F32, 3, Role::Out);
        let z = b.buf("z", DType::I32, 2, Role::Out);
        let accs = b.reduce(1, n + 1, |b, i| {
            let v = b.bind(Expr::load(x, &i) * 3.0);
            let w = b.bind(Expr::load(q, &i));
            vec![Acc::Sum(v.clone()), Acc::Dot(v.clone(), v.clone()), Acc::Max(v), Acc::Sum(w.clone()), Acc::Max(w)]
        });
        for (i, acc) in accs.into_iter().enumerate() {
            if i < 3 { b.store(y, i, acc) } else { b.store(z, i - 3, acc) }
        }
        let k = b.finish();
        let xs = Lcg(n as u64).floats(n + 1);
        let qs: Vec<i8> = (0..=n).map(|i| (i as i8).wrapping_mul(77)).collect();
        let mut args = [Data::F32(xs.clone()), Data::I8(qs.clone()), Data::F32(vec![0.0; 3]), Data::I32(vec![0; 2])];
        run(&k, &mut args);
        let mut s = [[0.0f32; 8], [0.0; 8], [f32::NEG_INFINITY; 8]];
        for (i, x) in xs[1..].iter().enumerate() {
            let v = x * 3.0;
            s[0][i % 8] += v;
            s[1][i % 8] = v.mul_add(v, s[1][i % 8]);
            s[2][i % 8] = s[2][i % 8].max(v);
        }
        let tree = |s: [f32; 8], f: fn(f32, f32) -> f32| {
            let four: Vec<f32> = (0..4).map(|j| f(s[j], s[j + 4])).collect();
            f(f(four[0], four[2]), f(four[1], four[3]))
        };
        let expected = [tree(s[0], |a, b| a + b), tree(s[1], |a, b| a + b), tree(s[2], f32::max)];
        assert_eq!(f32s(&args[2]), expected);
        let sum = qs[1..].iter().map(|&q| i32::from(q)).sum();
        let max = qs[1..].iter().map(|&q| i32::from(q)).max().unwrap_or(i32::MIN);
        assert_eq!(args[3], Data::I32(vec![sum, max]));
        assert!(unproven(&k).is_empty());
    }
}

#[test]
fn scratch_conditions_and_every_dtype() {
    let mut b = Builder::new("shift");
    let x = b.buf("x", DType::BF16, 6, Role::In);
    let y = b.buf("y", DType::F64, 6, Role::Out);
    let narrow = [DType::I8, DType::U8, DType::I16];
    let outs: Vec<Buf> = narrow.iter().map(|d| b.buf(d.name(), *d, 6, Role::Out)).collect();
    let t = b.scratch("t", DType::F32, 6);
    b.each(0, 6, |b, i| b.store(t, &i, Expr::load(x, &i) * 100.0));
    b.each(0, 6, |b, i| {
        let inner = Expr::Int(0).lt(&i);
        b.if_else(inner, |b| b.store(y, &i, Expr::load(t, &i - 1).cast(Ty::F64)), |b| b.store(y, &i, f64c(-1.0)));
        for &o in &outs {
            b.store(o, &i, Expr::load(t, &i).cast(Ty::I32) * i32c(3));
        }
    });
    let k = b.finish();
    assert_eq!(k.scratch_bytes(), 64);
    let values = [1.0f32, -2.0, 0.5, 3.5, -0.25, 100.0];
    let bits = values.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
    let mut args = vec![Data::BF16(bits), Data::zeros(DType::F64, 6)];
    args.extend(narrow.iter().map(|d| Data::zeros(*d, 6)));
    run(&k, &mut args);
    assert_eq!(args[1], Data::F64(vec![-1.0, 100.0, -200.0, 50.0, 350.0, -25.0]));
    let ints = [300i32, -600, 150, 1050, -75, 30_000];
    assert_eq!(args[2], Data::I8(ints.iter().map(|&x| x as i8).collect()));
    assert_eq!(args[3], Data::U8(ints.iter().map(|&x| x as u8).collect()));
    assert_eq!(args[4], Data::I16(ints.iter().map(|&x| x as i16).collect()));
    assert!(unproven(&k).is_empty(), "the condition bounds the index: {:?}", unproven(&k));
}

/// The value of a closed expression, through a store.
fn value(e: impl Into<Expr>) -> f64 {
    let mut b = Builder::new("value");
    let e = e.into();
    let ty = b.ty(&e);
    let dtype = match ty {
        Ty::F32 => DType::F32,
        Ty::F64 => DType::F64,
        Ty::I32 | Ty::I64 | Ty::Bool => DType::I32,
    };
    let y = b.buf("y", dtype, 1, Role::Out);
    b.store(y, 0, if matches!(ty, Ty::I64 | Ty::Bool) { e.cast(Ty::I32) } else { e });
    let mut args = [Data::zeros(dtype, 1)];
    run(&b.finish(), &mut args);
    match &args[0] {
        Data::F32(v) => v[0].into(),
        Data::F64(v) => v[0],
        Data::I32(v) => v[0].into(),
        other => panic!("expected a number, found {other:?}"),
    }
}

#[test]
fn scalar_operations() {
    let bin = |op, a: Expr, b: Expr| value(Expr::Bin(op, Box::new(a), Box::new(b)));
    let un = |op, a: Expr| value(Expr::Un(op, Box::new(a)));
    let (nan, big) = (f32c(f32::NAN), i32c(i32::MAX));
    assert_eq!(bin(Bin::Min, nan.clone(), f32c(1.0)), 1.0);
    assert!(bin(Bin::Min, f32c(1.0), nan.clone()).is_nan());
    assert!(bin(Bin::Max, f32c(-0.0), f32c(0.0)).is_sign_positive());
    assert!(bin(Bin::Max, f32c(0.0), f32c(-0.0)).is_sign_negative());
    assert_eq!(bin(Bin::Add, big.clone(), i32c(1)), f64::from(i32::MIN));
    assert_eq!(bin(Bin::Shl, i32c(3), i32c(33)), 6.0);
    assert_eq!(bin(Bin::Shr, i32c(-1), i32c(28)), 15.0);
    assert_eq!(bin(Bin::Sar, i32c(-8), i32c(-31)), -4.0);
    assert_eq!(bin(Bin::MulHi, i32c(-1), i32c(-1)), -2.0);
    assert_eq!(bin(Bin::Xor, i32c(6), i32c(3)), 5.0);
    assert_eq!(bin(Bin::Div, Expr::Int(-7), Expr::Int(2)), -3.0);
    assert_eq!(bin(Bin::Rem, Expr::Int(-7), Expr::Int(2)), -1.0);
    assert_eq!(bin(Bin::Div, f64c(1.0), f64c(3.0)), 1.0 / 3.0);
    assert_eq!(un(Un::Nearest, f32c(2.5)), 2.0);
    assert_eq!(un(Un::Floor, f64c(-2.5)), -3.0);
    assert_eq!(un(Un::Abs, i32c(i32::MIN)), f64::from(i32::MIN));
    assert_eq!(un(Un::Popcnt, i32c(-1)), 32.0);
    assert_eq!(un(Un::ToBits, f32c(-0.0)), f64::from(i32::MIN));
    assert_eq!(un(Un::FromBits, i32c(0x3fc0_0000)), 1.5);
    assert!(un(Un::Neg, f32c(0.0)).is_sign_negative());
    assert_eq!(value(nan.clone().ne(&nan)), 1.0);
    assert_eq!(value(nan.clone().le(&nan)), 0.0);
    assert_eq!(value(Expr::Un(Un::Not, Box::new(i32c(-1).lt(i32c(0))))), 0.0);
    assert_eq!(value(nan.cast(Ty::I32)), 0.0);
    assert_eq!(value(f32c(3e9).cast(Ty::I32)), f64::from(i32::MAX));
    assert_eq!(value(f64c(-1.9).cast(Ty::I64)), -1.0);
    assert_eq!(value(big.cast(Ty::F32)), 2_147_483_648.0);
    assert_eq!(value(Expr::Int(1 << 33).cast(Ty::I32)), 0.0);
    assert_eq!(value(f64c(0.1).cast(Ty::F32)), f64::from(0.1f32));
    let a = 1.0 + f32::EPSILON;
    assert_eq!(value(f32c(a).fma(f32c(a), f32c(-1.0))), f64::from(a.mul_add(a, -1.0)));
    assert_eq!(value(i32c(5).dot4(i32c(0x0302_0100), i32c(0x7f80_ff01))), 5.0 - 1.0 - 256.0 + 381.0);
    assert_eq!(value(f32c(1.0).lt(f32c(2.0)).select(f32c(3.0), f32c(4.0))), 3.0);
}

#[test]
fn words_are_little_endian() {
    let mut b = Builder::new("words");
    let x = b.buf("x", DType::I8, 9, Role::In);
    let y = b.buf("y", DType::I32, 2, Role::Out);
    b.lanes(0, 2, 1, |b, i| b.store(y, &i, i32c(0).dot4(i32c(0x0303_0303), Expr::word(x, &i))));
    let k = b.finish();
    let mut args = [Data::I8(vec![1, -2, 3, 4, 5, 6, -128, 127, 9]), Data::I32(vec![0; 2])];
    run(&k, &mut args);
    assert_eq!(args[1], Data::I32(vec![18, 30]));
    assert!(unproven(&k).is_empty());
}

#[test]
#[should_panic(expected = "kernel gather: index 7 is outside buffer x of 4 elements")]
fn a_dynamic_index_out_of_bounds_panics() {
    let mut b = Builder::new("gather");
    let x = b.buf("x", DType::F32, 4, Role::In);
    let at = b.buf("at", DType::I32, 1, Role::In);
    let y = b.buf("y", DType::F32, 1, Role::Out);
    b.store(y, 0, Expr::load(x, Expr::load(at, 0).cast(Ty::I64)));
    let k = b.finish();
    assert_eq!(unproven(&k), ["load x at (cast i64 (load at 0)): index in -2147483648..=2147483647, expected 0..=3"]);
    run(&k, &mut [Data::F32(vec![0.0; 4]), Data::I32(vec![7]), Data::F32(vec![0.0])]);
}

#[test]
fn broken_kernels_are_refused() {
    type Case = (&'static str, fn(&mut Builder, Buf, Buf));
    let cases: [Case; 24] = [
        ("expected F32", |b, _, y| b.store(y, 0, i32c(1))),
        ("expected I64", |b, _, y| b.store(y, i32c(0), f32c(1.0))),
        ("read only", |b, x, _| b.store(x, 0, f32c(1.0))),
        ("write only", |b, x, y| b.store(y, 0, Expr::load(y, 0) + Expr::load(x, 0))),
        ("buffer 9 is not declared", |b, _, y| b.store(y, 0, Expr::load(Buf(9), 0))),
        ("variable 9 is not declared", |b, _, y| b.store(y, 0, Expr::Var(Var(9)))),
        ("variable 9 is not declared", |b, _, _| b.lanes(0, 4, 1, |b, i| b.set(Var(9), i))),
        ("no value here", |b, _, y| {
            let v = b.var(Ty::F32);
            b.store(y, 0, v);
        }),
        ("no value here", |b, _, y| {
            let v = b.var(Ty::F32);
            b.each(0, 4, |b, _| b.set(v, f32c(1.0)));
            b.store(y, 0, v);
        }),
        ("no value here", |b, x, y| {
            let v = b.var(Ty::F32);
            b.when(Expr::load(x, 0).lt(f32c(0.0)), |b| b.set(v, f32c(1.0)));
            b.store(y, 0, v);
        }),
        ("lanes inside lanes", |b, _, _| b.lanes(0, 4, 1, |b, _| b.lanes(0, 4, 1, |_, _| {}))),
        ("lanes of step 1 interleaving 0", |b, _, _| b.lanes(0, 4, 0, |_, _| {})),
        ("a reduction inside lanes", |b, _, _| {
            b.lanes(0, 4, 1, |b, _| drop(b.sum(0, 4, |_, _| f32c(1.0))));
        }),
        ("expected let only", |b, _, y| {
            b.sum(0, 4, |b, _| {
                b.store(y, 0, f32c(1.0));
                f32c(1.0)
            });
        }),
        ("a condition inside lanes differs", |b, x, _| {
            b.lanes(0, 4, 1, |b, i| {
                let first = b.local(f32c(0.0));
                let second = b.local(f32c(0.0));
                b.each(0, 4, |b, _| {
                    b.when(Expr::from(second).lt(f32c(0.0)), |_| {});
                    b.set(second, first);
                    b.set(first, Expr::load(x, &i));
                });
            });
        }),
        ("a loop bound inside lanes differs", |b, _, _| b.lanes(0, 4, 1, |b, i| b.each(0, i, |_, _| {}))),
        ("from outside the lanes", |b, _, _| {
            let v = b.local(f32c(0.0));
            b.lanes(0, 4, 1, |b, _| b.set(v, f32c(1.0)));
        }),
        ("counts an enclosing loop", |b, _, _| {
            b.each(0, 4, |b, i| {
                if let Expr::Var(v) = i {
                    b.set(v, int(0))
                }
            });
        }),
        ("expected one type", |b, x, y| b.store(y, 0, Expr::load(x, 0) + i32c(1))),
        ("by a positive literal", |b, _, y| b.store(y, Expr::from(GRID) / GRID, f32c(0.0))),
        ("not defined for", |b, x, y| b.store(y, 0, Expr::load(x, 0) & f32c(1.0))),
        ("a cast to Bool", |b, x, _| drop(b.bind(Expr::load(x, 0).cast(Ty::Bool)))),
        ("always out of bounds", |b, x, y| b.each(8, 12, |b, i| b.store(y, 0, Expr::load(x, i)))),
        ("nesting exceeds", |b, x, y| {
            let sum = (0..300).fold(Expr::load(x, 0), |e, _| Expr::load(x, 0) + e);
            b.store(y, 0, sum);
        }),
    ];
    for (part, build) in cases {
        let mut b = Builder::new("broken");
        let x = b.buf("x", DType::F32, 8, Role::In);
        let y = b.buf("y", DType::F32, 8, Role::Out);
        build(&mut b, x, y);
        let why = verify(&b.finish()).expect_err(part).to_string();
        assert!(why.contains(part), "expected {part:?}, found {why:?}");
    }
}

#[test]
fn intervals_follow_arithmetic_and_conditions() {
    let mut b = Builder::new("intervals");
    let x = b.buf("x", DType::F32, 10, Role::In);
    let n = b.buf("n", DType::U8, 1, Role::In);
    let y = b.buf("y", DType::F32, 10, Role::Out);
    let g = b.grid(12);
    let start = b.bind((&g - 3).max(0).min(7));
    b.each(start.clone(), start + 3, |b, i| b.store(y, &i, Expr::load(x, Expr::Int(9) - &i)));
    b.store(y, &g % 10, Expr::load(x, Expr::load(n, 0).cast(Ty::I64) / 26));
    let positive = Expr::Un(Un::Not, Box::new(g.clone().le(0)));
    b.when(g.clone().le(9) & positive, |b| b.store(y, &g, Expr::load(x, &g - 1)));
    b.each(10, 10, |b, i| b.store(y, i, f32c(0.0)));
    b.store(y, g.clone().lt(10).select(g.clone(), Expr::Int(9)), f32c(0.0));
    let k = b.finish();
    verify(&k).unwrap_or_else(|e| panic!("{e}"));
    let found = unproven(&k);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("store y at (select"), "{found:?}");
}

#[test]
fn work_is_bounded_by_the_ranges_of_loops() {
    let kernel = |hi: &dyn Fn(Buf) -> Expr| {
        let mut b = Builder::new("work");
        let n = b.buf("n", DType::U8, 1, Role::In);
        let y = b.buf("y", DType::F32, 400, Role::Out);
        b.grid(3);
        b.each(0, hi(n), |b, i| b.store(y, i, f32c(0.0)));
        b.finish()
    };
    // Two bounds for each instance, an index and a value for each iteration.
    assert_eq!(work(&kernel(&|_| Expr::Int(5))), 3 * (2 + 5 * 2));
    assert_eq!(work(&kernel(&|_| Expr::Int(0))), 3 * 2);
    // A bound that is loaded has one expression more inside, and is 255 at most.
    assert_eq!(work(&kernel(&|n| Expr::load(n, 0).cast(Ty::I64))), 3 * (4 + 255 * 2));
    assert!(work(&kernel(&|n| Expr::load(n, 0).cast(Ty::F32).cast(Ty::I64))) > 1 << 62);
}

impl Lcg {
    fn constant(&mut self, ty: Ty) -> Expr {
        let r = self.next();
        match ty {
            Ty::F32 => Expr::F32(f32::from_bits(r as u32)),
            Ty::F64 => Expr::F64(f64::from_bits(r)),
            Ty::I32 => Expr::I32(r as i32),
            Ty::I64 => Expr::Int(r as i64 >> 32),
            Ty::Bool => Expr::I32(r as i32 >> 30).lt(Expr::I32(0)),
        }
    }

    /// A well-typed expression over the typed buffers 0 .. 4 and `vars`.
    fn expr(&mut self, ty: Ty, vars: &[(Var, Ty)], depth: usize) -> Expr {
        const TYPES: [Ty; 4] = [Ty::F32, Ty::F64, Ty::I32, Ty::I64];
        let known: Vec<Var> = vars.iter().filter(|v| v.1 == ty).map(|v| v.0).collect();
        if depth == 0 || self.below(6) == 0 {
            return if known.is_empty() { self.constant(ty) } else { known[self.below(known.len())].into() };
        }
        let d = depth - 1;
        let index = |r: &mut Lcg| Expr::bin(Bin::And, r.expr(Ty::I64, vars, d), Expr::Int(7));
        let operands = |r: &mut Lcg, ty| (r.expr(ty, vars, d), r.expr(ty, vars, d));
        match (ty, self.below(6)) {
            (Ty::F32, 0) => Expr::load(Buf(0), index(self)),
            (Ty::F64, 0) => Expr::load(Buf(1), index(self)),
            (Ty::I32, 0) => Expr::load(Buf(2), index(self)),
            (Ty::I32, 1) => Expr::word(Buf(3), index(self) % 2),
            (Ty::I32, 2) => self.expr(Ty::F32, vars, d).to_bits(),
            (Ty::I32, 3) => self.expr(Ty::I32, vars, d).dot4(self.expr(Ty::I32, vars, d), self.constant(Ty::I32)),
            (Ty::F32, 1) => self.expr(Ty::I32, vars, d).from_bits(),
            (Ty::F32, 2) => self.expr(Ty::F32, vars, d).fma(self.expr(Ty::F32, vars, d), self.constant(Ty::F32)),
            (Ty::I64, 0) => self.expr(Ty::I64, vars, d) / (1 + self.below(9)),
            (Ty::Bool, _) => {
                let (a, b) = operands(self, TYPES[d % 4]);
                a.cmp([Cmp::Eq, Cmp::Ne, Cmp::Lt, Cmp::Le][self.below(4)], b)
            }
            (_, 4) => self.expr(TYPES[d % 4], vars, d).cast(ty),
            (_, 5) => {
                let (a, b) = operands(self, ty);
                self.expr(Ty::Bool, vars, d).select(a, b)
            }
            _ => {
                let ops = [Bin::Add, Bin::Sub, Bin::Mul, Bin::Min, Bin::Max];
                let (a, b) = operands(self, ty);
                Expr::Bin(ops[self.below(ops.len())], Box::new(a), Box::new(b))
            }
        }
    }

    fn block(&mut self, b: &mut Builder, vars: &mut Vec<(Var, Ty)>, lanes: bool, depth: usize) {
        let outer = vars.len();
        for _ in 0..1 + self.below(4) {
            match self.below(if depth == 0 { 2 } else { 6 }) {
                0 => {
                    let ty = [Ty::F32, Ty::F64, Ty::I32, Ty::I64, Ty::Bool][self.below(5)];
                    let e = self.expr(ty, vars, 4);
                    vars.push((b.local(e), ty));
                }
                1 => {
                    let at = Expr::bin(Bin::And, self.expr(Ty::I64, vars, 2), Expr::Int(7));
                    b.store(Buf(4), at, self.expr(Ty::I32, vars, 4));
                }
                2 if !lanes => {
                    let x = self.expr(Ty::F64, vars, 3);
                    let acc = b.reduce(0, self.below(20), |b, i| {
                        let y = b.bind(i.cast(Ty::F64));
                        vec![Acc::Sum(x.clone() + &y), Acc::Max(y)]
                    });
                    vars.extend(acc.iter().filter_map(
                        |e| {
                            if let Expr::Var(v) = e { Some((*v, Ty::F64)) } else { None }
                        },
                    ));
                }
                3 if !lanes => {
                    let c = self.expr(Ty::Bool, vars, 3);
                    let mut other = vars.clone();
                    let mut split = Lcg(self.next());
                    b.if_else(c, |b| self.block(b, vars, lanes, depth - 1), |b| split.block(b, &mut other, lanes, 0));
                }
                n => {
                    let hi = self.below(6);
                    let body = |b: &mut Builder, i: Expr| {
                        if let Expr::Var(v) = i {
                            vars.push((v, Ty::I64));
                        }
                        self.block(b, vars, lanes || n == 5, depth - 1);
                        vars.pop();
                    };
                    if n == 5 && !lanes { b.lanes(0, hi, 3, body) } else { b.each_step(0, hi, 2, body) }
                }
            }
        }
        vars.truncate(outer);
    }

    fn kernel(&mut self) -> Kernel {
        let mut b = Builder::new("random \"kernel\"");
        b.buf("x", DType::F32, 8, Role::In);
        b.buf("two words", DType::F64, 8, Role::InOut);
        b.buf("0", DType::I32, 8, Role::Scratch);
        b.buf("bytes", DType::I8, 8, Role::In);
        b.buf("y", DType::I16, 8, Role::Out);
        b.grid(3);
        self.block(&mut b, &mut vec![(GRID, Ty::I64)], false, 3);
        b.finish()
    }
}

#[test]
fn random_kernels_run_and_round_trip() {
    let mut r = Lcg(3);
    for _ in 0..300 {
        let k = r.kernel();
        let mut args =
            [Data::F32(r.floats(8)), Data::zeros(DType::F64, 8), Data::I8(vec![3; 8]), Data::zeros(DType::I16, 8)];
        assert!(unproven(&k).is_empty(), "every index is masked: {:?}", unproven(&k));
        run(&k, &mut args);
    }
}

#[test]
fn damaged_text_never_panics() {
    let mut r = Lcg(4);
    for _ in 0..40 {
        let k = r.kernel();
        let tree = print(&k);
        let mut atoms = vec![];
        collect(&tree, &mut atoms);
        for _ in 0..60 {
            let (at, new) = (r.below(atoms.len()), atoms[r.below(atoms.len())].clone());
            let mut damaged = tree.clone();
            replace(&mut damaged, &mut { at }, &new);
            if let Ok(k) = parse(&damaged) {
                round_trip(&k);
            }
        }
        let text = tree.to_text();
        for _ in 0..60 {
            let (from, to) = (r.below(text.len()), r.below(text.len()));
            let cut = text.get(..from.min(to)).unwrap_or("").to_owned() + text.get(from.max(to)..).unwrap_or("");
            if let Ok(s) = Sexpr::parse(&cut) {
                drop(parse(&s));
            }
        }
    }
}

/// Every node in preorder.
fn collect(s: &Sexpr, out: &mut Vec<Sexpr>) {
    out.push(s.clone());
    if let Sexpr::List(items) = s {
        items.iter().for_each(|s| collect(s, out));
    }
}

/// Replace the node whose place in preorder is `at`.
fn replace(s: &mut Sexpr, at: &mut usize, new: &Sexpr) {
    if *at == 0 {
        *s = new.clone();
    } else if let Sexpr::List(items) = s {
        *at -= 1;
        items.iter_mut().for_each(|s| replace(s, at, new));
        return;
    }
    *at = at.wrapping_sub(1);
}
