//! The sampler against a full sort, and its edges.

use super::*;

/// The definition: penalise, sort everything, cut, draw.
fn naive(s: Sampling, logits: &[f32], context: &[u32], uniform: f32) -> u32 {
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    for (id, z) in &mut all {
        if context.contains(id) {
            *z = if *z > 0.0 { *z / s.repetition_penalty } else { *z * s.repetition_penalty };
        }
    }
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if s.temperature == 0.0 {
        return all[0].0;
    }
    all.truncate(s.top_k.unwrap_or(usize::MAX));
    let top = f64::from(all[0].1);
    let mut weighted: Vec<(u32, f64)> =
        all.iter().map(|&(id, z)| (id, ((f64::from(z) - top) / f64::from(s.temperature)).exp())).collect();
    let mut by_id = weighted.clone();
    by_id.sort_by_key(|c| c.0);
    let total: f64 = by_id.iter().map(|c| c.1).sum();
    if s.top_p < 1.0 {
        let mut mass = 0.0;
        let cut = weighted.iter().position(|c| {
            mass += c.1;
            mass >= f64::from(s.top_p) * total
        });
        weighted.truncate(cut.map_or(usize::MAX, |i| i + 1));
    }
    weighted.sort_by_key(|c| c.0);
    let target = f64::from(uniform) * weighted.iter().map(|c| c.1).sum::<f64>();
    let mut sum = 0.0;
    for &(id, w) in &weighted {
        sum += w;
        if sum > target {
            return id;
        }
    }
    weighted.iter().rfind(|c| c.1 > 0.0).unwrap().0
}

/// Uniform numbers in `[0, 1)` for the tests.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 24) as f32
    }
}

#[test]
fn agrees_with_the_full_sort() {
    let mut noise = Noise(3);
    let mut cases = 0;
    for size in [1usize, 2, 5, 63, 64, 65, 700, 5000] {
        for temperature in [0.0, 0.05, 0.7, 1.0, 30.0] {
            for top_k in [None, Some(1), Some(40), Some(10_000)] {
                for top_p in [1e-6, 0.5, 0.92, 0.9999, 1.0] {
                    let settings = Sampling { temperature, top_k, top_p, repetition_penalty: 1.08 };
                    let mut sampler = Sampler::new(settings).unwrap();
                    // Coarse values give ties; every fifth token but the first is masked.
                    let logits: Vec<f32> = (0..size)
                        .map(|i| if i % 5 == 4 { f32::NEG_INFINITY } else { (noise.next() * 40.0).floor() / 2.0 - 9.0 })
                        .collect();
                    let context: Vec<u32> = (0..6).map(|_| (noise.next() * size as f32) as u32).collect();
                    for _ in 0..3 {
                        let u = noise.next();
                        let drawn = sampler.draw(&logits, &context, u).unwrap();
                        assert_eq!(drawn, naive(settings, &logits, &context, u), "{size} {settings:?} {u}");
                        assert!(logits[drawn as usize] > f32::NEG_INFINITY);
                        cases += 1;
                    }
                }
            }
        }
    }
    assert_eq!(cases, 8 * 5 * 4 * 5 * 3);
}

#[test]
fn large_flat_vocabulary_agrees_with_the_full_sort() {
    let mut noise = Noise(9);
    let logits: Vec<f32> = (0..200_073).map(|_| noise.next() * 8.0).collect();
    let settings = Sampling::default();
    let mut sampler = Sampler::new(settings).unwrap();
    for _ in 0..3 {
        let u = noise.next();
        assert_eq!(sampler.draw(&logits, &[1, 2, 2], u).unwrap(), naive(settings, &logits, &[1, 2], u));
    }
}

