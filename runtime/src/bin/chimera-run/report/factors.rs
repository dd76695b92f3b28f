//! What a benchmark of paradigms shows: for each of them, how many times the tokens a second and the loss of a run without it.
//!
//! Invariant: factors are quotients of figures of two runs of the same time, also where they are below 1; what was not measured is left
//! open.

use super::comparison::{Comparison, Contender, Figures, aligned, tabled};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// A paradigm, the name of the run that has it, and of the one that lacks it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paradigm {
    /// Its name.
    pub name: String,
    /// The run with it.
    pub with: String,
    /// The run without it.
    pub without: String,
}

/// All runs of a benchmark and what they show.
#[derive(Clone, Debug)]
pub struct Factors {
    /// The runs.
    pub runs: Comparison,
    /// The paradigms.
    pub paradigms: Vec<Paradigm>,
    /// Paradigms that the runs cannot have, in sentences.
    pub left: Vec<String>,
}

/// The figures of a paradigm.
struct Row<'a> {
    paradigm: &'a Paradigm,
    with: Figures,
    without: Figures,
}

impl Row<'_> {
    /// Tokens of data a second, with by without.
    fn speed(&self) -> Option<f64> {
        Some(self.with.data_rate? / self.without.data_rate?).filter(|f| f.is_finite())
    }

    /// Held-out loss at the end, without by with: above 1 where the paradigm helps.
    fn loss(&self) -> Option<f64> {
        Some(self.without.last? / self.with.last?).filter(|f| f.is_finite())
    }
}

impl Factors {
    fn rows<'a>(&'a self) -> Vec<Row<'a>> {
        let held = self.runs.keys().1;
        let figures = |name: &str| {
            let run: Option<&Contender> = self.runs.contenders.iter().find(|c| c.name == name);
            run.map_or_else(Figures::default, |c| c.figures(held, None))
        };
        let row = |p: &'a Paradigm| Row { paradigm: p, with: figures(&p.with), without: figures(&p.without) };
        self.paradigms.iter().map(row).collect()
    }

    fn cells(&self) -> ([String; 8], Vec<[String; 8]>) {
        let unit = self.runs.keys().2;
        let head = [
            "paradigm".to_owned(),
            "with".to_owned(),
            "without".to_owned(),
            "data tokens/s".to_owned(),
            "factor".to_owned(),
            format!("{unit} without"),
            "with".to_owned(),
            "factor".to_owned(),
        ];
        let show = |x: Option<f64>, digits: usize| x.map_or_else(|| "-".to_owned(), |x| format!("{x:.digits$}"));
        let row = |r: &Row<'_>| {
            [
                r.paradigm.name.clone(),
                r.paradigm.with.clone(),
                r.paradigm.without.clone(),
                show(r.with.data_rate, 0),
                show(r.speed(), 3),
                show(r.without.last, 3),
                show(r.with.last, 3),
                show(r.loss(), 3),
            ]
        };
        (head, self.rows().iter().map(row).collect())
    }

    /// What `--all` shows where it loses.
    fn verdict(&self) -> Option<String> {
        let rows = self.rows();
        let all = rows.iter().find(|r| r.paradigm.name == "all")?;
        let loss = all.loss().filter(|&loss| loss < 1.0)?;
        let speed = |f: f64| format!("{f:.3} times the tokens a second");
        let worst = rows.iter().filter(|r| r.paradigm.name != "all" && r.paradigm.without == all.paradigm.without);
        let worst = worst.filter_map(|r| Some((r.loss()?, r))).min_by(|a, b| a.0.total_cmp(&b.0));
        let alone =
            worst.map_or(String::new(), |(f, r)| format!("; of those alone, {} loses most ({f:.3})", r.paradigm.name));
        Some(format!(
            "all together lose to the run without them in this time: a loss factor of {loss:.3} at {}{alone}",
            all.speed().map_or_else(|| "unmeasured speed".to_owned(), speed)
        ))
    }

    /// The tables for people.
    pub fn table(&self) -> String {
        let (head, rows) = self.cells();
        let mut out = format!("{}\n{}", aligned(&head, &rows), self.runs.table());
        for line in self.left.iter().chain(&self.verdict()) {
            let _ = writeln!(out, "{line}");
        }
        out
    }

    /// The same for programs.
    pub fn to_json(&self) -> Value {
        let of = |r: &Row<'_>| {
            json!({
                "paradigm": r.paradigm.name,
                "with": r.paradigm.with,
                "without": r.paradigm.without,
                "data_tokens_per_second": r.with.data_rate,
                "data_tokens_per_second_without": r.without.data_rate,
                "factor_of_tokens": r.speed(),
                "held_out": r.with.last,
                "held_out_without": r.without.last,
                "factor_of_loss": r.loss(),
            })
        };
        let mut value = self.runs.to_json();
        value["paradigms"] = self.rows().iter().map(of).collect();
        value["left_out"] = json!(self.left);
        value["verdict"] = json!(self.verdict());
        value
    }

    /// One page, which needs nothing outside of itself.
    pub fn page(&self) -> String {
        self.runs.page(|out| {
            let (head, rows) = self.cells();
            tabled(out, &head, &rows);
            for line in self.left.iter().chain(&self.verdict()) {
                let _ = writeln!(out, "<p>{}</p>", super::chart::escape(line));
            }
            out.push_str("<h2>Figures of each run</h2>\n");
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::comparison::tests::contender;
    use super::super::comparison::{Ending, Subject};
    use super::super::tests::balanced;
    use super::*;

    fn factors() -> Factors {
        let contenders = vec![
            contender("baseline", &[Some(5.0), Some(2.0)], Ending::Finished),
            contender("all", &[Some(6.0), Some(4.0)], Ending::Finished),
        ];
        let paradigm = |name: &str, with: &str, without: &str| Paradigm {
            name: name.into(),
            with: with.into(),
            without: without.into(),
        };
        Factors {
            runs: Comparison { subject: Subject::Paradigms, contenders, seconds: 9, seed: 7 },
            paradigms: vec![paradigm("all", "all", "baseline"), paradigm("packing", "baseline", "gone")],
            left: vec!["no <mask>".into()],
        }
    }

    #[test]
    fn factors_are_quotients_and_losses_are_said() {
        let value = factors().to_json();
        let all = &value["paradigms"][0];
        assert_eq!((all["factor_of_tokens"].as_f64(), all["factor_of_loss"].as_f64()), (Some(1.0), Some(0.5)));
        assert!(value["paradigms"][1]["factor_of_loss"].is_null(), "what was not measured is open");
        assert_eq!(value["runs"][1]["run"], "all");
        let table = factors().table();
        assert!(table.contains("lose to the run without them") && table.contains("0.500"), "{table}");
        let mut good = factors();
        good.paradigms[0].with = "baseline".into();
        assert!(good.to_json()["verdict"].is_null());
    }

    #[test]
    fn a_page_of_factors_holds_together() {
        let page = factors().page();
        balanced(&page);
        assert!(page.contains("no &lt;mask&gt;") && page.contains("<td>0.500</td>") && page.contains("<svg"));
    }
}
