"""The command line itself: help, versions, mistakes in what was typed. What the commands do: test_end_to_end.py."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import Command, Copy, subcommand

import nnunet_lite
from nnunet_lite import cli
from nnunet_lite.commands import options
from nnunet_lite.commands.machines import doctor


def one_line(err: str) -> str:
    """The message of a mistake: one line, which says `error`, and ends with a full sentence."""
    lines = [line for line in err.splitlines() if not line.startswith("dataset ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ") and lines[0].endswith((".", "?")), err
    return lines[0]


def test_help_lists_every_command(nnlite: Command, tmp_path: Path) -> None:
    code, out, err = nnlite("--help", cwd=tmp_path)
    assert (code, err) == (0, "")
    listed = out.partition("Commands:")[2].partition("\n\n")[0].split("\n  ")
    assert {line.split()[0] for line in listed if line[:1].strip()} == set(cli.COMMANDS)
    assert nnlite(cwd=tmp_path) == (0, out, ""), "no argument at all asks for help"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_is_in_one_panel_and_its_default_in_one_notation(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    every = subcommand(name).params
    parameters = [parameter for parameter in every if parameter.param_type_name == "option" and not parameter.hidden]
    lost = [parameter.opts[-1] for parameter in parameters if parameter.rich_help_panel not in options.PANELS]
    how = "declare it with options.length(help=...) or with another panel of commands/options.py, not with typer.Option"
    assert not lost, f"nnlite {name} {' '.join(lost)}: in no panel of --help; {how}"
    code, out, err = command(name, "-h", cwd=tmp_path)
    assert (code, err) == (0, "") and out.startswith(f"Usage: nnlite {name} ")
    assert "--json" in out and "-h, --help" in out
    assert max(map(len, out.splitlines())) <= 80
    headings = re.findall(r"^(\S.*):$", out, re.MULTILINE)
    assert headings == [*sorted(set(headings) - {"Examples"}, key=options.PANELS.index), "Examples"]
    for parameter in parameters:
        shown = re.findall(rf"^  (?:-\w+, )?{parameter.opts[-1]}\b(?!-)", out, re.MULTILINE)
        assert len(shown) == 1, f"nnlite {name} {parameter.opts[-1]}: {len(shown)} times in --help"
        how = 'write a default as show_default="...", not as [...]'
        assert "[" not in str(parameter.help), f"nnlite {name} {parameter.opts[-1]}: {how}"
    assert "[default: (" not in out and ")]" not in out
    usage = out.partition("\n\n")[0]
    assert usage.partition("[OPTIONS]")[2].isupper() or usage.endswith("[OPTIONS]"), "arguments are in upper case"
    assert not re.search(r"[{}]|x>=|<=x| range>|  (Of|On|By) |\.  Of ", out)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_two_examples_which_exist(name: str) -> None:
    examples = str(subcommand(name).epilog).splitlines()
    how = 'the docstring of the function ends with a section "Examples" of at least two lines `nnlite ...`'
    assert len(examples) >= 2 and all(example.startswith(f"nnlite {name}") for example in examples), f"{name}: {how}"
    for example in examples:
        subcommand(name).make_context(f"nnlite {name}", shlex.split(example)[2:])


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_help_is_as_wide_as_the_terminal(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = command("train", "--help", cwd=tmp_path)
    widest = max(map(len, out.partition("Examples:")[0].splitlines()))
    assert min(columns, 120) * 0.8 < widest <= min(columns, 120)


def test_version_and_module(nnlite: Command, tmp_path: Path) -> None:
    assert nnlite("--version", cwd=tmp_path) == (0, f"{nnunet_lite.__version__}\n", "")
    as_module = [sys.executable, "-m", "nnunet_lite", "--version"]
    assert subprocess.check_output(as_module, cwd=tmp_path, text=True) == f"{nnunet_lite.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["predict", "-i", "in"]])
def test_help_and_mistakes_import_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    """What `nnlite --help` costs is what it imports; the time itself is measured by a benchmark."""
    code = f"import atexit, sys; sys.argv[1:] = {arguments}; atexit.register(lambda: print('loaded', *sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; from nnunet_lite import cli; cli.main()"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    loaded = set(done.stdout.partition("loaded")[2].split())
    assert "nnunet_lite.cli" in loaded
    assert not loaded & {"torch", "numpy", "scipy", "SimpleITK", "rich", "nnunet_lite.planning.schema"}


COMPLETED: dict[str, set[str]] = {  # what is typed, and what bash proposes for the last word
    "tr": {"train"},
    "''": set(cli.COMMANDS),
    "train 3d_fullres 0 --re": {"--recipe", "--resume", "--restart"},
    "predict --speed b": {"balanced", "best"},
    "--v": {"--version", "--verbose"},
}


def test_bash_completes_commands_options_and_choices(tmp_path: Path) -> None:
    """The script that `--show-completion` prints, in a real bash, which `complete` would call as here."""
    script = f'PATH={sysconfig.get_path("scripts")}:$PATH; eval "$(nnlite --show-completion)"; complete -p nnlite >&2;'
    for typed in COMPLETED:
        words = f"COMP_WORDS=(nnlite {typed}); COMP_CWORD={len(shlex.split(typed))};"
        script += f'{words} _nnlite_completion nnlite; echo "${{COMPREPLY[@]}}";'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "complete -o default -F _nnlite_completion nnlite" in done.stderr
    assert [set(line.split()) for line in done.stdout.splitlines()] == list(COMPLETED.values())


def test_licence(command: Command, tmp_path: Path) -> None:
    code, out, err = command("--licence", cwd=tmp_path)
    assert (code, err) == (0, "") and command("--license", cwd=tmp_path) == (0, out, "")
    assert len(out.splitlines()) < 10
    for named in ("Apache License", "NiiVue", "CC BY-SA 4.0", "Isensee", "10.1038/s41592-020-01008-z"):
        assert named in out


@pytest.mark.parametrize("before", [True, False])
def test_quiet_and_verbose_before_and_after_the_command(
    command: Command, tmp_path: Path, hippocampus: Path, before: bool
) -> None:
    def run(option: str, *arguments: object) -> tuple[int, str, str]:
        return command(*([option, *arguments] if before else [*arguments, option]), cwd=tmp_path)

    _, printed, said = command("plan", hippocampus, cwd=tmp_path)
    assert "\nnext: nnlite train 3d_fullres 0" in said
    code, out, err = run("-q", "plan", hippocampus)
    assert (code, err) == (0, "") and out.splitlines() == [printed.splitlines()[0], "configurations: 2d, 3d_fullres"]
    code, out, err = run("--verbose", "plan", hippocampus)
    assert (code, out) == (0, printed)
    assert [line for line in err.splitlines() if not re.match(r"\[\d+\.\d s\] |warning: ", line)] == []
    code, out, err = run("-q", "info", "nowhere")
    assert code == 2 and "nowhere" in one_line(err)
    code, out, err = run("-v", "info", "nowhere")
    assert code == 2 and "Traceback" in err and "argument.py" in err
    assert err.splitlines()[-1].startswith("error: nowhere: is no model folder")


def test_commands_that_need_no_network_do_not_import_torch(tmp_path: Path) -> None:
    code = "import sys; from nnunet_lite.commands import evaluate, info, inventory, machines, plan"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], cwd=tmp_path, check=True)


def test_planning_and_preprocessing_of_nifti_import_no_other_reader(hippocampus: Path, tmp_path: Path) -> None:
    """Each of these takes a fifth of a second and more, as long as the work on fifty small cases."""
    code = "import sys, nnunet_lite as n; n.plan(sys.argv[1]); n.preprocess('3d_fullres'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, hippocampus], cwd=tmp_path, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "blosc2" in loaded and not loaded & {"nibabel", "pydicom", "scipy", "SimpleITK", "torch"}


def test_mistakes_in_arguments_are_reported_before_torch_is_imported(tiny_workspace: Path, tmp_path: Path) -> None:
    mistakes = {
        "train 3d_fulres 0": "no configuration '3d_fulres'",
        "train 3d_fullres 7": "there is no fold '7'",
        "train 3d_fullres 0 --recipe fats": "fats",
        "train 3d_fullres 0 --time-limit 3x": "time_limit",
        "train 3d_fullres 0 --set optimizer.ls=1": "optimizer.ls",
        "train 3d_fullres 0 -w nowhere": "no dataset is planned",
        "run nothing": "there is no dataset 'nothing'",
        "predict -i nothing -o out -w nowhere": "no dataset is planned",
        "predict -i . -o out -m nothing": "is no model folder",
        "select -w nowhere": "no dataset is planned",
        "train": "3d_fullres ",
    }
    code = "import sys; from nnunet_lite import cli; sys.argv[0] = 'nnlite'\nfor line in sys.stdin:\n"
    code += " sys.argv[1:] = line.split()\n try: cli.main()\n"
    code += " except SystemExit: print('torch' in sys.modules, '~', flush=True)"
    place = {**os.environ, "NNLITE_WORKSPACE": str(tiny_workspace)}
    started = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(mistakes), cwd=tmp_path, check=True, env=place,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    for said, (typed, message) in zip(started.stdout.split("~\n"), mistakes.items(), strict=False):
        assert message in said and said.endswith("False "), (typed, said)


def test_the_summary_of_a_command_is_how_the_docstring_of_its_function_begins() -> None:
    """cli.py has a copy of it, because it imports the function only to run it."""
    for path, summary in cli.COMMANDS.values():
        module, _, function = path.partition(".")
        documented = getattr(import_module(f"nnunet_lite.commands.{module}"), function).__doc__
        assert " ".join(documented.split()).startswith(summary.rstrip(".")), path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bogus"], "--bogus"),
        (["trane"], "Did you mean 'train'"),
        (["train"], "Run `nnlite plan DATA` first."),
        (["train", "3d_fullres", "0", "4"], "0 is no configuration. Give `nnlite train [DATASET] CONFIGURATION FOLD`"),
        (["train", "3d_fullres", "0", "--workers", "-1"], "'--workers': "),
        (["train", "3d_fullres", "0"], "no dataset is planned in the workspace"),
        (["preprocess"], "Run `nnlite plan DATA` first."),
        (["preprocess", "-d", "Task04"], "'Task04'"),
        (["plan", "Task99"], "there is no dataset 'Task99'"),
        (["plan", "--from-fingerprint", "f.json", "--dataset-json", "d.json"], "d.json: no such file"),
        (
            ["plan", "x", "--from-fingerprint", "f.json", "--dataset-json", "d.json", "--folds", "3"],
            "DATA, --folds would",
        ),
        (["plan", "x", "--dataset-json", "d.json"], "--from-fingerprint and --dataset-json need each other"),
        (["plan", "x", "--output", "scan.nii.gz"], "scan.nii.gz: a plan is written as .json"),
        (["predict", "-i", "in"], "--output"),
        (["predict", "-i", "in", "-o", "out"], "no dataset is planned"),
        (["predict", "-i", "in", "-o", "out", "-m", "."], ".: is no model folder (no plans.json in it)"),
        (["evaluate", "a", "b"], "a: "),
        (["evaluate", ".", ".", "--output", "scores"], "scores: scores are written as .json or .csv. Use scores.csv."),
        (["evaluate", ".", ".", "--tolerance", "nan"], "--tolerance nan is no distance"),
        (["info"], "no dataset is planned"),
    ],
)
def test_a_mistake_is_reported_in_one_line(command: Command, tmp_path: Path, arguments: list[str], says: str) -> None:
    code, out, err = command(*arguments, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert says in one_line(err)
    assert list(tmp_path.iterdir()) == [], "a mistake leaves nothing behind"


def test_a_home_that_the_shell_leaves_in_an_option(
    command: Command, hippocampus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--output=~/x would make a folder called ~ here."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "labels").mkdir(parents=True)
    label = shutil.copy(next((hippocampus / "labelsTr").iterdir()), tmp_path / "home" / "labels")
    code, _, err = command("evaluate", "~/labels", Path(label).parent, "--output=~/scores.json", cwd=tmp_path)
    assert (code, err) == (0, "") and (tmp_path / "home" / "scores.json").is_file() and not (tmp_path / "~").exists()

    for typed in (
        ("plan", "none", "--group-by", r"~\d+"),
        ("predict", "-i", "~$scan.nii", "-o", "o"),
        ("info", "~nobody"),
    ):
        code, _, err = command(*typed, cwd=tmp_path)
        assert code == 2 and err.startswith("error: "), "~ begins a name that is no home"


def test_mistake_in_a_real_process(nnlite: Command, tmp_path: Path) -> None:
    code, out, err = nnlite("train", "3d_fullres", "0", "--epoch", "3", cwd=tmp_path)
    assert (code, out) == (2, "") and "--epochs" in one_line(err)


def test_doctor(nnlite: Command, tmp_path: Path) -> None:
    code, out, err = nnlite("doctor", "--json", cwd=tmp_path)
    about = json.loads(out)
    assert (code, err) == (1 if about["problems"] else 0, "")
    assert about["nnunet_lite"] == nnunet_lite.__version__ and about["packages"]["torch"]
    assert about["cpus"] == len(os.sched_getaffinity(0)) and about["memory_gb"] > about["memory_free_gb"] > 0
    assert about["workspace"] == str(tmp_path / "nnlite_workspace") and list(tmp_path.iterdir()) == []


def test_the_doctor_of_a_package_that_runs_from_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without an installation nothing says which packages it needs."""
    (tmp_path / "file").touch()
    assert any("the workspace is a file" in one for one in doctor(workspace=tmp_path / "file" / "w").values["problems"])
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    about = doctor(workspace=tmp_path)
    assert about.exit_code == 1 and "nnunet_lite is not installed: pip install nnunet_lite" in about.values["problems"]


