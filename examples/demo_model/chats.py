"""Questions and answers made from Python source files.

Every function, method and short class of a file becomes one chat or a few: the
question is drawn from natural wordings, the answer is the code in a fenced
block, or the first paragraph of the docstring.  The same file gives the same
chats on every run.
"""

from __future__ import annotations

import ast
import dataclasses
import random
import textwrap
from collections.abc import Iterator

from small_talk import GREETING, THANKS, Dialogue

MAX_ANSWER_CHARACTERS = 2400
MIN_ANSWER_CHARACTERS = 40
MAX_CALL_CHARACTERS = 120
TEST_SHARE = 0.3  # most functions without a docstring are tests: too many of one kind
SEED = 2024

# Verbs that begin a docstring: "Return the sum" becomes "a function that returns the sum".
COMMANDS = frozenset(
    """
    add append assert build calculate call check clear close compare compute connect convert copy
    count create decode define delete determine display draw dump encode evaluate execute expand
    extract fetch fill find flush format generate get handle initialize insert install invoke
    iterate join list load log look make match move open parse perform pop prepare print process
    put quote raise read receive register remove render replace report reset resolve return run
    save schedule search send set show skip sort split start stop store strip test transform turn
    update use validate verify wait wrap write yield
    """.split()
)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclasses.dataclass(frozen=True)
class Piece:
    """A function, method or class, cut out of its file."""

    kind: str
    name: str
    module: str
    signature: str
    docstring: str
    source: str

    @property
    def call(self) -> str:
        """The signature as it is used: ``walk(top, topdown=True)``."""
        call = self.signature.removesuffix(":").split(" ->")[0]
        return call.split("def ", 1)[-1].split("class ", 1)[-1]

    @property
    def plain_call(self) -> str:
        """The call without types and defaults: ``walk(top, topdown)``."""
        node = ast.parse(f"{self.signature} pass").body[0]
        if not isinstance(node, ast.FunctionDef):
            return self.name
        return f"{self.name}({', '.join(argument.arg for argument in node.args.args)})"

    @property
    def words(self) -> str:
        """The name as words: ``find_spec`` as ``find spec``."""
        return self.name.strip("_").replace("_", " ")

    @property
    def purpose(self) -> str:
        """The docstring's first sentence in one line, without its full stop."""
        return _first_paragraph(self.docstring).split(". ")[0].rstrip(".")[:200]


def _first_paragraph(docstring: str) -> str:
    return " ".join(docstring.strip().split("\n\n")[0].split())


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def _lower_first(sentence: str) -> str:
    """Lower the first letter, unless the first word is a name such as ``HTTP``."""
    if len(sentence) > 1 and sentence[1].islower():
        return sentence[0].lower() + sentence[1:]
    return sentence


def _as_command(purpose: str) -> str:
    """``Returns the sum`` as ``return the sum``; empty where it is no command."""
    first, _, rest = purpose.partition(" ")
    for verb in (first.lower(), first.lower().removesuffix("s"), first.lower().removesuffix("es")):
        if verb in COMMANDS and rest:
            return f"{verb} {rest}"
    return ""


def _third_person(command: str) -> str:
    """``return the sum`` as ``returns the sum``."""
    verb, _, rest = command.partition(" ")
    if verb[-1] == "y" and verb[-2] not in "aeo":
        return f"{verb[:-1]}ies {rest}"
    return f"{verb}{'es' if verb.endswith(('sh', 'ch', 'ss')) else 's'} {rest}"


