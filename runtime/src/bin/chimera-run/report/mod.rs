//! `chimera-run report`: one page about a run, from the files in its folder.
//!
//! Invariant: the page needs nothing outside of itself, and the run may go on while it is made.

mod chart;
pub mod comparison;
pub mod factors;
mod health;

use crate::options::Failure;
use chart::{Labels, Mark, Series, chart, escape};
use chimera_runtime::files::atomic::write_atomic;
use chimera_runtime::train::history;
use chimera_runtime::train::metrics::Log;
use health::health;
use serde_json::Value;
use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Texts that are shown; of more, evenly chosen ones.
const MAX_TEXTS: usize = 24;
/// Events that are listed, the latest ones.
const MAX_EVENTS: usize = 200;
/// Events that are marked in charts.
const MARKED: [&str; 6] = ["rollback", "resume", "memory", "damage", "failure", "stage"];

/// Options of `report`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:
  chimera-run report runs/first -o report.html")]
pub struct Args {
    /// Folder of the run
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// The page [default: RUN/report.html]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Writes the page.
///
/// # Errors
/// A folder without a run, or a file that cannot be read or written.
pub fn run(args: &Args) -> Result<(), Failure> {
    let steps = history::lines(&args.run, Log::NAME)?;
    let events = history::lines(&args.run, history::NAME)?;
    if steps.is_empty() && events.is_empty() {
        return Err(Failure::new(format!(
            "{}: the folder has no run; name the folder that train wrote",
            args.run.display()
        )));
    }
    let path = args.output.clone().unwrap_or_else(|| args.run.join("report.html"));
    let page = page(&args.run, &steps, &events);
    write_atomic(&path, |w| w.write_all(page.as_bytes()))?;
    writeln!(std::io::stdout().lock(), "{}", path.display())?;
    Ok(())
}

fn number(line: &Value, key: &str) -> Option<f64> {
    line.get(key).and_then(Value::as_f64)
}

/// Position in the data behind a step, in tokens.
fn tokens(line: &Value) -> f64 {
    let even = || number(line, "step").unwrap_or(0.0) * number(line, "data_tokens").unwrap_or(0.0);
    number(line, "position").unwrap_or_else(even)
}

fn seconds(line: &Value) -> f64 {
    number(line, "seconds").unwrap_or(f64::NAN)
}

fn page(run: &Path, steps: &[Value], events: &[Value]) -> String {
    let name = run.file_name().map_or_else(|| run.display().to_string(), |n| n.to_string_lossy().into_owned());
    document(&name, |out| {
        headline(out, steps, events);
        charts(out, steps, events);
        texts(out, events);
        happenings(out, events);
        plan(out, events);
    })
}

/// A page with a heading and what `body` writes.
fn document(heading: &str, body: impl FnOnce(&mut String)) -> String {
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/><meta name=\"viewport\" content=\"width=device-width\"/><title>{name}</title><style>{STYLE}</style></head><body>\n<h1>{name}</h1>\n",
        name = escape(heading)
    );
    body(&mut out);
    out.push_str("</body></html>\n");
    out
}

/// The keys of the training loss and of the held-out loss in these steps, and their unit.
fn loss_keys(steps: &[Value]) -> (&'static str, &'static str, &'static str) {
    match steps.iter().any(|l| number(l, "bits_per_byte").is_some()) {
        true => ("bits_per_byte", "val_bits_per_byte", "bits/byte"),
        false if steps.iter().any(|l| number(l, "val_margin").is_some()) => ("loss", "val", "nats/pair"),
        false => ("loss", "val", "nats/token"),
    }
}

