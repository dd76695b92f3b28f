//! Hand-written kernels: the portable emitter agrees with the interpreter bit for bit.

use crate::support::{check, product};
use chimera_ir::DType;
use chimera_ir::loops::{Acc, Bin, Builder, Cmp, Expr, Kernel, Mode, Role, Stmt, Ty, Un, f32c, f64c, i32c, int, math};

fn un(op: Un, a: Expr) -> Expr {
    Expr::Un(op, Box::new(a))
}

/// `f` of two `F32` inputs at the same position, for `n` elements.
fn map(name: &str, n: usize, unroll: u8, f: impl Fn(&mut Builder, Expr, Expr) -> Expr) -> Kernel {
    let mut b = Builder::new(name);
    let x = b.buf("x", DType::F32, n, Role::In);
    let y = b.buf("y", DType::F32, n, Role::In);
    let z = b.buf("z", DType::F32, n, Role::Out);
    b.lanes(0, n, unroll, |b, i| {
        let v = f(b, Expr::load(x, &i), Expr::load(y, &i));
        b.store(z, i, v);
    });
    b.finish()
}

#[test]
fn maps_with_every_tail() {
    for n in 1..=17 {
        for unroll in 1..=3 {
            check(&map("axpy", n, unroll, |_, x, y| x.fma(f32c(1.5), y)));
        }
    }
}

#[test]
fn float_operations() {
    for op in [Bin::Add, Bin::Sub, Bin::Mul, Bin::Div, Bin::Min, Bin::Max] {
        check(&map("binary", 61, 2, |_, x, y| Expr::bin(op, &x + 0.0, y)));
        check(&map("zeros", 61, 2, |_, x, y| Expr::bin(op, x * 1e-44, y * 1e-44)));
    }
    for op in [Un::Neg, Un::Abs, Un::Sqrt, Un::Floor, Un::Nearest] {
        check(&map("unary", 61, 2, |_, x, y| un(op, x * y * f32c(4.0))));
    }
    for op in [Cmp::Eq, Cmp::Ne, Cmp::Lt, Cmp::Le] {
        check(&map("compare", 61, 1, |_, x, y| x.clone().cmp(op, &y).select(&x, y * f32c(3.0))));
        check(&map("flag", 61, 1, |_, x, y| un(Un::Not, x.cmp(op, y)).cast(Ty::F32)));
    }
}

#[test]
fn elementary_functions() {
    check(&map("exp", 61, 2, |b, x, y| math::exp(b, x * f32c(50.0) + y)));
    check(&map("silu", 61, 2, |b, x, y| math::silu(b, x * f32c(9.0)) * y));
    check(&map("softplus", 61, 2, |b, x, _| math::softplus(b, x * f32c(9.0))));
    check(&map("tanh", 61, 2, |b, x, _| math::tanh(b, x)));
    check(&map("cos_sin", 21, 2, |b, x, y| {
        let (c, s) = math::cos_sin(b, x * f32c(100.0));
        c.fma(y, s)
    }));
}

#[test]
fn integer_operations() {
    let mut b = Builder::new("integers");
    let x = b.buf("x", DType::I32, 50, Role::In);
    let y = b.buf("y", DType::I32, 50, Role::In);
    let ops = [Bin::Add, Bin::Sub, Bin::Mul, Bin::Min, Bin::Max, Bin::And, Bin::Or, Bin::Xor, Bin::MulHi];
    for (n, op) in ops.into_iter().enumerate() {
        let z = b.buf(format!("z{n}"), DType::I32, 50, Role::Out);
        b.lanes(0, 50, 2, |b, i| b.store(z, &i, Expr::bin(op, Expr::load(x, &i), Expr::load(y, &i))));
    }
    for (n, op) in [Bin::Shl, Bin::Shr, Bin::Sar].into_iter().enumerate() {
        let z = b.buf(format!("s{n}"), DType::I32, 50, Role::Out);
        let w = b.buf(format!("t{n}"), DType::I32, 50, Role::Out);
        b.lanes(0, 50, 2, |b, i| {
            b.store(z, &i, Expr::bin(op, Expr::load(x, &i), i32c(37)));
            b.store(w, &i, Expr::bin(op, Expr::load(x, &i), Expr::load(y, &i)));
        });
    }
    for (n, op) in [Un::Neg, Un::Abs, Un::Popcnt].into_iter().enumerate() {
        let z = b.buf(format!("u{n}"), DType::I32, 50, Role::Out);
        b.lanes(0, 50, 2, |b, i| b.store(z, &i, un(op, Expr::load(x, &i))));
    }
    check(&b.finish());
}

