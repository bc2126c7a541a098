"""report.py's HTML page, in a real browser where Debian's chromium is installed."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import report
from tests.test_report import heights, make_overfit_run, make_run, write_jsonl

CHROMIUM = shutil.which("chromium")


class Browser:
    """A headless Chromium with one tab, spoken to over its debugging pipe."""

    def __init__(self, profile: Path) -> None:
        self.count, self.events = 0, []  # type: int, list[dict[str, Any]]
        (browser_reads, self.to), (self.back, browser_writes) = os.pipe(), os.pipe()
        # The browser wants its ends of the pipes as files 3 and 4.
        shell = f'exec "$@" 3<&{browser_reads} 4>&{browser_writes}'
        command = ["bash", "-c", shell, "-", str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--hide-scrollbars", "about:blank"]
        pipes, nothing = (browser_reads, browser_writes), subprocess.DEVNULL
        self.process = subprocess.Popen(command, pass_fds=pipes, stdin=nothing, stdout=nothing, stderr=nothing)
        for pipe in pipes:
            os.close(pipe)
        self.pending, self.session = b"", ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.pending:
            got = os.read(self.back, 1 << 20)
            assert got, "the browser has gone"
            self.pending += got
        message, self.pending = self.pending.split(b"\0", 1)
        return json.loads(message)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (reply := self.receive()).get("id") != self.count:
            self.events.append(reply)
        assert "error" not in reply, reply
        return reply["result"]

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

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.to)
        os.close(self.back)


EVIL = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>"


def make_page(output: Path, *folders: Path) -> str:
    report.main([*map(str, folders), "-o", str(output)])
    return output.read_text(encoding="utf-8")


def change(folder: Path, **settings: Any) -> Path:
    """Other settings for a run."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | settings), encoding="utf-8")
    return folder


def add_metrics(folder: Path, step: int, **metrics: Any) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **metrics}) + "\n")


def add_completions(folder: Path, rows: list[dict[str, Any]]) -> Path:
    write_jsonl(folder / "completions.jsonl", report.read_jsonl(folder / "completions.jsonl") + rows)
    return folder


