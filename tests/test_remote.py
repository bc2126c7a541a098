"""remote_train.sh against a real sshd and tmux on 127.0.0.1, with keys, a home and a tmux server of their own."""

import contextlib
import hashlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
TOOLS = {"sshd": SSHD, **{name: shutil.which(name) for name in ("ssh", "ssh-keygen", "tmux", "rsync", "git")}}
UV = os.environ.get("UV") or shutil.which("uv") or "uv"
MISSING = [name for name, path in TOOLS.items() if not path]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

# Says what it was given, and ends at once.
PROBE = """
import json, os, sys, time  # takes --resume
if "--fail" in sys.argv:
    sys.exit("failed")
names = "HF_HOME", "CUDA_VISIBLE_DEVICES", "WANDB_GIT_COMMIT"
os.makedirs("runs/probe__x", exist_ok=True)
open("runs/probe__x/config.json", "w").write("{}")
open("probe.json", "w").write(json.dumps({"argv": sys.argv[1:], **{name: os.environ.get(name) for name in names}}))
if "--quiet" not in sys.argv:
    print("hello\\nrun folder: runs/probe__x", flush=True)
if "--wait" in sys.argv:
    time.sleep(600)
"""
HOSTILE = [
    "'; touch pwned #'", "$(touch pwned)", "`touch pwned`", "; touch pwned", "&& touch pwned", "$HOME", "new\nline",
    "a b", "  two  spaces ", "", '"', "'", "\\", "\\n", "$'\\x41'", "é€", "*", "~", "-", "--", "!!", "%s", "\ttab",
    "{a,b}", "#", "\udcff\udcfe", "*.py", "--session", "-x",
]  # fmt: skip