#[test]
fn every_element_type_is_read_and_written() {
    for from in [DType::F32, DType::F64, DType::BF16, DType::I8, DType::U8, DType::I16, DType::I32] {
        for to in [DType::F32, DType::F64, DType::I8, DType::U8, DType::I16, DType::I32] {
            for stride in [1, 3] {
                let mut b = Builder::new(format!("{} to {} by {stride}", from.name(), to.name()));
                let x = b.buf("x", from, 29 * stride, Role::In);
                let z = b.buf("z", to, 29 * stride, Role::InOut);
                let ty = chimera_ir::loops::load_ty(to);
                b.lanes(0, 29, 2, |b, i| {
                    let x = Expr::load(x, &i * stride);
                    b.store(z, i * stride, x.cast(ty));
                });
                check(&b.finish());
            }
        }
    }
}

#[test]
fn index_arithmetic_in_lanes() {
    let mut b = Builder::new("indices");
    let x = b.buf("x", DType::F32, 600, Role::In);
    let at = b.buf("at", DType::U8, 600, Role::In);
    let z = b.buf("z", DType::F32, 3 * 7 * 40, Role::Out);
    let w = b.buf("w", DType::I32, 3 * 7 * 40, Role::Out);
    let grid = b.grid(3);
    b.each(0, 7, |b, i| {
        b.lanes(0, 40, 2, |b, j| {
            let row = b.bind(&grid * 200 + &i * 8);
            let out = b.bind((&grid * 7 + &i) * 40 + &j);
            let quotient = b.bind(&j / 8);
            let rest = b.bind(&j % 16);
            let odd = b.bind(&j / 3);
            let backwards = b.bind(int(39) - &j);
            let mut v = Expr::load(x, &row + &quotient);
            for k in [&rest, &odd, &backwards] {
                v = v + Expr::load(x, &row + k);
            }
            let far = b.bind(Expr::load(at, &row + &j).cast(Ty::I64));
            v = v * Expr::load(x, far.clone() + 17);
            let early = j.clone().lt(&i * 5);
            b.store(z, &out, early.clone().select(v.clone(), -v));
            b.store(w, out, (j.cast(Ty::I32) + far.cast(Ty::I32)) * early.cast(Ty::I32));
        });
    });
    check(&b.finish());
}

#[test]
fn uneven_lane_starts() {
    let mut b = Builder::new("starts");
    let x = b.buf("x", DType::F32, 400, Role::In);
    let z = b.buf("z", DType::F32, 20 * 40, Role::InOut);
    let grid = b.grid(20);
    b.lanes(&grid / 3, &grid + 20, 2, |b, j| {
        b.store(z, &grid * 40 + &j, Expr::load(x, &j % 8) + Expr::load(x, &j / 8) * Expr::load(x, &j * 2 + 100));
    });
    check(&b.finish());
}

#[test]
fn loops_and_conditions_inside_lanes() {
    let mut b = Builder::new("nested");
    let x = b.buf("x", DType::F32, 40 * 12, Role::In);
    let flags = b.buf("flags", DType::I8, 12, Role::In);
    let z = b.buf("z", DType::F32, 40, Role::Out);
    let n = b.buf("n", DType::I32, 40, Role::Out);
    let q = b.buf("q", DType::F64, 40, Role::Out);
    b.lanes(0, 40, 2, |b, j| {
        let sum = b.local(f32c(0.0));
        let count = b.local(i32c(0));
        let exact = b.local(f64c(0.0));
        let at = b.local(j.clone());
        b.each(0, 12, |b, k| {
            let v = b.bind(Expr::load(x, &k * 40 + &j));
            b.set(exact, exact + v.clone().cast(Ty::F64));
            b.set(at, (at + 7) % 40);
            b.if_else(
                Expr::load(flags, &k).lt(i32c(0)),
                |b| b.set(sum, v.clone().fma(Expr::load(x, at), sum)),
                |b| {
                    b.set(sum, sum - v.clone());
                    b.set(count, count + v.clone().lt(f32c(0.0)).cast(Ty::I32));
                },
            );
        });
        b.store(z, &j, sum);
        b.store(n, &j, count);
        b.store(q, &j, exact);
    });
    check(&b.finish());
}

