"""Documents as people send them, YAML or JSON, made into plain values without loss.

Neither language is taken as its parsers come. Numbers with a point stay decimals and never become
floats; a name that is there twice is an error, not the last one's silent win; YAML's surprises are
off: `NO` is a text, `010` too, a date stays as it was written, and an alias is refused, since a
few of them make gigabytes of a few lines.
"""

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final, NoReturn

import yaml

from hostler_common import errors

MAX_BYTES: Final = 1024 * 1024


class DocumentUnreadable(errors.Invalid):
    """The text is too long, not in UTF-8, or neither YAML nor JSON that says each name once."""

    code = "usage.document.unreadable"


def read(text: bytes, *, is_json: bool) -> object:
    """The values of a document. It takes time in proportion to the text: call it in a thread.

    Raises:
        DocumentUnreadable: with the place, as far as it is known.
    """
    if len(text) > MAX_BYTES:
        raise DocumentUnreadable(f"a document may have {MAX_BYTES} bytes")
    try:
        said = text.decode()
        if is_json:
            return json.loads(
                said, parse_float=Decimal, parse_constant=_refuse, object_pairs_hook=_once
            )
        return yaml.load(said, Loader=_Loader)  # noqa: S506  a SafeLoader with less
    except UnicodeDecodeError as exc:
        raise DocumentUnreadable("the document is not in UTF-8") from exc
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise DocumentUnreadable(f"the document is not YAML: {where}{exc.problem}") from exc
    except (ValueError, yaml.YAMLError) as exc:
        raise DocumentUnreadable(f"the document cannot be read: {str(exc)[:200]}") from exc
    except RecursionError as exc:
        raise DocumentUnreadable("the document is nested too deeply") from exc


def plain(document: object) -> Any:  # noqa: ANN401  JSON
    """The document as JSON can hold it without loss: decimals as text."""
    match document:
        case Mapping():
            return {str(name): plain(value) for name, value in document.items()}
        case list():
            return [plain(value) for value in document]
        case Decimal() if document.is_finite() and -30 < document.adjusted() < 30:
            return format(document, "f")
        case Decimal():  # written out it might have no end; nobody takes it as a number
            return str(document)
        case _:
            return document


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:60]!r} is there twice")
    return found


class _Loader(yaml.SafeLoader):
    """YAML with texts, true, false, null, whole numbers and decimals, and nothing else."""

    # the resolvers of YAML 1.1 are replaced, not added to
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.get_mark()
            raise yaml.composer.ComposerError(None, None, "aliases are not taken here", mark)
        return super().compose_node(parent, index)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[object, object]:
    found: dict[object, object] = {}
    for name_node, value_node in node.value:
        name = loader.construct_object(name_node, deep=True)
        if not isinstance(name, str):
            problem = "a name must be a text"
        elif name in found:
            problem = f"{name[:60]!r} is there twice"
        else:
            found[name] = loader.construct_object(value_node, deep=True)
            continue
        raise yaml.constructor.ConstructorError(None, None, problem, name_node.start_mark)
    return found


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)))


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> Decimal:
    return Decimal(str(loader.construct_scalar(node)))


_WORDS: Final = (
    ("tag:yaml.org,2002:null", re.compile(r"~|null|"), ["~", "n", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"true|false"), ["t", "f"]),
    ("tag:yaml.org,2002:int", re.compile(r"-?(0|[1-9][0-9]*)", re.ASCII), list("-0123456789")),
    ("tag:yaml.org,2002:float", re.compile(r"-?[0-9]+\.[0-9]+", re.ASCII), list("-0123456789")),
)
for _tag, _pattern, _first in _WORDS:
    _Loader.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern.pattern})\\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _decimal)
