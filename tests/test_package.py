"""What is shipped and how it installs: sdist, wheel, the CUDA extension, doctor, and the pins of the make targets."""

from __future__ import annotations

import email
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import qwen2vl_fast
from qwen2vl_fast import doctor
from qwen2vl_fast.ops.backends import extension_error
from tests import cuda12

ROOT = Path(__file__).resolve().parent.parent
VERSION = qwen2vl_fast.__version__
NO_NVCC = {"QWEN2VL_FAST_NVCC": "none"}
BUILD_SECONDS = 300  # of two cores


def run(*command: object, cwd: Path, **environment: str) -> str:
    """The command's output, both streams; a failure shows it."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, f"{command}: exit status {result.returncode}\n{result.stdout}"
    return result.stdout


def load_setup():
    """setup.py as a module; it only acts when it is the program."""
    spec = importlib.util.spec_from_file_location("qwen2vl_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shipped() -> set[str]:
    """The files that both sdist and wheel must hold of the package, seen from qwen2vl_fast/."""
    package = ROOT / "qwen2vl_fast"
    files = [*package.rglob("*.py"), package / "py.typed"]
    files += [path for path in (package / "assets").rglob("*") if path.is_file()]
    names = {str(path.relative_to(package)) for path in files if "__pycache__" not in path.parts}
    return names | {f"kernels/{path.name}" for path in (ROOT / "kernels").iterdir() if path.is_file()}


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", folder, ROOT, cwd=folder, **NO_NVCC)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def unpacked(sdist, tmp_path_factory) -> Path:
    """The sdist's files: what follows is built from them, so that nothing of the checkout can help."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return folder / f"qwen2vl_fast-{VERSION}"


@pytest.fixture(scope="session")
def build_log_and_wheel(unpacked, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder, unpacked]
    log = run(*command, cwd=folder, **NO_NVCC)
    (wheel,) = folder.glob("*.whl")
    return log, wheel


def make_environment(folder: Path, wheel: Path) -> Path:
    """The Python of a new environment: `wheel` installed, and after it the packages of the running environment.

    They are found through a .pth file. Python does not read the .pth files of a folder that is added so, and thus an
    editable install of this checkout does not come along.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=ROOT)
    python = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", wheel]
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder)
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    paths |= {str(Path(package.__file__).parents[1]) for package in (pytest, sys.modules["torch"])}
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "zz_running_environment.pth").write_text("\n".join(sorted(paths)))
    return python


@pytest.fixture(scope="session")
def clean_python(build_log_and_wheel, tmp_path_factory) -> Path:
    return make_environment(tmp_path_factory.mktemp("clean") / "venv", build_log_and_wheel[1])


def test_sdist_contents(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
        assert not [member.name for member in archive.getmembers() if member.issym() or member.islnk()]
    csrc = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.is_file()}
    wanted = {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "CHANGELOG.md"} | csrc
    assert wanted <= names
    assert {name.removeprefix("qwen2vl_fast/") for name in names if name.startswith("qwen2vl_fast/")} == shipped()
    assert not [name for name in names if name.startswith("kernels/")]


def test_wheel_contents(build_log_and_wheel):
    wheel = build_log_and_wheel[1]
    assert wheel.name == f"qwen2vl_fast-{VERSION}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"qwen2vl_fast-{VERSION}.dist-info"
    assert {name.split("/")[0] for name in names} == {"qwen2vl_fast", info}
    assert {name.removeprefix("qwen2vl_fast/") for name in names if name.startswith("qwen2vl_fast/")} == shipped()
    assert f"{info}/licenses/LICENSE" in names
    # nano is at most 10 MB; the rest is text, pictures and a short clip.
    assert wheel.stat().st_size < 16 * 2**20


def test_wheel_metadata(build_log_and_wheel):
    archive = zipfile.ZipFile(build_log_and_wheel[1])
    metadata = email.message_from_bytes(archive.read(f"qwen2vl_fast-{VERSION}.dist-info/METADATA"))
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {"video", "transformers", "flash", "train", "dev"}
    core = [row for row in metadata.get_all("Requires-Dist") if "extra ==" not in row]
    names = {re.match(r"[\w-]+", row).group().replace("_", "-") for row in core}
    assert names == {"torch", "triton", "numpy", "safetensors", "tokenizers", "jinja2", "pillow", "huggingface-hub"}
    assert next(row for row in core if row.startswith("torch")) == "torch>=2.9"
    scripts = archive.read(f"qwen2vl_fast-{VERSION}.dist-info/entry_points.txt").decode()
    assert "qwen2vl-fast = qwen2vl_fast.cli:main" in scripts


def test_build_without_nvcc_says_so(build_log_and_wheel, clean_python, tmp_path):
    assert "installing without the CUDA extension" in build_log_and_wheel[0]
    script = "from qwen2vl_fast import backends, doctor; print(doctor.extension(), backends()['varlen_attention']['cuda'])"
    assert "extension is not built" in run(clean_python, "-I", "-c", script, cwd=tmp_path)


def test_wheel_beside_hugging_face_kernels(clean_python, tmp_path):
    script = """