def pieces_of(text: str, module: str) -> tuple[str, list[Piece]]:
    """The file's docstring, and its functions, methods and short classes."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return "", []  # the tests hold files that are broken on purpose
    lines = text.splitlines()
    found = [_cut_out(node, lines, module) for node in _definitions(tree)]
    return ast.get_docstring(tree) or "", [piece for piece in found if piece is not None]


def _definitions(tree: ast.Module) -> Iterator[Definition]:
    for node in ast.walk(tree):
        if isinstance(node, Definition):
            yield node


def _cut_out(node: Definition, lines: list[str], module: str) -> Piece | None:
    """The definition as text, or None where it is too long, empty or on one line."""
    docstring = ast.get_docstring(node) or ""
    is_empty = len(node.body) == 1 and bool(docstring)
    if node.body[0].lineno == node.lineno or is_empty or node.end_lineno is None:
        return None
    source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
    if not MIN_ANSWER_CHARACTERS < len(source) <= MAX_ANSWER_CHARACTERS:
        return None
    signature = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
    signature = textwrap.dedent(signature).strip()
    if len(signature) > 4 * MAX_CALL_CHARACTERS:
        return None
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    return Piece(kind, node.name, module, signature, docstring, source)


def _request(piece: Piece, draw: random.Random) -> str:
    """A wish for code that does what the docstring says."""
    purpose, command = piece.purpose, _as_command(piece.purpose)
    if command and draw.random() < 0.65:
        wordings = (
            f"Write a Python {piece.kind} that {_third_person(command)}.",
            f"Write a {piece.kind} `{piece.call}` that {_third_person(command)}.",
            f"How do I {command} in Python?",
            f"Write a Python {piece.kind} to {command}.",
        )
    else:
        wordings = (
            f"Write a Python {piece.kind} `{piece.call}`: {purpose}.",
            f"Write a Python {piece.kind} named `{piece.name}`. {purpose}.",
            f"Can you write `{piece.call}` in Python? It should do this: {_lower_first(purpose)}.",
            f"Please implement `{piece.call}`.\n\n{purpose}.",
        )
    return draw.choice(wordings)


def _documented_chats(piece: Piece, draw: random.Random) -> list[Dialogue]:
    """One to three chats about something that says what it does."""
    if not piece.purpose or len(piece.call) > MAX_CALL_CHARACTERS:
        return []
    code = _fenced(piece.source)
    chats: list[Dialogue] = [((_request(piece, draw), code),)]
    if draw.random() < 0.5:
        stub = _fenced(f'{piece.signature}\n    """{piece.purpose}."""')
        start = draw.choice((f"Complete this {piece.kind}:", f"Finish this Python {piece.kind}:"))
        chats.append(((f"{start}\n\n{stub}", code),))
    if piece.name.startswith(("test", "__")):
        return chats
    question = draw.choice(
        (
            f"What does `{piece.name}` in the module {piece.module} do?",
            f"Explain `{piece.module}.{piece.name}`.",
            f"What is `{piece.name}` for?",
            f"What does `{piece.name}` do?",
        )
    )
    explanation = (question, _first_paragraph(piece.docstring)[:400])
    if draw.random() < 0.3:
        follow_up = draw.choice(("Show me its code.", "Write it.", "How is it written?"))
        chats.append((explanation, (follow_up, code)))
    else:
        chats.append((explanation,))
    return chats


def _undocumented_chat(piece: Piece, draw: random.Random) -> Dialogue:
    """One chat about something without a docstring."""
    stub = _fenced(piece.signature)
    by_name = [
        f"Write a Python {piece.kind} `{piece.name}`.",
        f"Write a {piece.kind} `{piece.call}`.",
        f"Show me how `{piece.name}` in {piece.module} works.",
    ]
    if piece.name.startswith("test_"):
        by_name.append(f"Write a unit test for {piece.words.removeprefix('test ')}.")
    elif " " in piece.words:
        by_name.append(f"Write a Python {piece.kind} to {piece.words}.")
    by_stub = [
        f"Complete this {piece.kind}:\n\n{stub}",
        f"Write the body of this {piece.kind}:\n\n{stub}",
    ]
    question = draw.choice(by_name if draw.random() < 0.6 else by_stub)
    return ((question, _fenced(piece.source)),)


def exercise_chats(text: str) -> list[Dialogue]:
    """Each piece of ``exercises.py`` in every wording that people are likely to use."""
    chats: list[Dialogue] = []
    for piece in pieces_of(text, "exercises")[1]:
        if not piece.docstring:
            continue  # a method: its class is the exercise
        command = _as_command(piece.purpose) or _lower_first(piece.purpose)
        third_person = _third_person(command)
        questions: tuple[str, ...] = (
            f"Write a Python {piece.kind} that {third_person}.",
            f"Write a {piece.kind} that {third_person}.",
            f"Write a Python {piece.kind} to {command}.",
            f"write a python {piece.kind} to {command}",
            f"Can you write a {piece.kind} that {third_person}?",
            f"Please write a Python {piece.kind} that {third_person}.",
            f"I need a {piece.kind} that {third_person}.",
            f"How do I {command} in Python?",
            f"How can I {command}?",
            f"{command[0].upper()}{command[1:]} in Python.",
            f"Write a Python {piece.kind} `{piece.name}`.",
            f"Write a {piece.kind} `{piece.plain_call}`.",
            f"Complete this {piece.kind}:\n\n{_fenced(piece.signature)}",
        )
        questions += tuple(q.replace("whether", "if") for q in questions[:5] if "whether" in q)
        chats += [((question, _fenced(piece.source)),) for question in questions]
    # Every seventh one amid a conversation.
    return [(*GREETING, *chat, *THANKS) if i % 7 == 0 else chat for i, chat in enumerate(chats)]


def chats_of(text: str, module: str) -> list[Dialogue]:
    """The chats made from one file."""
    draw = random.Random(f"{SEED}:{module}")
    docstring, pieces = pieces_of(text, module)
    chats: list[Dialogue] = []
    if docstring:
        question = draw.choice((f"What is the module {module} for?", f"What does the module `{module}` do?"))
        chats.append(((question, _first_paragraph(docstring)[:400]),))
    for piece in pieces:
        if piece.docstring:
            chats += _documented_chats(piece, draw)
        elif not piece.name.startswith("test") or draw.random() < TEST_SHARE:
            chats.append(_undocumented_chat(piece, draw))
    return chats
