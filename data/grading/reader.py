"""Answers in LaTeX as trees, read by recursive descent.

An expression is ("num", Fraction), ("sym", name), ("const", name), ("add" | "mul" | "div" | "pow",
tree, ...) or ("fn", name, tree, ...). Around expressions there are ("list", connectors, node, ...),
("relation", signs, node, ...), ("set", operations, node, ...), ("ratio", colons, node, ...),
("group", brackets, node), ("matrix", rows, node, ...) and ("pm", 1 or -1, node). What cannot be
read in full raises NotUnderstood: no part of an answer goes unread.
"""

from fractions import Fraction

from data.grading.numbers import GREEK, is_unit
from data.grading.tokens import FUNCTIONS, NotUnderstood, prepared, tokens

MAX_DEPTH = 40
ARITHMETIC = ("add", "mul", "div", "pow", "fn")
CONNECTORS = (",", ";", "or", "and", "\\lor", "\\land")
RELATIONS = ("=", "<", "<=", ">", ">=", "!=", "\\in")
BRACKETS = {
    "(": ")]",
    "[": ")]",
    "{": "}",
    "\\{": ["\\}"],
    "|": "|",
    "\\lfloor": ["\\rfloor"],
    "\\lceil": ["\\rceil"],
    "\\langle": ["\\rangle"],
}
_ACCENTS = "vec hat bar dot ddot tilde overline overrightarrow mathbf mathit mathcal mathbb mathrm"
ACCENTS = f"{_ACCENTS} bm".split()
MINUS_ONE = ("num", Fraction(-1))


def negative(tree: tuple) -> tuple:
    """The tree of the value with its sign changed."""
    return ("mul", MINUS_ONE, tree)


def read(text: str) -> tuple:
    """The tree of a whole answer."""
    reader = _Reader(tokens(prepared(text)))
    tree = reader.alternatives()
    if reader.next is not None:
        raise NotUnderstood(reader.next.text)
    return tree


