"""remote_train.sh against a real sshd and tmux on 127.0.0.1, with keys, a home and a tmux server of their own."""

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
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
TOOLS = {"sshd": SSHD, **{name: shutil.which(name) for name in ("ssh", "ssh-keygen", "tmux", "rsync", "git")}}
UV = os.environ.get("UV") or shutil.which("uv") or "uv"
MISSING = [name for name, path in TOOLS.items() if not path]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

# Says what it was given, and ends at once.
PROBE = """
import json, os, sys, time
if "--help" in sys.argv:
    sys.exit(print("--resume RUN_FOLDER"))
if "--fail" in sys.argv:
    sys.exit("failed")
names = "HF_HOME", "CUDA_VISIBLE_DEVICES", "WANDB_GIT_COMMIT"
print("hello\\nrun folder: runs/probe__x", flush=True)
os.makedirs("runs/probe__x", exist_ok=True)
open("runs/probe__x/config.json", "w").write("{}")
open("probe.json", "w").write(json.dumps({"argv": sys.argv[1:], **{name: os.environ.get(name) for name in names}}))
if "--wait" in sys.argv:
    time.sleep(600)
"""
TORCH = """
class cuda:
    is_available = staticmethod(lambda: True)
class version:
    cuda = "13.2"
__version__ = "2"
"""
HOSTILE = [
    "'; touch pwned #'", "$(touch pwned)", "`touch pwned`", "; touch pwned", "&& touch pwned", "$HOME", "new\nline",
    "a b", "  two  spaces ", "", '"', "'", "\\", "\\n", "$'\\x41'", "é€", "*", "~", "-", "--", "!!", "%s", "\ttab",
    "{a,b}", "#",
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

    def tmux(self, *words: str) -> None:
        environment = {**os.environ, "TMUX_TMPDIR": str(self.home)}
        subprocess.run(["tmux", *words], env=environment, check=True, capture_output=True)

    def pid(self, session: str) -> int:
        return int((self.home / ".remote_train" / session / "pid").read_text())

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
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return port, process
        time.sleep(0.1)
    raise AssertionError((folder / "sshd.log").read_text())


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
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
        machine = Machine(folder / "gpubox", folder / "dr-grpo", folder / "bin")
        (machine.laptop / ".env").write_text("export REMOTE_HOST = gpubox # the alias\nREMOTE_DIR='work/dr-grpo'\n")
        (machine.laptop / ".env").chmod(0o644)
        yield machine
        for server in servers:
            server.terminate()
            server.wait()
        for alias in ("gpubox", "newbox"):
            environment = {**os.environ, "TMUX_TMPDIR": str(folder / alias)}
            subprocess.run(["tmux", "kill-server"], env=environment, capture_output=True)
        assert not list(folder.rglob("*pwned*"))
        assert "a-very-secret-key" not in (folder / "calls").read_text()


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def steps_of(run: Path) -> list[int]:
    """Those that a run has logged."""
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def attach(machine: Machine, *words: str) -> tuple[int, str]:
    """In a pseudo-terminal: waits for a step, detaches with ctrl-b d; (exit code, what was on the screen)."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update({"PATH": f"{machine.bin}:{os.environ['PATH']}", "TERM": "a-terminal-of-the-future"})
        os.execvp("bash", ["bash", str(machine.laptop / "remote_train.sh"), "attach", *words])
    screen, typed, end = b"", time.monotonic(), time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.5)[0]:
            try:
                read = os.read(terminal, 65536)
            except OSError:  # it has ended
                break
            if not read:
                break
            screen += read
        if re.search(rb"\d+% \d+/100000", screen) and time.monotonic() - typed > 3:
            os.write(terminal, b"\x02")
            time.sleep(0.1)  # tmux takes keys that come together for a paste
            os.write(terminal, b"d")
            typed = time.monotonic()
    else:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), screen.decode(errors="replace")


@pytest.mark.slow
def test_the_whole_path(machine: Machine) -> None:
    """Launched from a pushed branch, watched, stopped, resumed, fetched."""
    sizes = ["--num-steps", "100000", "--prompts-per-step", "4", "--eval-samples", "8", "--lr-schedule", "constant"]
    printed = machine.ok("launch", "--cpu", "grpo.py", "--preset", "tiny", *sizes)
    assert "code: branch 'main' at" in printed
    assert "session 'grpo' on gpubox: running" in printed
    run = re.findall("^preset .*, in (.*)", printed, re.MULTILINE)[-1]
    there = machine.there / run
    assert git(machine.there, "rev-parse", "HEAD") == git(machine.laptop, "rev-parse", "HEAD")
    commit = git(machine.laptop, "rev-parse", "HEAD")
    assert json.loads((there / "environment.json").read_text())["commit"] == commit.strip()
    assert not (machine.there / ".env").exists()

    assert "'grpo' runs on gpubox already" in machine.refused("--cpu", "grpo.py")
    assert "still runs" in machine.refused("resume")
    until(lambda: len(steps_of(there)) > 3)
    status = machine.ok("status").splitlines()
    assert status[:2] == ["grpo: running", run]
    assert json.loads(status[2])["train/reward"] >= 0
    assert re.fullmatch(r" *\d+% \d+/100000 .*accuracy.*\(\d+ s ago\)", status[3])
    assert status[4] == "on the CPU"
    assert machine.ok("list").startswith("grpo: running; ")
    assert machine.ok("list").endswith(f"grpo.py, in {machine.there} {run}\n")
    assert "0% 0/100000 " in machine.ok("logs", "grpo")
    code, screen = attach(machine)
    assert code == 0, screen
    assert "detached" in screen
    assert machine.ok("status").startswith("grpo: running")

    following = machine.start("logs", "-f")
    stopped = machine.ok("stop")
    assert f"to continue: uv run grpo.py --resume '{run}'" in stopped
    assert "grpo: ended with exit code 143, stopped; from here, ./remote_train.sh resume grpo\n" in stopped
    assert "grpo: ended with exit code 143" in following.communicate(timeout=30)[0]
    assert list(there.glob("checkpoints/step_*/trainer.pt"))
    steps = steps_of(there)[-1] + 20
    assert "attach wants a terminal" in machine.refused("attach")
    assert "ended with exit code 143" in machine.refused("stop")

    resumed = machine.ok("resume", "grpo", "--num-steps", str(steps))
    assert f", in {run}\n" in resumed
    assert "code:" not in resumed
    until(lambda: not machine.ok("status", "grpo").startswith("grpo: running"))
    assert machine.ok("status").startswith(f"grpo: ended with exit code 0\n{run}\n")
    assert steps_of(there) == list(range(steps + 1))
    log = machine.ok("logs")
    assert "to continue: " in log  # of the time before
    assert "accuracy, greedy" in log
    assert f"\nrun folder: {run}\npage: uv run report.py {run} -o report.html\n" in log

    assert machine.ok("fetch", Path(run).name).strip() == run
    here = machine.laptop / run
    assert (here / "metrics.jsonl").read_bytes() == (there / "metrics.jsonl").read_bytes()
    assert (here / "curve.png").is_file()
    assert not (here / "checkpoints").exists()
    machine.ok("fetch", "--checkpoints")
    assert (here / "checkpoints" / f"step_{steps:06d}" / "model.safetensors").is_file()
    for name in ("nothing", ".", "..", "../..", "runs", "/"):
        assert f"there is no run folder '{name}'" in machine.refused("fetch", name)


def test_arguments_reach_the_script_exactly(machine: Machine) -> None:
    given = machine.probe("launch", "--session", "b", "--sync", "--cpu", "--hf-home", "~/models", "probe.py", *HOSTILE)
    assert given["argv"] == HOSTILE
    assert given["CUDA_VISIBLE_DEVICES"] == ""
    again = machine.probe("resume", "b", *HOSTILE)
    assert again == given | {"argv": ["--resume", "runs/probe__x", *HOSTILE]}  # place, code and device are as they were
    assert again["HF_HOME"] == str(machine.home / "models")
    assert again["WANDB_GIT_COMMIT"]
    given = machine.probe("resume", "--num-gpus=1", "b", "--x=a b", "--", "-f")
    assert given["argv"] == ["--resume", "runs/probe__x", "--x=a b", "--", "-f"]
    machine.refused(*SYNC, "--session", "b", "probe.py", "--fail", code=1)
    for run in ("b", "runs/probe__x/", "probe__x"):  # in spite of the launch that failed; and by the folder
        assert machine.probe("resume", run, "x")["argv"] == ["--resume", "runs/probe__x", "x"]
    for place in (machine.home, machine.laptop.parent):
        assert not list(place.rglob("*pwned*"))


def test_sync_sends_the_working_tree(machine: Machine) -> None:
    """Uncommitted and new files, none that git ignores; what is gone here goes there, what was made there stays."""
    laptop, there = machine.laptop, machine.there
    (laptop / "runs" / "local").mkdir(parents=True, exist_ok=True)
    (laptop / "runs" / "local" / "big").write_text("ignored")
    names = ["new file.py", "#a", ";b", "-n", "line\nbreak", "thing", "linked/c", "later ignored"]
    (laptop / "linked").mkdir()
    for name in names:
        (laptop / name).write_text(PROBE)
    readme = (laptop / "README.md").read_text()
    (laptop / "README.md").write_text("changed")
    exclude = laptop / ".git" / "info" / "exclude"
    try:
        assert machine.probe("--sync", "--cpu", "new file.py", "x")["argv"] == ["x"]
        assert [name for name in names if not (there / name).is_file()] == []
        assert (there / "README.md").read_text() == "changed"
        assert not (there / ".env").exists()
        assert not (there / "runs" / "local").exists()

        (there / "of the machine").write_text("its own")
        (elsewhere := machine.home / "elsewhere").mkdir()
        (there / "linked" / "c").rename(elsewhere / "c")
        (there / "linked").rmdir()
        (there / "linked").symlink_to(elsewhere)
        exclude.write_text("later ignored\n")
        for name in names[:-1]:
            (laptop / name).unlink()
        (laptop / "linked").rmdir()
        (laptop / "thing").mkdir()
        (laptop / "thing" / "inside").write_text("a file before, a folder now")
        given = machine.probe("--sync", "--cpu", "probe.py")
        assert [name for name in names if (there / name).is_file()] == ["linked/c", "later ignored"]
        assert (there / "thing" / "inside").exists()
        assert (there / "of the machine").exists()
        assert (there / "grpo.py").exists()
        assert given["WANDB_GIT_COMMIT"] == git(laptop, "rev-parse", "HEAD").strip() + "-dirty"
    finally:
        exclude.unlink(missing_ok=True)
        (laptop / "README.md").write_text(readme)
        for name in names[:-2] + names[-1:]:
            if (laptop / name).is_file():
                (laptop / name).unlink()
        shutil.rmtree(laptop / "thing", ignore_errors=True)
        shutil.rmtree(laptop / "linked", ignore_errors=True)


def test_code_that_is_not_pushed_is_refused(machine: Machine) -> None:
    laptop, folder = machine.laptop, ["--dir", "work/cloned"]
    (laptop / "mine.py").write_text(PROBE)
    try:
        assert "commit and push it, or send the tree as it is with --sync\nmine.py" in machine.refused("mine.py")
        git(laptop, "add", "mine.py")
        git(laptop, "commit", "-m", "mine")
        assert "git push, --sync, or --branch main" in machine.refused("--cpu", *folder, "mine.py")
        assert "no 'mine.py'" in machine.refused("--cpu", *folder, "--branch", "main", "mine.py")
        git(laptop, "push", "origin", "main")
        printed = machine.ok("--cpu", *folder, "mine.py")
        assert "hello" in printed
        assert "session 'mine' on gpubox: ended with exit code 0" in printed
        error = machine.refused("--cpu", *folder, "--branch", "no-such", "probe.py")
        assert "cannot fetch branch 'no-such'" in error
        (machine.home / "work" / "cloned" / "grpo.py").write_text("edited there")
        assert "has changes of its own" in machine.refused("--cpu", *folder, "mine.py")
        git(machine.home / "work" / "cloned", "checkout", "grpo.py")

        (laptop / "tried.py").write_text(PROBE)
        (laptop / "mine.py").write_text(PROBE + "# edited")
        machine.ok("--sync", "--cpu", *folder, "tried.py")
        git(laptop, "add", "-A")
        git(laptop, "commit", "-m", "tried before it was pushed")
        git(laptop, "push", "origin", "main")
        assert "ended with exit code 0" in machine.ok("--cpu", *folder, "tried.py")
        assert git(machine.home / "work" / "cloned", "status", "--porcelain") == "?? probe.json\n"
        git(laptop, "remote", "set-url", "origin", "https://me:p@ss@nowhere.invalid/x.git?token=pass")
        error = machine.refused("--cpu", "--dir", "work/other", "tried.py")
        assert "cannot clone branch 'main' of https://nowhere.invalid/x.git:" in error
        assert "p@ss" not in error
    finally:
        (laptop / "mine.py").unlink(missing_ok=True)
        git(laptop, "remote", "set-url", "origin", str(laptop.parent / "origin.git"))
        git(laptop, "reset", "--hard", "origin/main")


def test_env_is_copied_on_demand_for_its_owner_alone(machine: Machine) -> None:
    old = (machine.laptop / ".env").read_text()
    (machine.laptop / ".env").write_text(old + "WANDB_API_KEY=a-very-secret-key\nHF_HOME=~/cache of models\n")
    try:
        given = machine.probe("--sync", "--cpu", "--session", "env", "probe.py")
        assert not (machine.there / ".env").exists()
        assert given["HF_HOME"] == str(machine.home / "cache of models")
        (machine.there / ".env").write_text("old")
        (machine.there / ".env").chmod(0o644)
        given = machine.probe("--sync", "--cpu", "--copy-env", "--hf-home", "/tmp", "--session=env", "probe.py")
        assert given["HF_HOME"] == "/tmp"
        assert (machine.there / ".env").stat().st_mode & 0o777 == 0o600
        assert (machine.there / ".env").read_text() == (machine.laptop / ".env").read_text()
        session = machine.home / ".remote_train" / "env"
        assert session.parent.stat().st_mode & 0o077 == 0
        assert not [path for path in session.iterdir() if "secret" in path.read_text()]
    finally:
        (machine.laptop / ".env").write_text(old)
        (machine.there / ".env").unlink(missing_ok=True)


def test_a_script_that_fails_at_once_says_so(machine: Machine) -> None:
    error = machine.call("--sync", "--cpu", "--session", "typo", "grpo.py", "--preset", "tiny", "--task", "gsm9k")
    assert error.returncode == 2
    assert "unknown task 'gsm9k'" in error.stdout
    assert "session 'typo' on gpubox ended with exit code 2" in error.stderr
    status = machine.ok("status", "--session", "typo")
    assert status.startswith("typo: ended with exit code 2\n")
    assert "unknown task 'gsm9k'" in status
    assert "no run folder" in machine.refused("resume", "typo")


def test_what_is_wrong_with_the_call_is_said(machine: Machine) -> None:
    cases = {
        "neither a command nor a script": ["lanch"], "unknown option '--gpus'": ["--gpus", "2", "grpo.py"],
        "no connection to 'closedbox'": ["--host", "closedbox", "--sync", "probe.py"],
        "is no host": ["--host", "a.invalid; touch pwned", "--sync", "probe.py"],
        "no connection to 'a.invalid'": ["--host", "a.invalid", "--sync", "probe.py"],
        "there is no 'nothing.py'": ["nothing.py"], "--host needs a value": ["--host"],
        "not both": ["--sync", "--branch", "b", "probe.py"], "no number": ["--num-gpus", "0", "--sync", "probe.py"],
        "no session's name": ["--session", "a b", "--sync", "probe.py"], "no folder's name": ["--dir", "$(x)", "list"],
        "there is no session 'nobody'": ["status", "nobody"], "one word too many": ["stop", "a", "b"],
        "there is no folder": ["--dir", "nowhere", "fetch", "x"], "attach wants a terminal": ["attach"],
        "no nvidia-smi on gpubox: for a machine without a GPU, add --cpu": ["--sync", "probe.py"],
    }  # fmt: skip
    for message, words in cases.items():
        error = machine.refused(*words)
        assert message in error, error
    assert "no session has been launched" in machine.refused("--host", "newbox", "status")
    assert "our options stand before" in machine.call("probe.py", "--cpu").stderr
    assert machine.call().returncode == 2
    assert "--copy-env" in machine.ok("--help")


def test_a_machine_without_uv_gets_one(machine: Machine) -> None:
    assert "hello" in machine.ok("--host", "newbox", "--sync", "--cpu", "probe.py")
    home = machine.home.with_name("newbox")
    assert subprocess.run([home / ".local" / "bin" / "uv", "--version"], check=True)
    assert (home / "work" / "dr-grpo" / "probe.json").exists()


NVIDIA_SMI = """#!/bin/sh
# Stands for a machine with an old driver and four GPUs: of two others have processes or only their memory, one is free,
# and one is too old to say how much memory is in use.
case "$*" in
  *query-gpu=index,uuid*) printf '0, GPU-aaa, 9\\n1, GPU-bbb, 70000\\n2, GPU-ccc, 4\\n3, GPU-ddd, [N/A]\\n' ;;
  *query-compute-apps*) printf 'GPU-aaa, 4242, python, 70000 MiB\\n' ;;
  *driver_version*) printf '470.57\\n470.57\\n' ;;
  *query-gpu=index,name*) printf '2, NVIDIA H100 80GB HBM3, 0 %%, 4 MiB, 81559 MiB\\n' ;;
  *) printf '| NVIDIA-SMI 470.57   Driver Version: 470.57   CUDA Version: 11.4 |\\n' ;;
