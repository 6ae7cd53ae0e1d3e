"""The text form of policies: ``magnitude{sparsity=0.9,structure=neuron};sensitivity``.

Grammar, white space free between tokens::

    policy  = [item *(";" item)]
    item    = name ["{" [option *("," option)] "}"]     a pass
            | name "=" value                            a setting of the policy
    option  = name "=" value
    value   = number | "true" | "false" | "none" | word | JSON string | "[" [value *("," value)] "]"

This file knows tokens and values, not which passes, options or settings there are.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from fxprune.errors import ConfigError

__all__ = ["Item", "Place", "format_options", "format_value", "nearest", "parse_items"]

_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[^\s{}\[\],;="]+|[{}\[\],;="])')
_MARKS = frozenset('{}[],;="')
_CONSTANTS: Mapping[str, Any] = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Place:
    """Where something stands, for messages.

    Attributes:
        source: the policy text, or the name of a file.
        at: position in it, in words.
    """

    source: str
    at: str

    def __str__(self) -> str:
        return f"{self.at} of {self.source}"


@dataclass(frozen=True)
class Item:
    """A pass with its options, or a setting with its value.

    Attributes:
        name: as written.
        place: where the name stands.
        options: values and places by option name; for a setting its one value under "".
        setting: whether it is a setting.
    """

    name: str
    place: Place
    options: Mapping[str, tuple[Any, Place]]
    setting: bool = False


def parse_items(text: str) -> list[Item]:
    """Reads a policy's text form.

    Raises:
        ConfigError: the text does not follow the grammar; with the place and what belongs there.
    """
    return _Reader(text).items()


def format_options(options: Mapping[str, Any]) -> str:
    """Writes ``{name=value,...}``; nothing for no options."""
    inner = ",".join(f"{name}={format_value(value)}" for name, value in options.items())
    return f"{{{inner}}}" if inner else ""


def format_value(value: Any) -> str:
    """Writes a value so that it reads back equal.

    Raises:
        ConfigError: a value of this type has no text form.
    """
    if isinstance(value, list | tuple):
        return f"[{','.join(map(format_value, value))}]"
    if isinstance(value, str):
        token = _TOKEN.fullmatch(value)
        bare = token is not None and token[1] == value and not _MARKS & set(value)
        return value if bare and _literal(value) == value else json.dumps(value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return repr(int(value))
    if isinstance(value, float):
        return repr(float(value))  # numpy's numbers are floats with a repr of their own
    raise ConfigError(f"{value!r} has no text form: numbers, strings, lists of them, true, none do")


def nearest(word: str, choices: Iterable[str]) -> str:
    """The ending of a message: " Did you mean ...?", or nothing if no choice is close."""
    close = difflib.get_close_matches(word, list(choices), n=3)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _literal(word: str) -> Any:
    if word.lower() in _CONSTANTS:
        return _CONSTANTS[word.lower()]
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            continue
    return word


class _Reader:
    """Reads tokens from left to right; each method reads one rule of the grammar."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, int]] = []
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            assert match is not None  # every character is a mark, white space or part of a word
            self.tokens.append((match[1], match.start(1)))
            position = match.end()
        self.next = 0

    def items(self) -> list[Item]:
        if not self.tokens:
            return []
        found = [self.item()]
        while self.peek():
            self.expect(";", "a ';' before the next pass, or the end")
            found.append(self.item())
        return found

    def item(self) -> Item:
        place = self.place()
        name = self.word("the name of a pass")
        if self.peek() == "=":
            self.next += 1
            at = self.place()
            return Item(name, place, {"": (self.value(), at)}, setting=True)
        options: dict[str, tuple[Any, Place]] = {}
        if self.peek() == "{":
            self.next += 1
            while self.peek() != "}":
                if options:
                    self.expect(",", "a ',' before the next option, or a '}'")
                self.option(name, options)
            self.next += 1
        return Item(name, place, options)

    def option(self, owner: str, options: dict[str, tuple[Any, Place]]) -> None:
        place = self.place()
        name = self.word(f"the name of an option of {owner!r}, or a '}}'")
        if name in options:
            raise ConfigError(f"option {name!r} of pass {owner!r} is given twice, {place}")
        self.expect("=", f"a '=' after option {name!r}")
        options[name] = (self.value(), place)

    def value(self) -> Any:
        if self.peek() == "[":
            self.next += 1
            values: list[Any] = []
            while self.peek() != "]":
                if values:
                    self.expect(",", "a ',' or a ']'")
                values.append(self.value())
            self.next += 1
            return tuple(values)
        token = self.peek()
        if len(token) > 1 and token.startswith('"'):
            return self.string()
        return _literal(self.word("a value"))

    def string(self) -> str:
        place = self.place()
        try:
            value: str = json.loads(self.word("a value", quoted=True))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{place}: not a JSON string ({error.msg})") from error
        return value

    def peek(self) -> str:
        return self.tokens[self.next][0] if self.next < len(self.tokens) else ""

    def word(self, expected: str, *, quoted: bool = False) -> str:
        token = self.peek()
        if not token or token in _MARKS or (token.startswith('"') and not quoted):
            self.fail(expected)
        self.next += 1
        return token

    def expect(self, mark: str, expected: str) -> None:
        if self.peek() != mark:
            self.fail(expected)
        self.next += 1

    def place(self) -> Place:
        if self.next == len(self.tokens):
            return Place(f"policy {self.text!r}", "at the end")
        return Place(f"policy {self.text!r}", f"at character {self.tokens[self.next][1] + 1}")

    def fail(self, expected: str) -> NoReturn:
        found = repr(self.peek()) if self.peek() else "the end"
        raise ConfigError(f"expected {expected}, found {found}, {self.place()}")