/// The figures that matter, in a row.
fn headline(out: &mut String, steps: &[Value], events: &[Value]) {
    let (Some(first), Some(last)) = (steps.first(), steps.last()) else {
        out.push_str("<p>no step was done yet</p>\n");
        return;
    };
    let mut tile = |what: &str, value: String| {
        let _ = write!(out, "<div class=\"tile\"><b>{}</b><span>{}</span></div>", escape(&value), escape(what));
    };
    let total = number(last, "steps").map_or(String::new(), |n| format!(" of {n:.0}"));
    tile("steps", format!("{:.0}{total}", number(last, "step").unwrap_or(0.0)));
    tile("tokens of data", format!("{:.2} M", tokens(last) / 1e6));
    tile("time in steps", crate::watch::time(seconds(last)).to_string());
    let mut bits = |what: &str, line: Option<&Value>, key: &str| {
        if let Some(x) = line.and_then(|l| number(l, key)) {
            tile(what, format!("{x:.3}"));
        }
    };
    bits("bits/byte in the first step", Some(first), "bits_per_byte");
    bits("bits/byte in the last step", Some(last), "bits_per_byte");
    let measured = || steps.iter().filter(|l| number(l, "val_bits_per_byte").is_some());
    bits("bits/byte held out, last", measured().next_back(), "val_bits_per_byte");
    let best = measured().min_by(|a, b| {
        let of = |l: &Value| number(l, "val_bits_per_byte").unwrap_or(f64::NAN);
        of(a).total_cmp(&of(b))
    });
    bits("bits/byte held out, best", best, "val_bits_per_byte");
    let preferred = |key: &str| steps.iter().rev().find_map(|l| number(l, key));
    if let (Some(margin), Some(share)) = (preferred("val_margin"), preferred("val_accuracy")) {
        tile("reward margin held out, last", format!("{margin:.3}"));
        tile("pairs told apart, last", format!("{:.0}%", 100.0 * share));
    }
    let count = |kind: &str| events.iter().filter(|e| e["event"] == kind).count();
    tile("returns to checkpoints", count("rollback").to_string());
    tile("times resumed", count("resume").to_string());
    out.push('\n');
}

fn charts(out: &mut String, steps: &[Value], events: &[Value]) {
    let series = |name, x: &dyn Fn(&Value) -> f64, key: &str, sparse| {
        let points = steps.iter().filter_map(|l| Some([x(l), number(l, key)?])).collect();
        Series { name, points, sparse }
    };
    let at = |step: f64| steps.iter().rfind(|l| number(l, "step").is_some_and(|s| s <= step));
    let marks = |x: &dyn Fn(&Value) -> f64| -> Vec<Mark> {
        let marked = events.iter().filter(|e| MARKED.iter().any(|m| e["event"] == *m));
        let mark = |e: &Value| {
            let text = |key: &str| e.get(key).and_then(Value::as_str).unwrap_or("").to_owned();
            Some(Mark { x: x(at(number(e, "step")?)?), kind: text("event"), sentence: text("sentence") })
        };
        marked.filter_map(mark).collect()
    };
    let (loss, held, unit) = loss_keys(steps);
    out.push_str("<section class=\"charts\">\n");
    type Axis<'a> = (&'a dyn Fn(&Value) -> f64, &'a str, &'a str);
    let both: [Axis<'_>; 2] =
        [(&seconds, "Loss over time", "seconds in steps"), (&tokens, "Loss over data", "tokens of data")];
    for (x, title, label) in both {
        let lines = [series("training, each step", x, loss, false), series("held out", x, held, true)];
        out.push_str(&chart(Labels { title, x: label, y: unit, from_zero: false }, &lines, &marks(x)));
    }
    if steps.iter().any(|l| number(l, "val_margin").is_some()) {
        let of = |title, y| Labels { title, x: "seconds in steps", y, from_zero: false };
        let margin = [series("held out", &seconds, "val_margin", true)];
        out.push_str(&chart(of("Reward margin of preferred answers", "nats times beta"), &margin, &marks(&seconds)));
        let share = [series("held out", &seconds, "val_accuracy", true)];
        out.push_str(&chart(
            of("Pairs whose preferred answer has the greater reward", "share"),
            &share,
            &marks(&seconds),
        ));
    }
    let time = |title, y| Labels { title, x: "seconds in steps", y, from_zero: true };
    let speed = [
        series("data", &seconds, "tokens_per_second", false),
        series("forward passes", &seconds, "forward_tokens_per_second", false),
    ];
    out.push_str(&chart(time("Speed", "tokens/s"), &speed, &marks(&seconds)));
    if steps.iter().any(|l| number(l, "gradient_norm").is_some()) {
        let health = [series("norm of the gradient before it is limited", &seconds, "gradient_norm", false)];
        out.push_str(&chart(time("Estimator: length of the gradient", ""), &health, &marks(&seconds)));
    } else {
        let health = [series("root mean square of the probes' differences", &seconds, "spread", false)];
        out.push_str(&chart(time("Estimator: what the probes tell apart", "nats/token"), &health, &marks(&seconds)));
    }
    health(out, steps, &seconds, &marks(&seconds));
    let rate = [series("learning rate", &seconds, "lr", false)];
    out.push_str(&chart(time("Learning rate", ""), &rate, &marks(&seconds)));
    let points = steps.iter().filter_map(|l| Some([seconds(l), number(l, "memory")? / f64::from(1 << 20)])).collect();
    let memory = [Series { name: "resident memory", points, sparse: false }];
    out.push_str(&chart(time("Memory", "megabytes"), &memory, &marks(&seconds)));
    out.push_str("</section>\n");
}

