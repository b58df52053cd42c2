"""Build of the compiled extension; everything else is in pyproject.toml.

CONVMIXER_FAST_EXT says whether ``convmixer_fast._C`` is built: ``auto`` (the default: where
it cannot be built, warn and install without it), ``0`` (never) or ``1`` (fail if it cannot).
"""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

EXT_MODE = os.environ.get("CONVMIXER_FAST_EXT", "auto")
if EXT_MODE not in ("auto", "0", "1"):
    raise SystemExit(f"CONVMIXER_FAST_EXT must be 'auto', '0' or '1', got {EXT_MODE!r}")

ROOT = Path(__file__).parent
# Relative to this folder, as setuptools wants them.
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h"))

WINGS = ["commands", "integrations", "models", "recognition", "runtime", "support"]
# Sub-packages whose folders stand beside the package's own.
BESIDE = ["benchmarks", "benchmarks.gpu", "export", "kernels"]

COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    # a * b + c may become one instruction, and no operation sets errno or traps: neither
    # changes how NaN and infinities propagate, as -ffast-math would.
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    # Vectors are template arguments and never cross a file: the warnings are about ABIs.
    "-Wno-ignored-attributes",
    "-Wno-psabi",
]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# The sources compiled for one instruction set, which run only where it is found at run time.
X86_FLAGS = {
    "isa_avx2.cpp": AVX2,
    "isa_avx2_vnni.cpp": [*AVX2, "-mavxvnni"],
    "isa_avx512.cpp": AVX512,
    "isa_avx512_vnni.cpp": [*AVX512, "-mavx512vnni"],
    "isa_avx512_bf16.cpp": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
}


class BuildExtension(build_ext):
    """Compiles each source with its own flags, in parallel, and only where it changed."""

    def build_extension(self, ext):
        try:
            import pybind11
        except ImportError as error:
            raise CompileError(f"{ext.name} needs pybind11 (pip install pybind11)") from error

        # One name in older setuptools, the other in newer.
        self.compiler.spawn = self.compiler.call = run_quietly
        includes = [*self.compiler.include_dirs, pybind11.get_include()]
        sources = [source for source in ext.sources if self.runs_here(source)]
        newest_header = max(os.path.getmtime(path) for path in [*ext.depends, __file__])

        def compile_one(source):
            (target,) = self.compiler.object_filenames([source], output_dir=self.build_temp)
            newest_input = max(newest_header, os.path.getmtime(source))
            if self.force or not os.path.exists(target) or os.path.getmtime(target) < newest_input:
                self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    include_dirs=includes,
                    extra_postargs=[*COMPILE_FLAGS, *X86_FLAGS.get(Path(source).name, [])],
                )
            return target

        with ThreadPoolExecutor(self.parallel or os.cpu_count()) as executor:
            objects = list(executor.map(compile_one, sources))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=["-pthread"],
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def runs_here(self, source):
        """Whether ``source`` can be compiled for the platform that is built for."""
        return Path(source).name not in X86_FLAGS or self.plat_name.endswith(("x86_64", "amd64"))


def run_quietly(command, **kwargs):
    """Run a compiler's command; what it prints is in the error, or shown if it succeeds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)
    except OSError as error:
        raise CompileError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise CompileError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    sys.stderr.write(done.stderr)


setup(
    packages=["convmixer_fast", *(f"convmixer_fast.{name}" for name in WINGS + BESIDE)],
    package_dir={
        "convmixer_fast": "convmixer_fast",
        **{f"convmixer_fast.{name}": name.replace(".", "/") for name in BESIDE},
    },
    include_package_data=False,  # otherwise the folder data/ is taken for a package
    package_data={"convmixer_fast": ["py.typed", "*.pyi", "data/*"]},
    ext_modules=[]
    if EXT_MODE == "0"
    else [
        # setuptools turns the failure of an optional extension into a warning.
        Extension(
            "convmixer_fast._C",
            SOURCES,
            depends=HEADERS,
            language="c++",
            optional=EXT_MODE == "auto",
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
