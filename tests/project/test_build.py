"""What the build says where it cannot go on. Nothing is compiled."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2]


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
    assert "gatewise needs a C++20 compiler, GCC 11 or Clang 12 or newer, and found none that works" in said
    assert "`apt install g++` on Debian" in said
    assert (f'not "{named}" either' in said) == (named is not None)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs GCC")
def test_an_old_compiler(tmp_path):
    """Refused by its version, before it fails with a message about one of its flags."""
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} -U__GNUC__ -D__GNUC__=10 "$@"\n')
    compiler.chmod(0o755)
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if cmake is None or ninja is None:
        pytest.skip("needs CMake and Ninja")
    command = [cmake, "-G", "Ninja", "-S", str(SOURCES), "-B", str(tmp_path / "build")]
    environment = os.environ | {"CXX": str(compiler)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert "gatewise needs a C++20 compiler, GCC 11 or Clang 12 or newer, and found GNU 10." in said
    assert str(compiler) in said