import json, kernels, transformers, qwen2vl_fast, qwen2vl_fast.kernels
from pathlib import Path
print(json.dumps({
    "kernels": kernels.__file__,
    "get_kernel": callable(kernels.get_kernel),
    "ours": qwen2vl_fast.__file__,
    "files": sorted(path.name for path in Path(qwen2vl_fast.kernels.__path__[0]).iterdir() if path.is_file()),
    "version": qwen2vl_fast.__version__,
}))
"""
    seen = json.loads(run(clean_python, "-I", "-c", script, cwd=tmp_path).splitlines()[-1])
    site_packages = str(clean_python.parents[1] / "lib")
    assert seen["ours"].startswith(site_packages)
    assert seen["get_kernel"] and not seen["kernels"].startswith((site_packages, str(ROOT / "kernels")))
    assert seen["files"] == sorted(path.name for path in (ROOT / "kernels").iterdir() if path.is_file())
    assert seen["version"] == VERSION


def test_installed_command(clean_python, tmp_path):
    report = run(clean_python.with_name("qwen2vl-fast"), "doctor", cwd=tmp_path)
    assert re.search(rf"^qwen2vl-fast +{re.escape(VERSION)}$", report, re.MULTILINE)


def test_doctor_reports_every_backend(capsys):
    report = doctor.report()
    for op, row in qwen2vl_fast.backends().items():
        assert re.search(rf"^{op}$", report, re.MULTILINE)
        for backend, reason in row.items():
            assert re.search(rf"^ +{backend} +{re.escape(reason or 'usable')}$", report, re.MULTILINE)
    assert doctor.main([]) == 0
    assert capsys.readouterr().out.strip() == report.strip()
    assert doctor.main(["--verbose"]) == 2
    assert "--verbose" in capsys.readouterr().err


def test_find_nvcc(monkeypatch, tmp_path):
    find_nvcc = load_setup().find_nvcc
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("QWEN2VL_FAST_NVCC", raising=False)

    monkeypatch.setattr(shutil, "which", lambda name: "/opt/cuda/bin/nvcc" if name == "nvcc" else None)
    assert find_nvcc() == Path("/opt/cuda/bin/nvcc")

    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    assert find_nvcc() == nvcc
    monkeypatch.setattr(sys, "path", [])
    assert find_nvcc() is None

    monkeypatch.setenv("QWEN2VL_FAST_NVCC", str(nvcc))
    assert find_nvcc() == nvcc
    monkeypatch.setenv("QWEN2VL_FAST_NVCC", "none")
    assert find_nvcc() is None
    monkeypatch.setenv("QWEN2VL_FAST_NVCC", str(tmp_path / "missing"))
    with pytest.raises(SystemExit, match="QWEN2VL_FAST_NVCC.*missing"):
        find_nvcc()


def check_extension(binary: Path, python: Path | str, cwd: Path) -> dict:
    """Loads without a GPU, describes itself truly, and neither needs nor offers symbols of CUDA or torch."""
    script = """
import json, qwen2vl_fast._C as extension
try:
    found = extension.device_count()
except RuntimeError as error:
    found = str(error)
