"""README and docs: their commands run on ten small cases, and the code can produce the messages that they quote.

The pages of the reference are those of the code; the site is built strictly, and needs no network.
"""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image as Pillow
from samples import subcommand

import nnunet_lite
from nnunet_lite import cli
from nnunet_lite.settings import keys

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"
GENERATED = runpy.run_path(str(ROOT / "scripts" / "write_reference.py"))["PAGES"]  # test_cli parses their examples
AT_TOP = [ROOT / f"{name}.md" for name in ("README", "AGENTS", "CONTRIBUTING", "SECURITY", "CODE_OF_CONDUCT")]
TEXT = {page: page.read_text() for page in (*AT_TOP, *sorted((ROOT / "docs").rglob("*.md")))}
LONG = {"models.md", "training.md", "tutorial.md"}  # more than ten seconds each
PAGES = [
    pytest.param(page, marks=[pytest.mark.slow] * (page.name in LONG), id=page.name)
    for page, text in TEXT.items()
    if "```" in text and page.name not in GENERATED
]
BLOCK = re.compile(r"^(<!-- only parsed: .+ -->\n)?```([a-z]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
Run = Callable[..., tuple[int, str, str]]

# A command of a page may take hours; here it does the same steps with a tiny network.
TINY = (
    "training.epochs=1", "training.iterations=2", "training.validation_iterations=1", "training.time_limit=null",
    "training.precision=fp32", "training.channels_last=false", "training.patch_voxels=18432",
    "training.batch_voxels=36864", "network.features_base=4", "network.features_max=8", "inference.mirroring=false",
    "inference.step_size=1.0", "inference.precision=fp32",
)  # fmt: skip
SHORTER = (
    (r"nnlite (train|run) .*", " ".join(f"--set {setting}" for setting in TINY)),
    (r"nnlite predict .*", "--no-mirroring"),
    (r"nnlite import .*\.zip", "--replace"),
    (r"nnlite select", "--no-quality"),  # test_calibration.py has it
)
SAME = re.compile(r" --(epochs|time-limit|precision) \S+")  # options of settings that TINY has
# These are only parsed: they take minutes, change the environment, or need GPUs, nnU-Net, a cluster or its queue. The
# small images need no low-resolution stage. So are those of a block below a line `<!-- only parsed: needs a GPU -->`.
NOT_RUN = re.compile(
    r"scripts/(demo|test)\.sh|pip install .*|.*--gpus \d+.*|torchrun .*|ssh .*"
    r"|nnlite train 3d_(lowres|cascade_fullres) .*|python scripts/compare_(preprocessed|training)\.py .*"
    r"|nnlite cluster .*|nnlite .*--scheduler .*|nnlite plan tests/data/.*"
)


def blocks(page: Path) -> Iterator[tuple[int, str, str, bool]]:
    """First line's number, language and text of a page's code blocks, and whether they are only parsed."""
    for match in BLOCK.finditer(TEXT[page]):
        yield TEXT[page][: match.start(3)].count("\n") + 1, match[2], match[3], match[1] is not None


def commands(block: str) -> list[str]:
    """Lines of a code block that begin with one of our programs, with or without `$ ` before it."""
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    ours = re.compile(r"(nnlite|scripts/\S+\.(sh|py)|python scripts/|torchrun|pip|ssh)\b")
    found = (line.removeprefix("$ ") for line in lines)
    return [shlex.join(shlex.split(text, comments=True)) for text in found if ours.match(text)]


def write_patients(folder: Path) -> None:
    """A folder for each of six patients with two channels and a mask; two new patients without a mask."""
    images = sorted((folder / "Task04_Hippocampus" / "imagesTr").iterdir())[:6]
    for patients, first, chosen in (("my_patients", 1, images), ("new_patients", 11, images[:2])):
        for number, image in enumerate(chosen, first):
            patient = folder / patients / f"P{number:03d}"
            patient.mkdir(parents=True)
            shutil.copy(image, patient / "t1.nii.gz")
            shutil.copy(image, patient / "flair.nii.gz")
            if chosen is images:
                shutil.copy(image.parent.parent / "labelsTr" / image.name, patient / "mask.nii.gz")
    for patient in (folder / "my_patients").iterdir():
        other = folder / "other_patients" / patient.name
        other.mkdir(parents=True)
        shutil.copy(patient / "t1.nii.gz", other)
        for structure in ("liver", "spleen"):
            shutil.copy(patient / "mask.nii.gz", other / f"{structure}_mask.nii.gz")


def write_cells(folder: Path) -> None:
    """Pictures x.png with masks x_mask.png of 0 and 255 in cells/, and pictures without masks in new_cells/."""
    raw = folder / "Task04_Hippocampus"
    for number, image in enumerate(sorted((raw / "imagesTr").iterdir())[:6]):
        volume, label = (np.asarray(nibabel.load(file).dataobj) for file in (image, raw / "labelsTr" / image.name))
        plane, mask = (array[:, :, array.shape[2] // 2] for array in (volume / volume.max(), label > 0))
        for name, array in ((f"cells/cell_{number}.png", plane), (f"cells/cell_{number}_mask.png", mask)):
            (folder / name).parent.mkdir(exist_ok=True)
            Pillow.fromarray((255 * array).astype(np.uint8)).save(folder / name)
    (folder / "new_cells").mkdir()
    for number in range(2):
        shutil.copy(folder / "cells" / f"cell_{number}.png", folder / "new_cells" / f"new_{number}.png")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tiny_workspace: Path, hippocampus: Path) -> Path:
    """A folder as that of a reader: raw data, images, references, and a workspace with one trained fold."""
    folder = tmp_path_factory.mktemp("start")
    planned = tiny_workspace / "Task04_Hippocampus"
    shutil.copytree(json.loads((planned / "dataset.json").read_text())["root"], folder / "Task04_Hippocampus")
    shutil.copytree(tiny_workspace, folder / "nnlite_workspace")
    for name, source in (("images", "imagesTs"), ("references", "labelsTs")):
        (folder / name).mkdir()
        for file in sorted((hippocampus / source).iterdir())[:2]:
            shutil.copy(file, folder / name)
    shutil.copytree(folder / "images", folder / "Task04_Hippocampus" / "imagesTs")
    shutil.copytree(folder / "references", folder / "Task04_Hippocampus" / "labelsTs")
    shutil.copy(next((folder / "images").iterdir()), folder / "scan.nii.gz")
    for name in ("organ", "tumour"):
        shutil.copy(next((folder / "references").iterdir()), folder / f"{name}.nii.gz")
    write_patients(folder)
    write_cells(folder)
    tiny, workspace = dict(setting.split("=") for setting in TINY), folder / "nnlite_workspace"
    nnunet_lite.train("3d_fullres", 0, recipe="cpu", settings=tiny, workspace=workspace, device="cpu")
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page(page: Path, start: Path, tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands and Python in order, from top to bottom; commands that cannot run here are parsed."""
    shutil.copytree(start, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NNLITE_WORKSPACE", raising=False)
    image = np.random.default_rng(1).normal(size=(30, 40, 30)).astype(np.float32)
    known = {"array": image, "z": 1.0, "y": 1.0, "x": 1.0}
    for line, language, block, only_parsed in blocks(page):
        if language == "python":
            code = block.replace('time_limit="10m"', f"settings={dict(one.split('=') for one in TINY)}")
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), known)
        for text in commands(block) if language in ("", "bash", "console") else ():
            words = shlex.split(text)
            if only_parsed or NOT_RUN.fullmatch(text):
                parse(words)
            elif words[:2] == ["nnlite", "view"]:
                run_view(words[1:], tmp_path)
            else:
                assert words[0] == "nnlite", f"{page}: {text}: neither run nor excluded"
                shorter = next((options for pattern, options in SHORTER if re.fullmatch(pattern, text)), "")
                words = shlex.split(SAME.sub("", text)) if words[1] in ("train", "run") else words
                code, out, err = command(*words[1:], *shlex.split(shorter), cwd=tmp_path)
                has_problems = code == 1 and words[1] == "doctor"  # this machine, not the page
                assert code == 0 or has_problems, f"{page}: {text}\n{out}{err}"


def parse(words: list[str]) -> None:
    """Parse the arguments of a command that is not run, and look for its files."""
    if "nnunet_lite" in words or words[0] == "nnlite":
        name, *rest = words[words.index("nnunet_lite" if "nnunet_lite" in words else "nnlite") + 1 :]
        subcommand(name).make_context(f"nnlite {name}", rest)
    elif words[0] == "python" or words[0].startswith("scripts/"):
        assert (ROOT / words[words[0] == "python"]).is_file(), words


def run_view(arguments: list[str], folder: Path) -> None:
    """`nnlite view` until it prints its address, then Ctrl-C."""
    program = [str(Path(sysconfig.get_path("scripts")) / "nnlite"), *arguments, "--no-browser"]
    environment = {k: v for k, v in os.environ.items() if k != "NNLITE_WORKSPACE"}
    with subprocess.Popen(program, cwd=folder, env=environment, stdout=-1, stderr=-1, text=True) as process:
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


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {nnunet_lite.__version__}\n" in (ROOT / "CITATION.cff").read_text()


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


# ----------------------------------------------------------------------------------------- the reference and the site


@pytest.mark.parametrize("name", GENERATED)
def test_a_page_of_the_reference_is_that_of_the_code(name: str) -> None:
    assert (REFERENCE / name).read_text() == GENERATED[name](), "run scripts/write_reference.py"


@pytest.mark.parametrize("name", ["settings.md", "plans.md"])
def test_every_key_has_legal_values_and_a_meaning(name: str) -> None:
    rows = [row.strip("| ").split(" | ") for row in TEXT[REFERENCE / name].splitlines() if row.startswith("| `")]
    assert [
        row for row in rows if len(row) != 4 or not row[1 if name == "plans.md" else 2].strip() or len(row[3]) < 4
    ] == []
    if name == "settings.md":
        assert [row[0].strip("`") for row in rows] == keys()


def test_the_value_of_an_option_is_a_type_or_a_limit() -> None:
    """A default with a semicolon would be split, and its second half listed as a limit."""
    values = [row.split(" | ")[2] for row in TEXT[REFERENCE / "commands.md"].splitlines() if row.startswith("| ")]
    legal = r"`[^`<]+`|text|path|number|whole number|required|at least \d|two numbers|0 to 100|value|---|"
    assert [value for value in values if not all(re.fullmatch(legal, part) for part in value.split(", "))] == []


def test_every_object_of_the_python_api_is_on_its_page() -> None:
    assert set(re.findall(r"^::: nnunet_lite\.(\w+)$", TEXT[REFERENCE / "api.md"], re.MULTILINE)) == set(
        nnunet_lite.__all__
    )


def test_the_site_is_built_and_read_without_a_network(browser: Any, tmp_path: Path) -> None:
    """Links, anchors and the navigation are complete; pages opened as files load nothing else, and search works."""
    pytest.importorskip("mkdocstrings", reason="needs the extra [docs]")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    done = subprocess.run(
        build, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: errors.extend([request.url] * (not request.url.startswith(("file:", "blob:")))))
    for name in ("reference/api.html", "index.html"):
        page.goto((tmp_path / name).as_uri())
    page.fill("input.md-search__input", "oversampling")
    page.click("a.md-search-result__link")
    page.wait_for_url("**/*.html*")
    assert "oversampling" in page.inner_text("article").lower() and not errors
