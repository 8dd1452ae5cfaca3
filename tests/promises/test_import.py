"""What `import gatewise` brings, each test in a process of its own, and what it says where it cannot."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gatewise as gw
import pytest


def python(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(("name", "package"), [("plot", "matplotlib"), ("torch", "torch"), ("jax", "jax")])
def test_modules_that_need_packages_are_imported_when_they_are_asked_for(tmp_path, name, package):
    pytest.importorskip(package)
    code = f"import sys, gatewise as gw; assert {package!r} not in sys.modules; print(gw.{name}.__name__)"
    done = python("-c", code, cwd=tmp_path)
    assert done.stdout == f"gatewise.{name}\n", done.stderr


@pytest.mark.parametrize(("name", "package"), [("plot", "matplotlib"), ("torch", "PyTorch"), ("jax", "JAX")])
@pytest.mark.parametrize("way", ["gatewise.{}", "from gatewise import {}"])
def test_a_package_that_is_missing_is_named(tmp_path, name, package, way):
    module = "matplotlib" if name == "plot" else name
    code = f"import sys, gatewise; sys.modules[{module!r}] = None; {way.format(name)}"
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f"gatewise.{name} needs {package}: pip install 'gatewise[{name}]'")


def test_the_names_of_the_package_are_those_for_users(tmp_path):
    done = python("-c", "import gatewise as gw, json; print(json.dumps(dir(gw)))", cwd=tmp_path)
    names = {name for name in json.loads(done.stdout) if not name.startswith("__")}
    assert names == set(gw.__all__)


def test_help_needs_no_packages(tmp_path):
    hidden = "import sys, gatewise; sys.modules.update(dict.fromkeys(['jax', 'matplotlib', 'torch']))"
    shown = "import pydoc; print(pydoc.render_doc(gatewise, renderer=pydoc.plaintext))"
    done = python("-c", f"{hidden}; {shown}", cwd=tmp_path)
    assert "class LSTM(" in done.stdout, done.stderr


def test_sources_that_are_not_built_say_so(tmp_path):
    """Without the packages of this environment, where another gatewise may be installed."""
    ignore = shutil.ignore_patterns("_core*.so", "__pycache__")
    shutil.copytree(Path(gw.__file__).parent, tmp_path / "gatewise", ignore=ignore)
    done = python("-S", "-c", "import gatewise", cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 1
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: gatewise is not built here for Python {version}: leave the source tree")


def test_another_module_that_is_missing_is_not_mistaken_for_the_core(tmp_path):
    code = "import sys; sys.modules['numpy'] = None; import gatewise"
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: import of numpy halted")
