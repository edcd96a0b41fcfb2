"""
Counts lines of code, without blank lines, comments and docstrings, and the longest function.

    python tools/code_lines.py [FOLDER]
"""

import ast
import io
import pathlib
import sys
import tokenize

PARTS = {
    "agent": ["inmanta_plugins"],
    "host": ["inmanta_mitogen"],
    "tests": ["tests"],
    "demo, tools, benchmarks": ["demo", "tools", "benchmarks", "testbed", "noxfile.py"],
    "pytest plugin": ["pytest_inmanta_mitogen"],
}
_NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)
_HAVE_DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstring_lines(tree: ast.AST) -> set[int]:
    """Return the lines of all strings that stand alone, so of docstrings and of attributes'."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, _HAVE_DOCSTRINGS)
        for statement in node.body
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        for line in range(statement.lineno, (statement.end_lineno or 0) + 1)
    }


def code_lines(source: str) -> set[int]:
    """Return the numbers of the lines that hold code."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {
        line
        for token in tokens
        if token.type not in _NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    return lines - docstring_lines(ast.parse(source))


def longest_function(path: pathlib.Path) -> tuple[int, str]:
    """Return the code lines of the longest function in a file, and its name."""
    source = path.read_text()
    lines = code_lines(source)
    return max(
        (
            (len(lines & {*range(node.lineno, (node.end_lineno or 0) + 1)}), f"{path}:{node.name}")
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ),
        default=(0, ""),
    )


def python_files(place: pathlib.Path) -> list[pathlib.Path]:
    """Return a file, or all those in a folder."""
    found = [place] if place.suffix == ".py" else sorted(place.rglob("*.py"))
    return [file for file in found if file.exists()]


def main(root: pathlib.Path) -> None:
    """Print a line for each part."""
    for part, places in PARTS.items():
        files = [file for place in places for file in python_files(root / place)]
        total = sum(len(code_lines(file.read_text())) for file in files)
        size, name = max(map(longest_function, files))
        print(f"{part:24} {total:6} lines of code, longest function {size} ({name})")


main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "."))
