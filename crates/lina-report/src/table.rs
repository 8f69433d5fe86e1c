//! Tables for a terminal.

/// Which side of its column a cell keeps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// For text.
    Left,
    /// For numbers, so that their digits stand under each other.
    Right,
}

/// A table with aligned columns, two spaces apart, under a line.
///
/// ```
/// use lina_report::{Align, Table};
///
/// let mut table = Table::new([("policy", Align::Left), ("step\nms", Align::Right)]);
/// table.row(["fair", "29.0"]);
/// table.row(["lina", "9.6"]);
/// assert_eq!(table.render(), "\
/// policy  step
///           ms
/// ────────────
/// fair    29.0
/// lina     9.6
/// ");
/// ```
#[derive(Clone, Debug)]
pub struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table with these column heads; a head may have several lines.
    pub fn new<S: Into<String>>(columns: impl IntoIterator<Item = (S, Align)>) -> Self {
        let columns = columns.into_iter().map(|(head, align)| (head.into(), align)).collect();
        Self { columns, rows: Vec::new() }
    }

    /// Adds a row. Missing cells stay empty, and cells beyond the last column are left out.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        let mut cells: Vec<String> = cells.into_iter().map(Into::into).collect();
        cells.resize(self.columns.len(), String::new());
        self.rows.push(cells);
    }

    /// The table as lines of text, the last one ended too, without spaces at the ends of lines.
    pub fn render(&self) -> String {
        let heads: Vec<Vec<&str>> = self.columns.iter().map(|(head, _)| head.lines().collect()).collect();
        let head_lines = heads.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|column| {
                let cells = self.rows.iter().map(|row| row[column].as_str());
                cells.chain(heads[column].iter().copied()).map(width).max().unwrap_or(0)
            })
            .collect();
        let mut text = String::new();
        for line in 0..head_lines {
            let cells = heads.iter().map(|head| head.get(line).copied().unwrap_or_default());
            self.line(&mut text, &widths, cells);
        }
        let total = widths.iter().sum::<usize>() + 2 * widths.len().saturating_sub(1);
        text.push_str(&"─".repeat(total));
        text.push('\n');
        for row in &self.rows {
            self.line(&mut text, &widths, row.iter().map(String::as_str));
        }
        text
    }

    fn line<'a>(&self, text: &mut String, widths: &[usize], cells: impl Iterator<Item = &'a str>) {
        let mut line = String::new();
        for (index, (cell, (_, align))) in cells.zip(&self.columns).enumerate() {
            if index > 0 {
                line.push_str("  ");
            }
            let padding = " ".repeat(widths[index] - width(cell));
            match align {
                Align::Left => line.extend([cell, &padding]),
                Align::Right => line.extend([&padding, cell]),
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
}

fn width(cell: &str) -> usize {
    cell.chars().count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_fill_up_and_characters_count() {
        let mut table = Table::new([("a", Align::Left), ("b", Align::Right)]);
        table.row(["é—x"]);
        table.row(["y", "10", "beyond"]);
        assert_eq!(table.render(), "a     b\n───────\né—x\ny    10\n");
    }
}
