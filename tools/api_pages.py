"""Write docs/api/: one Markdown page per public module of the library, from its docstrings.

    python tools/api_pages.py [FOLDER]

The source is read, not imported, so no page depends on the machine. A package's page lists the names that it
offers, each with a link to the module that defines it.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LIBRARY = "hdmil_lib"
INTERNAL = {"gpu", "reference", "elementary", "variants"}  # how a kernel is written, not how it is used
SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields")
WIDTH = 100  # of a signature

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def modules(root: Path) -> dict[str, ast.Module]:
    """Public modules of the package in a folder, each package before its modules: name -> syntax tree."""
    found = {}
    for path in root.rglob("*.py"):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        if not any(part.startswith("_") or part in INTERNAL for part in parts[1:]):
            found[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return dict(sorted(found.items()))


def pages(trees: dict[str, ast.Module]) -> dict[str, str]:
    """Text of each page and of an index, by file name; no page without a docstring and public names."""
    written = {}
    for module, tree in trees.items():
        body = list(_offered(module, trees)) + list(_defined(tree))
        if body and ast.get_docstring(tree):
            heading = [f"# `{module}`", _prose(ast.get_docstring(tree))]
            written[f"{module}.md"] = "\n\n".join(filter(None, heading + body)) + "\n"
    lines = [
        f"- [`{name[:-3]}`]({name}): {_summary(trees[name[:-3]])}"
        for name in sorted(written, key=lambda name: name.split("."))
    ]
    written["index.md"] = "# Modules\n\n" + "\n".join(lines) + "\n"
    return written


def _public(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node.name
        elif (name := _constant(node)) is not None:
            yield name


def _constant(node: ast.stmt) -> str | None:
    """Name of a public constant or type that a statement assigns, but not of a type variable."""
    if not isinstance(node, ast.Assign | ast.AnnAssign) or "TypeVar(" in ast.unparse(node):
        return None
    name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
    return name if name.isidentifier() and name[0].isupper() else None


def _offered(package: str, trees: dict[str, ast.Module]) -> Iterator[str]:
    """The names in a package's `__all__` that its modules define."""
    tree = trees[package]
    sources = {
        alias.name: f"{node.module}."
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    listed = [
        name
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for name in re.findall(r"'(\w+)'", ast.unparse(node.value))
    ]
    links = []
    for name in listed:
        source = sources.get(name, f"{package}.")
        homes = [m for m in trees if f"{m}.".startswith(source) and name in _public(trees[m])]
        homes = [m for m in homes if m != package and ast.get_docstring(trees[m])]
        links += [f"- [`{name}`]({home}.md#{name.lower()})" for home in homes[:1]]
    if links:
        yield "\n".join(links)


def _defined(tree: ast.Module) -> Iterator[str]:
    for place, node in enumerate(tree.body):
        if isinstance(node, Definition):
            if not node.name.startswith("_"):
                yield from _definition(node, "##", "")
        elif (name := _constant(node)) is not None:
            yield f"## `{name}`"
            yield f"```python\n{_shortened(ast.unparse(node))}\n```"
            follows = tree.body[place + 1] if place + 1 < len(tree.body) else None
            if isinstance(follows, ast.Expr) and isinstance(follows.value, ast.Constant):
                yield _prose(str(follows.value.value))


def _definition(node: Definition, level: str, owner: str) -> Iterator[str]:
    yield f"{level} `{owner}{node.name}`"
    yield f"```python\n{_signature(node)}\n```"
    yield _prose(ast.get_docstring(node))
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if not isinstance(member, ast.FunctionDef) or _is_setter(member):
                continue
            if member.name == "__init__":
                yield _prose(ast.get_docstring(member))
            elif not member.name.startswith("_"):
                yield from _definition(member, "###", f"{owner}{node.name}.")


def _is_setter(method: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).endswith(".setter") for decorator in method.decorator_list)


def _signature(node: Definition) -> str:
    """How a function is called, or a class made; one parameter per line where one line is too short."""
    if not isinstance(node, ast.ClassDef):
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        shown = [f"@{name}\n" for name in decorators if name in ("property", "classmethod", "staticmethod")]
        returned = f" -> {_annotation(node.returns)}" if node.returns else ""
        return "".join(shown) + _call(f"def {node.name}", _parameters(node.args), returned)
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return _call(f"class {node.name}", _parameters(member.args), "")
    fields = [ast.unparse(member) for member in node.body if isinstance(member, ast.AnnAssign)]
    if fields and not all(field.startswith("_") for field in fields):
        return _call(f"class {node.name}", fields, "")
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    return f"class {node.name}({bases})" if bases else f"class {node.name}"


def _parameters(arguments: ast.arguments) -> list[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    shown = [_parameter(a, default) for a, default in zip(positional, defaults, strict=True)]
    if arguments.posonlyargs:
        shown.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        shown.append("*" + _parameter(arguments.vararg, None))
    elif arguments.kwonlyargs:
        shown.append("*")
    shown += [
        _parameter(a, default) for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        shown.append("**" + _parameter(arguments.kwarg, None))
    return shown[1:] if positional and positional[0].arg in ("self", "cls") else shown


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {_annotation(argument.annotation)}" if argument.annotation else ""
    equals = " = " if annotation else "="
    return f"{argument.arg}{annotation}" + (f"{equals}{ast.unparse(default)}" if default else "")


def _annotation(node: ast.expr) -> str:
    """An annotation; one that stands in quotes without them."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ast.unparse(node)


def _call(name: str, parameters: list[str], returned: str) -> str:
    line = f"{name}({', '.join(parameters)}){returned}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){returned}"


def _shortened(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 4] + " ..."


def _summary(tree: ast.Module) -> str:
    return (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")


def _prose(docstring: str | None) -> str:
    """A Google-style docstring as Markdown: its sections become lists."""
    blocks = []
    for block in (docstring or "").split("\n\n"):
        heading, _, rest = block.partition("\n")
        if heading.rstrip(":") not in SECTIONS:
            blocks.append(block)
            continue
        entries = re.sub(r"\n {8,}", " ", rest)  # continued lines
        if heading in ("Returns:", "Yields:"):
            blocks.append(f"**{heading[:-1]}:** " + " ".join(line.strip() for line in entries.splitlines()))
        else:
            items = [
                re.sub(r"^([^:]+): ", r"- `\1`: ", line.strip(), count=1)
                for line in entries.splitlines()
                if line.strip()
            ]
            blocks.append(f"**{heading[:-1]}**\n\n" + "\n".join(items))
    return "\n\n".join(blocks).strip()


def main(folder: Path) -> None:
    """Write all pages into a folder, in place of those that a former run left there."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.md"):
        old.unlink()
    for name, text in pages(modules(REPOSITORY / LIBRARY)).items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / "docs" / "api")
