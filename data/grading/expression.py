"""LaTeX expressions as trees.

An expression that is not understood in full raises NotUnderstood: nothing is skipped, so no part
of an answer goes unread. data/grading/values.py says what a tree is worth.
"""

import re
from fractions import Fraction

from data.grading.tokens import FUNCTIONS, GREEK, NotUnderstood, Token

MAX_DEPTH = 40
ACCENTS = "vec hat bar dot ddot tilde overline overrightarrow mathbf mathit mathcal mathbb mathrm boldsymbol bm".split()
BRACKETS = {
    "(": ")",
    "[": "]",
    "{": "}",
    "\\{": "\\}",
    "|": "|",
    "\\lfloor": "\\rfloor",
    "\\lceil": "\\rceil",
    "\\langle": "\\rangle",
}


def read(items: list[Token]) -> tuple:
    """The tree of an expression: nested tuples ("num", Fraction), ("sym", name), ("const", "pi"),
    ("add", …), ("pow", base, exponent), …"""
    if not items:
        raise NotUnderstood("nothing")
    reader = _Reader(items)
    tree = reader.sum()
    if reader.next is not None:
        raise NotUnderstood(reader.next.text)
    return tree


class _Reader:
    """Recursive descent over tokens. Each method reads one kind of thing from where the reader
    stands and returns its tree."""

    def __init__(self, items):
        self.items, self.at, self.depth, self.bars = list(items), 0, 0, 0

    @property
    def next(self):
        return self.items[self.at] if self.at < len(self.items) else None

    def sees(self, *texts):
        return (
            self.next is not None
            and self.next.kind in ("symbol", "command", "word")
            and self.next.text in texts
        )

    def take(self, *texts):
        """The next token, which has to be one of these if any are named."""
        if self.next is None or (texts and not self.sees(*texts)):
            raise NotUnderstood(f"no {texts} here")
        self.at += 1
        return self.items[self.at - 1]

    def sum(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotUnderstood("nested too deeply")
        sign = self.take().text if self.sees("+", "-") else "+"
        terms = [self.signed(sign, self.product())]
        while self.sees("+", "-"):
            sign = self.take().text
            if self.sees("+", "-"):
                raise NotUnderstood("two signs")
            terms.append(self.signed(sign, self.product()))
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("add", *terms)

    @staticmethod
    def signed(sign, tree):
        return ("mul", ("num", Fraction(-1)), tree) if sign == "-" else tree

    def product(self):
        result = self.power()
        while True:
            if self.sees("*"):
                self.take()
                result = ("mul", result, self.signed_power())
            elif self.sees("/"):
                self.take()
                divisor = self.divisor(self.signed_power(), result)
                result = ("div", result, divisor)
            elif self.starts_factor():
                result = self.implicit(result)
            else:
                return result

    def implicit(self, left):
        """left next: a product without a sign, or a mixed number."""
        before, after = self.items[self.at - 1], self.items[self.at + 1 : self.at + 2]
        if self.next.kind == "number" and (
            before.kind == "number" or not (before.text == ")" or after and after[0].text == "^")
        ):
            raise NotUnderstood("a number behind a factor")  # but (n - 2) 2^n
        mixed = (
            left[0] == "num"
            and left[1].denominator == 1
            and before.kind == "number"
            and self.sees("\\frac")
        )
        right = self.power()
        if mixed and right[0] == "div" and right[1][0] == right[2][0] == "num":
            return ("add", left, right)
        return ("mul", left, right)

    def divisor(self, first, over):
        """What is divided by: 1/2 x is x/2 and t/RC is t/(RC); where readers disagree (1/2x, x/y
        z), nothing."""
        if not self.starts_factor():
            return first
        if first[0] == "num" and _is_number(over):
            if self.next.spaced or self.sees("(", "\\pi", "\\sqrt"):
                return first
            raise NotUnderstood("1/2x")
        while self.starts_factor():
            if self.next.kind != "letter" or self.next.spaced or first[0] == "num":
                raise NotUnderstood("an ambiguous divisor")
            first = ("mul", first, self.power())
        return first

    def signed_power(self):
        sign = self.take().text if self.sees("+", "-") else "+"
        return self.signed(sign, self.power())

    def starts_factor(self):
        token = self.next
        if token is None or token.text in ("or", "and", "mod", "base"):
            return False
        if token.kind in ("number", "letter", "word"):
            return True
        if token.kind == "command":
            return token.text not in (
                "\\}",
                "\\rfloor",
                "\\rceil",
                "\\rangle",
                "\\in",
                "\\cup",
                "\\cap",
                "\\setminus",
                "\\mid",
                "\\\\",
            )
        return token.text in ("(", "[", "{") or (token.text == "|" and not self.bars)

    def power(self):
        base = self.postfix(self.atom())
        if not self.sees("^"):
            return base
        self.take()
        return self.postfix(("pow", base, self.exponent()))

    def postfix(self, tree):
        if self.sees("!"):
            self.take()
            if self.sees("!", "="):
                raise NotUnderstood("!!")
            tree = ("fn", "factorial", tree)
        return tree

    def exponent(self):
        if self.sees("+", "-"):
            return self.signed(self.take().text, self.exponent())
        if self.sees("*", "'"):
            raise NotUnderstood("x^*")
        base = self.atom()
        if self.sees("^"):
            self.take()
            return ("pow", base, self.exponent())
        return self.postfix(base)

    def group(self, opening):
        """( … ) and the like, the brackets included."""
        self.take(opening)
        bars, self.bars = self.bars, opening == "|"
        inside = self.sum()
        self.take(BRACKETS[opening])
        self.bars = bars
        return inside

    def atom(self):
        token = self.next
        if token is None:
            raise NotUnderstood("the end")
        if token.kind == "number":
            self.take()
            if self.sees("_"):
                raise NotUnderstood("a numeral of another base")
            return ("num", Fraction(token.text.rstrip(".")))
        if token.kind == "letter":
            return self.letter()
        if token.kind == "text":
            self.take()
            return ("sym", f"text {token.text}")
        if token.kind == "word":
            return self.function()
        if self.sees("(", "[", "{"):
            return self.group(token.text)
        if self.sees("|"):
            return ("fn", "abs", self.group("|"))
        if token.kind == "command":
            return self.command()
        raise NotUnderstood(token.text)

    def single(self):
        """The argument of a command: a group, or one token; of a number its first digit."""
        if self.sees("{"):
            return self.group("{")
        token = self.next
        if (
            token is not None
            and token.kind == "number"
            and token.text.isdigit()
            and len(token.text) > 1
        ):
            self.items[self.at] = Token("number", token.text[1:], False)
            return ("num", Fraction(token.text[0]))
        return self.atom()

    def letter(self):
        name = self.take().text
        if name in "ei" and not self.sees("_", "'"):
            return ("const", name)
        return self.applied(self.subscripted(name))

    def subscripted(self, name):
        if self.sees("_"):
            self.take()
            name += "_" + self.raw_group()
        while self.sees("'"):
            name += self.take().text
        return name

    def raw_group(self):
        """The text of a group or of one token, as part of a name."""
        if not self.sees("{"):
            return self.take().text
        depth, parts = 0, []
        while True:
            token = self.take()
            depth += {"{": 1, "}": -1}.get(token.text, 0)
            if depth == 0:
                return " ".join(parts)
            if token.text != "{" or depth > 1:
                parts.append(token.text)

    def applied(self, name):
        """f(x): a function's value where the name is one of a function's, or where one number or
        symbol stands in the parentheses."""
        if not self.sees("("):
            return ("sym", name)
        inside = self.items[self.at + 1 : self.at + 3]
        lone = (
            len(inside) == 2
            and inside[1].text == ")"
            and (inside[0].kind in ("number", "letter") or inside[0].text[1:] in GREEK)
        )
        if not lone and name[0] not in "fghFGH":
            return ("sym", name)
        return ("fn", f"unknown {name}", *self.arguments())

    def arguments(self):
        """( … , … )"""
        self.take("(")
        found = [self.sum()]
        while self.sees(","):
            self.take()
            found.append(self.sum())
        self.take(")")
        return found

    def command(self):
        name = self.take().text[1:]
        if name in ("pi", "infty"):
            return ("const", name)
        if name == "arcdegree":
            return ("div", ("const", "pi"), ("num", Fraction(180)))
        if name in ("max", "min"):
            return ("fn", name, *self.arguments())
        if name in GREEK:
            return self.applied(self.subscripted("\\" + name))
        if name == "frac":
            return self.fraction()
        if name == "sqrt":
            return self.root()
        if name == "binom":
            return ("fn", "binomial", self.single(), self.single())
        if name in ("lfloor", "lceil"):
            self.at -= 1
            return ("fn", name[1:], self.group("\\" + name))
        if name in ACCENTS:
            return self.applied(self.subscripted(f"{name} {self.raw_group()}"))
        raise NotUnderstood("\\" + name)

    def fraction(self):
        raw = " ".join(t.text for t in self.items[self.at : self.at + 12])
        derivative = re.match(
            r"\{? ?(?:d|\\partial)\b(?: \^ \{? ?\d ?\}?)? ?([^{}]*?) ?\}? \{ (?:d|\\partial) (\S+)(?: \^ \{? ?\d ?\}?)? \}",
            raw,
        )
        if derivative:  # a symbol of its own, not d times something
            over, under = self.raw_group(), self.raw_group()
            return ("sym", f"derivative {over} / {under}")
        return ("div", self.single(), self.single())

    def root(self):
        degree = ("num", Fraction(2))
        if self.sees("["):
            degree = self.group("[")
        inside = self.group("(") if self.sees("(") else self.atom()
        return ("pow", inside, ("div", ("num", Fraction(1)), degree))

    def function(self):
        name = self.take().text
        if name not in FUNCTIONS:
            raise NotUnderstood(name)
        power = base = None
        while self.sees("^", "_"):
            if self.take().text == "^":
                power = self.exponent()
            else:
                base = self.single() if self.sees("{") else self.atom()
        if base is not None and name != "log":
            raise NotUnderstood("a base")
        argument = self.argument()
        if (
            power == ("mul", ("num", Fraction(-1)), ("num", Fraction(1)))
            and "arc" + name in FUNCTIONS
        ):
            name, power = "arc" + name, None
        tree = ("fn", name, argument)
        if name == "lg":
            tree, base = ("fn", "log", argument), ("num", Fraction(10))
        if base is not None:
            tree = ("div", tree, ("fn", "log", base))
        return tree if power is None else ("pow", tree, power)

    def argument(self):
        """What a function without braces is of: a group, or the product that follows up to the next
        function or parenthesis."""
        if self.sees("(", "{", "[", "|"):
            return ("fn", "abs", self.group("|")) if self.sees("|") else self.group(self.next.text)
        sign = self.take().text if self.sees("+", "-") else "+"
        factors = [self.power()]
        while (
            self.starts_factor()
            and self.next.kind in ("letter", "number", "command")
            and not self.sees("(", "\\lfloor")
        ):
            if self.next.kind == "number":
                raise NotUnderstood("a number behind a factor")
            factors.append(self.power())
        if self.sees("/"):
            raise NotUnderstood("an ambiguous argument")
        return self.signed(sign, factors[0] if len(factors) == 1 else ("mul", *factors))


def _is_number(tree):
    return tree[0] == "num" or (tree[0] == "mul" and all(_is_number(part) for part in tree[1:]))


def symbols(tree: tuple) -> set[str]:
    """The names of all variables of an expression, unknown functions among them."""
    if tree[0] == "sym":
        return {tree[1]}
    named = {tree[1]} if tree[0] == "fn" and tree[1].startswith("unknown") else set()
    return named.union(*(symbols(part) for part in tree[1:] if isinstance(part, tuple)))