fn texts(out: &mut String, events: &[Value]) {
    let all: Vec<&Value> = events.iter().filter(|e| e["event"] == "text").collect();
    if all.is_empty() {
        return;
    }
    out.push_str("<h2>What the model writes</h2>\n<table><tr><th>step</th><th>text</th></tr>\n");
    let shown = all.len().min(MAX_TEXTS);
    for i in 0..shown {
        // The first and the last are among them.
        let event = all[if shown > 1 { i * (all.len() - 1) / (shown - 1) } else { 0 }];
        let text = event.get("text").and_then(Value::as_str).unwrap_or("");
        let _ = writeln!(
            out,
            "<tr><td>{}</td><td><pre>{}</pre></td></tr>",
            escape(&event["step"].to_string()),
            escape(text)
        );
    }
    out.push_str("</table>\n");
}

fn happenings(out: &mut String, events: &[Value]) {
    out.push_str("<h2>What happened</h2>\n<table><tr><th>step</th><th>event</th><th></th></tr>\n");
    let listed: Vec<&Value> = events.iter().filter(|e| e["event"] != "text").collect();
    for event in &listed[listed.len().saturating_sub(MAX_EVENTS)..] {
        let text = |key: &str| escape(event.get(key).and_then(Value::as_str).unwrap_or(""));
        let _ = writeln!(
            out,
            "<tr class=\"{kind}\"><td>{}</td><td>{kind}</td><td>{} {}</td></tr>",
            escape(&event["step"].to_string()),
            text("sentence"),
            text("error"),
            kind = text("event"),
        );
    }
    out.push_str("</table>\n");
}

/// What the run was begun, or last resumed, with.
fn plan(out: &mut String, events: &[Value]) {
    let Some(start) = events.iter().rfind(|e| e["event"] == "start") else { return };
    for (title, key) in [("Plan", "plan"), ("Options", "options")] {
        let Some(Value::Object(rows)) = start.get(key) else { continue };
        let _ = writeln!(out, "<h2>{title}</h2>\n<table>");
        for (name, value) in rows.iter().filter(|(_, value)| !value.is_null()) {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let _ = writeln!(out, "<tr><th>{}</th><td>{}</td></tr>", escape(name), escape(&value));
        }
        out.push_str("</table>\n");
    }
}

