//! The results as pictures: bars with their spread, in SVG.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::record::{Document, Row};
use super::table::number;

const LABEL_WIDTH: f64 = 250.0;
const BAR_WIDTH: f64 = 420.0;
const VALUE_WIDTH: f64 = 170.0;
const BAR_HEIGHT: f64 = 16.0;
const GAP: f64 = 12.0;

/// Colours that can be told apart by everybody, in the order candidates appear.
const COLOURS: [&str; 7] = [
    "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#999999",
];

/// A picture for each table: file names and contents.
#[must_use]
pub fn all(document: &Document) -> BTreeMap<String, String> {
    let mut tables: Vec<(&str, &str)> = Vec::new();
    for row in &document.rows {
        let table = (row.lane.as_str(), row.title.as_str());
        if !tables.contains(&table) {
            tables.push(table);
        }
    }
    tables
        .into_iter()
        .map(|(lane, title)| {
            let rows: Vec<&Row> = document
                .rows
                .iter()
                .filter(|row| row.lane == lane && row.title == title)
                .collect();
            let name = format!("{}.svg", file_name(&format!("{lane} {title}")));
            (name, picture(&format!("{lane}: {title}, IOPS"), &rows))
        })
        .collect()
}

/// Words for a file system.
fn file_name(title: &str) -> String {
    let words: Vec<String> = title
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(str::to_ascii_lowercase)
        .collect();
    words.join("-")
}

/// Bars from zero, so that lengths can be compared, and a line from the least to the most.
fn picture(title: &str, rows: &[&Row]) -> String {
    let most = rows
        .iter()
        .flat_map(|row| &row.candidates)
        .map(|one| one.iops.max)
        .fold(f64::MIN_POSITIVE, f64::max);
    let x = |value: f64| LABEL_WIDTH + value / most * BAR_WIDTH;
    let width = LABEL_WIDTH + BAR_WIDTH + VALUE_WIDTH;
    let mut names: Vec<&str> = Vec::new();
    let mut body = String::new();
    let mut y = 34.0;
    // Writing to a string cannot fail.
    for row in rows {
        let _ = writeln!(
            body,
            r#"<text x="8" y="{:.1}" font-weight="bold">{}</text>"#,
            y + BAR_HEIGHT - 4.0,
            escape(&row.load)
        );
        y += BAR_HEIGHT + 2.0;
        for one in &row.candidates {
            let index = names.iter().position(|name| *name == one.name);
            let index = index.unwrap_or_else(|| {
                names.push(&one.name);
                names.len() - 1
            });
            let middle = y + BAR_HEIGHT / 2.0;
            let _ = writeln!(
                body,
                r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{}</text>
<rect x="{LABEL_WIDTH}" y="{:.1}" width="{:.1}" height="{:.1}" fill="{}"/>
<path d="M{:.1} {middle:.1}H{:.1}" stroke="black"/>
<text x="{:.1}" y="{:.1}">{}</text>"#,
                LABEL_WIDTH - 6.0,
                y + BAR_HEIGHT - 4.0,
                escape(&one.name),
                y + 1.0,
                x(one.iops.median) - LABEL_WIDTH,
                BAR_HEIGHT - 2.0,
                COLOURS[index % COLOURS.len()],
                x(one.iops.min),
                x(one.iops.max),
                x(one.iops.max) + 6.0,
                y + BAR_HEIGHT - 4.0,
                number(one.iops.median),
            );
            y += BAR_HEIGHT;
        }
        y += GAP;
    }
    format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}" font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="white"/>
<text x="8" y="20" font-size="15">{}</text>
{body}</svg>
"#,
        escape(title)
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::figures::Samples;
    use super::super::record::Candidate;
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_its_median_and_ends_its_line_at_the_most() {
        let candidate = |name: &str, samples: &[f64]| Candidate {
            name: name.to_owned(),
            iops: Samples::of(samples).expect("there are samples"),
            ..Candidate::default()
        };
        let row = Row {
            lane: "native".to_owned(),
            title: "t".to_owned(),
            load: "depth <1>".to_owned(),
            candidates: vec![
                candidate("a", &[50.0]),
                candidate("b", &[80.0, 90.0, 100.0]),
            ],
        };
        let picture = picture("title", &[&row]);
        assert!(picture.contains("depth &lt;1&gt;"));
        let half = format!(r#"width="{:.1}""#, BAR_WIDTH / 2.0);
        assert!(picture.contains(&half), "{picture}");
        let end = format!("H{:.1}", LABEL_WIDTH + BAR_WIDTH);
        assert!(picture.contains(&end), "{picture}");
        assert_eq!(picture.matches("<rect").count(), 3);
    }

    #[test]
    fn file_names_are_made_of_plain_words() {
        assert_eq!(
            file_name("native file, O_DIRECT: 4 KiB random reads"),
            "native-file-o-direct-4-kib-random-reads"
        );
    }
}
