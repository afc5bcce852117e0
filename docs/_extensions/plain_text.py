r"""Equations in plain text, as docstrings have them.

Terms that stand side by side are multiplied, which binds closer than ``/``. ``a_k``, ``a_(k in j)`` and ``a^2`` are
indices and powers, ``a'`` is a prime, ``|a|`` an absolute value, and ``a if b >= c else d`` tells cases apart. Greek
letters go by their names; any other word of several letters, such as ``ReLU``, is a name, and may have hyphens.
"""

import re

_TOKEN = re.compile(r"\s*([A-Za-z]+(?:-[A-Za-z]+)*|\d+(?:\.\d+)?|>=|<=|\S)")
_RELATIONS = {"=": "=", "<": "<", ">": ">", "<=": r"\le", ">=": r"\ge", "in": r"\in"}
_NAMES = {
    "max": r"\max",
    "min": r"\min",
    "product": r"\prod",
    "sum": r"\sum",
    **{name: rf"\{name}" for name in ("alpha", "beta", "gamma", "sigma", "tau", "theta")},
}


class _Line:
    """A line of plain text, read from left to right."""

    def __init__(self, line: str) -> None:
        self._line = line
        self._tokens = [*_TOKEN.findall(line), ""]
        self._inside_bars = False

    def equation(self, align: str = "") -> str:
        """The whole line in LaTeX, with a mark before its first relation."""
        latex = self._relation(align)
        self._take("")
        return latex

    def _take(self, expected: str | None = None) -> str:
        token = self._tokens.pop(0)
        if expected is not None and token != expected:
            raise self._error(repr(expected) if expected else "its end", token)
        return token

    def _error(self, expected: str, token: str) -> ValueError:
        return ValueError(f"{self._line!r} is no equation: {expected} was expected, not {token!r}")

    def _relation(self, align: str = "") -> str:
        latex = self._cases()
        while self._tokens[0] in _RELATIONS:
            latex += f" {align}{_RELATIONS[self._take()]} {self._cases()}"
            align = ""
        return latex

    def _cases(self) -> str:
        value = self._sum()
        if self._tokens[0] != "if":
            return value
        self._take("if")
        condition = self._relation()
        self._take("else")
        return rf"\begin{{cases}} {value} & \text{{if }} {condition} \\ {self._sum()} & \text{{else}} \end{{cases}}"

    def _sum(self) -> str:
        latex = self._take() if self._tokens[0] == "-" else ""
        latex += self._quotient()
        while self._tokens[0] in ("+", "-"):
            latex += f" {self._take()} {self._quotient()}"
        return latex

    def _quotient(self) -> str:
        factors = self._product()
        if self._tokens[0] != "/":
            return "".join(factors)
        self._take("/")
        return rf"\frac{{{_in_fraction(factors)}}}{{{_in_fraction(self._product())}}}"

    def _product(self) -> list[str]:
        factors = [self._factor()]
        while self._begins_factor():
            factors += [*([] if self._tokens[0] == "(" else [r"\,"]), self._factor()]
        return factors

    def _begins_factor(self) -> bool:
        token = self._tokens[0]
        if token == "|":
            return not self._inside_bars
        return (token[:1].isalnum() and token not in ("if", "else", "in")) or token == "("

    def _factor(self) -> str:
        latex = self._atom()
        for mark in "_^":
            if self._tokens[0] == mark:
                self._take(mark)
                latex += f"{mark}{{{self._group() if self._tokens[0] == '(' else self._atom()}}}"
        while self._tokens[0] == "'":
            self._take("'")
            latex += r"^\prime"
        return latex

    def _atom(self) -> str:
        token = self._tokens[0]
        if token == "(":
            inside = self._group()
            return rf"\left({inside}\right)" if r"\frac" in inside or r"\sum" in inside else f"({inside})"
        self._take()
        if token == "|":
            self._inside_bars = True
            inside = self._sum()
            self._inside_bars = False
            self._take("|")
            return rf"\left|{inside}\right|"
        if not token[:1].isalnum():
            raise self._error("a term", token)
        if token in _NAMES or len(token) == 1 or token[0].isdigit():
            return _NAMES.get(token, token)
        return rf"\text{{{token}}}"

    def _group(self) -> str:
        """What stands in parentheses, without them."""
        self._take("(")
        latex = self._relation()
        while self._tokens[0] == ",":
            self._take(",")
            latex += f", {self._relation()}"
        self._take(")")
        return latex


def _in_fraction(factors: list[str]) -> str:
    """A product without the parentheses around all of it: the bar of the fraction says what they do."""
    (latex, *more) = factors
    return "".join(factors) if more else re.sub(r"^(?:\\left)?\((.*?)(?:\\right)?\)$", r"\1", latex)


def as_latex(lines: str) -> str:
    r"""Equations, one a line, in LaTeX.

    Examples::

        >>> print(as_latex("L = sum_k w_k A_k"))
        L = \sum_{k}\,w_{k}\,A_{k}
        >>> print(as_latex("w = (y - y') / |y|"))
        w = \frac{y - y^\prime}{\left|y\right|}
        >>> print(as_latex("ReLU(sum_(k in j) g^2 / (2 alpha))"))
        \text{ReLU}\left(\frac{\sum_{k \in j}\,g^{2}}{2\,\alpha}\right)
        >>> print(as_latex("c = 1 if O > Y else 0"))
        c = \begin{cases} 1 & \text{if } O > Y \\ 0 & \text{else} \end{cases}
        >>> print(as_latex("A = w C\nF = max(A, -B)"))
        \begin{aligned} A &= w\,C \\ F &= \max(A, -B) \end{aligned}
        >>> as_latex("w = (g A")
        Traceback (most recent call last):
        ValueError: 'w = (g A' is no equation: ')' was expected, not ''
    """
    read = [_Line(line) for line in lines.splitlines()]
    if len(read) == 1:
        return read[0].equation()
    rows = r" \\ ".join(line.equation(align="&") for line in read)
    return rf"\begin{{aligned}} {rows} \end{{aligned}}"
