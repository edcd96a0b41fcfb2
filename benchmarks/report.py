"""
What was measured, as a table for the terminal, a page and a picture.
"""

import collections
import dataclasses
import html
import pathlib
import statistics

OURS, PUBLISHED = "this module", "published 0.2.5"
MITOGEN, EXECNET, ASYNCSSH, SSH = "mitogen", "execnet", "asyncssh", "ssh cat"
SUBJECTS = [OURS, PUBLISHED, MITOGEN, EXECNET, ASYNCSSH, SSH]

TRIPS = "round trips"
PLAIN_SSH = "ssh, compression off"
HUGE = 200 * 10**6
PUT_HUGE, GET_HUGE = "put_file 200 MB", "get_file 200 MB"
FAR = "orchestrator, 4 hosts x 50 files, 50 ms"
NEAR = "orchestrator, 4 hosts x 50 files, 0 ms"
MANY = "orchestrator, 40 hosts x 3 files, 50 ms"
ONE_FILE = "repair, median of one file"
COLD = "connect and all the first operations"


class Figures:
    """
    Samples by place, figure and subject.
    """

    def __init__(self) -> None:
        self.samples: dict[tuple[str, str, str], list[float]] = collections.defaultdict(list)
        self.failures: dict[tuple[str, str, str], str] = {}
        self.skipped: list[str] = []

    def add(self, place: str, figure: str, subject: str, value: float) -> None:
        self.samples[place, figure, subject].append(value)

    def fail(self, place: str, figure: str, subject: str, why: str) -> None:
        self.failures[place, figure, subject] = why

    def value(self, place: str, figure: str, subject: str = OURS) -> float | None:
        """Return the median, and of round trips the minimum: noise can only add to them."""
        samples = self.samples.get((place, figure, subject))
        if not samples:
            return None
        return min(samples) if place == TRIPS else statistics.median(samples)

    def ratio(
        self, place: str, figure: str, subject: str = OURS, against: str = PUBLISHED
    ) -> float | None:
        ours, theirs = (self.value(place, figure, name) for name in (subject, against))
        return ours / theirs if ours is not None and theirs else None

    def both(self, place: str, figure: str) -> str:
        """Return the figure of this module, and that of the published one in parentheses."""
        ours, theirs = (
            shown(place, figure, self.value(place, figure, name)) for name in (OURS, PUBLISHED)
        )
        return f"{ours or 'not measured'} (0.2.5: {theirs or 'not measured'})"

    def rows(self) -> list[tuple[str, str]]:
        keys = [*self.samples, *self.failures]
        return list(dict.fromkeys((place, figure) for place, figure, _ in keys))


def shown(place: str, figure: str, value: float | None) -> str:
    if value is None:
        return ""
    if place == TRIPS or figure.startswith("threads"):
        return f"{value:.0f}"
    if figure.endswith((": here", ": there", ": memory")) or figure.startswith("memory"):
        return f"{value / 1e6:.1f} MB"
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.2f} s"


@dataclasses.dataclass
class Target:
    """
    A ratio that is to be reached: what it is, None where it was not measured, and what it may be.
    """

    place: str
    title: str
    ratio: float | None
    limit: float

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return "not measured"
        return "met" if self.ratio <= self.limit else "NOT MET"


def targets(figures: Figures) -> list[Target]:
    found = [Target(FAR, f"{ONE_FILE} / published", figures.ratio(FAR, ONE_FILE), 0.5)]
    for place in ("local", "ssh"):
        new = f"{place}, new process"
        found.append(Target(new, f"{COLD} / published", figures.ratio(new, COLD), 0.97))
        found.append(Target(new, "connect / published", figures.ratio(new, "connect"), 1.03))
        limits = {"put 1 kB": 1.2, "run true": 1.05}
        for what in ("exists", "stat", "hash", "read 1 kB", "chmod", "put 1 kB", "run true"):
            limit = limits.get(what, 1.0)
            found.append(Target(place, f"{what} / published", figures.ratio(place, what), limit))
        large = {"put": 0.17, "read": 0.45} if place == "ssh" else {"put": 0.1, "read": 0.1}
        for what, limit in large.items():
            ratio = figures.ratio(place, f"{what} 20 MB")
            found.append(Target(place, f"{what} 20 MB / published", ratio, limit))
        answer = figures.value(place, "answer of 20,000 dicts")
        own = figures.value(place, "answer of 20,000 dicts: mitogen's own")
        ratio = answer / own if answer and own else None
        found.append(Target(place, "answer of 20,000 dicts / mitogen's own", ratio, 3.0))
    for what in ("put", "read"):
        ratio = figures.ratio(PLAIN_SSH, f"{what} 20 MB", against=SSH)
        found.append(Target(PLAIN_SSH, f"{what} 20 MB / ssh cat", ratio, 1.3))
    for what in (PUT_HUGE, GET_HUGE):
        ends = [figures.value(PLAIN_SSH, f"{what}: {end}") for end in ("here", "there")]
        ratio = max(end or 0 for end in ends) / HUGE if None not in ends else None
        found.append(Target(PLAIN_SSH, f"extra memory of {what} / its size", ratio, 0.05))
    return found