#[test]
fn reductions_of_every_length() {
    for n in 0..=40 {
        let mut b = Builder::new(format!("reduce {n}"));
        let x = b.buf("x", DType::F32, n + 1, Role::In);
        let y = b.buf("y", DType::I8, n + 1, Role::In);
        let d = b.buf("d", DType::F64, n + 1, Role::In);
        let z = b.buf("z", DType::F32, 3, Role::Out);
        let w = b.buf("w", DType::I32, 4, Role::Out);
        let e = b.buf("e", DType::F64, 2, Role::Out);
        let r = b.reduce(0, n, |b, i| {
            let v = b.bind(Expr::load(x, &i));
            let k = b.bind(Expr::load(y, &i));
            let f = b.bind(Expr::load(d, &i) * v.clone().cast(Ty::F64));
            vec![
                Acc::Sum(v.clone()),
                Acc::Max(v.clone()),
                Acc::Dot(v, k.clone().cast(Ty::F32)),
                Acc::Sum(k.clone()),
                Acc::Max(k.clone()),
                Acc::Sum(f.clone()),
                Acc::Max(f),
                Acc::Sum(i.clone() * 3),
                Acc::Max(i % 5),
            ]
        });
        for (n, v) in r.into_iter().enumerate() {
            match n {
                0..3 => b.store(z, n, v),
                3..5 => b.store(w, n - 3, v),
                5..7 => b.store(e, n - 5, v),
                _ => b.store(w, n - 5, v.cast(Ty::I32)),
            }
        }
        check(&b.finish());
    }
}

#[test]
fn reductions_of_computed_length() {
    let mut b = Builder::new("prefix sums");
    let x = b.buf("x", DType::F32, 60, Role::In);
    let z = b.buf("z", DType::F32, 50 * 2, Role::Out);
    let grid = b.grid(50);
    b.each(0, 2, |b, k| {
        let lo = b.bind(&grid / 4 * &k);
        let s = b.sum(lo, &grid, |_, i| Expr::load(x, i));
        let n = b.bind(&grid * 2 + &k);
        b.store(z, n, s);
    });
    check(&b.finish());
}

#[test]
fn a_reduction_that_leaves_a_local() {
    let mut b = Builder::new("carried");
    let x = b.buf("x", DType::F32, 21, Role::In);
    let z = b.buf("z", DType::F32, 2, Role::Out);
    let last = b.local(f32c(1.0));
    let s = b.sum(0, 21, |b, i| {
        b.set(last, last * f32c(0.5) + Expr::load(x, i));
        last.into()
    });
    b.store(z, 0, s);
    b.store(z, 1, last);
    check(&b.finish());
}

#[test]
fn byte_dot_products() {
    let mut b = Builder::new("dot4");
    let codes = b.buf("codes", DType::U8, 4 * 16 * 20, Role::In);
    let x = b.buf("x", DType::I8, 4 * 20, Role::In);
    let z = b.buf("z", DType::I32, 16, Role::Out);
    let w = b.buf("w", DType::I32, 1, Role::Out);
    b.lanes(0, 16, 2, |b, j| {
        let acc = b.local(i32c(-5));
        b.each(0, 20, |b, k| {
            let q = Expr::word(codes, &k * 16 + &j);
            let a = b.bind(Expr::word(x, &k));
            b.set(acc, Expr::from(acc).dot4(q, a));
        });
        b.store(z, j, acc);
    });
    let s = b.sum(0, 20, |_, k| i32c(0).dot4(Expr::word(codes, &k * 16), Expr::word(x, k)));
    let t = b.bind(s.dot4(Expr::word(codes, 3), Expr::word(x, 5)));
    b.store(w, 0, t);
    check(&b.finish());
}

