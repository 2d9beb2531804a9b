"""README and docs: every command in them runs, on ten small cases; every message that they quote can be said."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import nnunet_lite
from nnunet_lite import cli

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
Run = Callable[..., tuple[int, str, str]]

# A doc's command stands for hours of work; here it does the same steps with a tiny network.
TINY = (
    "training.epochs=1", "training.iterations=2", "training.validation_iterations=1", "training.time_limit=null",
    "training.precision=fp32", "training.channels_last=false", "training.patch_voxels=18432",
    "training.batch_voxels=36864", "network.features_base=4", "network.features_max=8",
)  # fmt: skip
SHORTER: tuple[tuple[str, str], ...] = (
    (r"nnlite (train|run) .*", " ".join(f"--set {setting}" for setting in TINY)),
    (r"nnlite predict .*", "--no-mirroring"),
    (r"nnlite import .*\.zip", "--replace"),
)
NOT_RUN: tuple[tuple[str, str], ...] = (  # these are still parsed
    (r"scripts/demo\.sh", "trains for minutes"),
    (r"scripts/test\.sh", "is this test suite"),
    (r"pip install .*", "would change the environment of the tests"),
    (r".*--gpus \d+.*", "needs GPUs"),
    (r"torchrun .*", "needs GPUs"),
    (r"nnlite plan .*--measure.*", "needs a GPU"),
    (r"nnlite train 3d_(lowres|cascade_fullres) .*", "the small images need no low-resolution stage"),
    (r"python scripts/compare_preprocessed\.py .*", "needs arrays that nnU-Net made"),
    (r"python scripts/compare_training\.py .*", "needs nnU-Net, and trains for minutes"),
    (r"nnlite cluster .*", "needs the queue of a cluster"),
    (r"nnlite .*--scheduler .*", "needs a cluster"),
    (r"ssh .*", "needs another machine"),
)


@dataclass(frozen=True)
class Command:
    page: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"


def blocks(page: Path, languages: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """The first line's number and the text of a page's code blocks in some languages."""
    text = page.read_text()
    for match in re.finditer(r"^```([a-z]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1] in languages:
            yield text[: match.start(2)].count("\n") + 1, match[2]


def commands(page: Path) -> list[Command]:
    """What a page tells to type: lines of code blocks that begin with a program of ours, `$ ` before or not."""
    found = []
    for first, block in blocks(page, ("", "bash", "console")):
        joined = re.sub(r"\\\n\s*", " ", block)
        for number, line in enumerate(joined.splitlines(), first):
            text = line.removeprefix("$ ")
            if re.match(r"(nnlite|scripts/\S+\.(sh|py)|python scripts/|torchrun|pip|ssh)\b", text):
                found.append(Command(page, number, shlex.join(shlex.split(text, comments=True))))
    return found


def name_of(page: Path) -> str:
    return page.name


def rule_of(text: str, table: tuple[tuple[str, str], ...]) -> str:
    return next((rule for pattern, rule in table if re.fullmatch(pattern, text)), "")


@pytest.fixture
def place(tmp_path: Path, tiny_workspace: Path, tiny_model: Path, hippocampus: Path) -> Path:
    """A folder as that of a reader: the raw data, images to predict with their references, a workspace with a model."""
    raw = Path(json.loads((tiny_model.parent.parent / "dataset.json").read_text())["root"])
    shutil.copytree(raw, tmp_path / "Task04_Hippocampus")
    shutil.copytree(tiny_workspace, tmp_path / "nnlite_workspace")
    for name, there in (("images", "imagesTs"), ("references", "labelsTs")):
        (tmp_path / name).mkdir()
        for file in sorted((hippocampus / there).iterdir())[:2]:
            shutil.copy(file, tmp_path / name)
    shutil.copy(next((tmp_path / "images").iterdir()), tmp_path / "scan.nii.gz")
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_of_a_page(page: Path, place: Path, command: Run) -> None:
    """In order, from top to bottom; those that cannot run here are read by the command line's parser."""
    run, skipped = 0, 0
    for told in commands(page):
        if why := rule_of(told.text, NOT_RUN):
            must_parse(told.text)
            assert why
            skipped += 1
        elif told.text.startswith("nnlite view"):
            look_at(shlex.split(told.text)[1:], place)
            run += 1
        else:
            arguments = shlex.split(told.text)
            assert arguments[0] == "nnlite", f"{told}: neither run nor in the table of what is not"
            code, out, err = command(*arguments[1:], *shlex.split(rule_of(told.text, SHORTER)), cwd=place)
            assert code == 0, f"{told}\n{out}{err}"
            run += 1
    assert run or skipped


@pytest.mark.parametrize(
    "page", [page for page in PAGES if list(blocks(page, ("python",)))], ids=lambda page: page.name
)
def test_python_of_a_page(page: Path, place: Path, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("NNLITE_WORKSPACE", raising=False)
    tiny = dict(setting.split("=") for setting in TINY)
    image = np.random.default_rng(1).normal(size=(30, 40, 30)).astype(np.float32)
    known = {"array": image, "z": 1.0, "y": 1.0, "x": 1.0}
    if "onnx" in page.read_text():
        assert command("export", "--format", "onnx", "-o", "OUT", cwd=place)[0] == 0
    for line, block in blocks(page, ("python",)):
        code = block.replace('time_limit="10m"', f"settings={tiny}")
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), known)


