"""The user's front door: every target's command parses, and variables reach the scripts."""

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import is_running

import clean
from run_directory import RunInUse, claim

ROOT = Path(__file__).parents[1]
TARGETS = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
VARIABLES = set(
    "DATA_DIR DATASET EPOCHS BATCH_SIZE SAMPLES CLASSES GUIDANCE STEPS SEED CHECKPOINT DEVICE "
    "GPUS NODES NODE_RANK RENDEZVOUS RESTARTS SAMPLER OUTPUT GRID TRAJECTORY PICTURES SWEEP FRESH "
    "CONFIRM ARGS RUN PYTHON BASE_PYTHON".split()
)


def own_environment() -> dict[str, str]:
    """That of the tests without what a make around them has set; what make says is English."""
    kept = {k: v for k, v in os.environ.items() if k not in VARIABLES and "MAKE" not in k}
    return kept | {"LC_ALL": "C.UTF-8"}


def make(*arguments, folder=ROOT, environment={}) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["make", *arguments], cwd=folder, env={**own_environment(), **environment},
        capture_output=True, text=True,
    )


@pytest.fixture
def copy(tmp_path) -> Path:
    """The product's files without its runs and data."""
    folder = tmp_path / "product"
    folder.mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "Makefile", *ROOT.glob("*.txt")]:
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "conditional_diffusion", folder / "conditional_diffusion")
    return folder


def test_help_is_the_default_and_lists_every_target():
    result = make()
    assert result.returncode == 0
    assert {"demo", "train", "overfit", "generate", "check", "clean-cuda"} <= set(TARGETS)
    for target in TARGETS:
        assert re.search(rf"^  {target}\s+\S", result.stdout, re.MULTILINE), target


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_phony_and_parses(target):
    result = make("-n", target, f"PYTHON={sys.executable}")
    assert result.returncode == 0, result.stderr
    phony = re.search(r"^\.PHONY: (.*?)(?<!\\)$", (ROOT / "Makefile").read_text(), re.M | re.S)
    assert target in phony[1].replace("\\\n", " ").split()


@pytest.mark.parametrize("target", ["train", "overfit", "test", "quick-test", "demo"])
def test_variables_reach_the_config(target, copy):
    """The target's own command, with --dry-run added through ARGS, prints what it resolved."""
    result = make(
        "-s", target, f"PYTHON={sys.executable}", "EPOCHS=3", "BATCH_SIZE=5", "SEED=7", "SAMPLES=2",
        "DEVICE=cpu", "DATA_DIR=/a folder/it's", "ARGS=--dry-run --train.learning_rate 3e-4",
        folder=copy,
    )
    config = json.JSONDecoder().raw_decode(result.stdout)[0]
    assert config["train"]["epochs"] == 3 and config["train"]["batch_size"] == 5
    assert config["train"]["seed"] == 7 and config["train"]["learning_rate"] == 3e-4
    assert config["data"]["samples_per_class"] == 2
    assert config["data"]["data_dir"] == "/a folder/it's"
    assert config["mode"] == {"train": "full", "test": "overfit"}.get(target, target)


def test_generate_hands_its_variables_on():
    result = make(
        "-n", "generate", f"PYTHON={sys.executable}", "CHECKPOINT=my run/a.pt", "CLASSES=cat,dog",
        "GUIDANCE=2", "STEPS=50", "SAMPLES=3", "SEED=1", "SAMPLER=ddim", "OUTPUT=my pictures",
        "GRID=1", "TRAJECTORY=1",
    )
    command = result.stdout.splitlines()[-1]
    assert "generate_samples.py 'my run/a.pt'" in re.sub(" +", " ", command)
    for flag in ("--classes='cat,dog'", "--guidance='2'", "--steps='50'", "--samples='3'",
                 "--sampler='ddim'", "--output='my pictures'", "--grid-only", "--trajectory"):
        assert flag in command


def test_several_gpus_go_through_the_launcher():
    result = make("-n", "train", f"PYTHON={sys.executable}", "GPUS=8", "NODES=2", "NODE_RANK=1",
                  "RENDEZVOUS=first:29500", "RESTARTS=3", "EPOCHS=2")
    command = re.sub(" +", " ", result.stdout.splitlines()[-1])
    assert ("launch.py --gpus='8' --nodes='2' --node-rank='1' --rendezvous='first:29500' "
            "--restarts='3' train_model.py --full") in command
    assert "--epochs='2'" in command
    for target in ("train", "overfit", "quick-test", "generate", "evaluate"):
        alone = make("-n", target, f"PYTHON={sys.executable}").stdout
        assert "launch.py" not in alone, target
        assert "launch.py --gpus='all'" in make(
            "-n", target, f"PYTHON={sys.executable}", "GPUS=all"
        ).stdout, target
    alone = make("-n", "train", f"PYTHON={sys.executable}", "RESTARTS=2").stdout
    assert "launch.py --gpus 1 --restarts='2'" in re.sub(" +", " ", alone)