def test_json_of_check_and_plan(command: Command, tmp_path: Path, hippocampus: Path) -> None:
    code, out, _ = command("check", hippocampus, "--json", cwd=tmp_path)
    report = json.loads(out)
    assert (code, report["ok"], report["cases"], report["problems"]) == (0, True, 32, [])
    assert list(tmp_path.iterdir()) == [], "a check writes nothing"
    code, out, _ = command("plan", hippocampus, "--json", "--output", "my/plan.json", cwd=tmp_path)
    assert code == 0 and json.loads(out) == json.loads((tmp_path / "my" / "plan.json").read_text())
    assert list(json.loads(out)["configurations"]) == ["2d", "3d_fullres"]
    stored = tmp_path / "nnlite_workspace" / "Task04_Hippocampus"
    written = {"check.json", "dataset.json", "fingerprint.json", "planned.json", "plans.json", "raw.json"}
    assert {p.name for p in stored.iterdir()} == written
    code, out, _ = command("info", "--json", cwd=tmp_path)
    about = json.loads(out)
    assert (code, about["dataset"], about["cases"], about["models"]) == (0, "Task04_Hippocampus", 32, [])


def test_names_and_workspaces(command: Command, copy_dataset: Copy, tmp_path: Path) -> None:
    """`Task04` is found in ./data; of several the one planned last is shown; -d takes another, -w elsewhere."""
    copy_dataset(6, "data/Task04_Hippocampus")
    copy_dataset(5, "data/Task05_Other")
    for name in ("Task04", "Task05"):
        code, _, err = command("plan", name, cwd=tmp_path)
        assert code == 0, err
    code, out, err = command("info", cwd=tmp_path)
    assert "planned last; -d takes one of the 2 planned)" in err and out.startswith("Task05_Other: 5 cases in ")
    assert command("info", "-d", "Task04", cwd=tmp_path)[1].startswith("Task04_Hippocampus: 6 cases in ")
    code, out, err = command("info", "-d", "Task06", cwd=tmp_path)
    assert code == 2 and "It holds: Task04_Hippocampus, Task05_Other." in one_line(err)
    code, out, err = command("info", "-w", "elsewhere", cwd=tmp_path)
    assert code == 2 and str(tmp_path / "elsewhere") in one_line(err)
    code, out, err = command("plan", "Task0", cwd=tmp_path)
    assert code == 2 and "there is no dataset 'Task0'" in one_line(err)


