"""README and docs: their commands run on ten small cases, and the code can produce the messages that they quote."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image as Pillow
from samples import subcommand

import nnunet_lite
from nnunet_lite import cli

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
TEXT = {page: page.read_text() for page in PAGES}
BLOCK = re.compile(r"^```([a-z]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
Run = Callable[..., tuple[int, str, str]]

# A command of a page may take hours; here it does the same steps with a tiny network.
TINY = (
    "training.epochs=1", "training.iterations=2", "training.validation_iterations=1", "training.time_limit=null",
    "training.precision=fp32", "training.channels_last=false", "training.patch_voxels=18432",
    "training.batch_voxels=36864", "network.features_base=4", "network.features_max=8",
)  # fmt: skip
SHORTER = (
    (r"nnlite (train|run) .*", " ".join(f"--set {setting}" for setting in TINY)),
    (r"nnlite predict .*", "--no-mirroring"),
    (r"nnlite import .*\.zip", "--replace"),
)
# These are only parsed: they take minutes, change the environment, or need GPUs, nnU-Net, a cluster or its queue. The
# small images need no low-resolution stage.
NOT_RUN = re.compile(
    r"scripts/(demo|test)\.sh|pip install .*|.*--gpus \d+.*|torchrun .*|ssh .*"
    r"|nnlite train 3d_(lowres|cascade_fullres) .*|python scripts/compare_(preprocessed|training)\.py .*"
    r"|nnlite cluster .*|nnlite .*--scheduler .*|nnlite plan tests/data/.*"
)


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """The first line's number and the text of a page's code blocks in some languages."""
    for match in BLOCK.finditer(TEXT[page]):
        if match[1] in languages:
            yield TEXT[page][: match.start(2)].count("\n") + 1, match[2]


def commands(page: Path) -> list[str]:
    """Lines of code blocks that begin with one of our programs, with or without `$ ` before it."""
    lines = (line for _, block in blocks(page, "", "bash", "console")
             for line in re.sub(r"\\\n\s*", " ", block).splitlines())  # fmt: skip
    found = (line.removeprefix("$ ") for line in lines)
    ours = re.compile(r"(nnlite|scripts/\S+\.(sh|py)|python scripts/|torchrun|pip|ssh)\b")
    return [shlex.join(shlex.split(text, comments=True)) for text in found if ours.match(text)]


def write_cells(folder: Path, raw: Path) -> None:
    """Pictures x.png with masks x_mask.png of 0 and 255 in cells/, and pictures without masks in new_cells/."""
    for number, image in enumerate(sorted((raw / "imagesTr").iterdir())[:6]):
        volume, label = (np.asarray(nibabel.load(file).dataobj) for file in (image, raw / "labelsTr" / image.name))
        plane, mask = (array[:, :, array.shape[2] // 2] for array in (volume / volume.max(), label > 0))
        for name, array in ((f"cells/cell_{number}.png", plane), (f"cells/cell_{number}_mask.png", mask)):
            (folder / name).parent.mkdir(exist_ok=True)
            Pillow.fromarray((255 * array).astype(np.uint8)).save(folder / name)
    (folder / "new_cells").mkdir()
    for number in range(2):
        shutil.copy(folder / "cells" / f"cell_{number}.png", folder / "new_cells" / f"new_{number}.png")


@pytest.fixture
def place(tmp_path: Path, tiny_workspace: Path, tiny_model: Path, hippocampus: Path) -> Path:
    """A folder as that of a reader: the raw data, images to predict with their references, a workspace with a model."""
    raw = Path(json.loads((tiny_model.parent.parent / "dataset.json").read_text())["root"])
    shutil.copytree(raw, tmp_path / "Task04_Hippocampus")
    shutil.copytree(tiny_workspace, tmp_path / "nnlite_workspace")
    for name, source in (("images", "imagesTs"), ("references", "labelsTs")):
        (tmp_path / name).mkdir()
        for file in sorted((hippocampus / source).iterdir())[:2]:
            shutil.copy(file, tmp_path / name)
    for name in ("imagesTs", "labelsTs"):
        shutil.copytree(tmp_path / {"i": "images", "l": "references"}[name[0]], tmp_path / "Task04_Hippocampus" / name)
    trained = sorted((raw / "imagesTr").iterdir())[:6]
    for folder, prefix, images in (("my_patients", "P", trained), ("new_patients", "N", trained[:2])):
        for number, image in enumerate(images, 1):
            patient = tmp_path / folder / f"{prefix}{number:03d}"
            patient.mkdir(parents=True)
            shutil.copy(image, patient / "t1.nii.gz")
            shutil.copy(image, patient / "flair.nii.gz")
            if folder == "my_patients":
                shutil.copy(raw / "labelsTr" / image.name, patient / "mask.nii.gz")
    write_cells(tmp_path, raw)
    shutil.copy(next((tmp_path / "images").iterdir()), tmp_path / "scan.nii.gz")
    for name in ("organ", "tumour"):
        shutil.copy(next((tmp_path / "references").iterdir()), tmp_path / f"{name}.nii.gz")
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_of_a_page(page: Path, place: Path, command: Run) -> None:
    """In order, from top to bottom; those that cannot run here are read by the command line's parser."""
    for text in commands(page):
        words = shlex.split(text)
        if NOT_RUN.fullmatch(text):
            parse(words)
        elif words[:2] == ["nnlite", "view"]:
            run_view(words[1:], place)
        else:
            assert words[0] == "nnlite", f"{page}: {text}: neither run nor excluded"
            shorter = next((options for pattern, options in SHORTER if re.fullmatch(pattern, text)), "")
            code, out, err = command(*words[1:], *shlex.split(shorter), cwd=place)
            assert code == 0, f"{page}: {text}\n{out}{err}"