def test_what_make_does_not_know_is_refused():
    for target, word, said in (
        ("train", "EPOCH=1", "no variable EPOCH, but: ARGS "),
        ("train", "STEPS=9", "no variable STEPS"),
        ("train", "FRESH=y", "FRESH=y is neither"), ("generate", "GRID=2", "GRID=2 is neither"),
        ("status", "RUN=checkpoints", "no variable RUN"), ("help", "SEED=1", "no variable SEED"),
    ):
        result = make("-n", target, f"PYTHON={sys.executable}", word)
        assert result.returncode != 0 and said in result.stderr
    for value, given in (("1", True), ("yes", True), ("0", False), ("false", False)):
        command = make("-n", "train", f"PYTHON={sys.executable}", f"FRESH={value}").stdout
        assert ("--fresh" in command) == given
    # Some clusters set this for purposes of their own.
    assert "launch.py" not in make("-n", "train", f"PYTHON={sys.executable}",
                                   environment={"NODE_RANK": "1"}).stdout
    # launch.py says what is missing.
    assert "launch.py" in make("-n", "train", f"PYTHON={sys.executable}", "NODE_RANK=1").stdout
    assert "\n'/a/python' run_status.py" in make("-n", "status", "PYTHON=/a/python").stdout


def test_every_target_takes_the_variables_of_its_recipe():
    """And of several targets each those of any."""
    makefile = (ROOT / "Makefile").read_text()
    flags = dict(re.findall(r"^([A-Z_]+) = ((?:.*\\\n)*.*)", makefile, re.MULTILINE))
    recipes = re.findall(r"^([a-z-]+):.*## .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert len(recipes) == len(TARGETS) - 1  # test is overfit
    for target, recipe in recipes:
        for name in re.findall(r"\$\((LAUNCH|[A-Z]+_FLAGS)\)", recipe):
            recipe += flags.get(name, "")  # those of the test suite are fixed
        used = VARIABLES & set(re.findall(r"(?:flag,|switch,|\$\()([A-Z_]+)", recipe))
        values = [f"{name}={1 if name in ('FRESH', 'GRID', 'TRAJECTORY', 'CONFIRM') else 'x'}"
                  for name in used | {"PYTHON", "DATA_DIR"}]
        assert make("-n", target, *values).returncode == 0, (target, used)
    assert make("-n", "train", "evaluate", "PYTHON=x", "EPOCHS=1", "SWEEP=1,2").returncode == 0
    assert make("-n", "clean", "ARGS=").returncode == 0, "an empty value asks for nothing"


def test_evaluate_hands_its_variables_on():
    result = make(
        "-n", "evaluate", f"PYTHON={sys.executable}", "PICTURES=my pictures", "SWEEP=1,2",
        "STEPS=9", "SAMPLES=3", "SEED=1", "SAMPLER=ddim", "DATASET=pictograms",
        "OUTPUT=my scores", "ARGS=--no-inception",
    )
    command = result.stdout.splitlines()[-1]
    for flag in ("evaluate_samples.py", "--pictures='my pictures'", "--sweep='1,2'", "--steps='9'",
                 "--samples='3'", "--seed='1'", "--sampler='ddim'", "--dataset='pictograms'",
                 "--output='my scores'", "--no-inception"):
        assert flag in command


def test_evaluation_goes_on_where_its_extra_packages_cannot_be_had(copy):
    (copy / ".venv" / "bin").mkdir(parents=True)
    python = copy / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\ncase $* in *requirements-eval.txt*) exit 1;; esac\n"
                      "echo called $@ >> calls\n")
    python.chmod(0o755)
    result = make("evaluate", folder=copy)
    assert result.returncode == 0 and "no FID this time" in result.stderr
    assert "evaluate_samples.py" in (copy / "calls").read_text()
    assert not (copy / ".venv" / ".installed-eval").exists()


