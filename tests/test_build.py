"""What the build says where it cannot go on. Nothing is compiled."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent.parent


@pytest.mark.parametrize("named", [None, "g++", "/bin/false"])
def test_a_missing_compiler(tmp_path, named):
    """One message says how to get one, where CMake's own speaks of its variables."""
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    environment = {"PATH": str(tmp_path), "HOME": os.environ.get("HOME", "/"), **({"CXX": named} if named else {})}
    for tool in (cmake, ninja):  # one that is a script of some shell does not run without its programs
        if tool is None or subprocess.run([tool, "--version"], env=environment, capture_output=True).returncode:
            pytest.skip("needs CMake and Ninja")
    command = [cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", str(SOURCES), "-B", str(tmp_path / "build")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert said.count("CMake Error") == 1
    assert "gatewise needs a C++17 compiler, GCC or Clang, and found none that works" in said
    assert "`apt install g++` on Debian" in said
    assert (f'not "{named}" either' in said) == (named is not None)