@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page, "python"))], ids=lambda page: page.name)
def test_python_of_a_page(page: Path, place: Path, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("NNLITE_WORKSPACE", raising=False)
    tiny = dict(setting.split("=") for setting in TINY)
    image = np.random.default_rng(1).normal(size=(30, 40, 30)).astype(np.float32)
    known = {"array": image, "z": 1.0, "y": 1.0, "x": 1.0}
    if "onnx" in TEXT[page]:
        assert command("export", "--format", "onnx", "-o", "OUT", cwd=place)[0] == 0
    for line, block in blocks(page, "python"):
        code = block.replace('time_limit="10m"', f"settings={tiny}")
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), known)


def parse(words: list[str]) -> None:
    """Parse the arguments of a command that is not run, and look for its files."""
    if "nnunet_lite" in words or words[0] == "nnlite":
        name, *rest = words[words.index("nnunet_lite" if "nnunet_lite" in words else "nnlite") + 1 :]
        subcommand(name).make_context(f"nnlite {name}", rest)
    elif words[0] == "python" or words[0].startswith("scripts/"):
        assert (ROOT / words[words[0] == "python"]).is_file(), words


def run_view(arguments: list[str], place: Path) -> None:
    """`nnlite view` until it prints its address, then Ctrl-C."""
    program = [str(Path(sysconfig.get_path("scripts")) / "nnlite"), *arguments, "--no-browser"]
    environment = {k: v for k, v in os.environ.items() if k != "NNLITE_WORKSPACE"}
    with subprocess.Popen(program, cwd=place, env=environment, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert address.startswith("http://127.0.0.1:") and process.returncode == 0, f"{arguments}\n{address}{err}"


def test_commands_in_sentences_exist() -> None:
    """`nnlite ...` in running text and tables: the command exists, and so do its options."""
    outside = {page: BLOCK.sub("", text) for page, text in TEXT.items()}
    spans = [(page, span) for page, text in outside.items() for span in re.findall(r"`(nnlite [^`]+)`", text)]
    assert len(spans) > 20
    for page, text in ((page, text) for page, span in spans for text in span.split("; ")):
        name, *rest = shlex.split(text)[1:]
        known = {"-h", "--help"}.union(*(option.opts + option.secondary_opts for option in subcommand(name).params))
        unknown = [word for word in rest if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]
        assert not unknown, f"{page.name}: `{text}`: no such option: {unknown}"


# ------------------------------------------------------------------------------------------------------------ messages


def messages() -> list[re.Pattern[str]]:
    """All texts of the package with at least eight letters, as patterns in which {} is any text."""
    found = set()
    for file in Path(nnunet_lite.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text())
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            parts: list[ast.expr] = node.values if isinstance(node, ast.JoinedStr) else []
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                parts = [node]
            texts = [str(part.value) if isinstance(part, ast.Constant) else None for part in parts]
            if len("".join("".join(filter(None, texts)).split())) >= 8:
                found.add("".join(".*" if text is None else re.escape(text) for text in texts))
    return [re.compile(pattern, re.DOTALL) for pattern in found]


def test_every_quoted_message_can_be_printed() -> None:
    """Entries of the troubleshooting page are headed by messages; each is one that the code can produce."""
    page = TEXT[ROOT / "docs/howto/troubleshooting.md"]
    quoted = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(quoted) >= 30 and len(set(quoted)) == len(quoted)
    patterns = messages()
    unknown = [text for text in quoted if not any(pattern.fullmatch(text) for pattern in patterns)]
    assert not unknown, "\n".join(unknown)
    assert not any(pattern.fullmatch("is of no format that anybody would say") for pattern in patterns)
    entries = re.split(r"^### .+$", page, flags=re.MULTILINE)[1:]
    lengths = [len(re.sub(r"^## .*$", "", entry, flags=re.MULTILINE).split()) for entry in entries]
    assert min(lengths) > 8, "each is explained"


def test_links_between_pages() -> None:
    ours = re.compile(r"`((?:docs|scripts|configs|nnunet_lite|tests)/[\w./-]+\.(?:md|py|sh|toml|json))`")
    for page, text in TEXT.items():
        links = [page.parent / link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "http" not in link]
        missing = [path for path in (*links, *(ROOT / path for path in ours.findall(text))) if not path.exists()]
        assert not missing, f"{page.name}: {missing}"


def test_every_command_is_documented() -> None:
    assert [name for name in cli.COMMANDS if f"nnlite {name}" not in "\n".join(TEXT.values())] == []


def test_keys_of_files_are_documented(tiny_model: Path) -> None:
    """reference/files.md describes the keys of metrics.jsonl, summary.json, run.json and the workspace's JSON files."""
    page, root = TEXT[ROOT / "docs/reference/files.md"], tiny_model.parent.parent
    summary = json.loads((tiny_model / "fold_0" / "validation" / "summary.json").read_text())
    objects = [json.loads(line) for line in (tiny_model / "fold_0" / "metrics.jsonl").read_text().splitlines()]
    objects += [summary, summary["foreground_mean"], summary["metric_per_case"][0]]
    names = ("dataset", "check", "fingerprint", "splits_made")
    files = [tiny_model / "run.json", *(root / f"{name}.json" for name in names)]
    objects += [json.loads(file.read_text()) for file in files]
    assert {key for keys in objects for key in keys if f"`{key}`" not in page} <= {"sha256"}
    written = {path.name for path in root.rglob("*") if path.is_file() and not path.name.endswith((".nii.gz", ".lock"))}
    assert not {name for name in written if name not in page and not re.match(r"(2d|3d_\w+)-\w+\.json", name)}
