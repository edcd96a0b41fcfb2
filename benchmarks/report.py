"""
What was measured, as a table for the terminal, a page and a chart.
"""

import collections
import dataclasses
import pathlib
import statistics
import typing

OURS, PUBLISHED = "this module", "published 0.2.5"
SUBJECTS = [OURS, PUBLISHED, "mitogen", "execnet", "asyncssh", "ssh cat"]


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

    def median(self, place: str, figure: str, subject: str) -> float | None:
        samples = self.samples.get((place, figure, subject))
        return statistics.median(samples) if samples else None

    def rows(self) -> list[tuple[str, str]]:
        keys = [*self.samples, *self.failures]
        return list(dict.fromkeys((place, figure) for place, figure, _ in keys))


@dataclasses.dataclass
class Target:
    """
    A ratio that is to be reached.

    :param place: where
    :param title: what is compared with what
    :param ratio: what it is, None where it could not be measured
    :param limit: what it may be at most
    :param profile: what to profile when it is more
    """

    place: str
    title: str
    ratio: float | None
    limit: float
    profile: dict[str, typing.Any]

    @property
    def met(self) -> bool:
        return self.ratio is not None and self.ratio <= self.limit

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return "not measured"
        return "met" if self.met else "NOT MET"


def targets(figures: Figures, in_flight: int, huge: int) -> list[Target]:
    off = "ssh, compression off"

    def ratio(
        place: str, figure: str, subject: str, against: str, other: str | None = None
    ) -> float | None:
        ours = figures.median(place, figure, subject)
        theirs = figures.median(place, other or figure, against)
        return ours / theirs if ours is not None and theirs else None

    def memory(figure: str) -> float | None:
        ends = [figures.median(off, f"{figure}: {end}", OURS) for end in ("here", "there")]
        return max(end or 0 for end in ends) / huge if all(e is not None for e in ends) else None

    size = {"size": 20 * 10**6, "times": 3}
    put, read = {"figure": "put", **size}, {"figure": "read", **size}
    call = {"figure": "call", "count": 300, "times": 1}
    flight = {"figure": "in_flight", "count": in_flight, "times": 3}
    many = f"{in_flight} calls"
    one_call = ("call: call", OURS, OURS, "call: bare")
    all_calls = (f"{many}, in flight", OURS, OURS, f"{many}, one by one")
    second = ("first call, on the second", OURS, PUBLISHED)
    sudo = "sudo via ssh"
    found = [
        (off, "put 20 MB / ssh cat", ratio(off, "put 20 MB", OURS, "ssh cat"), 1.3, put),
        (off, "read 20 MB / ssh cat", ratio(off, "read 20 MB", OURS, "ssh cat"), 1.3, read),
    ]
    for place, limits in (("ssh", (0.17, 0.45)), ("local", (0.1, 0.1))):
        for what, limit, profile in zip(("put", "read"), limits, (put, read), strict=True):
            value = ratio(place, f"{what} 20 MB", OURS, PUBLISHED)
            found.append((place, f"{what} 20 MB / published", value, limit, profile))
    for what in ("put_file", "get_file"):
        value = memory(f"{what} 200 MB")
        found.append((off, f"extra memory of {what} 200 MB / its size", value, 0.05, {}))
    found += [
        ("ssh", "one call / mitogen's own", ratio("ssh", *one_call), 1.05, call),
        ("local", "one call / mitogen's own", ratio("local", *one_call), 1.1, call),
        ("ssh", f"{many} in flight / one by one", ratio("ssh", *all_calls), 0.2, flight),
        ("ssh", "first call of a second connection / published", ratio("ssh", *second), 0.3, {}),
        (
            sudo,
            "connect of a second sudo context / published",
            ratio(sudo, "connect, the second", OURS, PUBLISHED),
            0.4,
            {},
        ),
    ]
    return [Target(*row) for row in found]


def shown(figure: str, value: float | None) -> str:
    if value is None:
        return ""
    if figure.endswith((": here", ": there", ": memory")):
        return f"{value / 1e6:.1f} MB"
    return f"{value * 1000:.2f} ms" if value < 1 else f"{value:.2f} s"


