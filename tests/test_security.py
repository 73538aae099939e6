"""No file of the package can run code that came with data, and none but the hub download opens a connection."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "qwen2vl_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])

# Modules that unpickle, or that open connections. Hub downloads are huggingface_hub's, which only weights.py may call.
FORBIDDEN_MODULES = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"),
    *("socket", "urllib.request", "http.client", "http.server", "ftplib", "requests", "httpx", "aiohttp", "urllib3"),
}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("torch", "save"), ("os", "system"), ("os", "popen"), ("torch.hub", "load")}
FORBIDDEN_WORDS = {"trust_remote_code", "allow_pickle"}


def dotted(node: ast.AST) -> str:
    """a.b.c of an attribute or a name, else the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def findings(source: str) -> list[str]:
    """What the source uses that is forbidden, with line numbers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = []
        for name in names:
            owner, _, leaf = name.rpartition(".")
            if any(name == module or name.startswith(f"{module}.") for module in FORBIDDEN_MODULES):
                found.append(f"line {line}: import {name}")
            elif (owner, leaf) in FORBIDDEN_ATTRIBUTES:
                found.append(f"line {line}: from {owner} import {leaf}")
        if isinstance(node, ast.Attribute) and (dotted(node.value), node.attr) in FORBIDDEN_ATTRIBUTES:
            found.append(f"line {line}: {dotted(node)}")
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in FORBIDDEN_BUILTINS:
                found.append(f"line {line}: {called}()")
            if called.split(".")[-1] == "import_module" and not (node.args and isinstance(node.args[0], ast.Constant)):
                found.append(f"line {line}: import_module of a name that is not written there")
            for keyword in node.keywords:
                if keyword.arg in FORBIDDEN_WORDS:
                    found.append(f"line {line}: {keyword.arg}")
                if keyword.arg == "shell" and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value):
                    found.append(f"line {line}: shell")
        if isinstance(node, ast.Constant) and node.value in FORBIDDEN_WORDS:
            found.append(f"line {line}: {node.value}")
    return found


def test_there_are_files_to_check():
    assert {"__init__.py", "reference.py"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_forbidden_use(path):
    assert findings(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import torch, pickle as p",
        "from pickle import loads",
        "def f():\n    import dill",
        "import urllib.request",
        "from urllib import request",
        "from http.client import HTTPConnection",
        "import requests",
        "x = eval('1')",
        "exec(text)",
        "m = __import__(name)",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "from torch import load",
        "load = torch.load",
        "torch.hub.load(a, b)",
        "np.load(path, allow_pickle=True)",
        "Model.from_pretrained(path, trust_remote_code=False)",
        "options = {'trust_remote_code': True}",
        "importlib.import_module(config['module'])",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
    ],
)
def test_forbidden_uses_are_found(source):
    assert findings(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import torch\nfrom safetensors.torch import load_file, save_file",
        "json.load(file)",
        "importlib.import_module('transformers')",
        "subprocess.run(['nvidia-smi'], shell=False)",
        "re.compile('a')",
        "torch.compile(model)",
        "from .weights import load",
        "from urllib.parse import urlparse",
    ],
)
def test_permitted_uses_are_not_found(source):
    assert findings(source) == []
