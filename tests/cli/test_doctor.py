import ast
import json
import re
import sys
import tomllib
from pathlib import Path

import qzoom
from qzoom.cli import doctor

ROOT = Path(__file__).resolve().parents[2]


def by_name(findings):
    return {finding["name"]: finding for finding in findings}


def test_a_working_installation_is_healthy(here):
    result = here("doctor", "--json")
    values = json.loads(result.out)
    found = by_name(values["findings"])
    assert (result.code, values["healthy"]) == (0, True), [f for f in values["findings"] if f["level"] == "fail"]
    assert found["qzoom"]["value"] == qzoom.__version__
    assert found["python"]["value"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"]["level"] == "ok"
    assert "sdpa" in found["attention"]["value"]
    assert found["embedded model"]["value"].startswith("tiny, ")
    result = here("doctor")
    assert result.code == 0
    for finding in doctor.examine():
        assert finding.name in result.out
    assert result.out.rstrip().endswith("qzoom can work here.")


def test_threads_that_spin_are_pointed_out(here, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = by_name(json.loads(here("doctor", "--json").out)["findings"])
    assert found["OMP_WAIT_POLICY"]["level"] == "warn"
    assert "OMP_WAIT_POLICY=passive" in found["OMP_WAIT_POLICY"]["remedy"]
    assert found["torch threads"]["value"].endswith(" (OMP_NUM_THREADS 1)")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    found = by_name(json.loads(here("doctor", "--json").out)["findings"])
    assert found["OMP_WAIT_POLICY"] == {"name": "OMP_WAIT_POLICY", "value": "passive", "level": "ok", "remedy": ""}


def test_a_broken_torchvision_is_a_failure(here, tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = here("doctor", "--json")
    values = json.loads(result.out)
    assert (result.code, values["healthy"]) == (1, False)
    finding = by_name(values["findings"])["torchvision"]
    assert finding["level"] == "fail"
    assert "uninstall torchvision" in finding["remedy"]


def test_model_cache_follows_hf_home(here, tmp_path, monkeypatch):
    (tmp_path / "hub" / "models--some--model").mkdir(parents=True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    value = by_name(json.loads(here("doctor", "--json").out)["findings"])["model cache"]["value"]
    assert value == f"{tmp_path / 'hub'} (1 models, offline (HF_HUB_OFFLINE))"


def test_only_attention_that_loading_accepts_is_named(apart, tmp_path):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    result = apart("doctor", "--json", env={"PYTHONPATH": str(tmp_path)})
    assert by_name(json.loads(result.out)["findings"])["attention"]["value"] == "sdpa, eager"


def test_every_library_that_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [need for name, needs in project["optional-dependencies"].items() if name != "dev" for need in needs]
    names = {re.split(r"[<>=\[]", need)[0].replace("-", "_") for need in (*project["dependencies"], *extras)}
    names |= {"PIL", "yaml", "qzoom"}  # of pillow and pyyaml
    names |= {"lmms_eval", "loguru"}  # the plug-in runs inside lmms-eval, which brings both
    names |= {"starlette", "pydantic_core", "typing_extensions", "h11"}  # of fastapi, pydantic and uvicorn
    names |= {"anyio"}  # of mcp
    names |= {"tokenizers", "torchvision"}  # comes with transformers; looked for, never needed
    imported = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    assert {"torch", "packaging"} <= imported
    assert imported - set(sys.stdlib_module_names) <= names
