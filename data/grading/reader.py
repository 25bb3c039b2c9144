"""Reads answers in LaTeX into trees, by recursive descent.

What cannot be read in full raises NotUnderstood: no part of an answer goes unread.
"""

from collections.abc import Callable, Sequence

from data.grading.numbers import GREEK, is_unit
from data.grading.tokens import FUNCTIONS, Token, prepared, tokens
from data.grading.trees import NotUnderstood, Tree, negative, num, op

MAX_DEPTH = 40
CONNECTORS = (",", ";", "or", "and", "\\lor", "\\land")
RELATIONS = ("=", "<", "<=", ">", ">=", "!=", "\\in")
SET_OPERATORS = ("\\cup", "\\cap", "\\setminus")
EITHER_SIGN = {"\\pm": 1, "\\mp": -1}
_PAIRS = ["( ) ]", "[ ) ]", "{ }", r"\{ \}", "| |"]
_PAIRS += [r"\lfloor \rfloor", r"\lceil \rceil", r"\langle \rangle"]
BRACKETS = {pair.split()[0]: pair.split()[1:] for pair in _PAIRS}  # what closes each opening one
ACCENTS = (
    "vec hat bar dot ddot tilde overline overrightarrow mathbf mathit mathcal mathbb mathrm bm"
).split()
# Commands behind which no further factor of a product begins.
ENDS = ("\\}", "\\\\", *SET_OPERATORS, *EITHER_SIGN, "\\in", *CONNECTORS)


def read(text: str) -> Tree:
    """Returns the tree of a whole answer."""
    reader = _Reader(tokens(prepared(text)))
    tree = reader.alternatives()
    if reader.next.kind:
        raise NotUnderstood(reader.next.text)
    return tree