def test_errors_reach_the_exit_status(copy):
    result = make("generate", f"PYTHON={sys.executable}", folder=copy)
    assert result.returncode != 0
    assert "no usable checkpoint" in result.stderr and "Traceback" not in result.stderr


def test_python_may_lie_in_a_folder_with_a_space(copy, tmp_path):
    python = tmp_path / "my programs" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho called "$@"\n')
    python.chmod(0o755)
    for target in ("data", "train", "generate", "report"):
        result = make(target, f"PYTHON={python}", folder=copy)
        assert result.returncode == 0 and "called " in result.stdout


def test_what_needs_no_packages_takes_the_environments_python_once_there_is_one(copy):
    assert make("-n", "status", folder=copy).stdout.startswith("'python3' ")
    (copy / ".venv" / "bin").mkdir(parents=True)
    (copy / ".venv" / "bin" / "python").touch(0o755)
    assert make("-n", "status", folder=copy).stdout.startswith("'python3' "), "not yet complete"
    (copy / ".venv" / ".installed").touch()
    assert make("-n", "status", folder=copy).stdout.startswith("'.venv/bin/python' ")


@pytest.mark.parametrize("target", ["install", "status", "monitor", "clean", "clean-cuda"])
def test_an_old_python_is_named(copy, tmp_path, target):
    old = tmp_path / "old-python"
    pretended = "import sys; sys.version_info = (3, 9)"
    old.write_text('#!/bin/sh\n[ "$1" = -c ] || exit 99\n'
                   f'exec {sys._base_executable} -c "{pretended}; $2"\n')
    old.chmod(0o755)
    result = make(target, f"BASE_PYTHON={old}", folder=copy)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {old} is missing or older than 3.11")


def test_a_python_that_does_not_exist_is_named_with_the_variable_that_named_it(copy):
    for target in ("status", "demo"):
        result = make(target, "PYTHON=/nowhere/python", folder=copy)
        assert result.returncode == 2 and "/nowhere/python" in result.stderr
        assert "BASE_PYTHON" not in result.stderr and "bash" not in result.stderr


def test_an_empty_python_is_none(copy):
    empty, none = (make("-n", "data", *words, folder=copy) for words in (["PYTHON="], []))
    assert empty.stdout == none.stdout and ".venv/bin/python" in none.stdout


def test_a_mistyped_target_is_not_blamed_on_its_variables():
    result = make("trian", "EPOCHS=3")
    assert result.returncode != 0
    assert "No rule to make target 'trian'" in result.stderr and "EPOCHS" not in result.stderr


def test_python_without_packages_is_refused_with_the_cure(copy, tmp_path):
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec {sys._base_executable} -I -S "$@"\n')
    bare.chmod(0o755)
    result = make("train", f"PYTHON={bare}", folder=copy)
    assert result.returncode != 0
    assert "lacks torch" in result.stderr and "requirements.txt" in result.stderr
    assert not (copy / ".venv").exists()


def test_install_is_done_once(copy):
    """With the stamps in place nothing is installed; a newer requirements.txt asks for it again."""
    (copy / ".venv" / "bin").mkdir(parents=True)
    python = copy / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\necho called $@ >> calls\n")
    python.chmod(0o755)
    def calls_of_pip() -> list[str]:
        assert make("install", folder=copy).returncode == 0
        return [line for line in (copy / "calls").read_text().splitlines() if "-m pip" in line]

    (call,) = calls_of_pip()
    assert call.endswith("-r requirements.txt")
    assert len(calls_of_pip()) == 1
    later = (copy / ".venv" / ".installed").stat().st_mtime + 5
    os.utime(copy / "requirements.txt", (later, later))
    assert len(calls_of_pip()) == 2


