"""A CUDA 12.4 toolkit put together from public packages: of CUDA 12, PyPI has ptxas, headers and runtime, but no nvcc.

The compiler is that of Debian 13's package nvidia-cuda-toolkit, by apt-get in a folder of its own; nothing is installed.
Headers come from PyPI in the compiler's release; the static runtime from CUDA 12.9, the only one that PyPI has for CUDA 12.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

RELEASE = "12.4"
PROGRAMS = ("cudafe++", "ptxas", "fatbinary", "nvlink", "bin2c")
PROFILE = """\
TOP                = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH              += $(TOP)/nvvm/bin:$(_HERE_):
INCLUDES          += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES         =+ $(_SPACE_) "-L$(TOP)/lib64"
"""


def toolkit(folder: Path) -> Path:
    """The path of nvcc. AssertionError, with the command's output, where something can't be had."""
    debian, top = _debian_compiler(folder), folder / "toolkit"
    for name in ("bin", "nvvm/bin", "include", "lib64"):
        (top / name).mkdir(parents=True)
    own = debian / "usr/lib/nvidia-cuda-toolkit"
    for program in (own / "bin/nvcc", *(debian / "usr/bin" / name for name in PROGRAMS)):
        shutil.copy2(program, top / "bin")
    shutil.copytree(own / "bin/crt", top / "bin/crt")
    shutil.copytree(own / "libdevice", top / "nvvm/libdevice")
    shutil.copy2(own / "bin/cicc", top / "nvvm/bin")
    (top / "bin/nvcc.profile").write_text(PROFILE)
    for name in ("nvcc", "runtime", "cccl"):
        for include in _pypi(folder, f"nvidia-cuda-{name}-cu12=={RELEASE}.*").glob("nvidia/*/include"):
            shutil.copytree(include, top / "include", dirs_exist_ok=True)
    runtime = _pypi(folder, "nvidia-cuda-runtime-cu12==12.9.*") / "nvidia/cuda_runtime/lib"
    for name in ("libcudart_static.a", "libculibos.a"):
        shutil.copy2(runtime / name, top / "lib64")
    # For CMake's trial of the compiler. nvlink refuses 12.9's, and nothing of ours is in need of it.
    _run("ar", "rc", top / "lib64/libcudadevrt.a")
    return top / "bin/nvcc"


def _debian_compiler(folder: Path) -> Path:
    assert shutil.which("apt-get"), "the compiler of CUDA 12 is taken from a Debian package: this needs apt-get"
    state = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (state / name).mkdir(parents=True)
    # The mirror that this machine uses already.
    mirrors = set(_run("apt-get", "indextargets", "--format", "$(REPO_URI)", cwd=folder).split())
    mirror = next((uri for uri in sorted(mirrors) if uri.rstrip("/").endswith("/debian")), None)
    assert mirror, f"no Debian mirror among apt's sources: {sorted(mirrors)}"
    keys = next(Path("/usr/share/keyrings").glob("debian-archive-keyring.*"))
    (state / "sources.list").write_text(f"deb [signed-by={keys}] {mirror} trixie non-free\n")
    options = {
        "Dir::State": state, "Dir::Cache": state / "cache", "Dir::Etc::SourceList": state / "sources.list",
        "Dir::Etc::SourceParts": "-", "APT::Sandbox::User": "root",
    }  # fmt: skip
    apt = ["apt-get", "-q", *(f"-o{name}={value}" for name, value in options.items())]
    _run(*apt, "update", cwd=state)
    _run(*apt, "download", "nvidia-cuda-toolkit=12.4.*", cwd=state)
    (package,) = state.glob("nvidia-cuda-toolkit_*.deb")
    _run("dpkg-deb", "--extract", package, folder / "debian")
    return folder / "debian"


def _pypi(folder: Path, requirement: str) -> Path:
    target = folder / requirement.replace("=", "").replace("*", "x")
    _run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, requirement, cwd=folder)
    return target


def _run(*command: object, cwd: Path | None = None) -> str:
    result = subprocess.run(list(map(str, command)), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}"
    return result.stdout
