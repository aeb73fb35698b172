"""One recorded model: its checkpoint in the authors' layout, its cases and its training cases."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from safetensors.torch import load_file

from qzoom.checkpoints.load import load_engine
from qzoom.engine.state import Engine
from tests.parity.report import Report


class ModelFolder:
    """Reads a folder and loads its checkpoint, once per config."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = self.read("images/images.json") if (root / "images/images.json").exists() else {}
        self._engines: dict[str, Engine] = {}
        self._made: dict[Hashable, Any] = {}

    def read(self, path: str) -> Any:
        """A JSON file."""
        return json.loads((self.root / path).read_text(encoding="utf-8"))

    def tensors(self, path: str) -> dict[str, torch.Tensor]:
        """A safetensors file."""
        return load_file(self.root / path)

    def picture(self, path: str) -> PIL.Image.Image:
        """A picture as RGB."""
        return PIL.Image.open(self.root / path).convert("RGB")

    def once(self, make: Callable[[], Any], *key: Hashable) -> Any:
        """What `make` returns, made for the first of the cases that need it; the key names all that it depends on."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def engine(self, config: str) -> Engine:
        """The checkpoint under one of its configs, through the package's own loader, in float32.

        Args:
            config: path of the config.json, e.g. "model/configs/gate_newpos.json".
        """
        if config not in self._engines:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name) / "model"
                folder.mkdir()
                if (self.root / "vision_tower").is_dir():
                    (Path(name) / "vision_tower").symlink_to((self.root / "vision_tower").resolve())
                weights = [p for p in (self.root / "model").iterdir() if p.name.startswith("model")]
                for path in [*weights, *(self.root / "processor").iterdir()]:
                    (folder / path.name).symlink_to(path.resolve())
                (folder / "config.json").symlink_to((self.root / config).resolve())
                self._engines[config] = load_engine(folder, dtype="float32", device_map="cpu")
        return self._engines[config]


def run_model_folder(root: Path, report: Report) -> set[Path]:
    """Run every case and training case of a model folder."""
    from tests.parity import llava_cases
    from tests.parity.model_cases import run_batch_case, run_single_case
    from tests.parity.training_cases import run_training_case

    folder = ModelFolder(root)
    llava = str(folder.read("model/config.json").get("model_type")).startswith("llava")
    if llava:
        run_training_case = llava_cases.run_training_case
    cases: Sequence[dict[str, Any]] = folder.read("cases.json") if (root / "cases.json").exists() else []
    known = {root / "spec.json", root / "facts.json", root / "cases.json", root / "training/training.json"}
    for entry in cases:
        run = llava_cases.run_case if llava else run_batch_case if "images" in entry else run_single_case
        with report.case("model case", f"{root.name}/{entry['id']}") as case:
            run(case, folder, entry)
        known.add(root / f"cases/{entry['id']}.safetensors")
    training = folder.read("training/training.json") if (root / "training/training.json").exists() else {}
    for name, entry in training.items():
        with report.case("training case", f"{root.name}/{name}") as case:
            run_training_case(case, folder, name, entry)
        known.add(root / f"training/{name}.safetensors")
    known |= llava_cases.model_files(root) | {root / "images/images.json"}
    return known | {root / f"images/{name}.safetensors" for name in folder.images}
