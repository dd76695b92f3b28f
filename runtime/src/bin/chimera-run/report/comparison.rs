//! What a comparison of runs shows: figures as a table and as JSON, and one page with their curves.
//!
//! Invariant: every number comes from the records of the runs; what was not measured is left open.

use super::chart::{Labels, Series, chart, escape};
use super::{document, loss_keys, number, seconds, tokens};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::PathBuf;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Its time was spent.
    Finished,
    /// By an interrupt.
    Stopped,
    /// By an error.
    Failed(String),
}

/// What runs are compared for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Each has an estimator of its own.
    Estimators,
    /// Each has paradigms of its own.
    Paradigms,
}

impl Subject {
    /// What a run stands for, in tables and JSON.
    fn one(self) -> &'static str {
        match self {
            Subject::Estimators => "estimator",
            Subject::Paradigms => "run",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Subject::Estimators => "Estimators compared",
            Subject::Paradigms => "Paradigms of training measured",
        }
    }
}

/// One run of the comparison.
#[derive(Clone, Debug)]
pub struct Contender {
    /// What it stands for.
    pub name: String,
    /// Folder of the run.
    pub folder: PathBuf,
    /// The lines of its log, one for each step.
    pub steps: Vec<Value>,
    /// The lines of its history.
    pub events: Vec<Value>,
    /// How it ended.
    pub ending: Ending,
}

/// All runs, and what they have in common.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// What for.
    pub subject: Subject,
    /// In the order in which they were made.
    pub contenders: Vec<Contender>,
    /// Seconds that each of them was given.
    pub seconds: u64,
    /// Seed of all of them.
    pub seed: u64,
}

/// The figures of one run.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Figures {
    steps: u64,
    data_tokens: f64,
    /// Tokens a second within steps.
    pub(super) data_rate: Option<f64>,
    forward_rate: Option<f64>,
    /// Held-out losses.
    pub(super) last: Option<f64>,
    best: Option<f64>,
    /// Seconds until the held-out loss was at most [`Comparison::worst`].
    to_worst: Option<f64>,
    /// Bytes that the plan has for weights, states and intermediate results.
    allocated: Option<f64>,
    /// Greatest resident memory of the process in bytes: code, data, and what earlier runs left are among it.
    resident: Option<f64>,
}

impl Contender {
    /// The numbers of a column of the log, with where they stand.
    fn column<'a>(&'a self, x: fn(&Value) -> f64, key: &'a str) -> impl Iterator<Item = [f64; 2]> + 'a {
        self.steps.iter().filter_map(move |l| Some([x(l), number(l, key)?]))
    }

    /// What the run was begun with.
    fn start(&self) -> Option<&Value> {
        self.events.iter().find(|e| e["event"] == "start")
    }

    pub(super) fn figures(&self, held: &str, worst: Option<f64>) -> Figures {
        let sum = |key: &str| self.steps.iter().filter_map(|l| number(l, key)).sum::<f64>();
        let rate = |key: &str| Some(sum(key) / sum("dt")).filter(|r| r.is_finite());
        let measured: Vec<[f64; 2]> = self.column(seconds, held).collect();
        let reached = |p: &&[f64; 2]| worst.is_some_and(|worst| p[1] <= worst);
        Figures {
            steps: self.steps.last().and_then(|l| l["step"].as_u64()).unwrap_or(0),
            data_tokens: sum("data_tokens"),
            data_rate: rate("data_tokens"),
            forward_rate: rate("forward_tokens"),
            last: measured.last().map(|p| p[1]),
            best: measured.iter().map(|p| p[1]).reduce(f64::min),
            to_worst: measured.iter().find(reached).map(|p| p[0]),
            allocated: self.start().and_then(|e| e.get("plan")?.get("bytes allocated")?.as_f64()),
            resident: self.column(seconds, "memory").map(|p| p[1]).reduce(f64::max),
        }
    }
}

