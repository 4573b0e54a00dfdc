"""The README's table of equations and lines of code. `uv run tests/test_readme.py` sets moved lines right."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\| `(?P<function>\w+)` \| \[`(?P<code>.+?)`\]\((?P<file>\w+\.py)#L(?P<line>\d+)\) \|")
EQUATIONS = [f"({n})" for n in range(1, 11)] + ["Alg. 1, 8", "Alg. 1, 10"]  # of version 4


def rows():
    """The table's rows: a match of LINK for each."""
    return list(LINK.finditer((ROOT / "README.md").read_text(encoding="utf-8")))


def find_line(row):
    """The line of the row's file that has the row's code, and nothing but a comment more, in the row's function."""
    text = (ROOT / row["file"]).read_text(encoding="utf-8")
    (function,) = (f for f in ast.parse(text).body if isinstance(f, ast.FunctionDef) and f.name == row["function"])
    lines = enumerate(text.splitlines()[function.lineno - 1 : function.end_lineno], function.lineno)
    (number,) = (n for n, line in lines if line.split("  # ")[0].strip() == row["code"])
    return number


def test_the_table_has_every_equation_once():
    lines = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if LINK.search(line)]
    found = [name for line in lines for name in re.findall(r"\(\d+\)|Alg\. 1, \d+", line.split(" | ")[0])]
    assert sorted(found) == sorted(EQUATIONS)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["function"])
def test_an_equation_stands_in_the_line_that_the_table_names(row):
    found = find_line(row)
    assert int(row["line"]) == found, f"{row['function']} is at {row['file']}#L{found}; run tests/test_readme.py"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(LINK.sub(lambda row: re.sub(r"#L\d+\)", f"#L{find_line(row)})", row[0]), text), encoding="utf-8")
