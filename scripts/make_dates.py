"""Make the data of the recipe `sequence_to_sequence/dates`: dates as people write them, and as ISO 8601 does.

The recipe does not need this script: its output is committed. Only the standard library is used and everything is
seeded, so it gives the same rows each time; recipes/data/README.md has the checksums.

    python scripts/make_dates.py --output_dir recipes/data
"""

from __future__ import annotations

import argparse
import random
from datetime import date, timedelta
from pathlib import Path

from prepare_data import Row, write_rows

SEED = 20240229
TRAIN_ROWS, TEST_ROWS = 12_000, 500
FIRST_DAY, LAST_DAY = date(1900, 1, 1), date(2029, 12, 31)
INTERVALS = 0.25
"""Share of the rows that have two dates, so that both sides of a row are long or short."""
TEST_DAYS = 0.1
"""Share of the days that only the test rows have: what is measured is reading, not memory."""

MONTHS = "January February March April May June July August September October November December".split()  # noqa: SIM905
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()  # noqa: SIM905
ONES = "zero one two three four five six seven eight nine".split()  # noqa: SIM905
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()  # noqa: SIM905
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
IRREGULAR = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}


def in_words(number: int) -> str:
    """A number below a hundred.

    >>> in_words(7), in_words(40), in_words(87)
    ('seven', 'forty', 'eighty-seven')
    """
    if number < 20:
        return [*ONES, *TEENS][number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")


def ordinal_in_words(day: int) -> str:
    """The number of a day as it is read out.

    >>> ordinal_in_words(3), ordinal_in_words(20), ordinal_in_words(31)
    ('third', 'twentieth', 'thirty-first')
    """
    *tens, last = in_words(day).split("-")
    regular = f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th"
    return "-".join([*tens, IRREGULAR.get(last, regular)])


def ordinal(day: int) -> str:
    """The number of a day with its ending.

    >>> [ordinal(day) for day in (1, 2, 3, 11, 22)]
    ['1st', '2nd', '3rd', '11th', '22nd']
    """
    ending = "th" if 10 < day < 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


def year_in_words(year: int) -> str:
    """A year as it is read out.

    >>> [year_in_words(year) for year in (1900, 1905, 1987, 2000, 2007, 2024)]
    ['nineteen hundred', 'nineteen oh five', 'nineteen eighty-seven', 'two thousand', 'two thousand and seven', \
'twenty twenty-four']
    """
    century, rest = divmod(year, 100)
    if century == 20 and rest < 10:
        return "two thousand" + (f" and {in_words(rest)}" if rest else "")
    if rest == 0:
        return f"{in_words(century)} hundred"
    return f"{in_words(century)} " + (f"oh {in_words(rest)}" if rest < 10 else in_words(rest))


def ways_to_write(day: date) -> list[str]:
    """A day as people write it, from short to long."""
    month, weekday = MONTHS[day.month - 1], WEEKDAYS[day.weekday()]
    return [
        f"{day.day}.{day.month}.{day.year}",
        f"{month[:3]} {day.day} {day.year}",
        f"{day.day} {month} {day.year}",
        f"{month} {ordinal(day.day)}, {day.year}",
        f"{weekday}, {day.day} {month} {day.year}",
        f"the {ordinal_in_words(day.day)} of {month}, {day.year}",
        f"the {ordinal_in_words(day.day)} of {month}, {year_in_words(day.year)}",
    ]


def make_row(days: list[date], generator: random.Random) -> Row:
    """One day, or two of them as the ends of an interval."""
    if generator.random() >= INTERVALS:
        (day,) = generator.choices(days)
        return {"written": generator.choice(ways_to_write(day)), "iso": day.isoformat()}
    start, end = sorted(generator.choices(days, k=2))
    written = f"from {generator.choice(ways_to_write(start))} to {generator.choice(ways_to_write(end))}"
    return {"written": written, "iso": f"{start.isoformat()}/{end.isoformat()}"}


def make_rows(days: list[date], num_rows: int, generator: random.Random) -> list[Row]:
    """So many rows, no two of them alike."""
    rows: dict[str, Row] = {}
    while len(rows) < num_rows:
        row = make_row(days, generator)
        rows[row["written"]] = row
    return list(rows.values())


def make_splits() -> dict[str, list[Row]]:
    """The rows of both files."""
    generator = random.Random(SEED)  # noqa: S311 - reproducible, not secret
    days = [FIRST_DAY + timedelta(days=i) for i in range((LAST_DAY - FIRST_DAY).days + 1)]
    generator.shuffle(days)
    num_test = round(TEST_DAYS * len(days))
    train = make_rows(days[num_test:], TRAIN_ROWS, generator)
    return {"train": train, "test": make_rows(days[:num_test], TEST_ROWS, generator)}


def main() -> None:
    """Read the command line, write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where the .jsonl.xz files go")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in make_splits().items():
        write_rows(args.output_dir / f"dates-{name}.jsonl.xz", rows)


if __name__ == "__main__":
    main()
