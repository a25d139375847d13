"""Sizes, words, references and other promises about the files themselves."""

import ast
import re
from pathlib import Path

import pytest

from tests.structure.tree import ROOT, imports, module_name, package_files, tracked_files
from vllm import envs

MAX_LINES = 500
CODE = {".py", ".cu", ".cuh", ".h", ".cpp"}
# Only for files that would be worse in two parts; each with its reason.
LONGER: dict[str, str] = {}

# Spelled so that this file does not contain what it looks for.
MACHINE = re.compile(
    "|".join(
        [
            r"(?<![\w.~-])/(wor" + r"k|op" + r"t)/[\w.]",
            r"/(hom" + r"e|User" + r"s)/\w+/",
            r"pypi-mo" + r"re",
            r"find-lin" + r"ks\s*=",
            r"(artifactor" + r"y|nexu" + r"s|devp" + r"i)[\w.-]*/",
            r"work" + r"place|fire" + r"cracker|gvis" + r"or",
        ]
    ),
    re.IGNORECASE,
)


def text(path: Path) -> str | None:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        return None


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_files_are_short():
    long = {}
    for path in tracked_files():
        if (
            path.suffix in CODE
            and (lines := len((text(path) or "").splitlines())) > MAX_LINES
            and name(path) not in LONGER
        ):
            long[name(path)] = lines
    assert not long, f"over {MAX_LINES} lines: {long}"


def machine_words(content: str) -> list[str]:
    return [match.group() for match in MACHINE.finditer(content)]


def test_no_file_speaks_of_one_machine():
    found = {name(path): words for path in tracked_files() if (words := machine_words(text(path) or ""))}
    assert not found, found


@pytest.mark.parametrize(
    "line", ["cd /wor" + "k/main", "--path=/op" + "t/x", "'/hom" + "e/me/x'", "find-lin" + "ks = x"]
)
def test_a_machine_path_is_seen(line):
    assert machine_words(line)


@pytest.mark.parametrize(
    "line", ["docs/work/x", "2/optimal", "~/.cache/vllm", "https://host/work", "the /workers route"]
)
def test_an_innocent_path_is_not(line):
    assert not machine_words(line)


def test_every_package_says_what_it_is():
    silent = []
    folders = {path.parent for path in package_files()}
    for folder in sorted(
        folders | {parent for f in folders for parent in f.parents if (ROOT / "vllm") in parent.parents}
    ):
        init = folder / "__init__.py"
        if not init.is_file() or not ast.get_docstring(ast.parse(init.read_text())):
            silent.append(name(init))
    assert not silent, f"no docstring in {silent}"


def launched_kernels(source: str) -> list[str]:
    """Triton kernels that a file defines and launches, as `kernel[grid](...)`."""
    tree = ast.parse(source)
    jitted = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any(re.search(r"\bjit\b", ast.unparse(d)) for d in node.decorator_list)
    }
    launched = {
        node.func.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name)
    }
    return sorted(jitted & launched)


REFERENCE = re.compile(r"(^|_)(ref|reference|naive|native|torch)(_|$)", re.IGNORECASE)


def names_a_reference(source: str) -> bool:
    """Whether a test uses something named as a plain-PyTorch reference."""
    nodes = list(ast.walk(ast.parse(source)))
    used = [node.id for node in nodes if isinstance(node, ast.Name)]
    used += [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    return any(REFERENCE.search(identifier) for identifier in used if identifier != "torch")


def kernel_tests(kernel: Path) -> list[Path]:
    """test_<stem>.py; or, for the second file of a pair such as conv.py and conv_update.py, the pair's test if it imports both."""
    tests = [path for folder in ("kernels", "csrc") for path in sorted((ROOT / "tests" / folder).glob("test_*.py"))]
    own = [test for test in tests if test.stem == f"test_{kernel.stem}"]
    pair = [
        test
        for test in tests
        if f"test_{kernel.stem}".startswith(f"{test.stem}_")
        and any(i.target.startswith(module_name(kernel)) for i in imports(test.read_text(), module_name(test)))
    ]
    return own or pair


def untested(kernel: Path) -> str | None:
    tests = kernel_tests(kernel)
    if not tests:
        return f"no tests/kernels/test_{kernel.stem}.py or tests/csrc/test_{kernel.stem}.py"
    if not any(names_a_reference(test.read_text()) for test in tests):
        return f"{name(tests[0])} uses nothing named as a reference (…_ref, …_reference, naive_…, …_torch)"
    return None


def test_every_kernel_has_a_reference():
    kernels = [path for path in package_files() if launched_kernels(path.read_text())]
    kernels += sorted((ROOT / "csrc").rglob("*.cu"))
    missing = {name(path): problem for path in kernels if (problem := untested(path))}
    assert not missing, "\n".join(f"{key}: {value}" for key, value in missing.items())


def test_a_kernel_without_a_reference_is_seen():
    kernel = "@triton.jit\ndef double(x): pass\n\ndef run(x):\n    double[(1,)](x)\n"
    assert launched_kernels(kernel) == ["double"]
    assert launched_kernels(kernel.replace("(1,)", "grid").replace("@triton.jit", "@triton.autotune([])\n@triton.jit"))
    assert launched_kernels("@triton.jit\ndef helper(x): pass\n") == []
    assert untested(ROOT / "vllm" / "no_such_kernel.py")
    assert names_a_reference("def test(): assert double(x) == double_ref(x)")
    assert names_a_reference("def test(): assert double(x) == naive.naive_double(x)")
    assert not names_a_reference("import torch\ndef test(): assert torch.equal(double(x), 2)")


def envs_read(source: str) -> set[str]:
    return set(re.findall(r"\benvs\.(VLLM_\w+)", source))


def test_environment_variables_are_declared_and_honoured():
    sources = {module_name(path): path.read_text() for path in package_files() if path.name != "envs.py"}
    read = set().union(*map(envs_read, sources.values()))
    read |= set(re.findall(r"environ.get\(\"(VLLM_\w+)\"", (ROOT / "setup.py").read_text()))
    assert read <= set(envs.VARIABLES), f"not in envs.VARIABLES: {read - set(envs.VARIABLES)}"
    assert read >= set(envs.VARIABLES), f"declared, but nothing reads it: {set(envs.VARIABLES) - read}"
    direct = {
        module: found
        for module, source in sources.items()
        if (found := re.findall(r"environ\b.{0,6}[\"'](VLLM_\w+)", source))
    }
    assert not direct, f"read these through vllm.envs: {direct}"


def test_versions_are_in_step():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements/test.txt").read_text(), re.MULTILINE))
    hooks = re.findall(r"([\w-]+)==([\w.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks and all(pins[tool] == version for tool, version in hooks)
    assert f"## {__import__('vllm').__version__}" in (ROOT / "CHANGELOG.md").read_text()