def train_row(step: int, completion: str, right: bool = True) -> dict[str, Any]:
    row = {"step": step, "split": "train", "question": "What is 1 + 1?", "answer": "2", "completion": completion}
    return row | {"reward": 2.0 * right, "advantage": 0.5, "right": right, "parsed": True, "length": 3}


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    """Three seeds of one configuration, whose accuracies after are 0.75."""
    return [change(make_run(tmp_path / f"grpo__{seed}"), seed=seed, run_dir=f"runs{seed}") for seed in (1, 2, 3)]


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts take most of a page's time; here they are not what is tested."""
    monkeypatch.setattr(report, "draw_svg", lambda *_: "<svg></svg>")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def data_of(html: str) -> dict[str, Any]:
    """What the page embeds for its script."""
    return json.loads(html.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def groups_of(*folders: Path) -> dict[str, list[int]]:
    runs = [report.load(folder) for folder in folders]
    return {group.label: [run.config["seed"] for run in group.runs] for group in report.group_runs(runs)}


def line_of(group: report.Group, key: str) -> tuple[list[list[float]], list[float]]:
    """(the points of each line that is drawn, least and most of the band)."""
    axes = report.Figure().subplots()
    report.draw_group(axes, group, key, count=9)
    lines = [heights(line) for line in axes.lines]
    extents = [band.get_paths()[0].get_extents() for band in axes.collections]
    return lines, [y for extent in extents for y in (extent.y0, extent.y1)]


def test_one_folder_writes_a_picture_and_several_a_page(
    seeds: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    report.main([str(seeds[0])])
    assert "greedy: 3 problems gained, 1 lost\n" in capsys.readouterr().out
    assert set(tmp_path.rglob("*")) - before == {seeds[0] / "curve.png"}
    report.main([str(folder) for folder in (*seeds, seeds[0])])
    assert set(tmp_path.rglob("*")) - before == {seeds[0] / "curve.png", tmp_path / "report.html"}
    assert capsys.readouterr().out.startswith("report.html: 3 runs, ")


def test_seeds_are_grouped_and_other_settings_are_not(seeds: list[Path], tmp_path: Path) -> None:
    assert groups_of(*seeds) == {"arithmetic, tiny_$\\x$": [1, 2, 3]}
    change(seeds[0], learning_rate=1e-3)
    other = change(make_run(tmp_path / "grpo_ladder__1"), task="counting")
    assert groups_of(*seeds, other) == {
        "grpo.py, arithmetic, learning_rate 0.001": [1],
        "grpo.py, arithmetic": [2, 3],
        "grpo_ladder.py, counting": [7],
    }


def test_another_source_is_another_configuration(seeds: list[Path]) -> None:
    folders = [folder.rename(folder.with_name(f"grpo__x__{folder.name[-1]}")) for folder in seeds]
    for sources in (["x = 1", "x = (1)  # a comment", "x = 1"], ["x = 1", "x = 2", "x = 1"]):
        for folder, source in zip(folders, sources, strict=True):
            (folder / "grpo.py").write_text(source)
        assert list(groups_of(*folders).values()) == ([[1, 3], [2]] if "x = 2" in sources else [[1, 2, 3]])


def test_seeds_are_drawn_as_mean_and_band_over_the_steps_that_all_have(seeds: list[Path]) -> None:
    add_metrics(seeds[2], 5, **{"train/reward": 8.0, "eval/accuracy": 0.9})
    rows = report.read_jsonl(seeds[0] / "metrics.jsonl")
    for row in rows[1:]:
        row["train/reward"] += 3.0
    write_jsonl(seeds[0] / "metrics.jsonl", rows)
    (group,) = report.group_runs([report.load(folder) for folder in seeds])
    # 0.5, 1, 1.5, 2 of two seeds and 3 more of one; the third goes on alone.
    assert line_of(group, "train/reward") == ([[1.5, 2.0, 2.5, 3.0], [2.0, 8.0]], [0.5, 5.0])
    assert line_of(group, "eval/accuracy")[0] == [[0.25, 0.75], [0.75, 0.9]]
    assert group.means() == [("held-out", ["0.250 [0.250, 0.250]", "0.800 [0.750, 0.900]"])]


def test_training_metrics_are_smoothed_and_accuracies_are_not(seeds: list[Path]) -> None:
    (group,) = report.group_runs([report.load(seeds[0])])
    assert line_of(group, "eval/accuracy") == ([[0.25, 0.75]], [0.0456, 0.9544])  # a single run: its interval
    rows = [{"step": i, "train/reward": i % 2, "eval/accuracy": i % 2} for i in range(80)]  # a mean over five steps
    write_jsonl(seeds[0] / "metrics.jsonl", rows)
    (group,) = report.group_runs([report.load(seeds[0])])
    assert line_of(group, "eval/accuracy")[0] == [[i % 2 for i in range(80)]]
    assert line_of(group, "train/reward")[0][0][2:6] == [0.4, 0.6, 0.4, 0.6]


@pytest.mark.usefixtures("no_charts")
def test_what_differs_and_what_was_gained(seeds: list[Path], tmp_path: Path) -> None:
    change(seeds[0], learning_rate=1e-3, unknown=["<b>"])
    (seeds[0] / "environment.json").write_text(json.dumps({"commit": "abc-dirty", "packages": {"torch": "9.1"}}))
    html = make_page(tmp_path / "page.html", *seeds)
    table = html.split("What differs between the configurations")[1].split("<details>")[0]
    assert "<tr><th>learning_rate</th><td>0.001</td><td>-</td></tr>" in table
    assert "&lt;b&gt;" in table
    assert "num_steps" not in table
    assert "1 lost and 3 gained of 4 held-out problems" in html
    assert html.count("0.250 [0.046, 0.699]<br>0.750 [0.301, 0.954]") == 3
    environment = html.split("<h2>Environment</h2>")[1].split("<script")[0]
    assert environment.count("9.1") == 1
    assert "<tr><th>commit</th><td>abc-dirty</td><td>-</td><td>-</td></tr>" in environment
    assert "<tr><th>torch</th><td>9.1</td><td>-</td><td>-</td></tr>" in environment


@pytest.mark.usefixtures("no_charts")
def test_a_sweep_is_expanded_to_its_finished_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for experiment, stamp in (("baseline", 1), ("aggressive", 3), ("aggressive", 2), ("not_yet", 4)):
        (tmp_path / "sweep" / experiment).mkdir(parents=True, exist_ok=True)
        run = make_run(tmp_path / "sweep" / experiment / f"grpo_overfit__{stamp}")
        (run.parent / "result.json").write_text(json.dumps({"run_folder": run.name}))  # the last one counts
    (run / "metrics.jsonl").write_text('{"step": 0, "eval/acc')
    (tmp_path / "sweep" / "failed").mkdir()
    report.main(["sweep"])
    assert capsys.readouterr().out.startswith("report.html: 2 runs, ")
    data = data_of((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert data["runs"] == ["baseline", "aggressive"]
    assert "grpo_overfit__3" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_broken_going_on_and_foreign_runs_have_a_page(seeds: list[Path], tmp_path: Path) -> None:
    """NaN, null and values of another kind; a last line cut off; no completions, config, environment or evaluation."""
    values = {"train/reward": None, "train/entropy": float("nan"), "completions/mean_length": "many", "new/key": [1]}
    add_metrics(seeds[0], 5, **values | {"eval/accuracy": None, "test/accuracy": 0.5})
    strange = {"step": 4, "split": "eval", "mode": "greedy", "completion": ["a", {"b": 1}], "reward": float("nan")}
    add_completions(seeds[0], [strange, {"step": 5}, {"no": "step"}, train_row(5, "lone \ud800 surrogate")])
    with (seeds[0] / "completions.jsonl").open("a") as file:
        file.write('7\n{"step": 6, "spl')
    for name in ("completions.jsonl", "config.json"):
        (seeds[1] / name).unlink()
    write_jsonl(seeds[2] / "metrics.jsonl", [{"step": 0, "eval/accuracy": 0.5}])
    bare = tmp_path / "bare"
    bare.mkdir()
    add_metrics(bare, 3, other=1)
    page = make_page(tmp_path / "page.html", *seeds, bare)
    rows = data_of(page)["rows"]
    assert [row[5] for row in rows if row[1] == 5] == [None, "lone \ud800 surrogate"]
    assert [row[7] for row in rows if row[5] == "['a', {'b': 1}]"] == ["nan"]
    for folder in (*seeds, bare):
        report.main([str(folder)])
        assert (folder / "curve.png").exists()


@pytest.mark.usefixtures("no_charts")
def test_errors_are_one_line(seeds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "directory.html").mkdir()
    broken = make_run(tmp_path / "broken")
    (broken / "config.json").write_text("[1")
    page = str(tmp_path / "page.html")
    for text, arguments in (
        ("has no metrics.jsonl", [seeds[0], tmp_path / "empty"]),
        ("config.json is no JSON object", [seeds[0], broken]),
        ("cannot write", [seeds[0], seeds[1], "-o", tmp_path / "directory.html"]),
        ("cannot write", [seeds[0], "-o", tmp_path / "no" / "folder.html"]),
    ):
        with pytest.raises(SystemExit) as ended:
            report.main([*map(str, arguments), *(["-o", page] if "-o" not in arguments else [])])
        captured = capsys.readouterr()
        assert (ended.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
        assert captured.err.startswith("error: ")
        assert text in captured.err
    assert not Path(page).exists()


def test_the_page_names_no_other_address_and_forbids_all(seeds: list[Path], tmp_path: Path) -> None:
    html = make_page(tmp_path / "page.html", *seeds)
    assert "://" not in html
    assert "url(" not in html.replace("url(#", "")
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-" in html
    assert html.count("<script") == 2


@pytest.mark.usefixtures("no_charts")
def test_no_text_of_a_run_can_become_markup(seeds: list[Path], tmp_path: Path) -> None:
    plain = make_page(tmp_path / "page.html", *seeds)
    change(seeds[0], model=EVIL)
    change(seeds[1], lr_schedule=EVIL)
    (seeds[1] / "environment.json").write_text(json.dumps({"command": [EVIL], "packages": {EVIL: EVIL}, EVIL: EVIL}))
    text = (seeds[2] / "completions.jsonl").read_text().replace('"What is 1 + 4?"', json.dumps(EVIL))
    (seeds[2] / "completions.jsonl").write_text(text.replace('"completion": "5"', f'"completion": {json.dumps(EVIL)}'))
    add_completions(seeds[2], [train_row(3, EVIL)])
    html = make_page(tmp_path / "page.html", *seeds)
    for tag in ("<script", "</script", "<img", "<!--"):
        assert html.count(tag) == plain.count(tag)
    assert [row[5] for row in data_of(html)["rows"] if row[1] == 3] == [EVIL]


@pytest.mark.usefixtures("no_charts")
def test_many_long_completions_stay_below_5_mb_evenly_over_steps(seeds: list[Path], tmp_path: Path) -> None:
    rows = [train_row(step, f"{step}.{i} " + "<" * 900 + "é" * 800) for step in range(1, 101) for i in range(30)]
    add_completions(seeds[0], rows)
    html = make_page(tmp_path / "page.html", *seeds)
    assert 4_000_000 < (tmp_path / "page.html").stat().st_size < 5_000_000
    shown = [row for row in data_of(html)["rows"] if row[2] == "train" and row[0] == 0]
    counts = {step: sum(row[1] == step for row in shown) for step in range(1, 101)}
    assert 5 <= min(counts.values()) >= max(counts.values()) - 2
    assert [row[5].split()[0] for row in shown if row[1] == 9] == [f"9.{i}" for i in range(counts[9])]
    assert [row[1] for row in shown[1:]] == sorted(row[1] for row in shown[1:])  # the first is of make_run
    assert f'data-count="{3000 + 3 * 18}"' in html


def test_in_a_browser_all_charts_are_drawn_in_light_and_dark(
    seeds: list[Path], tmp_path: Path, browser: Browser
) -> None:
    other = make_overfit_run(tmp_path / "grpo_overfit__1")
    make_page(tmp_path / "page.html", *seeds, other)
    browser.open(tmp_path / "page.html")
    methods = [event["method"] for event in browser.events]
    assert not {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"} & set(methods)
    requested = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert requested == [(tmp_path / "page.html").as_uri()]
    keys = {"eval/accuracy", "eval/train_subset_accuracy", "train/reward", "train/entropy", "time/rollout_s"}
    keys |= {"train/frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio", "time/update_s"}
    figures = "[...document.querySelectorAll('figure')]"
    lines = "['.s0', '.s1'].map((s) => f.querySelectorAll(s).length > 0)"
    drawn = dict(browser.run(f"{figures}.map((f) => [f.dataset.key, {lines}])"))
    assert drawn.keys() == keys | {"time/reward_s"}
    assert drawn.pop("eval/train_subset_accuracy") == [False, True]
    assert set(map(tuple, drawn.values())) == {(True, True)}
    assert "n = 3 (seeds 1, 2, 3)" in browser.run("document.querySelector('.legend').textContent")
    colours = []
    line = "getComputedStyle(document.querySelector('figure .s0 path')).stroke"
    for scheme in ("light", "dark"):
        media = {"name": "prefers-color-scheme", "value": scheme}
        browser.ask("Emulation.setEmulatedMedia", features=[media])
        tick = "getComputedStyle(document.querySelector('figure text')).fill"
        colours.append([browser.run(f"getComputedStyle(document.body).{c}") for c in ("color", "backgroundColor")])
        colours[-1] += [browser.run(tick), browser.run(line)]
    assert colours[0] == ["rgb(26, 26, 26)", "rgb(255, 255, 255)", "rgb(26, 26, 26)", "rgb(0, 114, 178)"]
    assert colours[1] == ["rgb(230, 230, 230)", "rgb(22, 24, 26)", "rgb(230, 230, 230)", "rgb(85, 174, 240)"]
    browser.ask("Emulation.setDeviceMetricsOverride", width=360, height=800, deviceScaleFactor=1, mobile=True)
    assert browser.run("document.documentElement.scrollWidth") == 360
    browser.ask("Emulation.clearDeviceMetricsOverride")
    browser.run("document.querySelector('.legend button').click()")
    assert browser.run("getComputedStyle(document.querySelector('figure .s0')).display") == "none"
    assert browser.run("getComputedStyle(document.querySelector('figure .s1')).display") == "inline"


@pytest.mark.usefixtures("no_charts")
def test_in_a_browser_completions_are_filtered_and_stay_text(
    seeds: list[Path], tmp_path: Path, browser: Browser
) -> None:
    add_completions(seeds[0], [train_row(3, EVIL), train_row(3, "wrong one", right=False)])
    make_page(tmp_path / "page.html", *seeds)
    cells = "[...document.querySelectorAll('#found tr')].slice(1).map((r) => r.children[3].textContent)"
    browser.open(tmp_path / "page.html", "#step=3")
    assert browser.run(cells) == [EVIL, "wrong one"]
    assert browser.run("document.querySelectorAll('script, img').length") == 2
    assert "Page.javascriptDialogOpening" not in [event["method"] for event in browser.events]
    browser.open(tmp_path / "page.html", "#step=3&right=wrong")
    assert browser.run(cells) == ["wrong one"]
    assert browser.run("document.querySelector('#found').textContent").count("wrong, reward 0, advantage +0.5") == 1
    browser.open(tmp_path / "page.html", "#kind=eval+greedy&right=right&step=4&run=seed+2")
    assert browser.run(cells) == ["5", "6", "7"]
    assert browser.run("document.querySelector('#count').textContent") == "3 of 56 match"
    choose = "at('%s').value = '%s'; at('%s').dispatchEvent(new Event('input'));"
    wait = "new Promise((done) => setTimeout(done, 100))"
    for id, value in (("kind", ""), ("run", ""), ("step", "3"), ("text", "ALERT(1)")):
        browser.run(choose % (id, value, id) + wait)
    assert browser.run(cells) == [EVIL]
    assert browser.run("location.hash") == "#step=3&right=right&text=ALERT%281%29"
    browser.run("location.hash = '#right=wrong';" + wait)
    assert browser.run("at('text').value + at('step').value + at('right').value") == "wrong"
    # The header, and all that is wrong.
    assert browser.run("document.querySelectorAll('#found tr').length") == 1 + 3 * (3 + 2 + 1 + 1 + 1) + 1


@pytest.mark.usefixtures("no_charts")
def test_in_a_browser_more_are_shown_on_demand_and_what_is_left_out_is_said(
    seeds: list[Path], tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_completions(seeds[0], [train_row(3, f"number {i}") for i in range(60)])
    make_page(tmp_path / "page.html", seeds[0])
    browser.open(tmp_path / "page.html", "#kind=train")
    count = "document.querySelectorAll('#found tr').length - 1"
    assert browser.run(count) == 50
    browser.run("at('more').click()")
    assert browser.run(count) == 61
    assert browser.run("at('embedded').textContent") == "All 78 recorded completions are here."
    size = (tmp_path / "page.html").stat().st_size
    monkeypatch.setattr(report, "MAX_BYTES", size - 4000)
    make_page(tmp_path / "page.html", seeds[0])
    assert size - 4500 < (tmp_path / "page.html").stat().st_size < size - 4000
    browser.open(tmp_path / "page.html")
    left = 78 - browser.run("rows.length")
    assert left > 10
    assert f"{left} were left out" in browser.run("at('embedded').textContent")
