"""Makes docs/annotated.html: formulas beside the lines that compute them, figures, and a laboratory. No network.

    python -m docs.annotate

The words are in annotated.html.jinja, the figures in figures.py, the laboratory in laboratory.js. Code is taken from
the sources by the names of functions; the lines of equations are those of the README's table.
"""

import ast
import html
import os
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from latex2mathml.converter import convert

from docs import figures

DOCS = Path(__file__).resolve().parent
ROW = re.compile(r"^\| (?P<labels>[^|]+) \|[^|]*\| `(?P<name>\w+)` \| \[`(?P<code>.+?)`\]\((?P<file>\w+\.py)#", re.M)
PARTS = {  # other lines that belong to an equation: tag → file, function, how the line begins
    "eq. 6, draw": ("sampling.py", "rollout", "z = mean + std * "),
    "eq. 7, s": ("sampling.py", "ddim_sde_step", "std = "),
    "eq. 8, s": ("sampling.py", "flow_sde_step", "return Step("),
    "eq. 9, ratio": ("grpo_sd.py", "grpo_loss", "rho = "),
}
WORDS = "and as assert break class continue def del elif else except finally for from global if import in is lambda not"
WORDS += " None True False or pass raise return try while with yield"
TOKEN = re.compile(
    rf"""(?P<s>(?<!\w)[rbf]{{0,2}}(?:\"{{3}}[\s\S]*?\"{{3}}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'))
    |(?P<c>\#[^\n]*) |(?P<k>\b(?:{"|".join(WORDS.split())})\b) |(?P<n>\b\d[\w.]*) |(?P<d>^@[\w.]+)""",
    re.VERBOSE | re.MULTILINE,
)


# ------------------------------------------------------------------------------------------------------------- sources


def source(file: str) -> str:
    return (DOCS.parent / file).read_text(encoding="utf-8")


def find(file: str, name: str) -> tuple[int, list[str]]:
    """A function or class of a file by its name: the number of its first line, decorators included, and its lines."""
    (node,) = (x for x in ast.parse(source(file)).body if getattr(x, "name", None) == name)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return first, source(file).splitlines()[first - 1 : node.end_lineno]


def paragraph(first: int, lines: list[str], comment: str) -> tuple[int, list[str]]:
    """The part of a function from the only comment line that has these words to the next blank line."""
    (start,) = (i for i, line in enumerate(lines) if line.strip().startswith("#") and comment.lower() in line.lower())
    end = next((i for i in range(start, len(lines)) if not lines[i].strip()), len(lines))
    return first + start, lines[start:end]


@dataclass(frozen=True)
class Equation:
    label: str  # "7", or "line 8" of Algorithm 1
    file: str
    name: str  # of the function
    code: str  # the line, without indentation and comment
    number: int  # of the line

    @property
    def anchor(self) -> str:
        return f"eq-{self.label}".replace("eq-line ", "line-")

    @property
    def tag(self) -> str:
        return f"eq. {self.label}".replace("eq. line", "line")


def equations() -> dict[str, Equation]:
    """The line of each equation, as the README's table names them by function and code."""
    found = []
    for row in ROW.finditer(source("README.md")):
        first, lines = find(row["file"], row["name"])
        (number,) = (n for n, line in enumerate(lines, first) if line.split("  # ")[0].strip() == row["code"])
        labels = re.findall(r"\d+", row["labels"]) if row["labels"][0] == "(" else [row["labels"].split(", ")[1]]
        found += [Equation(label, row["file"], row["name"], row["code"], number) for label in labels]
    return {equation.label: equation for equation in found}


def parts() -> dict[tuple[str, int], str]:
    """(file, number) of each line of PARTS → its tag."""
    found = {}
    for tag, (file, name, beginning) in PARTS.items():
        first, lines = find(file, name)
        (number,) = (n for n, line in enumerate(lines, first) if line.strip().startswith(beginning))
        found[file, number] = tag
    return found


def highlight(text: str) -> list[str]:
    """The lines of Python code as HTML: strings, comments, words, numbers and decorators in spans."""
    done, end = [], 0
    for token in TOKEN.finditer(text):
        done.append(html.escape(text[end : token.start()], quote=False))
        pieces = html.escape(token[0], quote=False).split("\n")
        done.append("\n".join(f'<span class="{token.lastgroup}">{piece}</span>' for piece in pieces))
        end = token.end()
    return "".join([*done, html.escape(text[end:], quote=False)]).split("\n")


