"""Builds the CPU kernels as a plain shared library; everything else about the package is in pyproject.toml.

A build that fails (no compiler, say) does not fail the install: the program then multiplies with plain
PyTorch and says so.
"""

import os
import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
NATIVE = runpy.run_path(str(ROOT / "pmpd" / "kernels" / "_sources.py"))


class BuildNative(build_ext):
    """Names the library without Python's suffix (it is not a Python module), and reports a failure instead of
    raising it."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # whatever goes wrong here must not stop the install
            print(
                f"warning: the CPU kernels were not built ({error}); the slow path will be used",
                file=sys.stderr,
            )


class BuildPython(build_py):
    """Writes the commit into what is built (not into the source tree), where git knows it."""

    def run(self) -> None:
        super().run()
        provenance = runpy.run_path(str(ROOT / "pmpd" / "storage" / "provenance.py"))
        commit = provenance["commit_of"](ROOT)
        if commit and not self.editable_mode:
            Path(self.build_lib, "pmpd", provenance["COMMIT_FILE"].name).write_text(commit + "\n")


setup(
    ext_modules=[
        Extension(
            "pmpd.kernels." + NATIVE["LIBRARY"].removesuffix(".so"),
            sources=[str(path.relative_to(ROOT)) for path in NATIVE["sources"]()],
            depends=[str(path.relative_to(ROOT)) for path in NATIVE["FOLDER"].glob("*.h")],
            extra_compile_args=[
                *(
                    "-std=c++17",
                    "-O3",
                    "-fvisibility=hidden",
                    "-fno-exceptions",
                    "-fno-rtti",
                    "-fno-math-errno",
                    "-Wno-maybe-uninitialized",
                ),
                f'-DPMPD_SOURCES="{NATIVE["fingerprint"]()}"',
            ],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