def table_rows(figures: Figures) -> list[list[str]]:
    rows = []
    for place, figure in figures.rows():
        row = [place, figure]
        for subject in SUBJECTS:
            failed = (place, figure, subject) in figures.failures
            value = figures.median(place, figure, subject)
            row.append("fails" if failed and value is None else shown(figure, value))
        ours, theirs = (figures.median(place, figure, name) for name in (OURS, PUBLISHED))
        row.append(f"{ours / theirs:.2f}" if ours is not None and theirs else "")
        rows.append(row)
    return rows


HEADER = ["where", "what", *SUBJECTS, "this / published"]
TARGET_HEADER = ["where", "ratio", "measured", "at most", ""]


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


def as_text(figures: Figures, some: list[Target]) -> str:
    parts = [aligned(HEADER, table_rows(figures)), aligned(TARGET_HEADER, target_rows(some))]
    parts += [f"skipped: {line}" for line in figures.skipped]
    parts += [f"fails: {', '.join(key)}: {why}" for key, why in figures.failures.items()]
    return "\n\n".join(parts)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(
    directory: pathlib.Path,
    figures: Figures,
    some: list[Target],
    profiles: dict[str, str],
    about: str,
) -> None:
    directory.mkdir(exist_ok=True)
    chart(directory / "benchmarks.svg", figures)
    parts = [
        "# Benchmarks",
        "Written by `make bench`, which measures all of these in turn, in one run, on this machine:"
        f" {about}. Contents are random bytes, which no compression makes smaller.",
        "![What a put, a read and a call take](benchmarks.svg)",
        "## Ratios that are to be reached",
        markdown(TARGET_HEADER, target_rows(some)),
        "The connection is taken off `ssh cat` by counting from when the command on the host says"
        " that it is there. Memory is by how much the peak of the worse of the two ends rises.",
    ]
    for title, profile in profiles.items():
        parts += [f"### Where the time goes: {title}", f"```text\n{profile}\n```"]
    parts += ["## All figures", markdown(HEADER, table_rows(figures))]
    parts += [f"- skipped: {line}" for line in figures.skipped]
    parts += [f"- {', '.join(key)} fails: `{why}`" for key, why in figures.failures.items()]
    (directory / "benchmarks.md").write_text("\n\n".join(parts) + "\n")


CHARTS = [
    ("put 20 MB", ["local", "ssh", "ssh, compression off", "sudo via ssh"], "seconds"),
    ("read 20 MB", ["local", "ssh", "ssh, compression off", "sudo via ssh"], "seconds"),
    ("connect, the second", ["local", "ssh", "sudo via ssh"], "seconds"),
    ("call: call", ["local", "ssh", "sudo via ssh"], "seconds"),
]


def chart(path: pathlib.Path, figures: Figures) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    colors = dict(zip(SUBJECTS, pyplot.get_cmap("tab10").colors, strict=False))
    for axes, (what, places, unit) in zip(all_axes.flat, CHARTS, strict=True):
        position, ticks = 0.0, []
        for place in places:
            found = [(name, figures.median(place, what, name)) for name in SUBJECTS]
            bars = [(name, value) for name, value in found if value is not None]
            ticks.append((position + (len(bars) - 1) / 2, place.replace(", ", ",\n")))
            for name, value in bars:
                axes.bar(position, value, color=colors[name], width=0.9)
                axes.annotate(shown("", value), (position, value), ha="center", va="bottom", size=6)
                position += 1
            position += 1
        axes.set_xticks([at for at, _ in ticks], [label for _, label in ticks])
        axes.set_title(what.removesuffix(": call"))
        axes.set_ylabel(f"{unit}, logarithmic")
        axes.set_yscale("log")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colors[name]) for name in SUBJECTS]
    figure.legend(handles, SUBJECTS, loc="outside upper center", ncols=len(SUBJECTS))
    figure.savefig(path)
    pyplot.close(figure)