#[test]
fn several_byte_products_of_a_sum_in_one_step() {
    // Few additions, a whole part of a long loop, and more than sums of 16 bits hold at once.
    for (steps, each) in [(3, 2), (16, 2), (60, 3), (2, 33)] {
        let mut b = Builder::new(format!("dots {steps} {each}"));
        let codes = b.buf("codes", DType::U8, 4 * 16 * steps * each, Role::In);
        let x = b.buf("x", DType::I8, 4 * steps * each, Role::In);
        let z = b.buf("z", DType::I32, 16, Role::Out);
        b.lanes(0, 16, 2, |b, j| {
            let acc = b.local(i32c(7));
            b.each(0, steps, |b, k| {
                b.prefetch(codes, &k * (64 * each) + 256);
                for i in 0..each {
                    let at = b.bind(&k * each + i);
                    let q = Expr::word(codes, &at * 16 + &j);
                    b.set(acc, Expr::from(acc).dot4(q, Expr::word(x, at)));
                }
            });
            b.store(z, j, acc);
        });
        check(&b.finish());
    }
}

#[test]
fn tiled_products() {
    for (m, k, n) in [(1, 1, 1), (4, 8, 8), (7, 9, 21), (6, 5, 12), (9, 0, 16)] {
        let mut b = Builder::new(format!("product {m} {k} {n}"));
        let x = b.buf("x", DType::F32, m * k + 1, Role::In);
        let y = b.buf("y", DType::F32, k * n + 1, Role::In);
        let s = b.scratch("sums", DType::F32, m * n);
        let z = b.buf("z", DType::F32, m * n, Role::Out);
        product(&mut b, [m, k, n], x, y, s);
        b.each(0, m, |b, i| {
            let top = b.reduce(0, n, |_, j| vec![Acc::Max(Expr::load(s, &i * n + j))]).remove(0);
            b.lanes(0, n, 2, |b, j| b.store(z, &i * n + &j, Expr::load(s, &i * n + j) - &top));
        });
        check(&b.finish());
    }
}

#[test]
fn tight_loops_over_memory_that_changes() {
    for n in [1, 2, 3, 4, 7] {
        let mut b = Builder::new(format!("recurrence {n}"));
        let q = b.buf("q", DType::F32, 6 * n, Role::In);
        let s = b.scratch("state", DType::F32, n * 20);
        let z = b.buf("z", DType::F32, 6 * 20, Role::InOut);
        b.lanes(0, n * 20, 2, |b, i| b.store(s, &i, f32c(0.25)));
        b.each(0, 6, |b, t| {
            for unroll in [1, 2] {
                b.lanes(0, 20, unroll, |b, j| {
                    let sum = b.local(Expr::load(z, &t * 20 + &j));
                    let last = b.local(f32c(0.0));
                    let m = if unroll == 1 { int(n) } else { &t % n + 1 };
                    b.each(0, m, |b, k| {
                        let v = b.bind(Expr::load(s, &k * 20 + &j));
                        b.set(sum, Expr::load(q, &t * n + &k).fma(&v, sum));
                        b.set(last, v);
                    });
                    b.each(0, n, |b, k| b.store(s, &k * 20 + &j, Expr::from(sum) * f32c(0.5)));
                    b.store(z, &t * 20 + &j, Expr::from(sum) + last);
                });
            }
        });
        check(&b.finish());
    }
}

#[test]
fn locals_that_outlive_their_loop_block() {
    let mut b = Builder::new("scopes");
    let x = b.buf("x", DType::F32, 64, Role::In);
    let z = b.buf("z", DType::F32, 64, Role::Out);
    let at = b.local(int(3));
    b.each(0, 5, |b, i| {
        let here = b.bind(at + &i);
        b.store(z, &i * 2, Expr::load(x, &here));
        b.set(at, &here + 4);
        b.store(z, &i * 2 + 1, Expr::load(x, &here + 1) + Expr::load(x, at));
    });
    b.when(Expr::from(at).lt(int(100)), |b| b.store(z, at, f32c(2.0)));
    for n in (10..64).filter(|n| *n != 33) {
        b.store(z, n, f32c(0.0));
    }
    check(&b.finish());
}