print(json.dumps([extension.__file__, extension.build_info(), found]))
"""
    seen = json.loads(run(python, "-c", script, cwd=cwd, CUDA_VISIBLE_DEVICES="").splitlines()[-1])
    assert seen[0] == str(binary)
    info = seen[1]
    assert info["architectures"] == ["sm_80", "sm_90a"] and info["ptx"] == ["compute_80"]
    assert re.fullmatch(r"\d+\.\d+", info["cuda_version"])
    assert re.fullmatch(r"cudaGetDeviceCount: .+ \(cudaError\w+\)", seen[2])

    dump = run(cuobjdump(), "--list-elf", "--list-ptx", binary, cwd=cwd)
    assert sorted({*re.findall(r"\.(sm_\w+)\.cubin", dump)}) == info["architectures"]
    assert sorted({*re.findall(r"\.sm_(\w+)\.ptx", dump)}) == [ptx.removeprefix("compute_") for ptx in info["ptx"]]

    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "--dynamic", binary, cwd=cwd))
    assert needed and not [name for name in needed if re.search("cuda|torch|c10", name)]
    exported = run("nm", "--dynamic", "--defined-only", binary, cwd=cwd).split()
    assert "PyInit__C" in exported and not [name for name in exported if name.startswith("cuda")]
    return info


def cuobjdump() -> Path:
    """NVIDIA's program from the PyPI package of that name, which is among the `dev` extra."""
    nvidia = importlib.util.find_spec("nvidia")
    roots = nvidia.submodule_search_locations if nvidia else []
    found = [path for root in roots for path in Path(root).glob("*/bin/cuobjdump")]
    assert found, "the tests of the extension need cuobjdump: pip install nvidia-cuda-cuobjdump"
    return found[0]


def test_extension_of_this_checkout(tmp_path):
    if load_setup().find_nvcc() is None:
        # The promise of a machine without nvcc: the package works, and says what is missing and why.
        assert "not built" in extension_error()
        assert "not built" in doctor.extension()
        assert qwen2vl_fast.backends()["varlen_attention"]["cuda"] is not None
        return
    # Compiles what changed since `make` built it; nothing, as a rule.
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=ROOT)
    binary = ROOT / "qwen2vl_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    check_extension(binary, sys.executable, ROOT)
    assert doctor.extension().startswith("extension: built with CUDA")


@pytest.mark.gpu
def test_extension_counts_the_devices():
    import torch

    from qwen2vl_fast import _C

    assert _C.device_count() == torch.cuda.device_count() > 0


@pytest.mark.full
def test_isolated_build_from_the_sdist(sdist, tmp_path):
    """pip fetches the build requirements itself, as for anyone who installs the sdist."""
    assert load_setup().find_nvcc() is not None, "this test builds the extension: it needs nvcc"
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, sdist, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    python = make_environment(tmp_path / "venv", wheel)
    (binary,) = (tmp_path / "venv").glob("lib/python*/site-packages/qwen2vl_fast/_C.*.so")
    check_extension(binary, python, tmp_path)


@pytest.mark.full
def test_build_with_nvcc_from_pypi(unpacked, tmp_path):
    """The compiler's PyPI packages are enough where there is no CUDA toolkit."""
    packages = [f"nvidia-cuda-{part}==13.0.*" for part in ("nvcc", "crt", "runtime", "cccl")] + ["nvidia-nvvm==13.0.*"]
    run(sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path / "toolkit", *packages, cwd=tmp_path)
    (nvcc,) = (tmp_path / "toolkit").glob("nvidia/cu*/bin/nvcc")
    check_build(nvcc, unpacked, tmp_path)


@pytest.mark.full
def test_build_with_cuda_12(unpacked, tmp_path):
    """For drivers before 580, which run nothing that CUDA 13 built."""
    info = check_build(cuda12.toolkit(tmp_path / "cuda12"), unpacked, tmp_path)
    assert info["cuda_version"] == cuda12.RELEASE


def check_build(nvcc: Path, unpacked: Path, folder: Path) -> dict:
    """The wheel that this nvcc builds from the sdist, installed: what the extension says of itself."""
    source = shutil.copytree(unpacked, folder / "source")
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder, source]
    before = os.times()
    log = run(*command, cwd=folder, QWEN2VL_FAST_NVCC=str(nvcc))
    used = sum(os.times()[2:4]) - sum(before[2:4])
    assert str(nvcc) in log
    (wheel,) = folder.glob("*.whl")
    # Of processor time, which other work on the machine does not stretch; the wheel is that of one Python.
    assert used < 2 * BUILD_SECONDS and wheel.stat().st_size < 30e6, f"{used:.0f} s, {wheel.stat().st_size} bytes"
    python = make_environment(folder / "venv", wheel)
    (binary,) = (folder / "venv").glob("lib/python*/site-packages/qwen2vl_fast/_C.*.so")
    return check_extension(binary, python, folder)
