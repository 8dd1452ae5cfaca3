"""The blocks of Python in README and docs: they can be parsed, and import the modules that they use."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = {"gatewise", "gw", "jax", "jnp", "np", "onnxruntime", "optax", "torch"}


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_can_be_parsed_and_import_what_they_use(page):
    """In their own block or one above; README's first block has gw and np for all of docs."""
    imported = set() if page == PAGES[0] else {"gw", "np"}
    for block in blocks(page):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imported |= {name.asname or name.name.partition(".")[0] for name in node.names}
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert used & MODULES <= imported, block


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_package_exist(page):
    text = "\n".join(blocks(page))
    for names in re.findall(r"\b(?:gw|gatewise)\.([a-zA-Z_.]+)", text):
        value = importlib.import_module("gatewise")
        for name in names.rstrip(".").split("."):
            if name in ("torch", "jax", "plot"):
                pytest.importorskip("matplotlib" if name == "plot" else name)
            assert hasattr(value, name), f"{value.__name__}.{name}"
            value = getattr(value, name)
