//! Line charts as inline SVG.
//!
//! Invariant: any numbers give a well-formed chart; those that are not finite are left out.

use std::fmt::Write;

/// Size of the drawing area and its margins in pixels.
const SIZE: [f64; 2] = [560.0, 260.0];
const LEFT: f64 = 62.0;
const BOTTOM: f64 = 38.0;
const TOP: f64 = 8.0;
const RIGHT: f64 = 12.0;
/// Columns into which many points are gathered.
const COLUMNS: usize = 400;

/// One line of a chart.
#[derive(Clone, Debug)]
pub struct Series<'a> {
    /// Its name in the legend.
    pub name: &'a str,
    /// Points, ascending by the first number.
    pub points: Vec<[f64; 2]>,
    /// Single points are shown, not the mean and the range of many.
    pub sparse: bool,
}

/// A moment that is marked across the chart.
#[derive(Clone, Debug)]
pub struct Mark {
    /// Where.
    pub x: f64,
    /// A word for its kind, which selects the colour.
    pub kind: String,
    /// What a reader sees who points at it.
    pub sentence: String,
}

/// What a chart says besides its lines.
#[derive(Clone, Copy, Debug)]
pub struct Labels {
    /// Above it.
    pub title: &'static str,
    /// Below the horizontal axis.
    pub x: &'static str,
    /// Beside the vertical axis.
    pub y: &'static str,
    /// Whether the vertical axis begins at zero.
    pub from_zero: bool,
}

