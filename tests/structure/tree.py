"""Reads the source tree without importing it: files, module names, imports."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


def tracked_files() -> list[Path]:
    """What git tracks or would track; without git (a source archive), everything but hidden and built files."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0 and listed.stdout:
        return sorted(path for line in set(listed.stdout.splitlines()) if (path := ROOT / line).is_file())
    skip = {"build", "dist", "__pycache__"}
    return sorted(
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not any(p in skip or p.startswith(".") for p in path.relative_to(ROOT).parts)
    )


def package_files() -> list[Path]:
    return sorted((ROOT / "vllm").rglob("*.py"))


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class Import(NamedTuple):
    line: int
    target: str  # as far as the text tells: for `from a import b` it is a.b, be b a module or a name in one


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Every import of a file, inside functions too, but not those for type checkers alone."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(child for statement in node.body for child in ast.walk(statement))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                keep = len(parents) - node.level + is_package
                base = ".".join(parents[:keep] + ([base] if base else []))
            yield from (Import(node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (
                Import(node.lineno, name.value)
                for name in node.args[:1]
                if isinstance(name, ast.Constant) and isinstance(name.value, str)
            )
