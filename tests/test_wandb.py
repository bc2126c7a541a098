"""--track against a W&B server on this machine that answers as the real one does, as far as a run asks."""

import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

import grpo

ROOT = Path(__file__).resolve().parents[1]


class Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: Any) -> None:
        pass

    def body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def answer(self, answer: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text := json.dumps(answer).encode())))
        self.end_headers()
        self.wfile.write(text)

    def do_PUT(self) -> None:
        self.server.files[self.path.removeprefix("/files/")] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        body = self.body()
        if self.server.gone(self.path):
            self.close_connection = True  # without a word, as where the network ends
            return
        if self.path.endswith("/file_stream"):
            for name, part in (json.loads(body).get("files") or {}).items():
                if name == "wandb-summary.json":
                    self.server.summary |= json.loads(part["content"][-1])
                elif name == "wandb-history.jsonl":
                    self.server.history += map(json.loads, part["content"])
            self.answer({"exitcode": None, "limits": {}})
        elif self.path.endswith("/graphql"):
            given = json.loads(body).get("variables") or {}
            self.server.asked.append(given)
            url = f"http://127.0.0.1:{self.server.server_port}/files/"
            files = [{"name": name, "uploadUrl": url + name} for name in given.get("files") or ()]
            project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "r", "name": given.get("name"), "displayName": given.get("displayName"), "project": project}
            self.answer({"data": {
                "viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
                "serverInfo": {"cliVersionInfo": {"max_cli_version": "9.0", "min_cli_version": "0.1"}, "features": []},
                "upsertBucket": {"bucket": bucket | {"config": "{}", "historyLineCount": 0}, "inserted": True},
                "model": {"bucket": None}, "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files},
            }})  # fmt: skip
        else:
            self.answer({})


@pytest.fixture
def server() -> Iterator[Any]:
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.files, server.summary, server.history, server.asked = {}, {}, [], []
    server.gone = lambda path: False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def track(server: Any, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    sizes = ["--num-steps", "4", "--prompts-per-step", "4", "--eval-samples", "8", "--patience", "0"]
    command = [sys.executable, f"{ROOT}/grpo.py", "--preset", "tiny", "--run-dir", str(folder), "--track", *sizes]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | {
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "a" * 40, "WANDB_PROJECT": "ours",
        "OMP_NUM_THREADS": "1"} | variables  # fmt: skip
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_what_a_run_tells_though_the_network_was_lost_for_a_while(server: Any, tmp_path: Path) -> None:
    lost: list[str] = []

    def gone(path: str) -> bool:  # when history is sent for the first time, for three attempts
        if path.endswith("/file_stream") and len(lost) < 3:
            lost.append(path)
            return True
        return False

    server.gone = gone
    done = track(server, tmp_path, WANDB_GIT_COMMIT="0123abc", WANDB_FINISH_TIMEOUT="60")
    assert done.returncode == 0, done.stderr
    assert len(lost) == 3
    (run,) = tmp_path.iterdir()
    (asked,) = [given for given in server.asked if given.get("groupName")][:1]
    assert asked["project"] == "ours"
    assert asked["name"] == asked["displayName"] == run.name
    assert asked["groupName"] == "grpo__arithmetic__tiny_policy"
    assert set(asked["tags"]) == {"grpo", "tiny", "arithmetic", "tiny_policy"}
    assert asked["commit"] == "0123abc"
    config = {name: entry["value"] for name, entry in json.loads(asked["config"]).items() if name != "_wandb"}
    ours = json.loads((run / "config.json").read_text())
    assert {name: config[name] for name in ours} == ours
    assert (config["commit"], config["device"]) == ("0123abc", "cpu")
    assert server.files["code/grpo.py"] == (ROOT / "grpo.py").read_bytes()
    assert server.files["rewards.py"] == (ROOT / "rewards.py").read_bytes()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("eval/accuracy", "eval/accuracy_low", "eval/accuracy_sampled"):
        assert server.summary[f"{name}_before"] == metrics[0][name]
        assert server.summary[name] == metrics[-1][name]
    assert [row["_step"] for row in server.history] == [row["step"] for row in metrics] == list(range(5))
    assert [row["eval/accuracy"] for row in server.history if "eval/accuracy" in row] == [
        row["eval/accuracy"] for row in metrics if "eval/accuracy" in row
    ]
    assert "a" * 40 not in done.stdout + done.stderr


def test_a_network_that_stays_away_holds_no_run(server: Any, tmp_path: Path) -> None:
    server.gone = lambda path: path.endswith("/file_stream")
    done = track(server, tmp_path, WANDB_FINISH_TIMEOUT="2")
    assert done.returncode == 0, done.stderr
    assert not server.history
    assert "wandb sync" in done.stderr
    (run,) = tmp_path.iterdir()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 5
    assert list(run.glob("wandb/run-*/run-*.wandb"))


def test_no_server_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What wandb raises when nobody has answered within the time that it was given."""

    def init(**_: Any) -> None:
        assert os.environ["WANDB_INIT_TIMEOUT"] == "20"
        raise wandb.errors.CommError("Run initialization has timed out\nPlease try again")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_INIT_TIMEOUT", raising=False)
    with pytest.raises(SystemExit) as caught:
        grpo.main(grpo.Config(track=True, run_dir=str(tmp_path), prompts_per_step=4, eval_samples=8))
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: no W&B ('Run initialization has timed out")
    assert "check network and login, or WANDB_MODE=offline" in printed.err
    assert printed.err.count("\n") == 1
    assert "run folder: " not in printed.out  # which tells remote_train.sh that it runs