impl Comparison {
    /// The keys of training loss and held-out loss, and their unit.
    pub(super) fn keys(&self) -> (&'static str, &'static str, &'static str) {
        loss_keys(self.contenders.iter().map(|c| &c.steps[..]).find(|steps| !steps.is_empty()).unwrap_or(&[]))
    }

    /// The highest of the last held-out losses.
    fn worst(&self) -> Option<f64> {
        let held = self.keys().1;
        self.contenders.iter().filter_map(|c| Some(c.column(seconds, held).last()?[1])).reduce(f64::max)
    }

    /// The names of the columns and the cells of each run.
    fn cells(&self) -> ([String; 9], Vec<[String; 9]>) {
        let (_, held, unit) = self.keys();
        let worst = self.worst();
        let open = || "-".to_owned();
        let head = [
            self.subject.one().to_owned(),
            "steps".to_owned(),
            "data tokens/s".to_owned(),
            "forward tokens/s".to_owned(),
            format!("{unit} held out, last"),
            "best".to_owned(),
            worst.map_or_else(|| "s to the worst".to_owned(), |w| format!("s to {w:.3}")),
            "plan MiB".to_owned(),
            "resident MiB".to_owned(),
        ];
        let row = |c: &Contender| {
            let f = c.figures(held, worst);
            let show = |x: Option<f64>, digits: usize| x.map_or_else(open, |x| format!("{x:.digits$}"));
            let name = match c.ending {
                Ending::Finished => c.name.clone(),
                Ending::Stopped => format!("{} (stopped)", c.name),
                Ending::Failed(_) => format!("{} (failed)", c.name),
            };
            [
                name,
                f.steps.to_string(),
                show(f.data_rate, 0),
                show(f.forward_rate, 0),
                show(f.last, 3),
                show(f.best, 3),
                show(f.to_worst, 1),
                show(f.allocated.map(mebibytes), 1),
                show(f.resident.map(mebibytes), 0),
            ]
        };
        (head, self.contenders.iter().map(row).collect())
    }

    /// The table for people, a line for each run.
    pub fn table(&self) -> String {
        let (head, rows) = self.cells();
        aligned(&head, &rows)
    }

    /// The same for programs. Times are seconds, memory bytes, losses in `unit`; points of `held_out` are seconds, tokens of data, loss.
    pub fn to_json(&self) -> Value {
        let (_, held, unit) = self.keys();
        let worst = self.worst();
        let of = |c: &Contender| {
            let f = c.figures(held, worst);
            let (outcome, error) = match &c.ending {
                Ending::Finished => ("finished", None),
                Ending::Stopped => ("stopped", None),
                Ending::Failed(error) => ("failed", Some(error)),
            };
            let point = |l: &Value| Some([seconds(l), tokens(l), number(l, held)?]);
            json!({
                (self.subject.one()): c.name,
                "folder": c.folder.display().to_string(),
                "outcome": outcome,
                "error": error,
                "steps": f.steps,
                "data_tokens": f.data_tokens,
                "data_tokens_per_second": f.data_rate,
                "forward_tokens_per_second": f.forward_rate,
                "held_out_last": f.last,
                "held_out_best": f.best,
                "seconds_to_worst": f.to_worst,
                "allocated": f.allocated,
                "resident": f.resident,
                "held_out": c.steps.iter().filter_map(point).collect::<Vec<_>>(),
            })
        };
        json!({
            "seconds": self.seconds,
            "seed": self.seed,
            "unit": unit,
            "worst": worst,
            (format!("{}s", self.subject.one())): self.contenders.iter().map(of).collect::<Vec<_>>(),
        })
    }

    /// One page, which needs nothing outside of itself; `first` writes what stands in front of the figures.
    pub fn page(&self, first: impl FnOnce(&mut String)) -> String {
        document(self.subject.title(), |out| {
            let _ = writeln!(
                out,
                "<p>A fresh model for each {}: the same configuration, data, vocabulary and seed ({}), {} seconds each, one after the other. Resident memory is that of the whole process and has what earlier runs left; the memory of a plan is that of its run alone.</p>",
                self.subject.one(),
                self.seed,
                self.seconds
            );
            first(out);
            self.figures(out);
            self.charts(out);
            self.beginnings(out);
        })
    }