def test_two_at_once_install_once(copy):
    """As `make train` in one terminal and `make doctor` in another, both for the first time."""
    (copy / ".venv" / "bin").mkdir(parents=True)
    python = copy / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\necho $@ >> calls; until test -e go; do sleep 0.1; done\n")
    python.chmod(0o755)
    command = ["make", "install", f"BASE_PYTHON={sys.executable}"]
    outputs = [copy / "first", copy / "second"]
    both = []
    for path in outputs:
        with open(path, "w") as output:
            both.append(subprocess.Popen(command, cwd=copy, env=own_environment(), stdout=output,
                                         stderr=subprocess.STDOUT))
    deadline = time.monotonic() + 60
    while not any("waiting" in path.read_text() for path in outputs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (copy / "go").touch()
    assert [process.wait(60) for process in both] == [0, 0]
    said = [path.read_text() for path in outputs]
    installing = ["installing requirements.txt into .venv (PyTorch is large: minutes)"]
    waiting = ["waiting for another make, which is installing"]
    ready = ["ready: .venv/bin/python"]
    assert sorted(text.splitlines() for text in said) == [installing + ready, waiting + ready]
    assert (copy / "calls").read_text().count("-m pip") == 1


def test_an_environment_whose_python_is_gone_is_named(copy):
    """As after an update of the system's; what needs no packages goes on."""
    (copy / ".venv" / "bin").mkdir(parents=True)
    (copy / ".venv" / ".installed").touch()
    (copy / ".venv" / "bin" / "python").symlink_to("/usr/bin/python3.2")
    assert make("status", folder=copy).returncode == 0
    for target in ("install", "quick-test"):
        result = make(target, folder=copy)
        assert result.returncode == 2 and not result.stdout
        assert result.stderr.startswith("error: .venv/bin/python links to a Python that is gone;")
    assert make("clean-all", folder=copy).returncode == 0 and not (copy / ".venv").exists()


def test_torch_is_one_that_the_product_supports():
    """2.11 or later, or the tests would prove nothing for its users."""
    import torch

    assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


def test_clean_removes_runs_only_after_listing_them(copy):
    for name in ("checkpoints_demo/a.pt", "generated_images/grid.png", "data/mine/cat.png",
                 "data/prepared/x/info.json", "checkpoints/best.pt"):
        path = copy / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    refused = make("clean", folder=copy)
    assert refused.returncode != 0 and "CONFIRM=yes" in refused.stderr
    assert (copy / "checkpoints_demo").exists()
    done = make("clean", "CONFIRM=yes", folder=copy)
    assert done.returncode == 0 and "checkpoints_demo" in done.stdout
    assert not list(copy.glob("checkpoints*")) and (copy / "data/prepared").exists()
    assert make("clean-all", folder=copy).returncode == 0
    assert not (copy / "data/prepared").exists() and (copy / "data/mine/cat.png").exists()


def test_clean_spares_folders_that_the_user_named_and_asks_for_nested_checkpoints(copy):
    mine = ("checkpoints_10epochs_keep/a.pt", "checkpoints_demo_1st/a.pt", "checkpoints.old/a.pt")
    made = ("checkpoints_2/run/a.pt", "checkpoints_overfit_1/a.pt")
    for name in (*mine, *made):
        (copy / name).parent.mkdir(parents=True)
        (copy / name).write_text("x")
    refused = make("clean", folder=copy)
    assert refused.returncode != 0 and "CONFIRM=yes" in refused.stderr
    assert make("clean", "CONFIRM=yes", folder=copy).returncode == 0
    assert [name for name in (*mine, *made) if (copy / name).exists()] == list(mine)


def test_python_in_a_folder_with_a_space(copy):
    (copy / "my python").symlink_to(sys.executable)
    result = make("status", f"PYTHON={copy}/my python", folder=copy)
    assert result.returncode == 0 and "No training run yet" in result.stdout


@pytest.mark.parametrize("target, name", [
    ("clean", "checkpoints_demo"), ("clean", "generated_images/demo"),
    ("clean-all", "data/prepared"),
])
def test_clean_refuses_while_something_writes_there(copy, target, name):
    folder = copy / name
    folder.mkdir(parents=True)
    with open(folder / "run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = make(target, "CONFIRM=yes", folder=copy)
    assert result.returncode != 0 and f"{name} is in use" in result.stderr
    assert folder.exists()


@pytest.mark.parametrize("begun", [None, "generated_images/new", "checkpoints_overfit/quick-test"])
def test_no_run_begins_between_the_question_of_clean_and_its_answer(copy, begun):
    """Or, below a folder where nothing has been written yet, is spared."""
    for name in ("checkpoints/best.pt", "generated_images/grid.png", "checkpoints_overfit/a.pt"):
        (copy / name).parent.mkdir()
        (copy / name).touch()
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "clean.py", "runs"], cwd=copy, stdin=theirs,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with open(theirs, closefd=True), open(ours, "wb", buffering=0) as terminal:
        assert [process.stdout.readline()[-9:-1] for _ in range(3)] == [
            "ckpoints", "_overfit", "d_images"]
        process.stdout.read(5)  # of the question
        for name in ("checkpoints", "checkpoints_overfit", "generated_images"):
            with pytest.raises(RunInUse, match="in use by another process"):
                claim(copy / name)
        if begun:
            (copy / begun).mkdir()
            lock = claim(copy / begun)
        terminal.write(b"y\n")
        said = process.communicate(timeout=60)
        assert process.returncode == (1 if begun else 0), said
    if begun:
        assert f"{begun} is in use" in said[1] and (copy / "checkpoints" / "best.pt").exists()
        lock.close()
    else:
        assert not list(copy.glob("checkpoints*")) and not (copy / "generated_images").exists()


@pytest.mark.parametrize("answer", ["n", "", "yess"])
def test_clean_asked_at_a_terminal_removes_nothing_without_a_yes(copy, answer):
    (copy / "checkpoints").mkdir()
    (copy / "checkpoints" / "best.pt").touch()
    ours, theirs = pty.openpty()
    with open(theirs, closefd=True), open(ours, "wb", buffering=0) as terminal:
        terminal.write(f"{answer}\n".encode())
        result = subprocess.run([sys.executable, "clean.py", "runs"], cwd=copy, stdin=theirs,
                                capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "nothing was removed" in result.stdout
    assert (copy / "checkpoints" / "best.pt").exists()


def test_a_process_that_does_not_end_when_asked_is_killed(monkeypatch):
    monkeypatch.setattr(clean, "GRACE_SECONDS", 0.2)
    deaf = ("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
            "print('ready', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        clean.end(process.pid)
        assert process.wait(60) == -signal.SIGKILL


@pytest.fixture
def orphan(copy):
    """orphan(script): a process of the copy whose parent has died; ended after the test."""
    pids = []

    def start(script: str) -> int:
        (copy / script).write_text("import time; time.sleep(60)")
        shell = f"{sys.executable} {script} > /dev/null 2>&1 & echo $!"
        pids.append(int(subprocess.check_output(["sh", "-c", shell], cwd=copy)))
        return pids[-1]

    yield start
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_session_manager_is_no_parent_that_waits(monkeypatch):
    names = {"7": "systemd\n", "8": "bash\n"}
    monkeypatch.setattr(clean.Path, "read_text", lambda path: names[path.parent.name])
    orphans = [clean.is_orphan(f"Name:\tpython\nPPid:\t{parent}\nUid:\t0") for parent in (1, 7, 8)]
    assert orphans == [True, True, False]


def test_clean_cuda_ends_own_leftovers_and_nothing_else(copy, orphan, tmp_path, monkeypatch):
    ours, foreign, live = map(orphan, ("generate_samples.py", "other.py", "train_model.py"))
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)", "train_model.py"], cwd=copy
    ) as child:  # ours by its name, but its parent waits for it
        listed = "\\n".join(f"{pid}, python, 9" for pid in (ours, foreign, live, child.pid))
        smi = tmp_path / "bin" / "nvidia-smi"
        smi.parent.mkdir()
        smi.write_text(f"#!/bin/sh\nprintf '{listed}\\n'")
        smi.chmod(0o755)
        monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
        monkeypatch.setenv("HOME", str(tmp_path))  # whose caches it may clear
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        run = copy / "checkpoints"
        run.mkdir()
        (run / "run.json").write_text(json.dumps({"pid": live, "host": "here", "started": 0}))
        with open(run / "run.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            asked = make("clean-cuda", folder=copy)
            everything_ran = all(map(is_running, (ours, foreign, live, child.pid)))
            done = make("clean-cuda", "CONFIRM=yes", folder=copy)
        running = [is_running(pid) for pid in (ours, foreign, live, child.pid)]
        child.kill()
    assert asked.returncode == done.returncode == 0, asked.stderr + done.stderr
    assert everything_ran and "left alone; CONFIRM=yes" in asked.stdout
    assert f"ended process {ours}" in done.stdout and "is theirs" in done.stdout
    assert running == [False, True, True, True]


def test_clean_cuda_asks_before_the_caches_of_all_programs_go(copy, tmp_path):
    cache, inductor = tmp_path / ".triton" / "cache", tmp_path / "torchinductor_me"
    cache.mkdir(parents=True)
    inductor.mkdir()
    here = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    refused = make("clean-cuda", folder=copy, environment=here)
    assert refused.returncode != 0 and "all your programs" in refused.stderr and cache.exists()
    assert make("clean-cuda", "CONFIRM=yes", folder=copy, environment=here).returncode == 0
    assert not cache.exists() and not inductor.exists()