const STYLE: &str = "
:root{color-scheme:light dark;--ink:light-dark(#1c2330,#e4e8ef);--soft:light-dark(#667085,#98a2b3);--grid:light-dark(#e4e7ec,#2c3444);
--paper:light-dark(#fff,#12161f);--bad:light-dark(#c01048,#ff6b93);--ok:light-dark(#087443,#4cc38a)}
body{font:15px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:2rem auto;max-width:75rem;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
.tile{display:inline-block;margin:0 1.6rem .8rem 0}.tile b{display:block;font-size:1.3rem}.tile span{color:var(--soft);font-size:.85rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(26rem,1fr));gap:1rem 2rem;margin-top:1.2rem}
figure{margin:0}figcaption{font-weight:600}svg{width:100%;height:auto}svg text{font-size:11px;fill:var(--soft)}
.grid{stroke:var(--grid)}.line{fill:none;stroke-width:1.6}.band{stroke:none;opacity:.22}
.s0{--own:light-dark(#2563c9,#6aa5ff)}.s1{--own:light-dark(#c2410c,#ff9d5c)}.s2{--own:light-dark(#087443,#4cc38a)}
.s3{--own:light-dark(#7a3fc4,#b794f6)}.s4{--own:light-dark(#a3145c,#ff7eb6)}.s5{--own:light-dark(#0e7490,#67d8ef)}
.s6{--own:light-dark(#854d0e,#f2c14e)}.s7{--own:light-dark(#4d5b1e,#b8cf5e)}.s8{--own:light-dark(#5b6472,#aab4c3)}
.s9{--own:light-dark(#be5a83,#f5b3cf)}.s10{--own:light-dark(#3d3fa8,#a4a6ff)}.s11{--own:light-dark(#7c2d12,#e08a6a)}
.line{stroke:var(--own)}.band,.dot{fill:var(--own)}
.mark{stroke:var(--soft);stroke-width:1.5;stroke-dasharray:4 3}.mark.rollback,.mark.failure,.mark.memory{stroke:var(--bad)}.mark.resume{stroke:var(--ok)}
.legend{margin:0;font-size:.85rem;color:var(--soft)}.key::before{content:'';display:inline-block;width:1.2em;height:.25em;margin-right:.4em;vertical-align:middle;background:var(--own)}
.none{color:var(--soft)}
table{border-collapse:collapse;font-size:.9rem}.figures td:not(:first-child){text-align:right}td,th{text-align:left;vertical-align:top;padding:.2rem .8rem .2rem 0;border-bottom:1px solid var(--grid)}
tr.rollback td,tr.failure td,tr.damage td,tr.memory td{color:var(--bad)}pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font-size:.85rem}
";

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_page_holds_together_whatever_the_files_say() {
        let step = |n: u64| {
            json!({ "step": n, "steps": 9, "seconds": 0.5 * n as f64, "data_tokens": 32, "loss": 3.0, "bits_per_byte": 4.0 / n as f64,
                "val_bits_per_byte": if n == 2 { json!(4.5) } else { json!(null) }, "tokens_per_second": 64, "spread": 0.1, "lr": 0.01, "memory": 1 << 24 })
        };
        let steps: Vec<Value> = (1..=3).map(step).collect();
        let events = [
            json!({ "event": "start", "step": 0, "sentence": "begun <b>", "plan": { "threads": 2 }, "options": { "lr": 0.01 } }),
            json!({ "event": "text", "step": 1, "text": "</pre><script>x\u{1}" }),
            json!({ "event": "rollback", "step": 2, "sentence": "back & on" }),
            json!({ "event": 7, "step": "no" }),
            json!([1, 2]),
        ];
        for (steps, events) in
            [(&steps[..], &events[..]), (&[], &events[..]), (&steps[..], &[]), (&[json!({})], &[json!(null)])]
        {
            let page = page(Path::new("runs/<first>"), steps, events);
            balanced(&page);
            assert!(page.contains("&lt;first&gt;") && !page.contains("<script"), "{page}");
            assert!(
                !page.contains("http:") && !page.contains("https:") && !page.contains("src="),
                "nothing from outside"
            );
        }
        let page = page(Path::new("r"), &steps, &events);
        for what in [
            "4.500",
            "class=\"mark rollback\"",
            "back &amp; on",
            "&lt;/pre&gt;&lt;script&gt;x\u{fffd}",
            "<th>threads</th><td>2</td>",
        ] {
            assert!(page.contains(what), "no {what:?}");
        }
    }

    /// Every tag is closed by its own.
    pub(super) fn balanced(page: &str) {
        let mut open: Vec<&str> = vec![];
        for tag in page.split('<').skip(1) {
            let tag = tag.split('>').next().unwrap_or("");
            let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap_or("");
            if let Some(closed) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(closed), "in {tag}");
            } else if !tag.starts_with('!') && !tag.ends_with('/') {
                open.push(name);
            }
        }
        assert!(open.is_empty(), "{open:?} stay open");
    }
}