    fn figures(&self, out: &mut String) {
        let (head, rows) = self.cells();
        tabled(out, &head, &rows);
    }

    fn charts(&self, out: &mut String) {
        let (loss, held, unit) = self.keys();
        type X = fn(&Value) -> f64;
        let axes: [(X, &str); 2] = [(seconds, "seconds in steps"), (tokens, "tokens of data")];
        let titles = [
            (held, true, ["Held out, over time", "Held out, over data"]),
            (loss, false, ["Training, each step, over time", "Training, each step, over data"]),
        ];
        out.push_str("<section class=\"charts\">\n");
        for (key, sparse, titles) in titles {
            for ((x, label), title) in axes.into_iter().zip(titles) {
                let lines = self.contenders.iter();
                let lines = lines.map(|c| Series { name: &c.name, points: c.column(x, key).collect(), sparse });
                let lines: Vec<Series<'_>> = lines.collect();
                out.push_str(&chart(Labels { title, x: label, y: unit, from_zero: false }, &lines, &[]));
            }
        }
        let dot = |c: &Contender| {
            let f = c.figures(held, None);
            f.allocated.zip(f.last).map(|(bytes, last)| [mebibytes(bytes), last])
        };
        let dots = self.contenders.iter();
        let dots = dots.map(|c| Series { name: &c.name, points: dot(c).into_iter().collect(), sparse: true });
        let dots: Vec<Series<'_>> = dots.collect();
        let labels =
            Labels { title: "Held out at the end, by memory", x: "memory of the plan, MiB", y: unit, from_zero: false };
        out.push_str(&chart(labels, &dots, &[]));
        out.push_str("</section>\n");
    }

    /// What each run was begun with, and what ended it early.
    fn beginnings(&self, out: &mut String) {
        let _ = writeln!(out, "<h2>Runs</h2>\n<table><tr><th>{}</th><th>folder</th><th></th></tr>", self.subject.one());
        for c in &self.contenders {
            let sentence = c.start().and_then(|e| e["sentence"].as_str()).unwrap_or("");
            let (kind, ended) = match &c.ending {
                Ending::Finished => ("finish", ""),
                Ending::Stopped => ("stop", "; stopped by an interrupt"),
                Ending::Failed(error) => ("failure", &error[..]),
            };
            let _ = writeln!(
                out,
                "<tr class=\"{kind}\"><td>{}</td><td>{}</td><td>{} {}</td></tr>",
                escape(&c.name),
                escape(&c.folder.display().to_string()),
                escape(sentence),
                escape(ended)
            );
        }
        out.push_str("</table>\n");
    }
}