#[test]
fn frequencies_follow_the_probabilities() {
    let settings = Sampling { temperature: 1.0, top_k: None, top_p: 1.0, repetition_penalty: 1.0 };
    let mut sampler = Sampler::new(settings).unwrap();
    let logits = [1.0f32, 0.0, 2.0, f32::NEG_INFINITY, -1.0];
    let total: f32 = logits.iter().map(|z| z.exp()).sum();
    let (n, mut counts) = (10_000, [0; 5]);
    for i in 0..n {
        counts[sampler.draw(&logits, &[], i as f32 / n as f32).unwrap() as usize] += 1;
    }
    for (z, count) in logits.iter().zip(counts) {
        assert!((z.exp() / total - count as f32 / n as f32).abs() < 2e-4, "{counts:?}");
    }
}

#[test]
fn rules_in_detail() {
    let with = |temperature, top_k, top_p, repetition_penalty| {
        Sampler::new(Sampling { temperature, top_k, top_p, repetition_penalty }).unwrap()
    };
    assert_eq!(with(0.0, None, 1.0, 1.0).draw(&[1.0, 3.0, 3.0, -1.0], &[], 0.9), Ok(1), "lowest id on ties");
    assert_eq!(with(0.0, None, 1.0, 2.0).draw(&[2.0, 1.5], &[0, 0, 0], 0.0), Ok(1), "positive logits are divided");
    assert_eq!(with(0.0, None, 1.0, 2.0).draw(&[2.0, 1.5], &[0, 0, 1], 0.0), Ok(0), "once per distinct token");
    assert_eq!(with(0.0, None, 1.0, 2.0).draw(&[-1.0, -1.5], &[0], 0.0), Ok(1), "negative logits are multiplied");
    assert_eq!(with(1.0, None, 1e-9, 1.0).draw(&[0.0, 5.0, 1.0], &[], 0.999), Ok(1), "top-p keeps at least one");
    assert_eq!(with(1.0, Some(1), 1.0, 1.0).draw(&[4.0, 4.0], &[], 0.999), Ok(0), "top-k ties");
    // Probabilities one half each: a prefix of exactly the half suffices, the crossing token is kept.
    assert_eq!(with(1.0, None, 0.5, 1.0).draw(&[0.0, 0.0], &[], 0.999), Ok(0));
    assert_eq!(with(1.0, None, 0.5001, 1.0).draw(&[0.0, 0.0], &[], 0.999), Ok(1));
    assert_eq!(with(1e-30, None, 1.0, 1.0).draw(&[0.0, 1.0, 0.5], &[], 0.999), Ok(1), "tiny temperature");
}

#[test]
fn damaged_input_is_refused() {
    let mut sampler = Sampler::new(Sampling::default()).unwrap();
    let nan = sampler.draw(&[0.0, f32::NAN], &[], 0.5).unwrap_err();
    assert!(nan.to_string().starts_with("the logit of token 1 is NaN"), "{nan}");
    assert!(matches!(sampler.draw(&[f32::INFINITY], &[], 0.5), Err(SampleError::BadLogit { id: 0, .. })));
    assert_eq!(sampler.draw(&[f32::NEG_INFINITY; 3], &[], 0.5), Err(SampleError::AllMasked));
    assert_eq!(sampler.draw(&[], &[], 0.5), Err(SampleError::AllMasked));
    assert_eq!(sampler.draw(&[0.0; 3], &[3], 0.5), Err(SampleError::BadContext { id: 3, size: 3 }));
    let bad = |f: fn(&mut Sampling)| {
        let mut settings = Sampling::default();
        f(&mut settings);
        Sampler::new(settings).unwrap_err().to_string()
    };
    assert_eq!(bad(|s| s.temperature = -1.0), "temperature is -1, expected 0 or more");
    assert!(bad(|s| s.temperature = f32::NAN).starts_with("temperature is NaN"));
    assert!(bad(|s| s.top_k = Some(0)).starts_with("top-k is 0"));
    assert!(bad(|s| s.top_p = 0.0).starts_with("top-p is 0"));
    assert!(bad(|s| s.repetition_penalty = 0.0).starts_with("repetition penalty is 0"));
}
