"""Parses a verb's flags, which are fields of dataclasses, from the command line and a config file.

A field's metadata may hold `help`, `choices`, `metavar`, `nargs` and `const` as in argparse. `positional` allows the
value without the flag's name, and `rare` hides the flag from all but `--help-all`. The flags of a class are a group of
the help, and the first line of the class's docstring is its heading.

transformers' HfArgumentParser reads the same dataclasses, but importing it takes longer than help should.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import enum
import functools
import importlib.util
import inspect
import json
import shutil
import sys
import types
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hf_decoder.safety.quiet import on_terminal

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
# Former names, accepted until the next version: (verb, former name) -> name.
RENAMED = {
    ("compare", "prompts"): "input_file",
    ("eval", "eval_file"): "test_file",
    ("eval", "model"): "model_name_or_path",
    ("eval", "text_file"): "validation_file",
    ("generate", "model"): "model_name_or_path",
    ("presets", "batch_size"): "per_device_train_batch_size",
    ("quantize", "model"): "model_name_or_path",
    ("quantize", "text_file"): "validation_file",
    ("tokenizer", "type"): "tokenizer_type",
}
BOOLEANS = {"true": True, "yes": True, "t": True, "y": True, "1": True}
BOOLEANS |= {"false": False, "no": False, "f": False, "n": False, "0": False}
MAX_WIDTH = 110
METAVARS = {int: "N", float: "X", str: "TEXT"}


def parse_arguments(
    verb: str, dataclass_types: Sequence[type], argv: Sequence[str], description: str = ""
) -> tuple[Any, ...]:
    """Fills `dataclass_types` from a config file and from flags, which override the file.

    The file is `--config FILE`, or a first argument that ends in .yaml, .yml or .json. Its keys are names of flags.

    Raises:
        ValueError: for an unknown, missing or malformed argument, an unreadable file, or a missing package.
        SystemExit: after `--help` and `--help-all`.
    """
    parser = Parser(verb, dataclass_types, description)
    values = parser.values(argv)
    if values.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise ValueError("--deepspeed needs a package that is not installed: pip install deepspeed")
    if "disable_tqdm" in parser.flags and not on_terminal():
        values.setdefault("disable_tqdm", True)  # a log gets a line at every logging step instead
    try:
        return tuple(
            kind(**{field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values})
            for kind in dataclass_types
        )
    except json.JSONDecodeError as error:  # transformers parses some values as JSON, and does not name the flag
        name = next((name for name, value in values.items() if value == error.doc), "a flag")
        raise ValueError(f"--{name} {error.doc} is not valid JSON: {error}") from None


def check_arguments(verb: str, dataclass_types: Sequence[type], argv: Sequence[str], description: str) -> None:
    """Checks the flags of `dataclass_types`, of which a verb may have more, and answers `--help`.

    Raises:
        ValueError: for a missing or malformed argument.
        SystemExit: after `--help`.
    """
    Parser(verb, dataclass_types, description, partial=True).values(argv)


def find_value(argv: Sequence[str], name: str) -> str | None:
    """The value of `--name` in flags or config file, before parsing: it decides which flags exist."""
    config_file, flags = _split_config_file(list(argv))
    value = None if config_file is None else _read_config_file(config_file).get(name)
    for number, flag in enumerate(flags):
        if flag == f"--{name}" and number + 1 < len(flags):
            value = flags[number + 1]
        elif flag.startswith(f"--{name}="):
            value = flag.partition("=")[2]
    return None if value is None else str(value)


def did_you_mean(name: str, known: Sequence[str], lists: str = "--help") -> str:
    """Suggests known names: with these initials, containing `name`, spelled alike, or sharing a word."""
    bare = name.lstrip("-").replace("-", "_")
    plain = {option.lstrip("-"): option for option in known}
    words = {option: {word.rstrip("s") for word in option.split("_")} for option in (bare, *plain)}
    ranked = [option for option in plain if len(bare) > 1 and bare == "".join(word[:1] for word in option.split("_"))]
    ranked += [option for option in plain if len(bare) > 2 and bare in option]
    ranked += difflib.get_close_matches(bare, plain, n=3)
    shared = [option for option in plain if words[option] & words[bare]]
    ranked += sorted(shared, key=lambda option: -len(words[option] & words[bare]))
    close = [repr(plain[option]) for option in dict.fromkeys(ranked)][:3]
    return f"; did you mean {' or '.join(close)}?" if close else f"; {lists} lists them all"


class Parser(argparse.ArgumentParser):
    """The parser of a verb. `partial` says that it knows only the flags that need no import of transformers."""

    def __init__(self, verb: str, dataclass_types: Sequence[type], description: str, *, partial: bool = False) -> None:
        super().__init__(
            prog=f"hf-decoder {verb}",
            description=description,
            add_help=False,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        self.verb, self.partial = verb, partial
        self.flags: dict[str, _Flag] = {}
        groups: dict[str, argparse._ArgumentGroup] = {}
        declared = [flag for kind in dataclass_types for flag in _flags_of(kind)]
        for flag in sorted(declared, key=lambda flag: flag.foreign):  # flags of other libraries come last
            if flag.heading not in groups:
                groups[flag.heading] = self.add_argument_group(flag.heading)
            flag.add_to(groups[flag.heading])
            self.flags[flag.name] = flag
        self.positionals = [flag for flag in self.flags.values() if flag.metadata.get("positional")]
        needed = [flag for flag in self.flags.values() if flag.required and flag not in self.positionals]
        self.formatter_class = functools.partial(_Help, positionals={flag.name for flag in self.positionals})
        words = [flag.shown if flag.required else f"[{flag.shown}]" for flag in self.positionals]
        words += [f"--{flag.name} {flag.shown}" for flag in needed]
        self.usage = " ".join([self.prog, *words, "[options]"])
        self.epilog = "--config FILE, or FILE.yaml or FILE.json as the first argument, gives flags as `name: value`."

    def values(self, argv: Sequence[str]) -> dict[str, Any]:
        """The values of flags and config file by name. Raises as `parse_arguments` does."""
        words, plain = list(argv), []
        if "--" in words:
            words, plain = words[: words.index("--")], words[words.index("--") + 1 :]
        wanted = {word.replace("-", "_") for word in words}
        everything = "__help_all" in wanted
        if (everything and not self.partial) or (wanted & {"__help", "_h"} and not everything):
            print(self.help_text(everything=everything))
            raise SystemExit(0)
        config_file, words = _split_config_file(words)
        values = {} if config_file is None else self._config_values(config_file)
        given, extra = self.parse_known_args(self._spell(words))
        values |= vars(given)
        unknown = [word for word in extra if word.startswith("-") and " " not in word and not _is_number(word)]
        if self.partial and unknown:
            return values
        if unknown:
            options = [f"--{name}" for name in self.flags]
            raise ValueError(f"unknown argument {unknown[0]!r}{did_you_mean(unknown[0], options)}")
        plain = extra + plain
        for flag in self.positionals:
            if plain and flag.name not in vars(given):
                values[flag.name] = plain[:] if flag.many else plain[0]
                plain = [] if flag.many else plain[1:]
        if plain and not self.partial:
            raise ValueError(f"unknown argument {plain[0]!r}; usage: {self.usage}")
        missing = [flag for flag in self.flags.values() if flag.required and flag.name not in values]
        if missing:
            what = missing[0].shown if missing[0] in self.positionals else f"--{missing[0].name}"
            raise ValueError(f"{what} is required; usage: {self.usage}")
        return values

    def help_text(self, *, everything: bool) -> str:
        """The help, with or without the rare flags."""
        hidden = [flag.action for flag in self.flags.values() if flag.rare and not everything]
        helps = [action.help for action in hidden]
        for action in hidden:
            action.help = argparse.SUPPRESS
        text = self.format_help().rstrip()
        for action, help in zip(hidden, helps, strict=True):
            action.help = help
        return text + (f"\n{self.prog} --help-all lists all flags." if hidden or self.partial else "")

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise ValueError(f"--{action.dest} {value!r} is unknown; choose one of: {', '.join(action.choices)}")

    def _spell(self, words: Sequence[str]) -> list[str]:
        """Rewrites flags as they are declared: with underscores, under present names, booleans with a value."""
        spelled, left = [], list(words)
        while left:
            word = left.pop(0)
            head, equals, value = word.partition("=")
            name = self._renamed(head[2:].replace("-", "_")) if word.startswith("--") else ""
            opposite = self.flags.get(name.removeprefix("no_"))
            if name in self.flags:
                if self.flags[name].boolean and not equals:
                    value = left.pop(0) if left and self.flags[name].takes(left[0]) else "true"
                    equals = "="
                word = f"--{name}{equals}{value}"
            elif name.startswith("no_") and opposite is not None and opposite.boolean and not equals:
                word = f"--{opposite.name}=false"
            spelled.append(word)
        return spelled

    def _renamed(self, name: str) -> str:
        """The present name of a flag. Warns of a former one."""
        new = RENAMED.get((self.verb, name))
        if new is None or name in self.flags:
            return name
        if not self.partial:
            warning = f"--{name} is now --{new}; the next version will not know the former name"
            print(f"{self.prog}: warning: {warning}", file=sys.stderr)
        return new

    def _config_values(self, path: Path) -> dict[str, Any]:
        """The values of a config file, checked like those of flags."""
        values = {}
        for key, value in _read_config_file(path).items():
            name = self._renamed(key)
            if name in self.flags:
                try:
                    values[name] = self.flags[name].typed(self, value)
                except (ValueError, argparse.ArgumentError) as error:
                    raise ValueError(f"config file {path}: {str(error).removeprefix('argument ')}") from None
            elif not self.partial:
                raise ValueError(f"unknown key {key!r} in {path}{did_you_mean(name, sorted(self.flags))}")
        return values


class _Flag:
    """A field of a dataclass as a flag."""

    def __init__(self, field: dataclasses.Field[Any], hint: Any, owner: type) -> None:
        self.name, self.metadata, self.kinds = field.name, field.metadata, _members(hint)
        self.optional = type(None) in typing.get_args(hint)
        self.foreign = not owner.__module__.startswith("hf_decoder")
        self.rare = self.foreign or bool(self.metadata.get("rare"))
        doc = (owner.__doc__ or owner.__name__).strip().splitlines()[0].rstrip(".")
        self.heading = f"{owner.__name__} of {owner.__module__.partition('.')[0]}" if self.foreign else doc
        self.required = field.default is field.default_factory is dataclasses.MISSING
        default = None if field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        self.default = default.value if isinstance(default, enum.Enum) else default
        kind = self.kinds[0]
        self.boolean = bool in self.kinds
        self.many = typing.get_origin(kind) is list
        choices = self.metadata.get("choices") or _choices(typing.get_args(kind)[0] if self.many else kind)
        self.choices = None if choices is None else tuple(choices)

    def takes(self, word: str) -> bool:
        """Whether the word after this boolean flag is its value."""
        return word.lower() in BOOLEANS or (str in self.kinds and not word.startswith("-"))

    @property
    def shown(self) -> str:
        """The placeholder of the value in help and usage."""
        if "metavar" in self.metadata:
            return str(self.metadata["metavar"])
        if self.choices is not None:
            return "{" + ",".join(map(str, self.choices)) + "}"
        if self.name.endswith(("_file", "_dir")):
            return "FILE" if self.name.endswith("_file") else "FOLDER"
        return METAVARS.get(self._type(), "TEXT")

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        text = " ".join(str(self.metadata.get("help") or "").split())
        if self.default not in (None, False, "") and self.default != []:
            shown = " ".join(map(str, self.default)) if isinstance(self.default, list | tuple) else self.default
            text += f" (default: {str(shown).replace('%', '%%')})"
        options = {name: self.metadata[name] for name in ("const", "nargs") if name in self.metadata}
        if self.many:
            options.setdefault("nargs", "+")
        self.action = group.add_argument(
            f"--{self.name}", type=self._type(), choices=self.choices, metavar=self.shown, help=text, **options
        )

    def typed(self, parser: argparse.ArgumentParser, value: Any) -> Any:
        """Converts and checks a value of a config file like a word of the command line.

        Raises:
            ValueError, argparse.ArgumentError: if it is of another kind.
        """
        if value is None or (value is False and not self.boolean):  # a bare `no` leaves out a flag that is no switch
            if not self.optional and self.default is not None:
                raise ValueError(f"--{self.name} has no value; give one, or leave the line out")
            return None
        if value is True and "const" in self.metadata:
            return self.metadata["const"]
        if isinstance(value, dict | bool) or (isinstance(value, list) and not self.many):
            if type(value) not in {typing.get_origin(kind) or kind for kind in self.kinds}:
                form = {dict: "a mapping", list: "a list", bool: "a yes or no (text stands in quotes)"}[type(value)]
                raise ValueError(f"--{self.name} does not take {form}: {json.dumps(value, default=str)}")
            return value
        words = value if isinstance(value, list) else [value]
        if not words or any(word is None or isinstance(word, dict | list | bool) for word in words):
            raise ValueError(f"--{self.name} takes texts or numbers, not {value}")
        found = [parser._get_value(self.action, str(word)) for word in words]
        for word in found:
            parser._check_value(self.action, word)
        return found if self.many else found[0]

    def _type(self) -> Any:
        kind = typing.get_args(self.kinds[0])[0] if self.many else self.kinds[0]
        if kind is bool:
            return _boolean
        if self.boolean:
            return lambda word: BOOLEANS.get(word.lower(), word)
        if self.choices is not None:
            return lambda word: next((choice for choice in self.choices or () if str(choice) == word), word)
        return kind


def _flags_of(kind: type) -> list[_Flag]:
    """The fields of a dataclass, those of the class itself first, then those of its bases."""
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    found = []
    for owner in kind.__mro__:
        for name in inspect.get_annotations(owner):
            if name in fields:
                found.append(_Flag(fields.pop(name), hints[name], owner))
    return found


def _members(hint: Any) -> list[Any]:
    """The types that a hint allows, without None. The first is the one to parse a word as: text where possible."""
    origin = typing.get_origin(hint)
    members = list(typing.get_args(hint)) if origin in (typing.Union, types.UnionType) else [hint]
    order = (str, bool, float)
    known = [kind for kind in members if kind is not type(None)]
    return sorted(known, key=lambda kind: order.index(kind) if kind in order else len(order))


def _choices(kind: Any) -> list[Any] | None:
    if typing.get_origin(kind) is typing.Literal:
        return list(typing.get_args(kind))
    return [member.value for member in kind] if isinstance(kind, type) and issubclass(kind, enum.Enum) else None


def _boolean(word: str) -> bool:
    if word.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{word!r} must be true or false")
    return BOOLEANS[word.lower()]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


class _Help(argparse.HelpFormatter):
    """One or two lines for each flag: name, value, what it does."""

    def __init__(self, prog: str, positionals: Collection[str]) -> None:
        width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
        super().__init__(prog, max_help_position=36, width=width)
        self._positionals = positionals

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.dest in self._positionals:
            return f"{action.metavar}, {action.option_strings[0]}"
        value = action.metavar if action.type is not _boolean else ""
        return f"{action.option_strings[0]} {value}".rstrip()


def _split_config_file(argv: list[str]) -> tuple[Path | None, list[str]]:
    """Splits `argv` into the config file and the rest."""
    if argv and not argv[0].startswith("-") and argv[0].endswith(CONFIG_SUFFIXES):
        return Path(argv[0]), argv[1:]
    for i, argument in enumerate(argv):
        if argument.startswith("--config="):
            return Path(argument.removeprefix("--config=")), argv[:i] + argv[i + 1 :]
        if argument == "--config":
            if i + 1 == len(argv):
                raise ValueError("--config needs a file: --config FILE.yaml")
            return Path(argv[i + 1]), argv[:i] + argv[i + 2 :]
    return None, argv


def _read_config_file(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise ValueError(f"config file {path} does not exist")
    try:
        # JSON is YAML, so one reader serves both.
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config file {path} must hold lines `flag: value`")
    # YAML reads a bare `no` as False. For eval_strategy and its like it is a word.
    named = ((str(key), value) for key, value in values.items())
    return {key: "no" if value is False and key.endswith("_strategy") else value for key, value in named}


def parse_verb(verb: str, argv: Sequence[str]) -> tuple[Any, ...]:
    """Parses the arguments of a verb, whose flags are in its file in `cli/flags`."""
    flags = importlib.import_module(f"hf_decoder.cli.flags.{verb}")
    argv = list(argv) or list(getattr(flags, "WITHOUT_ARGUMENTS", ()))
    if getattr(flags, "PARTIAL", False):
        check_arguments(verb, flags.ARGUMENTS, argv, flags.DESCRIPTION)
    return parse_arguments(verb, _types_of(verb, argv), argv, flags.DESCRIPTION)


def check_verb(verb: str, argv: Sequence[str]) -> None:
    """Complains about flags of a verb as `parse_verb` does, but for what only their values together get wrong."""
    Parser(verb, _types_of(verb, argv), "").values(argv)


def _types_of(verb: str, argv: Sequence[str]) -> tuple[type, ...]:
    flags = importlib.import_module(f"hf_decoder.cli.flags.{verb}")
    if not getattr(flags, "PARTIAL", False):
        return tuple(flags.ARGUMENTS)
    module = importlib.import_module(f"hf_decoder.cli.{verb}")
    return tuple(module.argument_types(argv))


def takes_argv(main: Callable[..., int]) -> Callable[..., int]:
    """Lets a command's `main` also take a list of words from the command line."""
    verb = main.__module__.rpartition(".")[2]

    @functools.wraps(main)
    def either(*arguments: Any) -> int:
        if len(arguments) == 1 and isinstance(arguments[0], list | tuple):
            arguments = parse_verb(verb, arguments[0])
        return main(*arguments)

    return either