class _Reader:
    """Each method reads one kind of thing from where the reader stands and returns its tree."""

    def __init__(self, items):
        self.items, self.at, self.depth, self.bars = items, 0, 0, False

    @property
    def next(self):
        return self.items[self.at] if self.at < len(self.items) else None

    def sees(self, *texts):
        return self.next is not None and self.next.kind == "sign" and self.next.text in texts

    def take(self, *texts):
        """The text of the next token, which has to be one of these signs if any are named."""
        if self.next is None or (texts and not self.sees(*texts)):
            raise NotUnderstood(f"no {texts} here")
        self.at += 1
        return self.items[self.at - 1].text

    # lists, relations, sets

    def alternatives(self):
        """What commas, "or" and "and" connect; a single thing is itself."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotUnderstood("nested too deeply")
        connectors, nodes = [], [self.relation()]
        while self.sees(*CONNECTORS):
            connectors.append(self.take())
            if self.sees("or", "and"):
                connectors.append(self.take())
            if self.next is not None:  # a comma may end the answer
                nodes.append(self.relation())
        self.depth -= 1
        return nodes[0] if len(nodes) == 1 else ("list", tuple(connectors), *nodes)

    def chain(self, kind, signs, read_one):
        """One thing, or several of them with signs between."""
        nodes, found = [read_one()], []
        while self.sees(*signs):
            found.append(self.take())
            nodes.append(read_one())
        return nodes[0] if not found else (kind, tuple(found), *nodes)

    def relation(self):
        return self.chain("relation", RELATIONS, self.set)

    def set(self):
        return self.chain("set", ("\\cup", "\\cap", "\\setminus"), self.ratio)

    def ratio(self):
        return self.chain("ratio", (":",), self.sum)

    # arithmetic

    def sum(self):
        terms = [self.term()]
        while self.sees("+", "-", "\\pm", "\\mp"):
            terms.append(self.term())
        self.unit()
        return terms[0] if len(terms) == 1 else ("add", *terms)

    def term(self):
        sign = self.take() if self.sees("+", "-", "\\pm", "\\mp") else "+"
        if self.sees("+", "-"):
            raise NotUnderstood("two signs")
        return self.signed(sign, self.product())

    @staticmethod
    def signed(sign, tree):
        if sign in ("\\pm", "\\mp"):
            return ("pm", 1 if sign == "\\pm" else -1, tree)
        return negative(tree) if sign == "-" else tree

    def unit(self):
        """Passes over the words behind a value: \\text{cm}^2, %."""
        while self.sees("%") or (self.at and self.next is not None and self.next.kind == "text"):
            word = self.take()
            if word != "%" and not is_unit(f" {word} "):
                raise NotUnderstood("words that are no unit")  # 3 or more
            if self.sees("^"):
                self.take()
                if self.atom() not in (("num", 2), ("num", 3)):
                    raise NotUnderstood("no power of a unit")

    def product(self):
        result = self.power()
        while True:
            if self.sees("*"):
                self.take()
                result = ("mul", result, self.signed_power())
            elif self.sees("/"):
                self.take()
                result = ("div", result, self.divisor(self.signed_power(), result))
            elif self.starts_factor():
                result = self.implicit(result)
            else:
                return result

    def implicit(self, left):
        """left next: a product without a sign, or a mixed number."""
        before, after = self.items[self.at - 1], self.items[self.at + 1 : self.at + 2]
        if self.next.kind == "number":
            if before.kind == "number" or not after or after[0].text != "^":
                raise NotUnderstood("a number behind a factor")  # but (n - 2) 2^n
        mixed = left[0] == "num" and before.text.isdigit() and self.sees("\\frac")
        right = self.power()
        if mixed and right[0] == "div" and right[1][0] == right[2][0] == "num":
            return ("add", left, right)
        return ("mul", left, right)

    def divisor(self, first, over):
        """What is divided by: 1/2 x is x/2; where readers disagree (1/2x, x/y z), nothing."""
        if self.starts_factor():
            clear = self.next.spaced or self.sees("(", "\\pi", "\\sqrt")
            if not (clear and first[0] == "num" and _is_number(over)):
                raise NotUnderstood("an ambiguous divisor")
        return first

    def signed_power(self):
        return self.signed(self.take() if self.sees("+", "-") else "+", self.power())

    def starts_factor(self):
        if self.next is None or self.next.kind != "sign":
            return self.next is not None and self.next.kind in ("number", "letter")
        text = self.next.text
        if text.startswith("\\"):
            ends = ("\\}", "\\\\", "\\cup", "\\cap", "\\setminus", "\\pm", "\\mp", "\\in")
            closing = text in ends or text.startswith("\\r") and text != "\\rho"
            return not closing and text not in CONNECTORS
        return text in (*FUNCTIONS, "(", "[", "{") or (text == "|" and not self.bars)

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
            return self.signed(self.take(), self.exponent())
        base = self.atom()
        if self.sees("^"):
            self.take()
            return ("pow", base, self.exponent())
        return self.postfix(base)

    def group(self, inside=None):
        """Brackets and what they hold: the tree itself where they are parentheses around one."""
        opening, bars = self.take(*BRACKETS), self.bars
        self.bars = opening == "|"
        if opening == "\\{" and self.sees("\\}"):
            self.take()
            return ("sym", "\\emptyset")
        tree = (inside or self.alternatives)()
        closing = self.take(*BRACKETS[opening])
        self.bars = bars
        if opening == "|":
            return ("fn", "abs", tree)
        if opening in ("\\lfloor", "\\lceil"):
            return ("fn", opening[2:], tree)
        plain = opening + closing in ("()", "[]", "{}") and tree[0] != "list"
        return tree if plain else ("group", opening + closing, tree)

    # what stands alone

    def atom(self):
        token = self.next
        if token is None:
            raise NotUnderstood("the end")
        if token.kind == "number":
            return ("num", Fraction(self.take().rstrip(".")))
        if token.kind == "text" and token.text:
            return ("sym", self.take())
        if token.kind == "letter":
            name = self.take()
            if name in "ei" and not self.sees("_", "'"):
                return ("const", name)
            return self.applied(self.subscripted(name))
        if token.kind == "matrix":
            return self.matrix()
        if self.sees(*BRACKETS):
            return self.group()
        if self.sees(*FUNCTIONS):
            return self.function()
        return self.command()

    def single(self):
        """The argument of a command: a group, or one token."""
        if self.next is not None and self.next.kind == "number" and len(self.next.text) > 1:
            raise NotUnderstood("a number whose first digit is meant")
        return self.atom()

    def subscripted(self, name):
        if self.sees("_"):
            self.take()
            name += "_" + self.raw_group()
        while self.sees("'"):
            name += self.take()
        return name

    def raw_group(self):
        """The text of a group or of one token, as part of a name."""
        if not self.sees("{"):
            return self.take()
        depth, parts = 0, []
        while depth or not parts:
            parts.append(self.take())
            depth += {"{": 1, "}": -1}.get(parts[-1], 0)
        return " ".join(parts[1:-1])

    def applied(self, name):
        """f(x): a function's value where the name is one of a function's, or where one number or
        symbol stands in the parentheses."""
        if not self.sees("("):
            return ("sym", name)
        lone = [token.text for token in self.items[self.at + 1 : self.at + 3]][1:] == [")"]
        if not lone and name[0] not in "fghFGH":
            return ("sym", name)
        return ("fn", f"unknown {name}", *self.arguments())

    def arguments(self):
        tree = self.group()
        return tree[2][2:] if tree[0] == "group" and tree[1] == "()" else [tree]

    def command(self):
        name = self.take()[1:]
        if name in ("pi", "infty"):
            return ("const", name)
        if name == "arcdegree":
            return ("div", ("const", "pi"), ("num", Fraction(180)))
        if name in GREEK or name == "emptyset":
            return self.applied(self.subscripted("\\" + name))
        if name == "frac":
            return ("div", self.single(), self.single())
        if name == "sqrt":
            degree = self.group() if self.sees("[") else ("num", Fraction(2))
            return ("pow", self.atom(), ("div", ("num", Fraction(1)), degree))
        if name == "binom":
            return ("fn", "binomial", self.single(), self.single())
        if name in ACCENTS:
            return self.applied(self.subscripted(f"{name} {self.raw_group()}"))
        raise NotUnderstood("\\" + name)

    def function(self):
        name = self.take()
        power = base = None
        while self.sees("^", "_"):
            if self.take() == "^":
                power = self.exponent()
            else:
                base = self.atom()
        if base is not None and name != "log":
            raise NotUnderstood("a base")
        argument = self.argument()
        if power == negative(("num", Fraction(1))) and "arc" + name in FUNCTIONS:
            name, power = "arc" + name, None
        tree = ("fn", "log" if name == "ln" else name, argument)
        if base is not None:
            tree = ("div", tree, ("fn", "log", base))
        return tree if power is None else ("pow", tree, power)

    def argument(self):
        """What a function without braces is of: a group, or the product that follows up to the next
        function or parenthesis."""
        if self.sees(*BRACKETS):
            return self.group()
        sign, factors = self.take() if self.sees("+", "-") else "+", [self.power()]
        while self.starts_factor() and not self.sees(*FUNCTIONS, *BRACKETS):
            if self.next.kind == "number":
                raise NotUnderstood("a number behind a factor")
            factors.append(self.power())
        if self.sees("/"):
            raise NotUnderstood("an ambiguous argument")
        return self.signed(sign, factors[0] if len(factors) == 1 else ("mul", *factors))

    def matrix(self):
        """\\begin{pmatrix} … \\end{pmatrix}; all rows of one length."""
        self.take()
        rows = [[]]
        while self.next is not None and self.next.kind != "matrix":
            rows[-1].append(self.sum())
            if self.sees("&"):
                self.take()
            elif self.sees("\\\\"):
                self.take()
                rows.append([])
        rows = [row for row in rows if row]
        if self.take() != "end" or len({len(row) for row in rows}) != 1:
            raise NotUnderstood("a ragged matrix")
        return ("matrix", len(rows), *(cell for row in rows for cell in row))


def _is_number(tree):
    return tree[0] == "num" or (tree[0] == "mul" and all(_is_number(part) for part in tree[1:]))


def symbols(tree: tuple) -> set[str]:
    """The names of all variables of an expression, unknown functions among them."""
    if tree[0] == "sym":
        return {tree[1]}
    named = {tree[1]} if tree[0] == "fn" and tree[1].startswith("unknown") else set()
    return named.union(*(symbols(part) for part in tree[1:] if isinstance(part, tuple)))