/// A chart, or a sentence where there is nothing to draw.
pub fn chart(labels: Labels, series: &[Series<'_>], marks: &[Mark]) -> String {
    let finite = |p: &&[f64; 2]| p[0].is_finite() && p[1].is_finite();
    let all: Vec<[f64; 2]> = series.iter().flat_map(|s| s.points.iter().filter(finite)).copied().collect();
    let title = escape(labels.title);
    if all.is_empty() {
        return format!(
            "<figure><figcaption>{title}</figcaption><p class=\"none\">nothing was measured yet</p></figure>\n"
        );
    }
    let range = |i: usize| {
        let fold = |f: fn(f64, f64) -> f64, from: f64| all.iter().map(|p| p[i]).fold(from, f);
        [fold(f64::min, f64::INFINITY), fold(f64::max, f64::NEG_INFINITY)]
    };
    let mut y = range(1);
    if labels.from_zero {
        y[0] = y[0].min(0.0);
    }
    let (x, y) = (Axis::new(range(0), [LEFT, SIZE[0] - RIGHT]), Axis::new(y, [SIZE[1] - BOTTOM, TOP]));
    let mut out = format!(
        "<figure><figcaption>{title}</figcaption><svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{title}\">",
        SIZE[0], SIZE[1]
    );
    for (at, text) in y.ticks() {
        put(
            &mut out,
            format_args!(
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>",
                SIZE[0] - RIGHT
            ),
        );
        put(
            &mut out,
            format_args!("<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>", LEFT - 5.0, at + 4.0),
        );
    }
    let floor = SIZE[1] - BOTTOM;
    for (at, text) in x.ticks() {
        put(
            &mut out,
            format_args!("<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{floor:.1}\"/>"),
        );
        put(
            &mut out,
            format_args!("<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>", floor + 15.0),
        );
    }
    let middle = (LEFT + SIZE[0] - RIGHT) / 2.0;
    put(
        &mut out,
        format_args!(
            "<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            SIZE[1] - 6.0,
            escape(labels.x)
        ),
    );
    put(
        &mut out,
        format_args!(
            "<text transform=\"translate(12 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            floor / 2.0,
            escape(labels.y)
        ),
    );
    for mark in marks.iter().filter(|m| m.x.is_finite() && m.x >= x.from && m.x <= x.to) {
        let (at, kind) = (x.place(mark.x), escape(&mark.kind));
        put(
            &mut out,
            format_args!(
                "<line class=\"mark {kind}\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{floor:.1}\"><title>{}</title></line>",
                escape(&mark.sentence)
            ),
        );
    }
    for (i, s) in series.iter().enumerate() {
        let points: Vec<[f64; 2]> = s.points.iter().filter(finite).copied().collect();
        line(&mut out, i, s.sparse, &points, x, y);
    }
    out.push_str("</svg><p class=\"legend\">");
    for (i, s) in series.iter().enumerate().filter(|(_, s)| !s.points.is_empty()) {
        put(&mut out, format_args!("<span class=\"key s{i}\">{}</span> ", escape(s.name)));
    }
    out.push_str("</p></figure>\n");
    out
}

/// One line: single points, or the mean of each column of many points within their range.
fn line(out: &mut String, index: usize, sparse: bool, points: &[[f64; 2]], x: Axis, y: Axis) {
    let columns = match sparse || points.len() <= COLUMNS {
        true => points.iter().map(|p| [p[0], p[1], p[1], p[1]]).collect(),
        false => gather(points),
    };
    let wide = columns.iter().any(|c: &[f64; 4]| c[2] < c[3]);
    if wide {
        put(out, format_args!("<path class=\"band s{index}\" d=\""));
        let edge = columns.iter().map(|c| [c[0], c[3]]).chain(columns.iter().rev().map(|c| [c[0], c[2]]));
        path(out, edge, x, y);
        out.push_str("Z\"/>");
    }
    if let [only] = &columns[..] {
        let at = [x.place(only[0]), y.place(only[1])];
        put(out, format_args!("<circle class=\"dot s{index}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"/>", at[0], at[1]));
        return;
    }
    put(out, format_args!("<path class=\"line s{index}\" d=\""));
    path(out, columns.iter().map(|c| [c[0], c[1]]), x, y);
    out.push_str("\"/>");
}

fn path(out: &mut String, points: impl Iterator<Item = [f64; 2]>, x: Axis, y: Axis) {
    for (i, p) in points.enumerate() {
        let letter = if i == 0 { 'M' } else { 'L' };
        put(out, format_args!("{letter}{:.1} {:.1}", x.place(p[0]), y.place(p[1])));
    }
}

/// Place, mean, least and greatest value of each column of points.
fn gather(points: &[[f64; 2]]) -> Vec<[f64; 4]> {
    let size = points.len().div_ceil(COLUMNS).max(1);
    let column = |part: &[[f64; 2]]| {
        let n = part.len() as f64;
        let mean = |i: usize| part.iter().map(|p| p[i]).sum::<f64>() / n;
        let fold = |f: fn(f64, f64) -> f64| part.iter().map(|p| p[1]).reduce(f).unwrap_or(0.0);
        [mean(0), mean(1), fold(f64::min), fold(f64::max)]
    };
    points.chunks(size).map(column).collect()
}

/// Values to pixels.
#[derive(Clone, Copy, Debug)]
struct Axis {
    from: f64,
    to: f64,
    pixels: [f64; 2],
}

impl Axis {
    fn new([from, to]: [f64; 2], pixels: [f64; 2]) -> Axis {
        let room = match to > from {
            true => 0.0,
            false => (from.abs() * 0.05).max(1e-9),
        };
        Axis { from: from - room, to: to + room, pixels }
    }

    fn place(self, x: f64) -> f64 {
        self.pixels[0] + (x - self.from) / (self.to - self.from) * (self.pixels[1] - self.pixels[0])
    }

    /// Round values with their pixels and texts.
    fn ticks(self) -> Vec<(f64, String)> {
        let rough = (self.to - self.from) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|x| x * power).into_iter().find(|&s| s >= rough).unwrap_or(power);
        let first = (self.from / step).ceil();
        (0..12)
            .map(|i| (first + f64::from(i)) * step)
            .take_while(|&v| v <= self.to + 1e-9 * step)
            .map(|v| (self.place(v), short(v, step)))
            .collect()
    }
}

/// A number with the digits that its step needs.
fn short(x: f64, step: f64) -> String {
    let (size, unit) = match x.abs().max(step) {
        n if n >= 1e9 => (1e9, "G"),
        n if n >= 1e6 => (1e6, "M"),
        n if n >= 1e4 => (1e3, "k"),
        _ => (1.0, ""),
    };
    if step < 1e-4 {
        return if x == 0.0 { "0".into() } else { format!("{x:.1e}") };
    }
    let digits = (-(step / size).log10().floor()).clamp(0.0, 6.0) as usize;
    format!("{:.digits$}{unit}", x / size)
}

/// Text inside of HTML.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // Other control characters have no place in a page.
            c if c.is_control() && c != '\n' && c != '\t' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

fn put(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    let _ = out.write_fmt(text);
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABELS: Labels = Labels { title: "a < b", x: "s", y: "bits", from_zero: false };

    fn series(points: Vec<[f64; 2]>) -> Series<'static> {
        Series { name: "loss", points, sparse: false }
    }

    #[test]
    fn any_numbers_give_a_chart() {
        let many = (0..5000).map(|i| [f64::from(i), f64::from(i % 7)]).collect();
        let cases = [
            vec![],
            vec![[0.0, 1.0]],
            vec![[0.0, 0.0], [0.0, 0.0]],
            vec![[0.0, f64::NAN], [1.0, f64::INFINITY], [2.0, 5.0]],
            vec![[1e-300, -1e300], [1e300, 1e300]],
            many,
        ];
        for points in cases {
            let n = points.len();
            let mark = Mark { x: 0.5, kind: "rollback".into(), sentence: "<&\">".into() };
            let text = chart(LABELS, &[series(points)], &[mark]);
            assert!(!text.contains("NaN") && !text.contains("inf\""), "{n} points: {text}");
            assert!(text.contains("a &lt; b") && !text.contains("<&"), "{text}");
            assert_eq!(text.matches("<svg").count(), usize::from(n > 0));
        }
        let text = chart(LABELS, &[series((0..5000).map(|i| [f64::from(i), f64::from(i % 7)]).collect())], &[]);
        assert!(text.contains("class=\"band s0\"") && text.len() < 40_000, "{} bytes", text.len());
    }

    #[test]
    fn ticks_are_round() {
        let texts = |from: f64, to: f64| -> Vec<String> {
            Axis::new([from, to], [0.0, 100.0]).ticks().into_iter().map(|t| t.1).collect()
        };
        assert_eq!(texts(0.0, 10.0), ["0", "2", "4", "6", "8", "10"]);
        assert_eq!(texts(2.31, 2.59), ["2.4", "2.5"]);
        assert_eq!(texts(0.0, 3e6), ["0.0M", "1.0M", "2.0M", "3.0M"].map(|t| t.replace(".0", "")));
        assert!(texts(5.0, 5.0).len() >= 2);
    }
}
