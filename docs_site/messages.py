"""Error messages of the program, read from the code that makes them.

A message is a pattern: its own words, with <name> for each value that is put in. Found are the errors that a user sees in one
line (InputError, RunFailed, LockLost), ValueErrors of settings and of plans, and failures of units.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from docs_site.repository import ROOT

SHOWN = ("InputError", "RunFailed", "LockLost")
"""Errors whose message is all that a user sees, wherever they are made."""
RAISED = ("ValueError", "RuntimeError")
"""Errors that become such a line where they are raised: pydantic and the pipeline add the place."""
FAILURE = "Failure"
"""What a unit ends with that is tried again."""
_ARITHMETIC: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Mult: operator.mul, ast.Pow: operator.pow, ast.LShift: operator.lshift,
}  # fmt: skip
"""Of constants that are written as a product, a power or a shift of two numbers."""
_PROBLEMS = "problems"
"""Function that says what pydantic found wrong: its lines are messages."""
_VERBS = (
    "add|ask|calibrate|call|change|check|choose|clone|close|convert|copy|correct|delete|download|drop|edit|end|"
    "export|expect|fetch|free|give|install|keep|leave|list|load|log|look|lower|make|mend|merge|move|name|open|"
    "point|pull|push|put|quote|raise|read|remove|rename|repeat|replace|report|restore|run|say|see|set|shorten|"
    "split|start|take|train|try|turn|unpack|update|use|wait|write"
)
"""First words of a remedy."""
_ORDER = rf"(?:(?:so|if [^,:;]*[:,]) )?(?:[`(]?(?:{_VERBS})\b|<remedy>|a regular file is needed)"
_REMEDY = re.compile(rf"{_ORDER}|(?:known|its models|there are)\b[^;]*<|it has:? <[^<>]*>(?:[;:]|$)", re.IGNORECASE)
"""A remedy begins with what to do, or lists what there is to choose from."""
_BREAK = re.compile(r"[;:] |, (?=so )|\n *|\. ")


def is_an_order(remedy: str) -> bool:
    """Whether a remedy says what to do, rather than what there is to choose from."""
    return bool(re.match(_ORDER, remedy, re.IGNORECASE))


@dataclass(frozen=True)
class Message:
    """A message. kind: class of the error. path: of the module, in the repository. function: that makes it."""

    text: str
    kind: str
    path: str
    function: str

    @property
    def has_words(self) -> bool:
        """Whether it says something itself, rather than putting another message behind a place."""
        return len(re.findall(r"[a-z]{2,}", re.sub(r"<[^<>]*>", "", self.text))) > 1

    @property
    def parts(self) -> tuple[str, str]:
        """What is wrong, and what to do about it; the latter is empty where the message does not say."""
        for found in _BREAK.finditer(self.text):
            rest = self.text[found.end() :]
            if _REMEDY.match(rest):
                return self.text[: found.start()], rest
        return self.text, ""


@dataclass(frozen=True)
class _Module:
    """A module as far as messages need it. functions: also those of classes. constants: its own texts and numbers by name,
    with those that it imports."""

    path: str
    functions: Sequence[ast.FunctionDef]
    constants: Mapping[str, str]

    @property
    def folder(self) -> str:
        """Folder that it lies in."""
        return self.path.rpartition("/")[0]


@cache
def all_messages() -> tuple[Message, ...]:
    """All messages, in the order of the code; equal ones of a module once."""
    modules = _modules()
    makers = {(module.folder, name): maker for module in modules for name, maker in _makers(module)}
    found = [message for module in modules for message in _messages(module, makers)]
    return tuple(dict.fromkeys(one for one in found if one.has_words))


def _modules() -> list[_Module]:
    paths = [ROOT / "hcsmoe.py", *sorted((ROOT / "pipeline").rglob("*.py")), *sorted((ROOT / "stages").rglob("*.py"))]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    own = {_dotted(path): _constants(tree) for path, tree in trees.items()}
    return [
        _Module(path.relative_to(ROOT).as_posix(), _functions(tree), {**_imported(tree, own), **own[_dotted(path)]})
        for path, tree in trees.items()
    ]


def _dotted(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


def _constants(tree: ast.Module) -> dict[str, str]:
    """Texts and numbers that a module gives names to."""
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(node.targets[0].elts, node.value.elts, strict=True))
        elif isinstance(node, ast.Assign):
            pairs = [(node.targets[0], node.value)]
        else:
            continue
        for target, value in pairs:
            if isinstance(target, ast.Name) and (text := _constant_text(value, found)) is not None:
                found[target.id] = text
    return found


def _constant_text(value: ast.expr, known: Mapping[str, str]) -> str | None:
    """A constant as a message prints it; None for anything else."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str | int) and not isinstance(value.value, bool):
        return value.value if isinstance(value.value, str) else f"{value.value:,}"
    if isinstance(value, ast.JoinedStr):
        return _Writer(known, {}).text(value)
    if isinstance(value, ast.BinOp) and type(value.op) in _ARITHMETIC:
        left, right = (side.value if isinstance(side, ast.Constant) else None for side in (value.left, value.right))
        if isinstance(left, int) and isinstance(right, int):
            return f"{_ARITHMETIC[type(value.op)](left, right):,}"
    return None