# ---------------------------------------------------------------------------------------------------------------- page


def formulas(text: str) -> str:
    """$inline$ and $$displayed$$ LaTeX as MathML; "$$…$$ (7)" links to the line of equation 7."""

    def displayed(match: re.Match) -> str:
        number = match[2] and f'<a href="#eq-{match[2]}" title="to the line">({match[2]})</a>'
        return f'<div class="equation" tabindex="0">{mathml(match[1], "block")}{number or ""}</div>'

    def inline(match: re.Match) -> str:  # with the punctuation that follows, on one line
        return f'<span class="nowrap">{mathml(match[1], "inline")}{match[2]}</span>'

    def mathml(latex: str, display: str) -> str:  # a raised prime is too small to see without a font for mathematics
        return convert(latex.replace("'", "\\text{\u2032}"), display=display)

    text = re.sub(r"\$\$(.+?)\$\$(?: \((\d+)\))?", displayed, text, flags=re.DOTALL)
    return re.sub(r"\$([^$]+)\$([.,;:)]*)", inline, text)


class Page:
    """What the template calls."""

    def __init__(self):
        self.equations, self.parts, self.anchors = equations(), parts(), set()

    def code(self, file: str, name: str, comment: str = "") -> str:
        """A function, or its part that begins with a comment, with line numbers and the equations' labels."""
        first, lines = find(file, name)
        twin = ""
        if file == "grpo_sd.py" and not comment and f"\ndef {name}(" in source("grpo_flux.py"):
            start, others = find("grpo_flux.py", name)
            same = others == lines
            twin = f" · the same in grpo_flux.py, lines {start} to {start + len(others) - 1}" if same else ""
        rows = highlight("\n".join(lines))
        if comment:
            begin, part = paragraph(first, lines, comment)
            rows, first = rows[begin - first : begin - first + len(part)], begin
        marked = "".join(self._line(file, number, row) for number, row in enumerate(rows, first))
        anchor = self._anchor(f"{file[:-3]}.{name}" + f".{comment}".replace(" ", "-") * bool(comment))
        where = f"lines {first} to {first + len(rows) - 1}"
        return (
            f'<figure class="code"{anchor}><figcaption><b>{name}</b> <a href="../{file}">{file}</a>, {where}{twin}'
            f'</figcaption><pre tabindex="0" role="region" aria-label="{name} of {file}"><code>{marked}</code></pre>'
            "</figure>"
        )

    def _line(self, file: str, number: int, row: str) -> str:
        here = [e for e in self.equations.values() if (e.file, e.number) == (file, number)]
        places = "".join(f"<a{self._anchor(e.anchor)}></a>" for e in here)
        tag = ", ".join(e.tag for e in here) or self.parts.get((file, number), "")
        tag = f' data-tag="{tag}"' * bool(tag)
        return f'<span class="l" data-n="{number}"{tag}>{places}{row}\n</span>'

    def _anchor(self, name: str) -> str:
        """An id, where a name first occurs."""
        new = name not in self.anchors
        self.anchors.add(name)
        return f' id="{name}"' if new else ""

    def line(self, label: str) -> str:
        """A link to the line of an equation, with its code."""
        e = self.equations[label]
        (code,) = highlight(e.code)
        return f'<a href="#{e.anchor}">{e.file} {e.number}</a> <code>{code}</code>'


def build() -> str:
    """The page. The same on the same machine, whenever it is built."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums do not depend on the number of cores
    try:
        drawn = {name: getattr(figures, name)() for name in ("marginals", "group", "ratios", "kl", "trajectory")}
    finally:
        torch.set_num_threads(threads)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    template = environment.from_string(formulas(source("docs/annotated.html.jinja")))
    return template.render(page=Page(), figures=drawn, prompt=figures.PROMPT, laboratory=source("docs/laboratory.js"))


if __name__ == "__main__":
    os.chdir(DOCS.parent)  # presets name folders relative to the repository
    (DOCS / "annotated.html").write_text(build(), encoding="utf-8")
    print(f"docs/annotated.html: {(DOCS / 'annotated.html').stat().st_size:,} bytes")
