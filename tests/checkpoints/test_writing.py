import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qzoom.checkpoints.adapter import save_pretrained
from qzoom.checkpoints.convert import convert
from qzoom.checkpoints.load import load_engine
from qzoom.checkpoints.writing import added_files, atomic_folder
from tests.checkpoints import folders
from tests.checkpoints.folders import refused


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_link_stays_one_and_what_it_leads_to_is_written(tmp_path, merged):
    made = folders.engine("qwen3_vl")
    (tmp_path / "big").mkdir()
    for number, target in enumerate((tmp_path / "big" / "adapter", tmp_path / "big" / "new")):
        link = tmp_path / f"link{number}"
        if not number:
            target.mkdir()
        link.symlink_to(target)
        for _ in range(2):
            save_pretrained(made, link, compact=False)
            assert folders.same_branches(load_engine(target), made)
    link = tmp_path / "plain"
    link.symlink_to(tmp_path / "big" / "plain")
    for _ in range(2):
        convert(merged["qwen3_vl"], link, answer_only=True)
    assert load_engine(tmp_path / "big" / "plain").region is None
    assert all(path.is_symlink() for path in tmp_path.iterdir() if path.name != "big")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "link0", "link1", "plain"]
    assert sorted(path.name for path in (tmp_path / "big").iterdir()) == ["adapter", "new", "plain"]


WRITE_TWICE = """
import sys
from pathlib import Path
from qzoom.checkpoints.writing import atomic_folder

folder = Path(sys.argv[1])
(folder / "lost+found").mkdir()
for files in (("config.json", "model-1.safetensors", "qzoom_config.json"), ("config.json", "model.safetensors")):
    with atomic_folder(folder, "adapter") as part:
        for name in (*files, "qzoom_config.json"):
            (part / name).write_text("{}")
print(*sorted(path.name for path in folder.iterdir()))
"""


def test_a_mount_point_is_written(tmp_path):
    unshare = shutil.which("unshare")
    alone = [unshare or "", "--map-root-user", "--mount", "--", "sh", "-c"]
    mount = 'mount -t tmpfs none "$0"'
    if unshare is None or subprocess.run([*alone, mount, tmp_path], capture_output=True, check=False).returncode:
        pytest.skip("no rights to mount a file system")
    command = [*alone, f'{mount} && exec "$@"', tmp_path, sys.executable, "-c", WRITE_TWICE, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["config.json", "lost+found", "model.safetensors", "qzoom_config.json"], done.stderr


def test_where_the_folder_cannot_be_moved_its_files_change_places(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "adapter")
    made = folders.engine("qwen3_vl")
    folder = tmp_path / "adapter"
    folder.mkdir()
    number = folder.stat().st_ino
    save_pretrained(made, folder, max_shard_size="150KB")
    (folder / "README.md").write_text("Read me.")
    save_pretrained(made, folder, compact=False)
    assert folder.stat().st_ino == number
    assert folders.same_branches(load_engine(folder), made)
    assert (folder / "README.md").read_text() == "Read me."
    assert {path.name for path in folder.glob("*.safetensors*")} == {"model.safetensors", "qzoom.safetensors"}
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("write", [added_files, atomic_folder])
def test_files_that_cannot_change_places_are_put_back(write, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "adapter")
    folder = save_pretrained(folders.engine("qwen3_vl"), tmp_path / "adapter")
    before = files_in(folder)
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    how = (lambda name: name.startswith("qzoom")) if write is added_files else "adapter"
    with refused("No space left"), write(folder, how) as part:
        for name in ("qzoom.safetensors", "qzoom_config.json", "new.json"):
            (part / name).write_text("{}")
    assert len(calls) > 4
    assert files_in(folder) == before
    assert not list(folder.glob(".*"))