def _imported(tree: ast.Module, own: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {
        alias.asname or alias.name: own[node.module][alias.name]
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
        if alias.name in own.get(node.module, {})
    }


@dataclass(frozen=True)
class _Writer:
    """Turns the expression of a message into its pattern. local: texts that the function around it gives names to."""

    constants: Mapping[str, str]
    local: Mapping[str, ast.expr]

    def text(self, node: ast.expr) -> str:
        """The pattern of an expression."""
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(self.text(part) for part in node.values)
        if isinstance(node, ast.FormattedValue):
            return self.text(node.value)
        if isinstance(node, ast.IfExp):
            return self._choice(node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):  # of paths
            return f"{self.text(node.left)}/{self.text(node.right)}"
        if isinstance(node, ast.BinOp) and _is_text(node.left) and _is_text(node.right):
            return self.text(node.left) + self.text(node.right)
        if isinstance(node, ast.Name) and node.id in self.constants:
            return self.constants[node.id]
        if isinstance(node, ast.Name) and node.id in self.local:
            return replace(self, local={name: value for name, value in self.local.items() if name != node.id}).text(
                self.local[node.id]
            )
        if isinstance(node, ast.Call) and _called(node) == "join" and isinstance(node.args[0], ast.Tuple):
            return "\n".join(map(self.text, node.args[0].elts))
        return f"<{_name(node)}>"

    def _choice(self, node: ast.IfExp) -> str:
        given = [text for text in (self.text(node.body), self.text(node.orelse)) if text]
        return f"({'|'.join(given)})" if len(given) > 1 or not given else f"[{given[0]}]"


def _name(node: ast.expr) -> str:
    """A name for a value that is put into a message."""
    if isinstance(node, ast.Call):
        inside = [*node.args, node.func.value] if isinstance(node.func, ast.Attribute) else list(node.args)
        for one in inside:
            if not isinstance(one, ast.Constant):
                return _name(one)
        return _called(node).strip("_")
    if isinstance(node, ast.Attribute):
        owner = _name(node.value)
        return node.attr.strip("_").lower() if node.attr != "name" or owner == "self" else f"{owner} {node.attr}"
    if isinstance(node, ast.Name):
        return node.id.strip("_").lower()
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    if isinstance(node, ast.GeneratorExp | ast.ListComp | ast.SetComp):
        return _name(node.generators[0].iter)
    if isinstance(node, ast.BinOp):
        return _name(node.right if isinstance(node.right, ast.Name | ast.Attribute) else node.left)
    if isinstance(node, ast.BoolOp):
        return _name(node.values[0])
    if isinstance(node, ast.Starred):
        return _name(node.value)
    return "value"


@dataclass(frozen=True)
class _Maker:
    """A function that makes an error of a text that it is given. text: number of the argument, without self, and its name."""

    error: ast.Call
    parameters: tuple[str, ...]
    module: _Module


def _makers(module: _Module) -> Iterator[tuple[str, _Maker]]:
    """Functions of a module that return an error, by name."""
    for node in module.functions:
        if isinstance(node.returns, ast.Name) and node.returns.id in SHOWN:
            errors = [one for one in ast.walk(node) if isinstance(one, ast.Call) and _called(one) in SHOWN]
            if len(errors) == 1:
                parameters = tuple(one.arg for one in node.args.args if one.arg != "self")
                yield node.name, _Maker(errors[0], parameters, module)


def _called(node: ast.expr) -> str:
    function = node.func if isinstance(node, ast.Call) else node
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _messages(module: _Module, makers: Mapping[tuple[str, str], _Maker]) -> Iterator[Message]:
    for function in module.functions:
        nodes = list(_own(function))
        local = _local_texts(nodes)
        for node in nodes:
            name = _called(node) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and name in SHOWN and node.args and (module.folder, function.name) not in makers:
                yield from _patterns(module, function, node.args[0], local, name)
            elif isinstance(node, ast.Call) and function.name == _PROBLEMS and name == "append" and _is_text(node.args[0]):
                yield from _patterns(module, function, node.args[0], local, "InputError")
            elif isinstance(node, ast.Call) and name == FAILURE and len(node.args) > 1:
                yield from _patterns(module, function, node.args[1], local, name)
            elif (
                isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and _called(node.exc) in RAISED and node.exc.args
            ):
                yield from _patterns(module, function, node.exc.args[0], local, _called(node.exc))
            elif isinstance(node, ast.Call) and (maker := makers.get((module.folder, name))) is not None:
                given = dict(zip(maker.parameters, node.args, strict=False)) | {
                    one.arg: one.value for one in node.keywords if one.arg
                }
                texts = {
                    key: value for key, value in given.items() if isinstance(value, ast.Constant | ast.JoinedStr | ast.Name)
                }
                writer = _Writer({**maker.module.constants, **module.constants}, {**local, **texts})
                yield Message(_shown(writer.text(maker.error.args[0])), "InputError", module.path, function.name)


def _patterns(
    module: _Module, function: ast.FunctionDef, text: ast.expr, local: Mapping[str, ast.expr], kind: str
) -> Iterator[Message]:
    yield Message(_shown(_Writer(module.constants, local).text(text)), kind, module.path, function.name)


def _shown(text: str) -> str:
    return re.sub(r" {2,}", " ", text.strip())


def _functions(tree: ast.Module) -> tuple[ast.FunctionDef, ...]:
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """What a function holds, without the functions in it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef):
            yield from _own(child)


def _local_texts(nodes: Iterable[ast.AST]) -> dict[str, ast.expr]:
    """Names that a function gives to texts, once each."""
    found: dict[str, list[ast.expr]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    return {name: values[0] for name, values in found.items() if len(values) == 1 and _is_text(values[0])}


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) and _is_text(node.orelse)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