/// A table for people: the first column to the left, the others to the right.
pub(super) fn aligned<const N: usize>(head: &[String; N], rows: &[[String; N]]) -> String {
    let width = |i: usize| rows.iter().chain([head]).map(|r| r[i].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut out = String::new();
    for row in [head].into_iter().chain(rows) {
        let _ = write!(out, "{:<1$}", row[0], widths[0]);
        for (cell, width) in row.iter().zip(widths).skip(1) {
            let _ = write!(out, "  {cell:>width$}");
        }
        out.push('\n');
    }
    out
}

/// The same on a page.
pub(super) fn tabled<const N: usize>(out: &mut String, head: &[String; N], rows: &[[String; N]]) {
    out.push_str("<table class=\"figures\"><tr>");
    for name in head {
        let _ = write!(out, "<th>{}</th>", escape(name));
    }
    out.push_str("</tr>\n");
    for row in rows {
        out.push_str("<tr>");
        for cell in row {
            let _ = write!(out, "<td>{}</td>", escape(cell));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</table>\n");
}

fn mebibytes(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::{STYLE, tests::balanced};
    use super::*;
    use crate::estimators::ESTIMATORS;

    pub(in super::super) fn contender(name: &str, held: &[Option<f64>], ending: Ending) -> Contender {
        let step = |(i, held): (usize, &Option<f64>)| {
            json!({ "step": i + 1, "seconds": 2.0 * (i + 1) as f64, "dt": 0.5, "data_tokens": 32, "forward_tokens": 64,
                "loss": 3.0, "bits_per_byte": 4.0, "val_bits_per_byte": held, "memory": (i + 1) << 20 })
        };
        let steps = held.iter().enumerate().map(step).collect();
        let events = match held {
            [] => vec![json!([])],
            _ => vec![json!({ "event": "start", "sentence": "<begun>", "plan": { "bytes allocated": 3 << 19 } })],
        };
        Contender { name: name.into(), folder: "out/<x>".into(), steps, events, ending }
    }

    fn comparison() -> Comparison {
        let contenders = vec![
            contender("quick", &[Some(5.0), Some(2.0), None, Some(2.5)], Ending::Finished),
            contender("slow", &[Some(6.0), None, Some(4.0)], Ending::Stopped),
            contender("none", &[], Ending::Failed("a <loss>".into())),
        ];
        Comparison { subject: Subject::Estimators, contenders, seconds: 9, seed: 7 }
    }

    #[test]
    fn figures_are_those_of_the_records() {
        let value = comparison().to_json();
        assert_eq!((value["worst"].as_f64(), value["unit"].as_str()), (Some(4.0), Some("bits/byte")));
        let of = |i: usize, key: &str| value["estimators"][i][key].clone();
        for (key, quick, slow) in [
            ("steps", json!(4), json!(3)),
            ("data_tokens", json!(128.0), json!(96.0)),
            ("data_tokens_per_second", json!(64.0), json!(64.0)),
            ("forward_tokens_per_second", json!(128.0), json!(128.0)),
            ("held_out_last", json!(2.5), json!(4.0)),
            ("held_out_best", json!(2.0), json!(4.0)),
            ("seconds_to_worst", json!(4.0), json!(6.0)),
            ("allocated", json!(1572864.0), json!(1572864.0)),
            ("resident", json!(4194304.0), json!(3145728.0)),
            ("outcome", json!("finished"), json!("stopped")),
            ("held_out", json!([[2.0, 32.0, 5.0], [4.0, 64.0, 2.0], [8.0, 128.0, 2.5]]), of(1, "held_out")),
        ] {
            assert_eq!((of(0, key), of(1, key)), (quick, slow), "{key}");
        }
        assert!(
            of(2, "held_out_last").is_null()
                && of(2, "resident").is_null()
                && of(2, "allocated").is_null()
                && of(2, "error") == "a <loss>"
        );
        let table = comparison().table();
        let lines: Vec<&str> = table.lines().collect();
        assert!(lines[0].contains("s to 4.000") && lines[2].starts_with("slow (stopped)"), "{table}");
        assert!(lines.iter().all(|l| l.len() == lines[0].len()), "columns stand below one another: {table}");
        assert_eq!(
            lines[3].split_whitespace().collect::<Vec<_>>(),
            ["none", "(failed)", "0", "-", "-", "-", "-", "-", "-", "-"]
        );
    }

    #[test]
    fn a_page_holds_together_and_has_a_colour_for_each() {
        let page = comparison().page(|_| {});
        balanced(&page);
        assert_eq!(page.matches("<svg").count(), 5);
        for what in [
            "class=\"key s1\">slow",
            "a &lt;loss&gt;",
            "class=\"dot s0\"",
            "out/&lt;x&gt;",
            "4.000",
            "&lt;begun&gt;",
            ">1.5<",
        ] {
            assert!(page.contains(what), "no {what:?}");
        }
        assert!(!page.contains("http:") && !page.contains("src="), "nothing from outside");
        balanced(&Comparison { contenders: vec![], ..comparison() }.page(|_| {}));
        assert!((0..ESTIMATORS.len()).all(|i| STYLE.contains(&format!(".s{i}{{--own:"))));
    }
}
