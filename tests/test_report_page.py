"""report.py's HTML page, in a real browser where Debian's chromium is installed."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

import report
from tests.conftest import Capture, Patch
from tests.test_report import change, heights, make_overfit_run, make_run, write_jsonl

CHROMIUM = shutil.which("chromium")


class Browser:
    """A headless Chromium with one tab, spoken to over its debugging pipe."""

    def __init__(self, profile: Path) -> None:
        self.count, self.events = 0, []  # type: int, list[dict[str, Any]]
        shell = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null'  # the browser wants the pipes as files 3 and 4
        command = ["bash", "-c", shell, "-", str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--hide-scrollbars", "about:blank"]
        self.process: Any = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=subprocess.DEVNULL)
        self.pending, self.session = b"", ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.process.stdin.fileno(), json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.pending:
                got = os.read(self.process.stdout.fileno(), 1 << 20)
                assert got, "the browser has gone"
                self.pending += got
            reply, self.pending = self.pending.split(b"\0", 1)
            self.events.append(json.loads(reply))
            if self.events[-1].get("id") == self.count:
                assert "error" not in self.events[-1], reply
                return self.events.pop()["result"]

    def run(self, expression: str) -> Any:
        """The value of an expression in the page."""
        done = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def open(self, path: Path, fragment: str = "") -> None:
        self.ask("Page.navigate", url="about:blank")  # else another fragment would not load the file again
        self.events.clear()
        self.ask("Page.navigate", url=f"{path.resolve().as_uri()}{fragment}")
        end = time.monotonic() + 20
        while not self.run("location.protocol === 'file:' && document.readyState === 'complete'"):
            assert time.monotonic() < end
            time.sleep(0.05)


EVIL = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>"
FOUND = "at('found').textContent"
WAIT = "new Promise((done) => setTimeout(done, 100))"
CELLS = "[...document.querySelectorAll('#found td:nth-child(4) div')].map((cell) => cell.textContent)"


def make_page(output: Path, *folders: Path) -> str:
    report.main([*map(str, folders), "-o", str(output)])
    return output.read_text(encoding="utf-8")


def add_metrics(folder: Path, step: int, **metrics: Any) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **metrics}) + "\n")


def add_completions(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_jsonl(folder / "completions.jsonl", report.read_jsonl(folder / "completions.jsonl") + rows)


def train_row(step: int, completion: str, right: bool = True) -> dict[str, Any]:
    row = {"step": step, "split": "train", "question": "What is 1 + 1?", "answer": "2", "completion": completion}
    return row | {"reward": 2.0 * right, "advantage": 0.5, "right": right, "parsed": True, "length": 3}


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    """Three seeds of one configuration, whose accuracies after are 0.75."""
    folders = [make_run(tmp_path / f"grpo__{seed}__20260131-1200{seed}0-000000") for seed in (1, 2, 3)]
    return [change(folder, seed=seed, run_dir=f"runs{seed}") for seed, folder in enumerate(folders, start=1)]


@pytest.fixture
def no_charts(monkeypatch: Patch) -> None:
    """Charts take most of a page's time; here they are not what is tested."""
    monkeypatch.setattr(report, "draw_svg", lambda *_: "<svg></svg>")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.process.terminate()
    browser.process.wait(20)