esac
"""


def test_gpus_that_nobody_uses_are_chosen(machine: Machine) -> None:
    """The driver's tool and, at the end, torch are played by a few lines: this machine need not have a GPU."""
    smi, torch = machine.home / ".local" / "bin" / "nvidia-smi", machine.laptop / "torch.py"
    smi.write_text(NVIDIA_SMI)
    smi.chmod(0o755)
    try:
        assert "nobody uses: wait, or take them" in (error := machine.refused("--sync", "--num-gpus", "3", "probe.py"))
        assert "4242, python" in error
        assert "has 4 GPU(s), not 5" in machine.refused("--sync", "--num-gpus=5", "probe.py")
        error = machine.refused("--sync", "probe.py")
        assert "does not see the GPU of gpubox, whose driver 470.57 knows CUDA Version: 11.4" in error
        assert "install a newer driver" in error

        torch.write_text(TORCH)
        assert machine.probe("--sync", "--force", "probe.py")["CUDA_VISIBLE_DEVICES"] == "2"
        printed = machine.ok("--sync", "--session", "long", "probe.py", "--wait")
        assert "./remote_train.sh stop long" in printed
        assert "session 'long' on gpubox: running, GPU 2" in printed
        assert machine.ok("status", "long").splitlines()[-1].startswith("2, NVIDIA H100 80GB HBM3")
        # The next one from another folder, though the first uses nothing yet; then only by force.
        printed = machine.ok("--sync", "--dir", "work/b", "--session", "next", "probe.py", "--wait")
        assert "running, GPU 3" in printed
        assert "has not 1 GPU(s) that nobody uses" in machine.refused("--sync", "probe.py")
        assert machine.probe("--sync", "--force", "probe.py")["CUDA_VISIBLE_DEVICES"] == "0"
        for name in ("long", "next"):
            assert f"{name}: ended with exit code 143, stopped" in machine.ok("stop", name)
    finally:
        smi.unlink()
        torch.unlink(missing_ok=True)


