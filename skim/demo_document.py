"""Build a long sample document from the standard library's docstrings, and hide a fact in it.

First step of `skim demo` and the prose of every shipped test and benchmark: real text that is on
each machine that can run this project, so nothing has to be bundled or fetched. Source files are
parsed, never imported. The text differs in detail between Python versions; a document is
reproducible on one of them. Refused: an interpreter without its library's sources.
"""

import ast
import inspect
import itertools
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from skim.errors import InvalidRequest, PreconditionFailed

# Modules with long prose docstrings that exist in Python 3.11 to 3.13, in reading order.
MODULES = (
    "argparse", "ast", "asyncio/base_events", "asyncio/events", "asyncio/locks",
    "asyncio/streams", "asyncio/tasks", "base64", "bdb", "bz2", "calendar", "code", "codecs",
    "collections/__init__", "concurrent/futures/_base", "concurrent/futures/process",
    "configparser", "contextlib", "ctypes/__init__", "dataclasses", "datetime", "difflib", "dis",
    "doctest", "email/_policybase", "email/charset", "email/header", "email/message",
    "email/policy", "enum", "fileinput", "fractions", "ftplib", "functools", "gzip",
    "http/client", "http/cookiejar", "http/server", "imaplib", "importlib/abc", "inspect",
    "ipaddress", "json/__init__", "locale", "logging/__init__", "logging/handlers", "lzma",
    "mailbox", "mimetypes", "optparse", "os", "pdb", "pickle", "pickletools", "pkgutil",
    "platform", "poplib", "pydoc", "queue", "random", "selectors", "shelve", "shutil", "site",
    "smtplib", "socket", "socketserver", "ssl", "statistics", "string", "subprocess", "tarfile",
    "tempfile", "textwrap", "threading", "timeit", "tokenize", "traceback", "turtle", "types",
    "typing", "unittest/case", "unittest/mock", "urllib/parse", "urllib/request", "uuid", "wave",
    "weakref", "wsgiref/handlers", "xml/etree/ElementTree", "xml/sax/handler", "xmlrpc/client",
    "xmlrpc/server", "zipfile", "_pydecimal", "_pyio",
)  # fmt: skip
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(`])")
MIN_SENTENCE_CHARS, MAX_SENTENCE_CHARS = 12, 400

ADJECTIVES = (
    "amber", "brisk", "calm", "dapper", "eager", "faint", "gentle", "humble", "ivory", "jolly",
    "keen", "lively", "mellow", "nimble", "opal", "plucky", "quiet", "rustic", "silent", "tidy",
    "umber", "vivid", "wistful", "young", "zesty",
)  # fmt: skip
# Needle and question as the bundled models know them: the benchmark's own sentences.
NEEDLE = "One of the special magic numbers for {key} is: {value}."
QUESTION = "What is the special magic number for {key} mentioned in the provided text?"
SHALLOWEST, DEEPEST = 0.1, 0.9

NOUNS = (
    "anchor", "beacon", "canyon", "dolphin", "ember", "falcon", "garden", "harbour", "island",
    "jacket", "kettle", "lantern", "meadow", "nectar", "orchard", "pebble", "quarry", "river",
    "saddle", "timber", "umbrella", "valley", "willow", "yarrow", "zephyr",
)  # fmt: skip


@dataclass(frozen=True)
class Docstring:
    """One docstring: the dotted name it documents and its sentences, whitespace collapsed."""

    name: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class DemoDocument:
    """A document with one hidden fact.

    `needle_begin` and `needle_end` bound the hidden sentence in UTF-8 bytes of `text`.
    """

    text: str
    question: str
    answer: str
    needle_begin: int
    needle_end: int


def collect_docstrings(max_modules: int | None = None) -> tuple[Docstring, ...]:
    """Return the docstrings of the first `max_modules` of MODULES (all: about 1 s, then cached)."""
    found: list[Docstring] = []
    for module in MODULES[:max_modules]:
        found.extend(_docstrings_of(module))
    return tuple(found)


def collect_sentences() -> tuple[str, ...]:
    """Return every docstring sentence in reading order, without headings."""
    return tuple(s for docstring in collect_docstrings() for s in docstring.sentences)


def build_document(
    target_tokens: int, count_tokens: Callable[[str], int], seed: int = 0
) -> tuple[str, ...]:
    """Return paragraphs (a heading and its docstring each) of at most `target_tokens` tokens.

    The reading starts at a module drawn by `seed` and wraps around at the end of the library.
    Joined with "\\n\\n" the paragraphs come within 1 % of targets of 1,000 tokens and more.
    """
    if target_tokens < 1:
        raise InvalidRequest.field_value("target_tokens", target_tokens, "at least 1")
    start = random.Random(seed).randrange(len(MODULES))
    paragraphs: list[str] = []
    total = 0
    for paragraph in _paragraphs(start):
        size = count_tokens(paragraph + "\n\n")
        if total + size > target_tokens:
            return (*paragraphs, *_fill(paragraph, target_tokens - total, count_tokens))
        paragraphs.append(paragraph)
        total += size
    return tuple(paragraphs)


def build_demo(
    target_tokens: int, count_tokens: Callable[[str], int], seed: int = 0
) -> DemoDocument:
    """Hide "One of the special magic numbers for KEY is: NUMBER." in a document and ask for it.

    The depth is drawn by `seed` between 10 % and 90 % of the document, so that neither the first
    nor the last tokens of a prompt (which are always kept) give the answer away.
    """
    rng = random.Random(seed)
    key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    answer = str(rng.randrange(1_000_000, 10_000_000))
    needle = NEEDLE.format(key=key, value=answer)
    question = QUESTION.format(key=key)
    room = target_tokens - count_tokens(needle + "\n\n") - count_tokens(question)
    paragraphs = list(build_document(room, count_tokens, seed))
    at = _index_at(paragraphs, rng.uniform(SHALLOWEST, DEEPEST))
    before = "".join(p + "\n\n" for p in paragraphs[:at])
    begin = len(before.encode())
    text = before + "\n\n".join([needle, *paragraphs[at:]])
    return DemoDocument(text, question, answer, begin, begin + len(needle.encode()))


def split_sentences(text: str) -> tuple[str, ...]:
    """Split prose into sentences; whitespace is collapsed, fragments and monsters are left out."""
    flat = " ".join(text.split())
    parts = SENTENCE_END.split(flat)
    return tuple(p for p in parts if MIN_SENTENCE_CHARS <= len(p) <= MAX_SENTENCE_CHARS)


@cache
def _docstrings_of(module: str) -> tuple[Docstring, ...]:
    path = Path(sysconfig.get_path("stdlib")) / f"{module}.py"
    if not path.is_file():  # a trimmed interpreter: the document is built from what is there
        return ()
    found: list[Docstring] = []
    _walk(ast.parse(path.read_bytes()), module.removesuffix("/__init__").replace("/", "."), found)
    return tuple(found)


def _walk(node: ast.AST, name: str, found: list[Docstring]) -> None:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, kinds):
        sentences = _prose(ast.get_docstring(node, clean=False) or "")
        if sentences:
            found.append(Docstring(name, sentences))
        for child in node.body:
            if isinstance(child, kinds[1:]):
                _walk(child, f"{name}.{child.name}", found)


def _prose(docstring: str) -> tuple[str, ...]:
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    sessions = (">>>", "...", "+-", "==", "--")
    prose = (b for b in blocks if not any(mark in b for mark in sessions))
    return tuple(s for block in prose for s in split_sentences(block))


def _paragraphs(start: int) -> Iterator[str]:
    for step in itertools.count(start):
        if step == start + len(MODULES) and not collect_docstrings():
            raise PreconditionFailed("this Python has no standard library sources to read from")
        for docstring in _docstrings_of(MODULES[step % len(MODULES)]):
            yield f"{docstring.name}\n" + " ".join(docstring.sentences)


def _fill(paragraph: str, room: int, count_tokens: Callable[[str], int]) -> list[str]:
    """Return the longest head of `paragraph`, in words, of at most `room` tokens (or nothing)."""
    words = paragraph.split(" ")
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        if count_tokens(" ".join(words[:middle])) + 2 <= room:
            low = middle
        else:
            high = middle - 1
    return [" ".join(words[:low])] if low else []


def _index_at(paragraphs: list[str], depth: float) -> int:
    """Return the paragraph, before which `depth` of the text lies most nearly.

    Among those from SHALLOWEST to DEEPEST, where there are any.
    """
    sizes = [len(paragraph) for paragraph in paragraphs]
    starts = [start / sum(sizes) for start in itertools.accumulate(sizes, initial=0)]
    inside = [i for i, start in enumerate(starts) if SHALLOWEST <= start <= DEEPEST]
    return min(inside or range(len(starts)), key=lambda i: abs(starts[i] - depth))