class _Reader:
    """Reads tokens one by one. Each method reads one kind of thing from the current position and
    returns its tree."""

    def __init__(self, items: list[Token]):
        end = Token("", "", False)
        self.items = [*items, end, end]  # so that there always is a next one, and one behind it
        self.at = 0
        self.depth = 0
        self.in_bars = False  # directly between |, where the next one closes

    @property
    def next(self) -> Token:
        return self.items[self.at]

    def sees(self, *texts: str) -> bool:
        """Whether the next token is one of these signs."""
        return self.next.kind == "sign" and self.next.text in texts

    def take(self, *texts: str) -> str:
        """Passes over the next token, which has to be one of these signs if any are named, and
        returns its text."""
        if not self.next.kind or (texts and not self.sees(*texts)):
            raise NotUnderstood(f"no {texts} here")
        self.at += 1
        return self.items[self.at - 1].text

    def accept(self, *texts: str) -> str:
        """Like take, but returns "" where the next token is none of these signs."""
        return self.take() if self.sees(*texts) else ""

    # lists, relations, sets

    def alternatives(self) -> Tree:
        """What commas, "or" and "and" connect; a single thing is itself."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotUnderstood("nested too deeply")
        connectors, nodes = [], [self.relation()]
        while self.sees(*CONNECTORS):
            connectors.append(self.take())
            if self.sees("or", "and"):  # "1, or 2"
                connectors.append(self.take())
            if self.next.kind:  # a comma may end the answer
                nodes.append(self.relation())
        self.depth -= 1
        return nodes[0] if len(nodes) == 1 else Tree("list", tuple(connectors), tuple(nodes))

    def chain(self, kind: str, signs: Sequence[str], read_one: Callable[[], Tree]) -> Tree:
        """One thing, or several of them with signs between."""
        nodes, found = [read_one()], []
        while self.sees(*signs):
            found.append(self.take())
            nodes.append(read_one())
        return Tree(kind, tuple(found), tuple(nodes)) if found else nodes[0]

    def relation(self) -> Tree:
        return self.chain("relation", RELATIONS, self.set)

    def set(self) -> Tree:
        return self.chain("set", SET_OPERATORS, self.ratio)

    def ratio(self) -> Tree:
        return self.chain("ratio", ":", self.sum)

    # arithmetic

    def sum(self) -> Tree:
        terms = [self.term()]
        while self.sees("+", "-", *EITHER_SIGN):
            terms.append(self.term())
        self.skip_units()
        return terms[0] if len(terms) == 1 else op("add", *terms)

    def term(self) -> Tree:
        sign = self.accept("+", "-", *EITHER_SIGN)
        if self.sees("+", "-"):
            raise NotUnderstood("two signs")
        return self.signed(sign, self.product())

    @staticmethod
    def signed(sign: str, tree: Tree) -> Tree:
        if sign in EITHER_SIGN:
            return Tree("pm", EITHER_SIGN[sign], (tree,))
        return negative(tree) if sign == "-" else tree

    def skip_units(self) -> None:
        """Passes over the words behind a value: \\text{cm}^2, %."""
        while self.sees("%") or (self.at and self.next.kind == "text"):
            word = self.take()
            if not is_unit(f" {word} "):
                raise NotUnderstood("words that are no unit")  # 3 or more
            if self.accept("^") and self.atom() not in (num(2), num(3)):
                raise NotUnderstood("no power of a unit")

    def product(self) -> Tree:
        result = self.power()
        while True:
            if self.accept("*"):
                result = op("mul", result, self.signed_power())
            elif self.accept("/"):
                result = op("div", result, self.divisor(result))
            elif self.starts_factor():
                result = self.implicit_product(result)
            else:
                return result

    def implicit_product(self, left: Tree) -> Tree:
        """A product without a sign, or a mixed number."""
        before = self.items[self.at - 1]
        if self.next.kind == "number":
            if before.kind == "number" or self.items[self.at + 1].text != "^":
                raise NotUnderstood("a number behind a factor")  # but (n - 2) 2^n
        may_be_mixed = left.kind == "num" and before.text.isdigit() and self.sees("\\frac")
        right = self.power()
        if may_be_mixed and [part.kind for part in right.parts] == ["num", "num"]:
            return op("add", left, right)
        return op("mul", left, right)

    def divisor(self, dividend: Tree) -> Tree:
        """What is divided by: 1/2 x is x/2; where readers disagree (1/2x, x/y z), nothing."""
        tree = self.signed_power()
        if self.starts_factor():
            clear = self.next.spaced or self.sees("(", "\\pi", "\\sqrt")
            if not (clear and tree.kind == "num" and _is_number(dividend)):
                raise NotUnderstood("an ambiguous divisor")
        return tree

    def signed_power(self) -> Tree:
        return self.signed(self.accept("+", "-"), self.power())

    def starts_factor(self) -> bool:
        """Whether the next token begins another factor of a product without signs."""
        kind, text = self.next.kind, self.next.text
        if kind != "sign":
            return kind in ("number", "letter")
        if text.startswith("\\"):
            is_closing = text.startswith("\\r") and text != "\\rho"  # \rfloor, \rangle
            return not is_closing and text not in ENDS
        return text in (*FUNCTIONS, "(", "[", "{") or (text == "|" and not self.in_bars)

    def power(self) -> Tree:
        base = self.postfix(self.atom())
        if not self.accept("^"):
            return base
        return self.postfix(op("pow", base, self.exponent()))

    def postfix(self, tree: Tree) -> Tree:
        if not self.accept("!"):
            return tree
        if self.sees("!", "="):
            raise NotUnderstood("!!")
        return op("factorial", tree)

    def exponent(self) -> Tree:
        sign = self.accept("+", "-")
        if sign:
            return self.signed(sign, self.exponent())
        base = self.atom()
        if self.accept("^"):
            return op("pow", base, self.exponent())
        return self.postfix(base)

    def group(self) -> Tree:
        """Brackets and what they hold: the tree itself where they are parentheses around one."""
        opening, in_bars = self.take(*BRACKETS), self.in_bars
        if opening == "\\{" and self.accept("\\}"):
            return Tree("sym", "\\emptyset")
        self.in_bars = opening == "|"
        tree = self.alternatives()
        brackets = opening + self.take(*BRACKETS[opening])
        self.in_bars = in_bars
        match brackets:
            case "||":
                return op("abs", tree)
            case "\\lfloor\\rfloor" | "\\lceil\\rceil":
                return op(opening[2:], tree)
            case "()" | "[]" | "{}" if tree.kind != "list":
                return tree
        return Tree("group", brackets, (tree,))

    # what stands alone

    def atom(self) -> Tree:
        match self.next.kind:
            case "number":
                return num(self.take().rstrip("."))
            case "text" if self.next.text:
                return Tree("sym", self.take())
            case "letter":
                name = self.take()
                if name in "ei" and not self.sees("_", "'"):
                    return Tree("const", name)
                return self.variable(name)
            case "matrix":
                return self.matrix()
        if self.sees(*BRACKETS):
            return self.group()
        return self.function() if self.sees(*FUNCTIONS) else self.command()

    def single(self) -> Tree:
        """The argument of a command: a group, or one token."""
        if self.next.kind == "number" and len(self.next.text) > 1:
            raise NotUnderstood("a number whose first digit is meant")
        return self.atom()

    def raw_group(self) -> str:
        """The text of a group or of one token, as part of a name."""
        if not self.sees("{"):
            return self.take()
        depth, parts = 0, []
        while depth or not parts:
            parts.append(self.take())
            depth += {"{": 1, "}": -1}.get(parts[-1], 0)
        return " ".join(parts[1:-1])

    def variable(self, name: str) -> Tree:
        """A variable with its subscript and primes, or an unknown function's value: f(x), where
        the name is a function's or one number or symbol stands in the parentheses."""
        if self.accept("_"):
            name += "_" + self.raw_group()
        while self.sees("'"):
            name += self.take()
        if not self.sees("("):
            return Tree("sym", name)
        if name[0] not in "fghFGH" and self.items[self.at + 2].text != ")":
            return Tree("sym", name)
        match self.group():
            case Tree("group", "()", (inside,)):
                arguments = inside.parts
            case argument:
                arguments = (argument,)
        return Tree("function", f"unknown {name}", arguments)

    def command(self) -> Tree:
        name = self.take()[1:]
        match name:
            case "pi" | "infty":
                return Tree("const", name)
            case "arcdegree":
                return op("div", Tree("const", "pi"), num(180))
            case "frac":
                return op("div", self.single(), self.single())
            case "binom":
                return op("binomial", self.single(), self.single())
            case "sqrt":
                degree = self.group() if self.sees("[") else num(2)
                return op("pow", self.atom(), op("div", num(1), degree))
        if name in GREEK or name == "emptyset":
            return self.variable("\\" + name)
        if name in ACCENTS:
            return self.variable(f"{name} {self.raw_group()}")
        raise NotUnderstood("\\" + name)

    def function(self) -> Tree:
        """sin x, \\sin^2 x, \\log_2 x, \\tan^{-1} x."""
        name, power, base = self.take(), None, None
        while self.sees("^", "_"):
            if self.take() == "^":
                power = self.exponent()
            else:
                base = self.atom()
        if base and name != "log":
            raise NotUnderstood("a base")
        argument = self.argument()
        if power == negative(num(1)) and "arc" + name in FUNCTIONS:
            name, power = "arc" + name, None
        tree = op("log" if name == "ln" else name, argument)
        if base:
            tree = op("div", tree, op("log", base))
        return op("pow", tree, power) if power else tree

    def argument(self) -> Tree:
        """What a function without braces is of: a group, or the product that follows up to the next
        function or parenthesis."""
        if self.sees(*BRACKETS):
            return self.group()
        sign, factors = self.accept("+", "-"), [self.power()]
        while self.starts_factor() and not self.sees(*FUNCTIONS, *BRACKETS):
            if self.next.kind == "number":
                raise NotUnderstood("a number behind a factor")
            factors.append(self.power())
        if self.sees("/"):
            raise NotUnderstood("an ambiguous argument")
        return self.signed(sign, factors[0] if len(factors) == 1 else op("mul", *factors))

    def matrix(self) -> Tree:
        """\\begin{pmatrix} … \\end{pmatrix}; all rows of one length."""
        self.take()
        rows = [[]]
        while self.next.kind not in ("", "matrix"):
            rows[-1].append(self.sum())
            if not self.accept("&") and self.accept("\\\\"):
                rows.append([])
        rows = [row for row in rows if row]
        if self.take() != "end" or len({len(row) for row in rows}) != 1:
            raise NotUnderstood("a ragged matrix")
        return Tree("matrix", len(rows), tuple(cell for row in rows for cell in row))


def _is_number(tree: Tree) -> bool:
    is_product = tree.kind == "op" and tree.value == "mul"
    return tree.kind == "num" or (is_product and all(map(_is_number, tree.parts)))
