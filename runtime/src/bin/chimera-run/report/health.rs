//! Charts of what a run measures of its estimate.
//!
//! Invariant: what was never measured has no chart.

use super::chart::{Labels, Mark, Series, chart};
use super::number;
use serde_json::Value;

/// The lines of each chart: name and key.
const COSINES: &[(&str, &str)] = &[
    ("all weights", "cosine"),
    ("ternary", "cosine_ternary"),
    ("matrices", "cosine_matrix"),
    ("embedding", "cosine_embedding"),
    ("vectors", "cosine_vector"),
];

/// The charts for which `steps` have numbers; `x` is the place of a step.
pub fn health(out: &mut String, steps: &[Value], x: &dyn Fn(&Value) -> f64, marks: &[Mark]) {
    let mut add = |title, y, lines: &[(&'static str, &str)], sparse| {
        let points =
            |key: &str| -> Vec<[f64; 2]> { steps.iter().filter_map(|l| Some([x(l), number(l, key)?])).collect() };
        let series = lines.iter().map(|&(name, key)| Series { name, points: points(key), sparse });
        let series: Vec<Series<'_>> = series.filter(|s| !s.points.is_empty()).collect();
        if !series.is_empty() {
            out.push_str(&chart(Labels { title, x: "seconds in steps", y, from_zero: true }, &series, marks));
        }
    };
    add("Ternary codes that a step changes", "share", &[("all ternary weights", "flips")], false);
    let scatter = [("standard deviation", "scalar_deviation")];
    add("Estimator: scatter of the scalars of a step", "nats/token", &scatter, false);
    add("Estimator: cosine to the gradient", "", COSINES, true);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn charts_are_of_what_was_measured() {
        let drawn = |steps: &[Value]| {
            let mut out = String::new();
            health(&mut out, steps, &|l| number(l, "seconds").unwrap_or(0.0), &[]);
            super::super::tests::balanced(&out);
            (out.matches("<figure").count(), out.contains("vectors"))
        };
        assert_eq!(drawn(&[json!({ "seconds": 1.0, "spread": 0.5 })]), (0, false));
        assert_eq!(drawn(&[json!({ "seconds": 1.0, "flips": 0.5, "cosine": 0.25 })]), (2, false));
        assert_eq!(drawn(&[json!({ "scalar_deviation": 0.5, "cosine_vector": -0.25 }), json!(3)]), (2, true));
    }
}
