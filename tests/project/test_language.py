"""Words that CONTRIBUTING.md asks to avoid, in names, comments and docstrings."""

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("python", "cpp", "tests", "benchmarks")
NOT_YET = (
    "python/gatewise/formats/onnx",
    "python/gatewise/cli/demo.py",
    "tests/formats/test_onnx.py",
    "tests/fuzz/onnx.py",
)

# A variable is named by what it is: these say only that something happened to a thing, or where it is.
NAMES = {"of", "found", "given", "wanted", "kept", "own", "one", "two", "at", "there", "what"}
PHRASES = {
    r"\bbehind\b": "after, or to the right of",
    r"\balone\b": "only, or by itself",
    r"\b(just )?so many\b": "that many, or the number's name",
    r"\b(what|which) is (none|no)\b": "not a",
    r"\bbe it\b": "even if",
}


def variables(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def sentences(path):
    """Comments and docstrings, each with the number of its line."""
    text = path.read_text()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                yield ast.get_docstring(node), node.body[0].lineno
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield token.string, token.start[0]
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if comment := re.search(r"//.*", line):
                yield comment[0], number


def findings(path):
    for text, line in sentences(path):
        for phrase, better in PHRASES.items():
            if match := re.search(phrase, text):
                yield f"{path.relative_to(ROOT)}:{line}: {match[0]!r}; write {better}"
    if path.suffix == ".py":
        for name, line in variables(ast.parse(path.read_text())):
            if name in NAMES:
                yield f"{path.relative_to(ROOT)}:{line}: a variable {name!r}; name it by what it is"


def files():
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            name = str(path.relative_to(ROOT))
            if path.suffix in (".py", ".cpp", ".hpp") and not name.startswith(NOT_YET) and path != Path(__file__):
                yield path


def test_words():
    assert [finding for path in files() for finding in findings(path)] == []


def test_the_check_sees_a_word(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "a.py").write_text('"""What lies behind."""\n\n\ndef double(of):\n    return of  # a number alone\n')
    (tmp_path / "a.cpp").write_text("int behind = 0;  // so many\n")
    lines = [finding.partition(";")[0] for path in sorted(tmp_path.iterdir()) for finding in findings(path)]
    assert lines == ["a.cpp:1: 'so many'", "a.py:1: 'behind'", "a.py:5: 'alone'", "a.py:4: a variable 'of'"]
