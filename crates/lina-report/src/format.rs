//! Numbers as people read them.

/// Three significant digits, never an exponent: `0.0123`, `1.23`, `12.3`, `1230`.
pub(crate) fn significant(value: f64) -> String {
    if !value.is_finite() {
        return "–".into();
    }
    let magnitude = if value == 0.0 { 0 } else { value.abs().log10().floor() as i32 };
    let decimals = (2 - magnitude).clamp(0, 6) as usize;
    let text = format!("{value:.decimals$}");
    // Rounding can carry into another digit: 9.999 has two decimals, 10.0 one.
    let rounded: f64 = text.parse().unwrap_or(value);
    let carried = rounded != 0.0 && rounded.abs().log10().floor() as i32 > magnitude;
    if carried && decimals > 0 { format!("{value:.0$}", decimals - 1) } else { text }
}

/// A whole number with thin groups of three digits: `1,234,567`.
pub(crate) fn thousands(value: u64) -> String {
    let digits = value.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// A count with a suffix: `812`, `14.2 K`, `46.7 B`.
pub(crate) fn count(value: u64) -> String {
    scaled(value as f64, 1000.0, &["", " K", " M", " B", " T"])
}

/// Bytes in binary units: `812 B`, `30.0 MiB`.
pub(crate) fn bytes(value: u64) -> String {
    scaled(value as f64, 1024.0, &[" B", " KiB", " MiB", " GiB", " TiB"])
}

/// A share of one as a percentage: `31.4 %`.
pub(crate) fn percent(share: f64) -> String {
    if share.is_finite() { format!("{:.1} %", share * 100.0) } else { "–".into() }
}

/// A duration in whole units that a person waits for: `45 s`, `3 min 05 s`, `2 h 10 min`.
pub(crate) fn wait(seconds: f64) -> String {
    let seconds = if seconds.is_finite() {
        seconds.round() as u64
    } else {
        return "–".into();
    };
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}

fn scaled(mut value: f64, base: f64, suffixes: &[&str]) -> String {
    let mut index = 0;
    while value >= base && index + 1 < suffixes.len() {
        value /= base;
        index += 1;
    }
    if index == 0 { format!("{value}{}", suffixes[0]) } else { format!("{}{}", significant(value), suffixes[index]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        let shown: Vec<_> =
            [0.0, 0.01234, 0.9999, 1.0, 9.996, 12.34, 99.96, 1234.5, -3.456, f64::NAN].map(significant).to_vec();
        assert_eq!(shown, ["0.00", "0.0123", "1.00", "1.00", "10.0", "12.3", "100", "1234", "-3.46", "–"]);
        assert_eq!([0, 999, 1000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([812, 14_200, 46_700_000_000].map(count), ["812", "14.2 K", "46.7 B"]);
        assert_eq!([812, 30 << 20].map(bytes), ["812 B", "30.0 MiB"]);
        assert_eq!([0.0, 0.3141].map(percent), ["0.0 %", "31.4 %"]);
        assert_eq!([45.2, 185.0, 7800.0].map(wait), ["45 s", "3 min 05 s", "2 h 10 min"]);
    }
}
