"""Lists the packages and builds the CUDA extension where nvcc is found; everything else stands in pyproject.toml.

nvcc is looked for on PATH, then in /usr/local/cuda, then among the installed PyPI packages (nvidia-cuda-nvcc and what
it requires; visible with --no-build-isolation). QWEN2VL_FAST_NVCC overrides this: the path of an nvcc, or "none" to
install without the extension. A pip install has no argument that reaches here, hence the variable.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> Path | None:
    """The nvcc to build with, or None to build no extension."""
    requested = os.environ.get("QWEN2VL_FAST_NVCC")
    if requested == "none":
        return None
    if requested:
        if not os.access(requested, os.X_OK):
            raise SystemExit(f"QWEN2VL_FAST_NVCC: expected the path of an nvcc or 'none', got {requested!r}")
        return Path(requested)
    on_path = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if on_path:
        return Path(on_path)
    nvidia = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in nvidia.submodule_search_locations] if nvidia else []
    return next((nvcc for root in roots for nvcc in sorted(root.glob("cu*/bin/nvcc"), reverse=True)), None)


def find_tool(name: str) -> str:
    """A build tool from PATH, or from beside this Python (a virtual environment that is not activated)."""
    tool = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if tool is None:
        raise SystemExit(f"building the CUDA extension needs {name}: pip install {name}")
    return tool


class CMakeBuild(build_ext):
    """Configures and builds csrc/ with CMake, in a folder that is kept so that the next build compiles only changes."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError:
            raise SystemExit("building the CUDA extension needs pybind11: pip install pybind11") from None

        nvcc = find_nvcc()
        target = (ROOT / self.get_ext_fullpath(ext.name)).resolve()
        # A folder for each compiler: CMake drops its settings, ours among them, when the compiler of a folder changes.
        compiler = hashlib.sha256(str(nvcc).encode()).hexdigest()[:8]
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{compiler}"
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CUDA_COMPILER": nvcc,
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        # The PyPI packages keep libraries in lib, where their nvcc looks in lib64.
        libraries = nvcc.parent.parent / "lib"
        if (libraries / "libcudart_static.a").exists():
            options["CMAKE_CUDA_FLAGS"] = f"-L{libraries}"
        cmake = find_tool("cmake")
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        try:
            subprocess.run([cmake, "-S", ROOT, "-B", build_dir, "-G", "Ninja", *definitions], check=True)
            subprocess.run([cmake, "--build", build_dir], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"building the CUDA extension with {nvcc} failed: {error}. QWEN2VL_FAST_NVCC=/path/to/nvcc "
                "chooses another, QWEN2VL_FAST_NVCC=none installs without the extension."
            ) from error
        (built,) = build_dir.glob("_C.*.so")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Moved into place, since a running process may have the old file mapped.
        partial = target.with_suffix(".partial")
        shutil.copyfile(built, partial)
        partial.replace(target)


def main() -> None:
    has_nvcc = find_nvcc() is not None
    if not has_nvcc:
        print(
            "qwen2vl_fast: no nvcc (or QWEN2VL_FAST_NVCC=none): installing without the CUDA extension. "
            "`qwen2vl-fast doctor` tells what that leaves unusable.",
            file=sys.stderr,
        )
    setup(
        # kernels/ is reached through a symlink and has no __init__.py: nothing is installed as top-level `kernels`.
        packages=[*find_packages(include=["qwen2vl_fast", "qwen2vl_fast.*"]), "qwen2vl_fast.kernels"],
        ext_modules=[Extension("qwen2vl_fast._C", sources=[])] if has_nvcc else [],
        cmdclass={"build_ext": CMakeBuild},
    )


if __name__ == "__main__":
    main()
