//! The comparison as one HTML page: no script, no font and no picture from elsewhere.

use std::fmt::Write;

use super::report::{Measure, Report, Series};
use super::stages::Stage;

const STYLE: &str = include_str!("page.css");
/// Of the drawings, in their own units.
const WIDTH: f64 = 960.0;
/// Where bars begin, and how much is left for the figures behind them.
const LEFT: f64 = 90.0;
const RIGHT: f64 = 190.0;
const ROW: f64 = 34.0;

/// The page.
#[must_use]
pub fn to_html(report: &Report) -> String {
    let mut page = String::new();
    let command = report.command.join(" ");
    let command = if command.is_empty() {
        "its own command".into()
    } else {
        format!("<code>{}</code>", escape(&command))
    };
    let image = escape(&report.image);
    let kinds: Vec<_> = report.series.iter().map(|series| series.isolation.name()).collect();
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>microvm compare: {image}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <h1>{image}: {}</h1>\n<p>{command}, {} runs of each in turn after a warm-up.</p>\n<p class=\"soft\">{}</p>\n",
        kinds.join(", "),
        report.runs,
        escape(&report.host.line()),
    );
    for remark in &report.remarks {
        let _ = writeln!(page, "<p class=\"remark\">{}</p>", escape(remark));
    }
    let count = report.series.first().map_or(0, |series| series.measures.len());
    for index in 0..count {
        page.push_str(&bars(report, index));
    }
    page.push_str(&timeline(report));
    page.push_str(&figures(report));
    page.push_str(&checks(report));
    page.push_str(READING);
    page.push_str("</body>\n</html>\n");
    page
}

const READING: &str = "<h2>How to read this</h2>
<p>Bars are medians; the line over a bar goes from the least value to the one below which 95 % lie. Ratios are of medians;
what stands behind them in brackets is the middle 95 % of what 2000 draws of the same rounds give (bootstrap).</p>
<p>Times are of the whole <code>microvm run</code>: from exec to the program's start or to the exit of <code>microvm</code>. Memory is the
most that was charged to the run's control group: microvm, the container runtime, guest memory that was touched, the program.
What a VM takes is also told apart: guest memory and microvm itself.
Figures of one host say nothing of another's. docs/compare.md says what is in each of them.</p>
";

/// One measure: a bar for each isolation that has it.
fn bars(report: &Report, index: usize) -> String {
    let rows: Vec<(&Series, &Measure)> =
        report.series.iter().map(|series| (series, &series.measures[index])).collect();
    let largest = rows.iter().filter_map(|(_, m)| Some(m.summary?.p95)).fold(0.0, f64::max);
    let Some((_, first)) = rows.first().filter(|_| rows.iter().any(|(_, m)| m.summary.is_some())) else {
        return String::new();
    };
    let scale = (WIDTH - LEFT - RIGHT) / if largest > 0.0 { largest } else { 1.0 };
    let unit = if first.unit.is_empty() { String::new() } else { format!(", {}", first.unit) };
    let height = ROW * rows.len() as f64 + 4.0;
    let mut out = format!("<h2>{}{unit}</h2>\n", capital(first.name));
    let _ = writeln!(
        out,
        "<div class=\"scroll\"><svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">",
        first.name
    );
    for (row, (series, measure)) in rows.iter().enumerate() {
        let top = ROW * row as f64;
        let middle = top + ROW / 2.0;
        let text = middle + 4.5;
        let name = series.isolation.name();
        let _ = writeln!(out, "<text x=\"0\" y=\"{text}\">{name}</text>");
        let Some(summary) = measure.summary else {
            let _ = writeln!(out, "<text class=\"soft\" x=\"{LEFT}\" y=\"{text}\">none</text>");
            continue;
        };
        let (min, median, p95) = (summary.min * scale, summary.median * scale, summary.p95 * scale);
        let _ = writeln!(
            out,
            "<rect x=\"{LEFT}\" y=\"{}\" width=\"{median:.1}\" height=\"{}\" rx=\"2\" fill=\"{}\"/>\
             <path class=\"whisker\" d=\"M{:.1} {middle}H{:.1}M{:.1} {}v10M{:.1} {}v10\"/>",
            top + 6.0,
            ROW - 12.0,
            colour_of(name),
            LEFT + min,
            LEFT + p95,
            LEFT + min,
            middle - 5.0,
            LEFT + p95,
            middle - 5.0,
        );
        let ratio = measure.ratio.map_or(String::new(), |r| {
            format!(
                "<tspan class=\"soft\" dx=\"8\">× {} ({}–{})</tspan>",
                short(r.value),
                short(r.low),
                short(r.high)
            )
        });
        let x = LEFT + median.max(p95) + 10.0;
        let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{text}\">{}{ratio}</text>", short(summary.median));
    }
    out.push_str("</svg></div>\n");
    out
}