#[test]
fn a_copy_keeps_what_a_variable_was() {
    let mut b = Builder::new("copies");
    let x = b.buf("x", DType::I32, 24, Role::In);
    let y = b.buf("y", DType::F32, 24, Role::In);
    let z = b.buf("z", DType::I32, 26, Role::Out);
    let w = b.buf("w", DType::F32, 24, Role::Out);
    let n = b.local(Expr::load(x, 3));
    let before = b.local(n);
    b.each(0, 3, |b, _| b.set(n, n + i32c(7)));
    b.store(z, 24, before);
    b.store(z, 25, n);
    b.lanes(0, 24, 1, |b, i| {
        let (n, f) = (b.local(Expr::load(x, &i)), b.local(Expr::load(y, &i)));
        let (n_before, f_before) = (b.local(n), b.local(f));
        b.each(0, 3, |b, _| {
            b.set(n, n + i32c(7));
            b.set(f, f + f32c(0.5));
        });
        b.store(z, &i, Expr::from(n_before) ^ n);
        b.store(w, i, Expr::from(f_before) * f);
    });
    check(&b.finish());
}

#[test]
fn codes_may_be_masked_in_place() {
    for steps in [8, 16, 40] {
        let mut b = Builder::new(format!("masked {steps}"));
        let codes = b.buf("codes", DType::U8, 4 * 16 * steps, Role::In);
        let x = b.buf("x", DType::I8, 4 * steps, Role::In);
        let z = b.buf("z", DType::I32, 32, Role::Out);
        b.lanes(0, 16, 1, |b, j| {
            let sums = [b.local(i32c(0)), b.local(i32c(1))];
            b.each(0, steps, |b, k| {
                let word = b.bind(Expr::word(codes, &k * 16 + &j));
                // The same codes in place and two bits further up.
                let masked = [word.clone() & i32c(0x0303_0303), word.shl(2) & i32c(0x0c0c_0c0c)];
                for (sum, code) in sums.into_iter().zip(masked) {
                    let code = b.bind(code);
                    b.set(sum, Expr::from(sum).dot4(code, Expr::word(x, &k)));
                }
            });
            sums.into_iter().enumerate().for_each(|(n, sum)| b.store(z, &j + 16 * n, sum));
        });
        check(&b.finish());
    }
}

#[test]
fn wide_integers_and_doubles_run_lane_by_lane() {
    let mut b = Builder::new("wide");
    let x = b.buf("x", DType::I32, 30, Role::In);
    let d = b.buf("d", DType::F64, 30, Role::In);
    let z = b.buf("z", DType::F64, 30, Role::Out);
    let w = b.buf("w", DType::I32, 30, Role::Out);
    b.lanes(0, 30, 2, |b, i| {
        let v = b.bind(Expr::load(x, &i).cast(Ty::I64));
        let v = b.bind(&v * &v + Expr::bin(Bin::Sar, v.clone(), int(3)) / int(7));
        let v = b.bind((v.clone() % int(10)).lt(&i).select(-v.clone(), v));
        let f = b.bind(v.clone().cast(Ty::F64).sqrt() + Expr::load(d, &i));
        b.store(z, &i, f.clone().lt(f64c(9.0)).select(f.clone() * f64c(0.1), un(Un::Floor, f)));
        b.store(w, i, v.cast(Ty::I32));
    });
    check(&b.finish());
}

#[test]
fn a_part_of_the_grid_touches_only_its_part() {
    let mut b = Builder::new("grid");
    let z = b.buf("z", DType::I32, 10, Role::InOut);
    let i = b.grid(10);
    b.store(z, &i, i.clone().cast(Ty::I32) + i32c(100));
    let kernel = b.finish();
    for emitters in ["interp", "portable"] {
        let allowed = chimera_codegen::Allowed::parse(emitters).unwrap();
        let module = chimera_codegen::compile(&[&kernel], &chimera_codegen::host(), &allowed).unwrap();
        let mut data = [0i32; 10];
        let table = [data.as_mut_ptr().cast::<u8>()];
        // SAFETY: one argument of the declared length, no scratch memory, a part of the grid.
        unsafe { module.entry(0).call(table.as_ptr(), std::ptr::null_mut(), 3, 6) };
        assert_eq!(data, [0, 0, 0, 103, 104, 105, 0, 0, 0, 0]);
    }
}

#[test]
fn lanes_as_written_in_text() {
    let kernel = map("text", 12, 2, |_, x, y| x * y);
    let Stmt::For { mode, .. } = &kernel.body[0] else { panic!("a loop") };
    assert_eq!(*mode, Mode::Lanes(2));
    check(&chimera_ir::loops::parse(&chimera_ir::loops::print(&kernel)).unwrap());
}