def test_a_name_is_one_session_in_all_folders(machine: Machine) -> None:
    one = ("--dir", "work/one")
    machine.ok(*SYNC, "--dir", "work/two", "--session", "w", "probe.py", "--wait")
    assert "runs on gpubox already" in machine.refused(*SYNC, *one, "--session", "w", "probe.py")
    assert f"in {machine.home}/work/two runs/probe__x" in machine.ok(*one, "list")
    assert "stopped" in machine.ok(*one, "stop")  # the only one that runs
    assert "session 'w' on gpubox ended" in machine.refused("stop", "w")


def test_two_launches_at_once_are_one(machine: Machine) -> None:
    both = [machine.start(*SYNC, "--session", "race", "probe.py", "--wait") for _ in range(2)]
    ended = [(process.communicate(timeout=120), process.returncode) for process in both]
    assert sorted(code for _, code in ended) == [0, 2], ended
    assert "'race' runs on gpubox already" in "".join(err for (_, err), _ in ended)
    assert "race: running" in machine.ok("status", "race")
    assert "race: ended with exit code 143, stopped" in machine.ok("stop", "race")


@pytest.mark.parametrize("session", ["gone", "closed"])
def test_a_session_that_was_killed(machine: Machine, session: str) -> None:
    """As by a restart of the machine; and a terminal that is closed ends its script."""
    machine.ok(*SYNC, "--session", session, "probe.py", "--wait")
    process = machine.pid(session)
    if session == "closed":
        machine.tmux("kill-session", "-t", session)
    else:
        shell = int(Path(f"/proc/{process}/stat").read_text().rsplit(")")[1].split()[1])  # its parent
        os.kill(shell, signal.SIGKILL)
        os.kill(process, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{process}").exists())
    until(lambda: machine.ok("status", session).startswith(f"{session}: ended without an exit code"))
    assert machine.probe("resume", session)["argv"] == ["--resume", "runs/probe__x"]


def test_two_processes(machine: Machine) -> None:
    """Under accelerate's launcher, which stops both."""
    machine.ok(*SYNC, "--num-gpus", "2", "--session", "two", "probe.py", "--wait")
    until(lambda: machine.ok("logs", "two").count("hello") == 2)
    assert "two: ended with exit code" in machine.ok("stop", "two")
    assert "--num_processes 2 --gpu_ids all" in (machine.home / ".remote_train" / "two" / "job.sh").read_text()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    subprocess.run(["shellcheck", ROOT / "remote_train.sh", ROOT / ".ci" / "run"], check=True)