def test_inline_commands_exist() -> None:
    """`nnlite ...` in running text and tables: the command exists, and so do its options."""
    checked = 0
    for page in PAGES:
        outside = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for span in re.findall(r"`(nnlite [^`]+)`", outside):
            for text in span.split("; "):
                check_options(text, page)
                checked += 1
    assert checked > 20


def subcommand(name: str) -> Any:
    group = typer.main.get_command(cli.app)
    found = group.get_command(None, name)  # type: ignore[attr-defined]
    assert found is not None, f"there is no command nnlite {name}"
    return found


def check_options(text: str, page: Path) -> None:
    name, *rest = shlex.split(text)[1:]
    known = {"-h", "--help"}.union(
        *(parameter.opts + parameter.secondary_opts for parameter in subcommand(name).params)
    )
    unknown = [word for word in rest if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]
    assert not unknown, f"{page.name}: `{text}`: no such option: {unknown}"


def must_parse(text: str) -> None:
    """A command that is not run: its arguments are what the command line takes, its files are there."""
    words = shlex.split(text)
    if "nnunet_lite" in words or words[0] == "nnlite":
        name, *rest = words[words.index("nnunet_lite") + 1 :] if "nnunet_lite" in words else words[1:]
        subcommand(name).make_context(f"nnlite {name}", rest)
    elif words[0] == "python" or words[0].startswith("scripts/"):
        assert (ROOT / words[words[0] == "python"]).is_file(), text


def look_at(arguments: list[str], place: Path) -> None:
    """`nnlite view` until it has told its address, then Ctrl-C."""
    nnlite = str(Path(sysconfig.get_path("scripts")) / "nnlite")
    told = [nnlite, *arguments, "--no-browser"]
    environment = {k: v for k, v in os.environ.items() if k != "NNLITE_WORKSPACE"}
    with subprocess.Popen(told, cwd=place, env=environment, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert address.startswith("http://127.0.0.1:") and process.returncode == 0, f"{arguments}\n{address}{err}"


# ------------------------------------------------------------------------------------------------------------ messages


def sayable() -> list[re.Pattern[str]]:
    """All texts of the package with some letters in them, their {} standing for anything."""
    found = set()
    for file in Path(nnunet_lite.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text())
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                parts = [node.value]
            else:
                continue
            if sum(len("".join(part.split())) for part in parts if isinstance(part, str)) >= 7:
                found.add("".join(".*" if part is None else re.escape(str(part)) for part in parts))
    return [re.compile(pattern, re.DOTALL) for pattern in found]


def test_every_quoted_message_can_be_said() -> None:
    """Entries of the troubleshooting page are headed by messages; each is one that the code can produce."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(quoted) >= 30 and len(set(quoted)) == len(quoted)
    patterns = sayable()
    unknown = [text for text in quoted if not any(pattern.fullmatch(text) for pattern in patterns)]
    assert not unknown, "\n".join(unknown)
    assert not any(pattern.fullmatch("is of no format that anybody would say") for pattern in patterns)
    entries = re.split(r"^### .+$", page, flags=re.MULTILINE)[1:]
    assert all(len(re.sub(r"^## .*$", "", entry, flags=re.MULTILINE).split()) > 8 for entry in entries), (
        "each is explained"
    )


def test_links_between_pages() -> None:
    ours = re.compile(r"`((?:docs|scripts|configs|nnunet_lite|tests)/[\w./-]+\.(?:md|py|sh|toml|json))`")
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"
        for path in ours.findall(page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_every_command_is_documented() -> None:
    """No command without a word on it in README or docs."""
    text = "\n".join(page.read_text() for page in PAGES)
    names = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert [name for name in names if f"nnlite {name}" not in text] == []


def test_keys_of_files_are_documented(tiny_model: Path) -> None:
    """What metrics.jsonl, summary.json, run.json and the workspace's JSON files hold has a word in docs/files.md."""
    page = (ROOT / "docs" / "files.md").read_text()
    root = tiny_model.parent.parent
    rows = [json.loads(line) for line in (tiny_model / "fold_0" / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((tiny_model / "fold_0" / "validation" / "summary.json").read_text())
    keys = {key for row in rows for key in row} | set(summary) | set(summary["foreground_mean"])
    keys |= set(summary["metric_per_case"][0]) | set(json.loads((tiny_model / "run.json").read_text()))
    for name in ("dataset", "check", "fingerprint", "splits_made"):
        keys |= set(json.loads((root / f"{name}.json").read_text()))
    undocumented = {key for key in keys if f"`{key}`" not in page}
    assert undocumented <= {"sha256"}
    files = {path.name for path in root.rglob("*") if path.is_file() and not path.name.endswith((".nii.gz", ".lock"))}
    assert not {name for name in files if name not in page and not re.match(r"(2d|3d_\w+)-\w+\.json", name)}