/// Each isolation's stages behind each other, on one scale.
fn timeline(report: &Report) -> String {
    let total = |series: &Series| series.stages.iter().filter_map(|stage| stage.ms).sum::<f64>();
    let largest = report.series.iter().map(total).fold(0.0, f64::max);
    if largest <= 0.0 {
        return String::new();
    }
    let scale = (WIDTH - LEFT - RIGHT) / largest;
    let height = ROW * report.series.len() as f64 + 4.0;
    let mut out = String::from("<h2>Where the time goes</h2>\n<ul class=\"legend\">");
    let names: Vec<_> =
        report.series.first().into_iter().flat_map(|series| &series.stages).map(|s| s.name).collect();
    let is_there = |name: &str| {
        report.series.iter().flat_map(|series| &series.stages).any(|s| s.name == name && s.ms.is_some())
    };
    for (index, name) in names.iter().enumerate().filter(|(_, name)| is_there(name)) {
        let _ = write!(out, "<li><i style=\"background:{}\"></i>{name}</li>", STAGES[index % STAGES.len()]);
    }
    let _ = writeln!(
        out,
        "</ul>\n<div class=\"scroll\"><svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"stages of a run\">"
    );
    for (row, series) in report.series.iter().enumerate() {
        let top = ROW * row as f64;
        let text = top + ROW / 2.0 + 4.5;
        let _ = writeln!(out, "<text x=\"0\" y=\"{text}\">{}</text>", series.isolation.name());
        let mut x = LEFT;
        for (index, stage) in series.stages.iter().enumerate() {
            let Some(ms) = stage.ms else { continue };
            let _ = writeln!(
                out,
                "<rect x=\"{x:.1}\" y=\"{}\" width=\"{:.1}\" height=\"{}\" fill=\"{}\"><title>{}: {} ms</title></rect>",
                top + 5.0,
                ms * scale,
                ROW - 10.0,
                STAGES[index % STAGES.len()],
                stage.name,
                short(ms)
            );
            x += ms * scale;
        }
        let _ = writeln!(out, "<text x=\"{:.1}\" y=\"{text}\">{} ms</text>", x + 10.0, short(total(series)));
    }
    out.push_str("</svg></div>\n<div class=\"scroll\"><table>\n<tr><th>stage</th>");
    for series in &report.series {
        let _ = write!(out, "<th>{}, ms</th><th class=\"words\"></th>", series.isolation.name());
    }
    out.push_str("</tr>\n");
    for (index, name) in names.iter().enumerate() {
        let _ = write!(out, "<tr><td>{name}</td>");
        report.series.iter().for_each(|series| out.push_str(&stage_cells(&series.stages[index])));
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
    out
}

fn stage_cells(stage: &Stage) -> String {
    let time = stage.ms.map_or("–".into(), short);
    format!("<td>{time}</td><td class=\"words soft\">{}</td>", escape(stage.what))
}

fn figures(report: &Report) -> String {
    let mut out = String::from(
        "<h2>All figures</h2>\n<div class=\"scroll\"><table>\n<tr><th>measure</th><th class=\"words\">isolation</th><th>min</th>\
         <th>median</th><th>95 %</th>",
    );
    let _ = writeln!(out, "<th>to {}</th><th>95 % interval</th></tr>", report.base());
    let count = report.series.first().map_or(0, |series| series.measures.len());
    for index in 0..count {
        for (row, series) in report.series.iter().enumerate() {
            let measure = &series.measures[index];
            let class = if row + 1 == report.series.len() { " class=\"group\"" } else { "" };
            let unit = if measure.unit.is_empty() { String::new() } else { format!(", {}", measure.unit) };
            let name = if row == 0 { format!("{}{unit}", measure.name) } else { String::new() };
            let cells =
                measure.summary.map_or([const { String::new() }; 3], |s| [s.min, s.median, s.p95].map(short));
            let [min, median, p95] = cells.map(|cell| if cell.is_empty() { "–".into() } else { cell });
            let (ratio, interval) = measure.ratio.map_or(Default::default(), |ratio| {
                (short(ratio.value), format!("{}–{}", short(ratio.low), short(ratio.high)))
            });
            let _ = writeln!(
                out,
                "<tr{class}><td>{name}</td><td class=\"words\">{}</td><td>{min}</td><td>{median}</td><td>{p95}</td><td>{ratio}</td>\
                 <td>{interval}</td></tr>",
                series.isolation.name()
            );
        }
    }
    out.push_str("</table></div>\n");
    out
}

fn checks(report: &Report) -> String {
    let mut out = String::from("<h2>The host</h2>\n<div class=\"scroll\"><table>\n");
    for check in &report.host.checks {
        let _ = writeln!(
            out,
            "<tr><td>{}</td><td class=\"words\">{}</td></tr>",
            escape(check.name),
            escape(&check.found)
        );
    }
    out.push_str("</table></div>\n");
    out
}

fn colour_of(isolation: &str) -> &'static str {
    match isolation {
        "process" => "#8592a6",
        "container" => "#2f9e8f",
        _ => "#4a7dde",
    }
}

const STAGES: [&str; 9] =
    ["#8592a6", "#d0d5dd", "#d0d5dd", "#d0d5dd", "#4a7dde", "#7c5cc4", "#2f9e8f", "#d9912b", "#b4546a"];

/// A number with three digits that count.
#[must_use]
pub fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    #[test]
    fn the_page_is_whole_and_by_itself() {
        let page = to_html(&report());
        assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
        for word in ["<script", "http://", "https://", "url(", "@import", "src=", "href="] {
            assert!(!page.contains(word), "{word}");
        }
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert!(page.contains("echo &lt;b&gt;&amp;") && !page.contains("<b>"));
        assert!(page.contains("4 runs are few"));
    }

    #[test]
    fn bars_are_as_long_as_the_medians() {
        let text = bars(&report(), 1);
        let widths: Vec<f64> = text
            .split(" width=\"")
            .skip(1)
            .map(|part| part.split('"').next().unwrap().parse().unwrap())
            .collect();
        // Medians of 11.5, 21.5 and 81.5 ms, and 82.85 ms as wide as there is room.
        let room = WIDTH - LEFT - RIGHT;
        for (width, ms) in widths.iter().zip([11.5, 21.5, 81.5]) {
            assert!((width - ms / 82.85 * room).abs() < 0.1, "{width} for {ms}");
        }
        assert_eq!(widths.len(), 3);
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!([0.0, 1.234, 12.34, 123.4, 1234.0].map(short), ["0.00", "1.23", "12.3", "123", "1234"]);
    }
}