def data_of(html: str) -> dict[str, Any]:
    return json.loads(html.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def groups_of(*folders: Path) -> dict[str, list[int]]:
    groups = report.group_runs([report.load(folder) for folder in folders])
    return {group.label: [run.config["seed"] for run in group.runs.values()] for group in groups}


def lines_of(folders: list[Path], key: str) -> list[list[float]]:
    axes = report.Figure().subplots()
    report.draw_line(axes, [report.load(folder) for folder in folders], key, index=0)
    return [heights(line) for line in axes.lines]


def test_seeds_are_grouped_and_other_settings_or_sources_are_not(seeds: list[Path], tmp_path: Path) -> None:
    assert groups_of(*seeds) == {"arithmetic, tiny_$\\x$": [1, 2, 3]}
    change(seeds[0], learning_rate=1e-3)
    other = change(make_run(tmp_path / "grpo_ladder__1"), task="counting")
    assert groups_of(*seeds, other) == {
        "script grpo.py, task arithmetic, learning_rate 0.001": [1], "script grpo.py, task arithmetic": [2, 3],
        "script grpo_ladder.py, task counting": [7],
    }  # fmt: skip
    change(seeds[1], learning_rate=1e-3)
    for source, grouped in (("x = (1)  # a comment", [[1, 2]]), ("x = 2", [[1], [2]])):
        (seeds[0] / "grpo.py").write_text("x = 1")
        (seeds[1] / "grpo.py").write_text(source)
        assert list(groups_of(*seeds[:2]).values()) == grouped


def test_a_single_run_is_drawn_with_its_running_mean_and_seeds_with_their_mean(seeds: list[Path]) -> None:
    add_metrics(seeds[2], 5, **{"train/reward": 8.0, "eval/accuracy": 0.9})
    alone, longer = [0.5, 1.0, 1.5, 2.0], [0.5, 1.0, 1.5, 2.0, 8.0]
    assert lines_of(seeds, "train/reward") == [alone, alone, alone, longer]  # the mean: over the steps that all have
    rows = [{"step": i, "train/reward": i % 2, "eval/accuracy": i % 2, "train_subset/reward": i % 2} for i in range(80)]
    write_jsonl(seeds[0] / "metrics.jsonl", rows)
    for key in ("eval/accuracy", "train_subset/reward"):
        assert lines_of(seeds[:1], key) == [[i % 2 for i in range(80)]] * 2
    smooth, values = [line[2:6] for line in lines_of(seeds[:1], "train/reward")]
    assert (smooth, values) == ([0.4, 0.6, 0.4, 0.6], [0, 1, 0, 1])  # a mean of five steps


@pytest.mark.usefixtures("no_charts")
def test_what_differs_and_the_tables(seeds: list[Path], tmp_path: Path) -> None:
    change(seeds[0], unknown=["<b>"])
    packages = {"zlib": "1", "Torch": "9.1", "attrs": "2"}
    environment = {"command": ["grpo.py", "--task", "a b"], "commit": "0" * 40 + "-dirty", "packages": packages}
    (seeds[0] / "environment.json").write_text(json.dumps(environment))
    html = " ".join(make_page(tmp_path / "page.html", *seeds).replace("\u00a0", " ").split())
    table = html.split("<h2>Settings and environment</h2>")[1].split("<script")[0]
    assert '<th>unknown</th><td colspan="1">&#39;&lt;b&gt;&#39;</td><td colspan="1">-</td>' in table
    assert '<th>num_<wbr>steps</th><td colspan="3">4</td>' in table
    assert table.index("unknown") < table.index("num_<wbr>steps")  # first what differs
    folded = table.split("<details><summary>Packages: 3, of which some differ</summary>")[1]
    assert folded.index("attrs") < folded.index("Torch") < folded.index("zlib")
    made = "A, 2026-01-31 12:00, commit 0000000000-dirty: <code>grpo.py --task &#39;a b&#39;</code>"
    assert made in html.split("<table>")[0]
    row = "<td>0.250 [0.046, 0.699]</td><td>0.750 [0.301, 0.954]</td>"
    assert html.count(f"{row}<td>+3 -1</td><td>4</td><td>15 s</td>") == 3
    assert html.count(row) == 6  # and in "before and after"
    assert "B mean</td><td>0.250</td><td>0.750</td><td></td>" in html
    several = [report.mean_cell(values) for values in ([0.5, 0.7], [0.5] * 3, [0.5, 0.6, 0.7])]
    assert several == ["0.600", "0.500", "0.600 ± 0.248"]  # 4.30 times 0.1 / sqrt(3)


@pytest.mark.usefixtures("no_charts")
def test_a_sweep_is_expanded_without_unreadable_runs(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    for experiment, stamp in (("baseline", 1), ("aggressive", 3), ("aggressive", 2), ("not_yet", 4)):
        (tmp_path / "sweep" / experiment).mkdir(parents=True, exist_ok=True)
        run = make_run(tmp_path / "sweep" / experiment / f"grpo_overfit__{stamp}")
        (run.parent / "result.json").write_text(json.dumps({"run_folder": run.name}))  # the last one counts
    (run / "metrics.jsonl").write_text('{"step": 0, "eval/acc')
    before = set(tmp_path.rglob("*"))
    report.main(["sweep"])
    written = {tmp_path / "sweep" / name for name in ("table.md", "curves.png", "report.html")}
    assert set(tmp_path.rglob("*")) - before == written
    html = (tmp_path / "sweep" / "report.html").read_text(encoding="utf-8")
    assert html.index("<b>A</b> baseline") < html.index("<b>B</b> aggressive")
    assert "grpo_overfit__3" not in html
    assert capsys.readouterr().err.startswith("error: sweep/not_yet/grpo_overfit__4/metrics.jsonl holds no line")
    report.main(["sweep/baseline", "sweep/aggressive", "sweep/aggressive", "sweep/no_run"])  # twice counts once
    told = capsys.readouterr()
    assert told.out.startswith("report.html: 2 run(s), ")
    assert (told.err.count("\n"), "sweep/no_run" in told.err) == (1, True)


def test_broken_going_on_and_foreign_runs_have_a_page(seeds: list[Path], tmp_path: Path) -> None:
    """NaN, null and values of another kind; a last line cut off; no completions, config, environment or evaluation."""
    values = {"train/reward": None, "train/entropy": float("nan"), "completions/mean_length": "many", "new/key": [1]}
    add_metrics(seeds[0], 5, **values | {"eval/accuracy": None, "test/accuracy": 0.5})
    strange = {"step": 4, "split": "eval", "mode": "greedy", "completion": ["a", {"b": 1}], "reward": float("nan")}
    add_completions(seeds[0], [strange, {"step": 5}, {"no": "step"}, train_row(5, "lone \ud800 surrogate")])
    with (seeds[0] / "completions.jsonl").open("a") as file:
        file.write('7\n{"step": 6, "spl')
    (seeds[1] / "completions.jsonl").unlink()
    (seeds[1] / "config.json").unlink()
    write_jsonl(seeds[2] / "metrics.jsonl", [{"step": 3, "other": 1}])
    rows = data_of(make_page(tmp_path / "page.html", *seeds))["rows"]
    assert [row[6] for row in rows if row[1] == 5] == ["-", "lone \ud800 surrogate"]
    assert [row[7] for row in rows if row[6] == "['a', {'b': 1}]"] == [""]
    for folder in seeds:
        report.main([str(folder)])
        assert (folder / "curve.png").exists()


def test_the_page_names_no_other_address_and_no_text_of_a_run_becomes_markup(seeds: list[Path], tmp_path: Path) -> None:
    plain = make_page(tmp_path / "page.html", *seeds)
    assert "://" not in plain
    note = plain.split('<h2>Curves</h2>\n<p class="note">')[1].split("</p>")[0]
    assert note.strip() == "With several seeds, a thin line is one seed and the thick line is their mean."
    assert "url(" not in plain.replace("url(#", "")
    assert "default-src 'none'; style-src 'unsafe-inline';" in plain
    change(seeds[0], model=EVIL)
    change(seeds[1], lr_schedule=EVIL)
    (seeds[1] / "environment.json").write_text(json.dumps({"command": [EVIL], "packages": {EVIL: EVIL}, EVIL: EVIL}))
    add_completions(seeds[2], [train_row(3, EVIL)])
    add_metrics(seeds[2], 5, **{EVIL: 1, "time/reward_s": 1e-6})
    html = make_page(tmp_path / "page.html", *seeds)
    assert "mathdefault" not in html  # nor becomes a number of a logarithmic axis a formula
    for tag in ("<script", "</script", "<img", "<!--"):
        assert html.count(tag) == plain.count(tag)
    assert [row[6] for row in data_of(html)["rows"] if row[1] == 3] == [EVIL]


@pytest.mark.usefixtures("no_charts")
def test_many_completions_stay_below_5_mb_evenly(seeds: list[Path], tmp_path: Path, browser: Browser) -> None:
    rows = [train_row(step, f"{step}.{i} " + "<" * 500 + "é" * 400) for step in range(1, 101) for i in range(30)]
    add_completions(seeds[0], rows)
    html = make_page(tmp_path / "page.html", *seeds)
    assert 4_000_000 < (tmp_path / "page.html").stat().st_size < 5_000_000
    shown = [row for row in data_of(html)["rows"] if row[2] == "train" and row[0] == "A1"]
    counts = {step: sum(row[1] == step for row in shown) for step in range(1, 101)}
    assert 5 <= min(counts.values()) >= max(counts.values()) - 2
    assert [row[6].split()[0] for row in shown if row[1] == 9] == [f"9.{i}" for i in range(counts[9])]
    browser.open(tmp_path / "page.html")
    left = 3000 + 3 * 18 - len(data_of(html)["rows"])
    assert f"{left} more were left out" in browser.run("at('count').textContent")


def test_in_a_browser_all_is_drawn_and_fits(seeds: list[Path], tmp_path: Path, browser: Browser) -> None:
    other = make_overfit_run(tmp_path / "grpo_overfit__1")
    add_metrics(other, 5, **{"train/frac_thinking": 0.5})
    make_page(tmp_path / "page.html", *seeds, other)
    browser.open(tmp_path / "page.html")
    methods = {event["method"] for event in browser.events}
    assert not {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"} & methods
    keys = "[...document.querySelectorAll('%s figure')].map((f) => f.dataset.key)"
    assert browser.run(keys % ".large") == list(report.TITLES)
    notes = browser.run("document.querySelector('h2 + .note').textContent")
    assert all(note in notes for note in ("is one seed", "A band is", "A level dashed line", "checkboxes"))
    folded = browser.run(keys % "details:not([open])")
    assert {"train/frac_thinking", "eval/accuracy_sampled", "time/rollout_s", "completions/clipped_ratio"} <= {*folded}
    assert not {"eval/accuracy_low", "test/accuracy", "step"} & {*folded}
    assert "A1 seed 1, A2 seed 2," in " ".join(browser.run("document.querySelector('.key').textContent").split())
    style = "getComputedStyle(document.querySelector('%s')).%s"
    looks = (("body", "backgroundColor"), ("figure text", "fill"), ("figure .s0 path", "stroke"))
    light, dark = ["rgb(255, 255, 255)", "rgb(26, 26, 26)"], ["rgb(22, 24, 26)", "rgb(230, 230, 230)"]
    expected = {"light": [*light, "rgb(0, 114, 178)"], "dark": [*dark, "rgb(85, 174, 240)"]}
    for scheme, colours in expected.items():
        browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        assert [browser.run(style % look) for look in looks] == colours
    note = f"{WAIT}.then(() => document.querySelector('.wide').previousElementSibling.hidden)"
    for width in (1280, 390):
        browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=True)
        assert browser.run("document.documentElement.scrollWidth") == width
        assert browser.run(note) == (width == 1280)  # that the settings scroll sideways
        boxes = "[...document.querySelectorAll('.key %s')].map((box) => box.getBoundingClientRect().%s)"
        assert max(browser.run(boxes % ("table", "right"))) <= width
    assert browser.run(boxes % ("td", "bottom"))[20] < 844  # accuracy is on the first screen of a phone
    browser.ask("Emulation.clearDeviceMetricsOverride")
    browser.run("document.querySelector('.key input').click()")
    assert [browser.run(style % (f"figure {name}", "display")) for name in (".s0", ".s1")] == ["none", "inline"]


@pytest.mark.usefixtures("no_charts")
def test_in_a_browser_completions_are_filtered(seeds: list[Path], tmp_path: Path, browser: Browser) -> None:
    read: list[dict[str, Any]] = [{"extracted": EVIL}, {"extracted": None}]
    add_completions(seeds[0], [train_row(3, EVIL) | read[0], train_row(3, "wrong one", right=False) | read[1]])
    add_completions(seeds[1], [train_row(2, f"number {i}") for i in range(60)])
    make_page(tmp_path / "page.html", *seeds)
    count = "document.querySelectorAll('#found tr').length - 1"
    browser.open(tmp_path / "page.html")  # the last evaluation, before beside after
    assert browser.run(count) == 3 * 4
    second = "document.querySelectorAll('#found tr')[2].children[%d].textContent"
    assert browser.run(second % 1) == "What is 1 + 4?answer 5"
    assert browser.run(second % 2).startswith("wrong step 0, reward 2\x1b[2J")
    assert browser.run(second % 3) == "right step 4, reward 25"
    browser.open(tmp_path / "page.html", "#step=last&kind=eval+greedy&run=A2&right=lost")
    assert browser.run(CELLS) == ["9"]
    browser.open(tmp_path / "page.html", "#step=3")
    assert browser.run(CELLS) == [EVIL, "wrong one"]
    assert browser.run("document.querySelectorAll('script, img').length") == 2
    assert "Page.javascriptDialogOpening" not in [event["method"] for event in browser.events]
    assert f"length 3, read {EVIL} for 2" in browser.run(FOUND)
    assert "wrong step 3, reward 0, advantage 0.5, length 3, read nothing for 2" in browser.run(FOUND)
    browser.run("at('text').value = 'ALERT(1)'; at('text').dispatchEvent(new Event('input'));" + WAIT)
    assert browser.run(CELLS) == [EVIL]
    assert browser.run("location.hash") == "#step=3&text=ALERT%281%29"
    browser.run("location.hash = '#step=2';" + WAIT)
    assert browser.run(count) == 20
    browser.run("at('more').click()")
    assert browser.run("at('count').textContent") == "60 of 116 completions match."
