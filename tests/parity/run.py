"""Find every case below a folder and run it; what nobody knows how to run counts as failed."""

from __future__ import annotations

from pathlib import Path

from tests.parity import label_cases, llava_cases
from tests.parity.report import Report


def run_all(root: Path) -> Report:
    """Run every case below `root`.

    Folders with `cases.json` and `model/` hold model and training cases; folders with one of the label files hold
    label cases. Any other JSON or safetensors file is a failure, so that no case is passed over in silence.
    """
    report = Report()
    claimed: set[Path] = set()
    folders = [root, *sorted(p for p in root.rglob("*") if p.is_dir())] if root.is_dir() else []
    for folder in folders:
        if (folder / llava_cases.ATTENTION_FILES[0]).exists():
            claimed |= llava_cases.run_attention(folder, report)
        elif any((folder / name).exists() for name in llava_cases.LABEL_FILES):
            llava_cases.run_labels(folder, report)
            claimed |= {folder / name for name in llava_cases.LABEL_FILES}
        elif (folder / "cases.json").exists() or (folder / "model").is_dir():
            from tests.parity.model_folder import run_model_folder

            claimed |= run_model_folder(folder, report)
        elif any((folder / name).exists() for name in label_cases.FILES):
            label_cases.run_labels(folder, report)
            claimed |= {folder / name for name in label_cases.FILES}
    for path in sorted(root.rglob("*")):
        if path.suffix in {".json", ".safetensors"} and path not in claimed:
            report.fail("unknown file", str(path.relative_to(root)), "no case names it")
    if not report.cases:
        report.fail("reference", str(root), "no cases found there; name a folder of recorded cases")
    return report
