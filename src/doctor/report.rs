//! The report for people.

use std::io::{self, Write};

use super::{Report, State};

/// Writes a line for each check, what to do behind an arrow, and the verdict. Colours are for terminals.
///
/// # Errors
/// `out` cannot be written.
pub fn write_table(report: &Report, colours: bool, out: &mut dyn Write) -> io::Result<()> {
    let width = report.checks.iter().map(|c| c.name.len()).max().unwrap_or(0);
    for check in &report.checks {
        let (word, colour) = match check.state {
            State::Ok => ("ok", "32"),
            State::Missing => ("missing", "33"),
            State::Fatal => ("fatal", "31"),
        };
        let word = if colours { format!("\x1b[{colour}m{word:<7}\x1b[0m") } else { format!("{word:<7}") };
        write!(out, "{word}  {:<width$}  {}", check.name, check.found)?;
        match &check.advice {
            Some(advice) => writeln!(out, "  -> {advice}")?,
            None => writeln!(out)?,
        }
    }
    writeln!(out, "microvm boot will {}work here", if report.boot { "" } else { "not " })
}

#[cfg(test)]
mod tests {
    use super::super::Check;
    use super::*;

    #[test]
    fn colours_are_asked_for() {
        let checks = vec![Check::ok("tun", "there"), Check::fatal("tier", "software", "elsewhere")];
        let report = Report { schema: "", boot: false, checks };
        let text = |colours| {
            let mut out = Vec::new();
            write_table(&report, colours, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert!(text(true).contains('\x1b') && !text(false).contains('\x1b'));
        assert!(text(false).contains("software  -> elsewhere") && text(false).ends_with("not work here\n"));
    }
}