HEADER = ["where", "what", *SUBJECTS, "this / published"]
TARGET_HEADER = ["where", "ratio", "measured", "at most", ""]


def table_rows(figures: Figures) -> list[list[str]]:
    rows = []
    for place, figure in figures.rows():
        row = [place, figure]
        for subject in SUBJECTS:
            failed = (place, figure, subject) in figures.failures
            value = figures.value(place, figure, subject)
            row.append("fails" if failed and value is None else shown(place, figure, value))
        ratio = figures.ratio(place, figure)
        rows.append([*row, "" if ratio is None else f"{ratio:.2f}"])
    return rows


def target_rows(some: list[Target]) -> list[list[str]]:
    return [
        [
            target.place,
            target.title,
            "" if target.ratio is None else f"{target.ratio:.3f}",
            f"{target.limit:g}",
            target.verdict,
        ]
        for target in some
    ]


def aligned(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_text(figures: Figures) -> str:
    measured = [target for target in targets(figures) if target.ratio is not None]
    parts = [aligned(HEADER, table_rows(figures)), aligned(TARGET_HEADER, target_rows(measured))]
    parts += [f"skipped: {line}" for line in figures.skipped]
    parts += [f"fails: {', '.join(key)}: {why}" for key, why in figures.failures.items()]
    return "\n\n".join(parts)


def summary(figures: Figures) -> list[str]:
    """Return what a person wants to know, losses included."""
    trips = [f"{name} {figures.both(TRIPS, f'converged {name}')}" for name in _TYPES]
    operations = [figures.ratio("ssh", what) for what in _OPERATIONS]
    known = [ratio for ratio in operations if ratio is not None]
    losses = [
        f"{place}: {figure} {figures.both(place, figure)}"
        for place, figure in figures.rows()
        if (figures.ratio(place, figure) or 0) > 1.05 and place in _PLACES and ":" not in figure
    ]
    both = figures.both
    return [
        f"Round trips for a resource that is as it should be: {', '.join(trips)}.",
        f"Round trips for a new fs::File: {both(TRIPS, 'new fs::File')}; to connect:"
        f" {both(TRIPS, 'connect')}, and for the first call {both(TRIPS, 'first call')}.",
        "An orchestrator that repairs 200 files on 4 hosts, 50 ms there and back:"
        f" {both(FAR, 'repair')}; one file takes {both(FAR, ONE_FILE)}.",
        f"The same without delay: {both(NEAR, 'repair')}; its first deploy"
        f" {both(NEAR, 'first deploy')}.",
        f"The first deploy on 40 hosts, 3 files each, 50 ms: {both(MANY, 'first deploy')}; its"
        f" agents take {both(MANY, 'processor time of the agents')} of processor time and"
        f" {both(MANY, 'memory of the agents')}.",
        "Connecting and the first exists, stat, hash, read, put and run of a new process over ssh:"
        f" {both('ssh, new process', COLD)}.",
        f"The small operations over ssh take {min(known, default=0):.2f} to"
        f" {max(known, default=0):.2f} times what they take in 0.2.5.",
        f"20 MB over ssh: put {both('ssh', 'put 20 MB')}, read {both('ssh', 'read 20 MB')}.",
        f"20 connections at once over ssh, each: {both('ssh', '20 connections, each: seconds')} and"
        f" {both('ssh', '20 connections, each: memory')}.",
        f"Slower than 0.2.5 by more than a twentieth: {'; '.join(losses) or 'nothing'}.",
    ]


_TYPES = ("fs::File", "files::TextFile", "fs::Symlink")
_OPERATIONS = ("exists", "stat", "hash", "read 1 kB", "put 1 kB", "chmod", "run true", "call")
_PLACES = (
    "local",
    "ssh",
    "local, new process",
    "ssh, new process",
    "agent",
    TRIPS,
    FAR,
    NEAR,
    MANY,
)

BARS = {
    (TRIPS, "converged fs::File"): "round trips, fs::File as it should be",
    (FAR, ONE_FILE): "orchestrator at 50 ms: repair of a file",
    (FAR, "first deploy"): "orchestrator at 50 ms: first deploy",
    (NEAR, "repair"): "orchestrator at 0 ms: repair",
    ("ssh, new process", COLD): "new process: connect and first calls",
    ("ssh", "exists + stat + hash"): "ssh: exists, stat and hash",
    ("ssh", "put 1 kB"): "ssh: put 1 kB",
    ("ssh", "run true"): "ssh: run a command",
    ("ssh", "put 20 MB"): "ssh: put 20 MB",
    ("ssh", "read 20 MB"): "ssh: read 20 MB",
}

_STYLE = (
    "text { font: 13px sans-serif; fill: #222 } .bar { fill: #2b7bba } .loss { fill: #c0562b }"
    " line { stroke: #888; stroke-dasharray: 4 3 }"
    " @media (prefers-color-scheme: dark) { text { fill: #ddd } .bar { fill: #58a6dd }"
    " .loss { fill: #e08a5f } }"
)


def picture(figures: Figures) -> str:
    """Return an SVG of this module's figures, as shares of the published one's."""
    rows = [(title, *key, figures.ratio(*key)) for key, title in BARS.items()]
    bars = [row for row in rows if row[3] is not None]
    left, unit, height = 270, 260, 26
    bottom = 34 + height * len(bars)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {bottom + 6}" role="img">',
        f"<title>This module compared with 0.2.5</title><style>{_STYLE}</style>",
        f'<text x="{left + unit}" y="18" text-anchor="middle">0.2.5 = 1; shorter is better</text>',
        f'<line x1="{left + unit}" y1="26" x2="{left + unit}" y2="{bottom}"/>',
    ]
    for number, (title, place, figure, ratio) in enumerate(bars):
        assert ratio is not None
        top = 32 + height * number
        width = min(ratio, 1.25) * unit
        kind = "bar" if ratio <= 1 else "loss"
        ours, theirs = (
            shown(place, figure, figures.value(place, figure, name)) for name in (OURS, PUBLISHED)
        )
        parts += [
            f'<text x="{left - 8}" y="{top + 14}" text-anchor="end">{html.escape(title)}</text>',
            f'<rect class="{kind}" x="{left}" y="{top}" width="{width:.0f}" height="18"/>',
            f'<text x="{left + max(width, unit) + 8:.0f}" y="{top + 14}">'
            f"{ours}, 0.2.5: {theirs}</text>",
        ]
    return "\n".join([*parts, "</svg>", ""])


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(directory: pathlib.Path, figures: Figures, about: str) -> None:
    """Write the page and its picture."""
    (directory / "benchmarks.svg").write_text(picture(figures))
    parts = [
        "# Benchmarks",
        "\n".join(f"- {line}" for line in summary(figures)),
        "![This module compared with 0.2.5](benchmarks.svg)",
        f"Written by `make bench`, which measures all of it in turn, in one run: {about}.",
        "## Ratios that are to be reached",
        markdown(TARGET_HEADER, target_rows(targets(figures))),
        "The connection is taken off `ssh cat` by counting from when the command on the host says"
        " that it is there. Memory is by how much the peak of the worse of the two ends rises."
        " Contents are random bytes, which no compression makes smaller.",
        "## All figures",
        "<details>\n<summary>The whole table</summary>",
        markdown(HEADER, table_rows(figures)),
        "</details>",
    ]
    parts += [f"- skipped: {line}" for line in figures.skipped]
    parts += [f"- {', '.join(key)} fails: `{why}`" for key, why in figures.failures.items()]
    (directory / "benchmarks.md").write_text("\n\n".join(parts) + "\n")