@dataclass
class Machine:
    """A laptop with a clone of the project, and the machine that it reaches by ssh."""

    home: Path  # of the machine
    laptop: Path  # the clone
    bin: Path  # comes first in the laptop's PATH: ssh with a config of its own, as ~/.ssh/config would be

    @property
    def there(self) -> Path:
        return self.home / "work" / "dr-grpo"

    def start(self, *words: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"}
        command = ["bash", str(self.laptop / "remote_train.sh"), *words]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=-1, stderr=-1, text=True, env=environment)

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def ok(self, *words: str) -> str:
        done = self.call(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "a-very-secret-key" not in done.stdout + done.stderr
        return done.stdout

    def refused(self, *words: str, code: int = 2) -> str:
        done = self.call(*words)
        assert done.returncode == code, done.stdout + done.stderr
        assert "error: " in done.stderr
        return done.stderr

    def session(self, name: str) -> Path:
        return self.home / ".remote_train" / f"{name}@{hashlib.sha256(bytes(self.there)).hexdigest()[:12]}"

    def probe(self, *words: str) -> dict:
        """Launches PROBE and returns what it was given."""
        (self.there / "probe.json").unlink(missing_ok=True)
        self.ok(*words)
        return json.loads((self.there / "probe.json").read_text())


SYNC = ("--sync", "--cpu")


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def make_laptop(folder: Path) -> None:
    """The project as it is in this working tree, committed and pushed."""
    names = git(ROOT, "ls-files", "-co", "--exclude-standard").splitlines()
    for name in [n for n in names if not n.startswith(("tests/", "docs/", "benchmarks/")) and (ROOT / n).is_file()]:
        (folder / "dr-grpo" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "dr-grpo" / name)
    (folder / "dr-grpo" / "probe.py").write_text(PROBE)
    git(folder, "init", "--quiet", "--bare", "origin.git")
    for words in (["init"], ["add", "-A"], ["commit", "-m", "all"], ["remote", "add", "origin", "../origin.git"],
                  ["remote", "set-url", "origin", str(folder / "origin.git")], ["push", "origin", "main"]):  # fmt: skip
        git(folder / "dr-grpo", *words)


def serve(folder: Path, home: Path, keys: Path) -> tuple[int, subprocess.Popen[bytes]]:
    """An sshd for whoever runs this test, with another home."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tools := folder / "bin").mkdir()
    path = ":".join(p for p in ("/usr/local/bin", "/usr/bin", "/bin") if not Path(p, "uv").exists())
    (tools / "curl").write_text(f"#!/bin/sh\necho 'mkdir -p ~/.local/bin; ln -s {UV} ~/.local/bin/uv'\n")
    (tools / "curl").chmod(0o755)  # the installer that it brings without a network
    variables = {
        "HOME": home, "PATH": f"{tools}:{path}", "TMUX_TMPDIR": home, "HF_HUB_OFFLINE": 1,
        "UV_PROJECT_ENVIRONMENT": sys.prefix, "OMP_NUM_THREADS": 1, "UV_OFFLINE": 0, "TMPDIR": "/tmp",
    }  # fmt: skip
    lines = [
        f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {keys / 'host'}", f"PidFile {folder / 'pid'}",
        f"AuthorizedKeysFile {keys / 'user.pub'}", "StrictModes no", "PasswordAuthentication no",
        "KbdInteractiveAuthentication no", "SetEnv " + " ".join(f'"{k}={v}"' for k, v in variables.items()),
    ]  # fmt: skip
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(parents=True, exist_ok=True)
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen([str(SSHD), "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    until(lambda: "Server listening" in (folder / "sshd.log").read_text(), 10)
    return port, process


@pytest.fixture(scope="module")
def served() -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(prefix="remote", dir="/tmp") as name:  # short: sockets have short paths
        folder = Path(name)
        for key in ("host", "user"):
            (folder / "keys").mkdir(exist_ok=True)
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "keys" / key], check=True)
        config, servers = [], []
        for alias in ("gpubox", "newbox"):
            home = folder / alias
            (home / ".local" / "bin").mkdir(parents=True)
            if alias == "gpubox":
                (home / ".local" / "bin" / "uv").symlink_to(UV)
            (folder / f"{alias}.sshd").mkdir()
            port, process = serve(folder / f"{alias}.sshd", home, folder / "keys")
            servers.append(process)
            config += [f"Host {alias}", f"  Port {port}"]
        config += ["Host closedbox", "  Port 1", "Host *box", "  HostName 127.0.0.1", "Host *",
                   f"  IdentityFile {folder}/keys/user", f"  UserKnownHostsFile {folder}/known",
                   "  StrictHostKeyChecking accept-new", "  LogLevel ERROR", "  IdentitiesOnly yes"]  # fmt: skip
        (folder / "config").write_text("\n".join(config) + "\n")
        (folder / "bin").mkdir()
        (folder / "bin" / "ssh").write_text(
            f'#!/bin/sh\necho "$@" >>{folder}/calls\nexec {TOOLS["ssh"]} -F {folder}/config "$@"\n'
        )
        (folder / "bin" / "ssh").chmod(0o755)
        make_laptop(folder)
        yield Machine(folder / "gpubox", folder / "dr-grpo", folder / "bin")
        for server in servers:
            server.terminate()
            server.wait()
        for alias in ("gpubox", "newbox"):
            environment = {**os.environ, "TMUX_TMPDIR": str(folder / alias)}
            subprocess.run(["tmux", "kill-server"], env=environment, capture_output=True)
        assert not list(folder.rglob("*pwned*"))
        assert "a-very-secret-key" not in (folder / "calls").read_text()


@pytest.fixture
def machine(served: Machine) -> Iterator[Machine]:
    """With a clean clone; what a test has put beside the code is gone afterwards."""
    (served.laptop / ".env").write_text("export REMOTE_HOST = gpubox # the alias\nREMOTE_DIR='work/dr-grpo'\n")
    (served.laptop / ".env").chmod(0o644)
    yield served
    git(served.laptop, "remote", "set-url", "origin", str(served.laptop.parent / "origin.git"))
    git(served.laptop, "reset", "--hard", "origin/main")
    git(served.laptop, "clean", "-fdxq")
    for left in (served.there / ".env", served.home / ".local" / "bin" / "nvidia-smi"):
        left.unlink(missing_ok=True)


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def steps_of(run: Path) -> list[int]:
    """Those that a run has logged."""
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def attach(machine: Machine, *words: str) -> str:
    """In a pseudo-terminal: waits for a step, detaches with ctrl-b d; returns what was on the screen."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update({"PATH": f"{machine.bin}:{os.environ['PATH']}", "TERM": "a-terminal-of-the-future"})
        os.execvp("bash", ["bash", str(machine.laptop / "remote_train.sh"), "attach", *words])
    screen, typed, end = b"", time.monotonic(), time.monotonic() + 60
    with contextlib.suppress(OSError):  # it has ended
        while time.monotonic() < end:
            if select.select([terminal], [], [], 0.5)[0]:
                screen += os.read(terminal, 65536)
            if re.search(rb"\d+% \d+/100000", screen) and time.monotonic() - typed > 3:
                os.write(terminal, b"\x02")
                time.sleep(0.1)  # tmux takes keys that come together for a paste
                os.write(terminal, b"d")
                typed = time.monotonic()
        os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, screen
    return screen.decode(errors="replace")


@pytest.mark.slow
def test_the_whole_path(machine: Machine) -> None:
    """Launched from a pushed branch, watched, stopped, resumed, fetched."""
    sizes = ["--num-steps", "100000", "--prompts-per-step", "4", "--eval-samples", "8", "--lr-schedule", "constant"]
    printed = machine.ok("launch", "--cpu", "grpo.py", "--preset", "tiny", *sizes)
    assert "\ngrpo: running\n" in printed
    run = re.findall("^preset .*, in (.*)", printed, re.MULTILINE)[-1]
    there = machine.there / run
    commit = git(machine.laptop, "rev-parse", "HEAD")
    assert git(machine.there, "rev-parse", "HEAD") == commit
    assert json.loads((there / "environment.json").read_text())["commit"] == commit.strip()

    assert "'grpo' runs on gpubox already" in machine.refused("resume")
    until(lambda: len(steps_of(there)) > 3)
    words = r"step \d+ of 100000 \(0 %\), reward [\d.]+, accuracy [\d.]+ at step \d+, about [\d.]+ minutes left"
    assert re.match(f"grpo: running\n{run}\n{words}\nprinted, [0-9]+ seconds ago:\n", machine.ok("status"))
    assert machine.ok("list") == f"grpo: running; grpo.py, in {machine.there} {run}\n"
    assert "0% 0/100000 " in machine.ok("logs", "grpo")
    assert "detached" in attach(machine)
    assert machine.ok("status").startswith("grpo: running")

    following = machine.start("logs", "-f")
    stopped = machine.ok("stop")
    assert f"to continue: uv run grpo.py --resume '{run}'" in stopped
    assert "grpo: ended with exit code 143; from here, ./remote_train.sh resume grpo continues it\n" in stopped
    assert f"--resume '{run}'" in following.communicate(timeout=30)[0]
    steps = steps_of(there)[-1] + 20
    assert "attach needs a terminal" in machine.refused("attach")
    assert "ended with exit code 143" in machine.refused("stop")

    assert f", in {run}\n" in machine.ok("resume", "grpo", "--num-steps", str(steps))
    until(lambda: not machine.ok("status", "grpo").startswith("grpo: running"))
    assert machine.ok("status").startswith(f"grpo: ended with exit code 0\n{run}\nstep {steps} of {steps} (100 %), ")
    assert steps_of(there) == list(range(steps + 1))
    assert "0% 0/100000 " in (machine.session("grpo") / "log.before").read_text()
    assert f"\nrun folder: {run}\npage: uv run report.py {run} -o report.html\n" in machine.ok("logs")
    before = files(machine.session("grpo"))
    printed = machine.ok("resume", "--micro-batch-size", "4")
    assert f"this run is finished: all {steps} steps are done\n\ngrpo: ended with exit code 0\n" in printed
    assert files(machine.session("grpo")) == before

    assert machine.ok("fetch", Path(run).name).strip() == run
    here = machine.laptop / run
    assert (here / "metrics.jsonl").read_bytes() == (there / "metrics.jsonl").read_bytes()
    assert (here / "curve.png").is_file()
    assert not (here / "checkpoints").exists()
    machine.ok("fetch", "--checkpoints")
    assert (here / "checkpoints" / f"step_{steps:06d}" / "model.safetensors").is_file()
    for name in ("nothing", ".", "..", "../..", "runs", "runs/", "runs//", "/", "a b", "$(touch pwned)"):
        assert f"'{name}'" in machine.refused("fetch", name)


def test_arguments_reach_the_script_exactly(machine: Machine) -> None:
    given = machine.probe("launch", "--session", "newest", *SYNC, "--hf-home", "~/models", "probe.py", *HOSTILE)
    assert given["argv"] == HOSTILE
    assert given["CUDA_VISIBLE_DEVICES"] == ""
    again = machine.probe("resume", "newest", *HOSTILE)
    assert again == given | {"argv": ["--resume", "runs/probe__x", *HOSTILE]}  # place, code and device are as they were
    assert again["HF_HOME"] == str(machine.home / "models")
    assert again["WANDB_GIT_COMMIT"]
    given = machine.probe("resume", "--num-gpus=1", "--session", "newest", "--x=a b", "--", "-f")
    assert given["argv"] == ["--resume", "runs/probe__x", "--x=a b", "--", "-f"]
    assert machine.call("resume", "newest", "--fail").returncode == 1
    assert machine.probe("resume", "newest", "x")["argv"] == ["--resume", "runs/probe__x", "x"]  # after one that failed


def test_sync_sends_the_working_tree(machine: Machine) -> None:
    """Uncommitted and new files, none that git ignores; nothing is deleted there."""
    laptop, there = machine.laptop, machine.there
    (laptop / "runs" / "local").mkdir(parents=True)
    (laptop / "runs" / "local" / "big").write_text("ignored")
    names = ["new file.py", "#a", ";b", "-n", "line\nbreak"]
    for name in names:
        (laptop / name).write_text(PROBE)
    (laptop / "README.md").unlink()
    (laptop / "LICENSE").write_text("changed")
    given = machine.probe("--sync", "--cpu", "new file.py")
    assert given["WANDB_GIT_COMMIT"] == git(laptop, "rev-parse", "HEAD").strip() + "-dirty"
    assert [name for name in names if not (there / name).is_file()] == []
    assert (there / "LICENSE").read_text() == "changed"
    assert not (there / "runs" / "local").exists()
    (there / "of the machine").write_text("its own")
    machine.probe("--sync", "--cpu", "probe.py")
    assert (there / "of the machine").exists()


def test_what_would_not_get_there_is_refused(machine: Machine) -> None:
    laptop, folder = machine.laptop, ["--cpu", "--dir", "work/cloned"]
    for name in ("mine.py", "runs/data.jsonl"):
        (laptop / name).parent.mkdir(exist_ok=True)
        (laptop / name).write_text(PROBE)
    assert "commit and push it, or --sync if git does not ignore it\nmine.py" in machine.refused("mine.py")
    for words in (["--rewards", "accuracy", "mine:f=2"], ["--rewards=mine:f"], ["--dataset-path", "mine.py"],
                  ["--dataset_path=./mine.py"], ["--x", "--test-path", "mine.py", "--y"]):  # fmt: skip
        assert "would not get there" in machine.refused(*folder, "probe.py", *words), words
    assert "runs/data" in machine.refused(*SYNC, "probe.py", "--dataset-path", "runs/data.jsonl")
    absolute = str(laptop / "runs" / "data.jsonl")
    assert machine.probe(*SYNC, "probe.py", "--rewards", "mine:f=2", "--dataset-path", absolute)["argv"][3] == absolute
    git(laptop, "add", "mine.py")
    assert "you have changes" in machine.refused(*folder, "mine.py")
    git(laptop, "commit", "-m", "mine")
    assert "not pushed: git push" in machine.refused(*folder, "mine.py")
    git(laptop, "push", "origin", "main")
    assert "hello" in machine.ok(*folder, "mine.py", "--rewards", "mine:f=2")
    (machine.home / "work" / "cloned" / "grpo.py").write_text("edited there")
    assert "has changes of its own" in machine.refused(*folder, "mine.py")
    git(laptop, "remote", "set-url", "origin", "https://me:p@ss@nowhere.invalid/x.git?token=pass")
    error = machine.refused("--cpu", "--dir", "folder/other", "mine.py")
    assert f"cannot clone https://nowhere.invalid/x.git into '{machine.home}/folder/other', see above: give it" in error
    assert "p@ss" not in error


def test_env_is_copied_on_demand_for_its_owner_alone(machine: Machine) -> None:
    with (machine.laptop / ".env").open("a") as file:
        file.write("WANDB_API_KEY=a-very-secret-key'$(touch pwned)\nHF_HOME=~/my cache\n")
    given = machine.probe("--sync", "--cpu", "--session", "env", "probe.py")
    assert not (machine.there / ".env").exists()
    assert given["HF_HOME"] == str(machine.home / "my cache")
    (machine.there / ".env").write_text("old")
    (machine.there / ".env").chmod(0o644)
    given = machine.probe("--sync", "--cpu", "--copy-env", "--hf-home", "/tmp", "--session=env", "probe.py")
    assert given["HF_HOME"] == "/tmp"
    assert (machine.there / ".env").stat().st_mode & 0o777 == 0o600
    assert (machine.there / ".env").read_text() == (machine.laptop / ".env").read_text()
    assert (machine.home / ".remote_train").stat().st_mode & 0o077 == 0
    assert not [path for path, text in files(machine.home / ".remote_train").items() if b"secret" in text]


def test_a_script_that_fails_at_once_or_cannot_resume_says_so(machine: Machine) -> None:
    assert "unknown task 'gsm9k'" in machine.call(*SYNC, "--session", "typo", "grpo.py", "--task", "gsm9k").stdout
    assert re.match(r"(?s)typo: .* code 2\nno run folder yet\nno metrics yet\n.*gsm9k", machine.ok("status", "typo"))
    assert all("no run folder" in machine.refused(word, "typo") for word in ("resume", "fetch"))
    (machine.there / "config.json").write_text('{"system_prompt": "Think step by step."}')
    (machine.laptop / "deaf.py").write_text("print('run folder: .')")
    machine.ok(*SYNC, "deaf.py")
    assert "\nno metrics yet\n" in machine.ok("status")
    assert "deaf.py has no --resume: launch it again" in machine.refused("resume")


def test_what_is_wrong_with_the_call_is_said(machine: Machine) -> None:
    cases = {
        "neither a command nor a script": ["lanch"], "unknown option '--gpus'": ["--gpus", "2", "grpo.py"],
        "no connection to 'closedbox'": ["--host", "closedbox", "--sync", "probe.py"],
        "is no host": ["--host", "a.invalid; touch pwned", "--sync", "probe.py"],
        "'-oProxyCommand=x' is no host": ["--host=-oProxyCommand=x", "list"],
        "no connection to 'a.invalid'": ["--host", "a.invalid", "list"],
        "there is no script 'nothing.py'": ["nothing.py"], "--host needs a value": ["--host"],
        "no number": ["--num-gpus", "0", "--sync", "probe.py"], "no folder's name": ["--dir", "$(x)", "list"],
        "'a b' is no session's name": ["--session", "a b", "--sync", "probe.py"],
        "'-x' is no session's name": ["--session", "-x", "--sync", "probe.py"],
        "'--cpu' is no session's name": ["--session", "--cpu", "probe.py"],
        "there is no session 'nobody'": ["status", "nobody"], "'a c' is no session's name": ["stop", "a", "c"],
        "attach needs a terminal": ["attach"],
        "for a machine without a GPU, add --cpu": ["--sync", "probe.py"], "use up to 64": ["status", "n" * 65],
    }  # fmt: skip
    for message, words in cases.items():
        error = machine.refused(*words)
        assert message in error, error
    assert "no session in " in machine.refused("--host", "newbox", "status")
    for words in (["stop", ""], ["stop", ".py"], ["logs", ""], ["fetch", ""], ["resume", ""]):
        assert "session needs a value" in machine.refused(*words)
    assert (machine.call().returncode, machine.call().stderr) == (2, machine.ok("--help"))
    (machine.laptop / "-x.py").write_text(PROBE)
    assert "\n_x: " in machine.ok(*SYNC, "./-x.py")


def test_what_is_missing_or_in_the_way_is_said_in_one_line(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.ok(*SYNC, "probe.py")
    folder = machine.laptop.parent
    for name, words in (("gpubox/file", ["--dir", "file", *SYNC, "probe.py"]), ("dr-grpo/runs", ["fetch"]),
                        ("newbox/.remote_train", ["--host", "newbox", "list"])):  # fmt: skip
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).touch()
        assert re.fullmatch("error: .* folder.*: (give|move) .*\n", machine.refused(*words))
        (folder / name).unlink()
    (folder / "few").mkdir()
    for tool in ("bash", "sed", "tail", "dirname", "basename"):
        (folder / "few" / tool).symlink_to(str(shutil.which(tool)))
    (machine.laptop / ".env").unlink()
    assert "--copy-env finds no .env" in machine.refused("--host", "gpubox", *SYNC, "--copy-env", "probe.py")
    monkeypatch.setenv("PATH", str(folder / "few"))
    assert machine.refused("fetch", "--host", "gpubox") == "error: there is no rsync here: install it\n"


def test_two_projects_under_one_account_leave_each_other_alone(machine: Machine) -> None:
    other = replace(machine, laptop=machine.laptop.with_name("other"))
    shutil.copytree(machine.laptop, other.laptop)
    (other.laptop / ".env").write_text("REMOTE_HOST=gpubox\nREMOTE_DIR=work/second\n")
    machine.ok(*SYNC, "probe.py", "--wait")
    before = files(machine.session("probe")) | files(machine.there)
    assert other.ok("list").startswith("there is no session in ")
    commands = ("status", "logs", "stop", "resume", "fetch")
    for command in commands:
        assert "no session in" in other.refused(command)
        assert "there is no session 'probe' in" in other.refused(command, "probe")
    other.ok(*SYNC, "probe.py", "--wait")
    for command in commands:
        other.ok(command)
    assert files(machine.session("probe")) | files(machine.there) == before
    moved = machine.there.rename(machine.home / "moved")
    assert machine.ok("status").startswith(f"probe: running\nthe project's folder '{machine.there}' on gpubox is gone")
    assert "hello" in machine.ok("logs")
    assert "probe: ended with exit code 143; the project's folder" in machine.ok("stop")
    assert "is gone: launch again" in machine.refused("resume")
    moved.rename(machine.there)


def test_a_machine_without_uv_gets_one(machine: Machine) -> None:
    assert "hello" in machine.ok("--host", "newbox", "--sync", "--cpu", "probe.py")
    for name in (".local/bin/uv", "work/dr-grpo/probe.json"):
        assert (machine.home.with_name("newbox") / name).exists()


NVIDIA_SMI = """#!/bin/sh
# Stands for four GPUs: of two others have processes or only their memory, one is free, and one does not say how much
# memory is in use.
case "$*" in
  *index,uuid*) printf '0, GPU-aaa, 9 MiB\\n1, GPU-bbb, 70000 MiB\\n2, GPU-ccc, 4 MiB\\n3, GPU-ddd, [N/A]\\n' ;;
  *query-compute-apps*) printf 'GPU-aaa, 4242, python\\n' ;;
  *query-gpu=index,name*) printf '2, NVIDIA H100 80GB HBM3, 0 %%, 4 MiB, 81559 MiB\\n' ;;
esac
"""


def test_gpus_that_nobody_uses_are_chosen(machine: Machine) -> None:
    """The driver's tool and torch are played by a few lines: this machine need not have a GPU."""
    gpu = ("--sync", "--dir", "work/gpu")
    smi, torch = machine.home / ".local" / "bin" / "nvidia-smi", machine.laptop / "torch.py"
    smi.write_text(NVIDIA_SMI)
    smi.chmod(0o755)
    torch.write_text('raise RuntimeError("the driver is too old")')
    assert "2 free GPU(s), not 3: wait" in (error := machine.refused(*gpu, "--num-gpus", "3", "probe.py"))
    assert "4242, python" in error
    error = machine.refused(*gpu, "probe.py")
    assert "torch does not see the GPU of gpubox (RuntimeError: the driver is too old): a newer driver" in error
    torch.write_text("class ones:\n    def __init__(self, size): pass\n    def cuda(self): pass\n")
    assert "hello" in machine.ok(*gpu, "probe.py")
    assert "\nlong: running, GPU 2\n" in machine.ok(*gpu, "--session", "long", "probe.py", "--wait")
    assert "\n2, NVIDIA H100 80GB HBM3" in machine.ok("status", *gpu[1:], "long")
    # The next one from another folder, though the first uses nothing yet.
    printed = machine.ok("--sync", "--dir", "work/b", "--session", "next", "probe.py", "--wait")
    assert "\nnext: running, GPU 3\nnext: ./remote_train.sh --dir=work/b status" in printed
    assert "0 free GPU(s), not 1" in machine.refused(*gpu, "probe.py")
    for folder in ("work/gpu", "work/b"):
        assert f"143; from here, ./remote_train.sh --dir={folder} resume" in machine.ok("stop", "--dir", folder)


def test_two_launches_at_once_are_one(machine: Machine) -> None:
    both = [machine.start(*SYNC, "--session", "race", "probe.py", "--wait") for _ in range(2)]
    ended = [(process.communicate(timeout=120), process.returncode) for process in both]
    assert sorted(code for _, code in ended) == [0, 2], ended
    assert re.search("'race' runs on gpubox already|tmux refuses session 'race'", "".join(err for (_, err), _ in ended))
    assert machine.ok("status", "race").startswith("race: running\nruns/probe__x\n")
    both = [machine.start("stop", "race") for _ in range(2)]
    for out, err in [process.communicate(timeout=120) for process in both]:
        assert "race: ended with exit code 143" in out + err
        assert re.fullmatch("(error: .*, so there is nothing to stop\n)?", err)


def test_a_lost_connection_harms_no_run(machine: Machine) -> None:
    def kill(name: str) -> None:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name().startswith(name) and process.ppid() not in (os.getpid(), 1):
                    process.kill()

    uv, real, syncing = machine.home / ".local" / "bin" / "uv", machine.home / "uv", machine.home / "syncing"
    uv.rename(real)
    uv.write_text(f'#!/bin/sh\n[ "$1" = sync ] || exec {real} "$@"\ntouch {syncing}; sleep 2; rm {syncing}\n')
    uv.chmod(0o755)
    launching = machine.start(*SYNC, "--session", "early", "probe.py")
    until(syncing.exists)
    kill("sshd")
    assert "no connection to 'gpubox', or it was lost: " in launching.communicate(timeout=30)[1]
    until(lambda: not syncing.exists())
    time.sleep(1)
    assert "there is no session 'early'" in machine.refused("status", "early")
    real.rename(uv)

    launching = machine.start(*SYNC, "--session", "lost", "probe.py", "--quiet", "--wait")
    until((machine.session("lost") / "pid").exists)
    kill("sshd")
    assert "no connection to 'gpubox', or it was lost" in launching.communicate(timeout=30)[1]
    following = machine.start("logs", "-f", "lost")
    time.sleep(1)
    kill("ssh")
    following.communicate(timeout=30)
    assert machine.ok("status", "lost").startswith("lost: running\n")
    assert "lost: ended with exit code 143" in machine.ok("stop", "lost")


@pytest.mark.parametrize("session", ["gone", "closed"])
def test_a_session_that_was_killed(machine: Machine, session: str) -> None:
    """As by a restart of the machine; and a terminal that is closed ends its script."""
    machine.ok(*SYNC, "--session", session, "probe.py", "--wait")
    process = int((machine.session(session) / "pid").read_text())
    if session == "closed":
        environment = {**os.environ, "TMUX_TMPDIR": str(machine.home)}
        subprocess.run(["tmux", "kill-session", "-t", session], env=environment, check=True)
    else:
        os.kill(psutil.Process(process).ppid(), signal.SIGKILL)
        os.kill(process, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{process}").exists())
    until(lambda: machine.ok("status", session).startswith(f"{session}: ended without an exit code"))
    assert machine.probe("resume", session)["argv"] == ["--resume", "runs/probe__x"]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    subprocess.run(["shellcheck", ROOT / "remote_train.sh", ROOT / ".ci" / "run"], check=True)
