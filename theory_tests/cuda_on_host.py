"""The source of the CUDA kernels compiled for the host, so that every line of it is run where there is no device.

A stand-in for `dfmath.backends.cuda` on torch tensors of the CPU: its `launch` runs the blocks of a grid one after
another. What a device does differently (its scheduling, its memory, its own arithmetic beyond IEEE's) is not seen.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

from dfmath.backends import cuda

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")


def compiled(folder):
    """Compile the kernels, each with a function around it that runs a grid of it."""
    text = subprocess.run(
        [COMPILER, "-E", "-P", "-x", "c++", str(cuda.SOURCE)], check=True, capture_output=True, text=True
    ).stdout
    kernels = re.findall(r'extern "C" __global__ void (\w+)\(([^)]*)\)', text)
    source = folder / "kernels.cpp"
    wrapped = "\n".join(_runner(name, _arguments(given)) for name, given in kernels)
    source.write_text(f'#include "{HERE / "cuda_on_host.h"}"\n#include "{cuda.SOURCE}"\n{wrapped}\n')
    target = folder / "kernels.so"
    flags = ["-O1", "-g", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-w"]
    subprocess.run([COMPILER, *flags, "-o", str(target), str(source)], check=True)
    return ctypes.CDLL(str(target)), {name: [kind for kind, _ in _arguments(given)] for name, given in kernels}


def _arguments(text):
    """(type, name) of each argument."""
    return [(kind.strip(), name) for kind, name in re.findall(r"\s*([^,]*?)(\w+)\s*(?:,|$)", text)]


def _runner(name, arguments):
    """A function with C's names that keeps the arguments for every thread of every block."""
    kept = "\n".join(f"static {kind} {name}_{i};" for i, (kind, _) in enumerate(arguments))
    taken = ", ".join(f"{kind} a{i}" for i, (kind, _) in enumerate(arguments))
    stored = " ".join(f"{name}_{i} = a{i};" for i in range(len(arguments)))
    passed = ", ".join(f"{name}_{i}" for i in range(len(arguments)))
    return (
        f"{kept}\nstatic void body_{name}() {{ {name}({passed}); }}\n"
        f'extern "C" int run_{name}(unsigned x, unsigned y, unsigned z, unsigned threads, int backwards, {taken})\n'
        f"{{ {stored} body = body_{name}; return run_grid(x, y, z, threads, backwards); }}"
    )


class Host:
    """Runs kernels on tensors of the CPU; `started` has their names."""

    def __init__(self, folder):
        self.library, self.signatures = compiled(folder)
        self.backwards, self.started = False, []

    def launch(self, name, grid, *arguments):
        """Run every block of the grid; see `dfmath.backends.cuda.launch`."""
        kinds = self.signatures[name]
        assert len(kinds) == len(arguments), (name, kinds, len(arguments))
        passed = [self._passed(kind, value) for kind, value in zip(kinds, arguments, strict=True)]
        self.started.append(name)
        sizes = [ctypes.c_uint(n) for n in (*grid, 1, 1)[:3]]
        run = self.library[f"run_{name}"]
        broken = run(*sizes, ctypes.c_uint(cuda.THREADS), ctypes.c_int(self.backwards), *passed)
        assert not broken, f"{name}: not all threads of a block came to the same barrier"

    def _passed(self, kind, value):
        if "*" not in kind:
            return {"Index": ctypes.c_longlong, "double": ctypes.c_double}[kind](value)
        element = kind.replace("const", "").replace("*", "").strip()
        wanted = {"Index": "int64", "double": "float64", "float": "float32", "Law": "float64"}[element]
        assert str(value.dtype) == f"torch.{wanted}" and value.is_contiguous(), (kind, value.dtype, value.stride())
        assert value.device.type == "cpu"
        return ctypes.c_void_p(value.data_ptr())