def test_plan_from_a_fingerprint(command: Command, tmp_path: Path, hippocampus: Path) -> None:
    planned = json.loads(command("plan", hippocampus, "--json", cwd=tmp_path)[1])
    stored = tmp_path / "nnlite_workspace" / "Task04_Hippocampus"
    given = ("--from-fingerprint", stored / "fingerprint.json", "--dataset-json", stored / "dataset.json")
    code, out, _ = command("plan", *given, "--json", cwd=tmp_path)
    assert code == 0 and json.loads(out)["configurations"] == planned["configurations"]
    code, out, _ = command("plan", *given, "--format", "nnunet", "--output", "nnUNetPlans.json", cwd=tmp_path)
    theirs = json.loads((tmp_path / "nnUNetPlans.json").read_text())
    assert code == 0 and theirs["configurations"]["3d_fullres"]["patch_size"] == [40, 56, 40]
    code, out, _ = command("plan", hippocampus, "--plans", "nnUNetPlans.json", "--json", cwd=tmp_path)
    adopted = json.loads(out)["configurations"]["3d_fullres"]
    assert code == 0 and adopted["network"] == planned["configurations"]["3d_fullres"]["network"]


def test_a_plan_of_pictures_names_the_reader_that_nnunet_has_for_them(command: Command, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(3):
        for folder, high in (("images", 256), ("labels", 2)):
            (tmp_path / "pictures" / folder).mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(rng.integers(0, high, (40, 48), np.uint8))
            picture.save(tmp_path / "pictures" / folder / f"p{number}.png")
    arguments = ("--format", "nnunet", "--output", "nnUNetPlans.json")
    code, _, err = command("plan", "pictures", *arguments, cwd=tmp_path)
    assert code == 0, err
    theirs = json.loads((tmp_path / "nnUNetPlans.json").read_text())
    assert theirs["image_reader_writer"] == "NaturalImage2DIO" and list(theirs["configurations"]) == ["2d"]


def test_reader_that_stops_reading(tmp_path: Path, hippocampus: Path) -> None:
    """`nnlite plan ... | head -1` ends in silence."""
    command = [sys.executable, "-m", "nnunet_lite", "plan", str(hippocampus)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode in (0, 1) and "Error" not in err, err
