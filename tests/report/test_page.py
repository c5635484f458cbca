"""The page as a file: what is in it, that it needs nothing else, and that no text of a run becomes part of it."""

import base64
import hashlib
import io
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from page_reader import Page
from report_runs import GONE, HOSTILE, RECIPE, course, write_checkpoint, write_json, write_run, write_status

from trl_opd.report import page as page_module
from trl_opd.report import write_report
from trl_opd.report.cli import main
from trl_opd.report.page import embedded

PLOTLY_JS = page_module._plotly_js


@pytest.fixture(scope="module", autouse=True)
def small_pages():
    """Pages without the 5 MB of plotly's script, which are slow to parse; `whole_pages` brings it back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_module, "_plotly_js", lambda: "var Plotly;")
        yield


@pytest.fixture
def whole_pages(monkeypatch):
    monkeypatch.setattr(page_module, "_plotly_js", PLOTLY_JS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "lora", num_steps=60, alarms=(9, 40, 41))


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(write_report(folder, folder / "report.html"))


class TestOneRun:
    def test_says_what_ran(self, page: Page):
        for text in ("lora", "finished at step 60", "Qwen/Qwen3-1.7B", "1.72 B", "Qwen/Qwen3-8B", RECIPE["paper"]):
            assert text in page.text
        assert RECIPE["citation"] in page.text
        assert '{"beta": 0.5} → {"beta": 0.9}' in page.text
        assert RECIPE["link"] in page.attributes("href")

    def test_values_of_alarms_are_short(self, page: Page):
        assert "distill/reverse_kl 1.94 · median 0.21" in page.text

    def test_shows_alarms_findings_configuration_versions_and_starts(self, page: Page):
        assert "3 times, at steps 9, 40, 41" in page.text and "jumped from 0.21 to 1.94 at step 41" in page.text
        assert "<|im_end|>" in page.text and "Set generation_kwargs" in page.text and "All 2 checks" in page.text
        assert "2 fields that differ" in page.text and "generalized_jsd" in page.text and "All 6 fields" in page.text
        assert "2.13.0" in page.text and "2026-11-26T06:00:00+00:00, up to step 20" in page.text

    def test_every_number_of_the_log_is_drawn_or_listed(self, page: Page):
        logged = {name for _, logs in course(2) for name in logs} - {"epoch"}
        figures = page.data["figures"].values()
        drawn = sum(len([t for t in f["data"] if t["type"] == "scatter"]) for f in figures)
        maps = [trace for f in figures for trace in f["data"] if trace["type"] == "heatmap"]
        by_position = {name for name in logged if "_at/" in name}
        assert sum(len(trace["y"]) for trace in maps) == len(by_position)
        assert drawn == len(logged - by_position) + 2  # and two of evaluations
        assert "train_runtime" in page.text and "240.5" in page.text

    def test_every_figure_has_its_place_heading_and_sentence(self, page: Page):
        ids = page.attributes("id")
        assert len(ids) == len(set(ids))
        for name in page.data["figures"]:
            assert name in ids and f"t-{name}" in ids
        captions = re.findall(r"<figcaption>(.+?)</figcaption>", page.source, flags=re.DOTALL)
        assert len(captions) == len(page.data["figures"]) and all(len(caption) > 40 for caption in captions)

    def test_marks_are_the_alarms_and_the_restart(self, page: Page):
        marks = [(mark["kind"], mark["step"]) for mark in page.data["marks"]]
        assert marks == [("alarm", 9), ("alarm", 40), ("alarm", 41), ("restart", 20)]

    def test_headings_descend_one_level_at_a_time(self, page: Page):
        levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))

    def test_references_inside_the_page_lead_somewhere(self, page: Page):
        ids = set(page.attributes("id"))
        assert {target[1:] for target in page.attributes("href") if target.startswith("#")} <= ids
        for name in ("aria-labelledby", "for", "data-copy"):
            assert set(page.attributes(name)) <= ids

    def test_needs_nothing_else(self, page: Page):
        """Nothing is loaded from anywhere: the only address is a link that a person may follow."""
        outside = [link for link in page.attributes("href") if not link.startswith(("#", "data:"))]
        assert outside == [RECIPE["link"]]
        assert page.attributes("src") == [] and page.attributes("srcset") == []
        style = page.source[page.source.index("<style>") : page.source.index("</style>")]
        assert "url(" not in style and "@import" not in style

    @pytest.mark.usefixtures("whole_pages")
    def test_the_whole_script_is_one_element(self, folder: Path, tmp_path: Path):
        scripts = Page(write_report(folder, tmp_path / "report.html")).scripts
        assert len(scripts) == 3 and scripts[1] == PLOTLY_JS() and len(scripts[1]) > 4e6

    def test_its_policy_allows_its_own_scripts_and_no_others(self, page: Page):
        (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
        for script in page.scripts[1:]:
            assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
        assert len(page.scripts) == 3 and policy.count("'sha256-") == 2
        assert "default-src 'none'" in policy and "script-src 'unsafe" not in policy and "http" not in policy

    def test_tokens_are_there_with_their_numbers(self, page: Page):
        (items,) = page.data["tokens"]
        assert [item["step"] for item in items] == [1] * 4 + [30] * 4 + [60] * 4
        item = items[0]
        assert len(item["tokens"]) == len(item["gap"]) == len(item["student"]) == len(item["teacher"]) == 60
        for gap, student, teacher in zip(item["gap"][:50], item["student"], item["teacher"], strict=False):
            assert gap == pytest.approx(teacher - student, abs=2e-4)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Page:
    folder = tmp_path_factory.mktemp("hostile") / "run<b>"
    write_run(folder, num_steps=6, text=HOSTILE, alarms=(2,), state="failed", status={"error": HOSTILE})
    facts = json.loads((folder / "_opd/run.json").read_text())
    facts["recipe"]["link"] = "javascript:alert(1)"
    facts["config"][HOSTILE] = facts["changed"][HOSTILE] = HOSTILE
    facts["versions"][HOSTILE] = HOSTILE
    write_json(folder / "_opd/run.json", facts)
    line = {"time": 1.0, "step": 7, "logs": {f"rewards/{HOSTILE}/mean": 1.0, HOSTILE: 2.0}}
    with open(folder / "_opd/log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    return Page(write_report([folder, folder], folder / "report.html"))


class TestHostileTexts:
    def test_are_shown_as_text(self, hostile: Page):
        assert hostile.text.count("</script><img src=x onerror=alert(1)>") > 10
        assert hostile.data["tokens"][0][0]["tokens"][4] == HOSTILE

    def test_bring_in_no_element(self, hostile: Page):
        tags = {tag for tag, _ in hostile.elements}
        assert "img" not in tags and tags.isdisjoint({"iframe", "object", "embed", "b<"})
        assert len(hostile.scripts) == 3
        assert not [name for _, attributes in hostile.elements for name in attributes if name.startswith("on")]

    def test_bring_in_no_address(self, hostile: Page):
        assert not any("javascript" in link for link in hostile.attributes("href"))

    def test_cannot_leave_the_data(self, hostile: Page):
        assert not {"<", ">", "&"} & set(hostile.scripts[0])
        assert json.loads(embedded({"a": "</SCRIPT ><!--\u2028\ud800"})) == {"a": "</SCRIPT ><!--\u2028\ud800"}
        with pytest.raises(ValueError, match="JSON"):
            embedded({"a": float("nan")})

    def test_texts_that_are_no_unicode_can_be_written(self, tmp_path: Path):
        folder = write_run(tmp_path / "run", num_steps=2)
        write_json(folder / "_opd/run.json", {"student": {"name": "\ud83d half a character \x00\x1b[31m"}})
        assert "half a character" in Page(write_report(folder, tmp_path / "report.html")).text


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Page:
    folder = tmp_path_factory.mktemp("several")
    one = write_run(folder / "one", num_steps=20)
    two = write_run(folder / "two", num_steps=30, seed=1, changes={"learning_rate": 1e-6, "top_k": 20})
    write_checkpoint(folder / "grpo" / "checkpoint-9", 9)
    return Page(write_report([one, two, folder / "grpo"], folder / "all.html"))


class TestSeveralRuns:
    def test_numbers_lie_over_each_other(self, several: Page):
        (name,) = re.findall(r'id="t-(chart-\d+)">Top-k overlap', several.source)
        figure = several.data["figures"][name]
        assert [trace["name"] for trace in figure["data"]] == ["one", "two", "grpo"]
        assert [(trace["meta"]["run"], len(trace["x"])) for trace in figure["data"]] == [(0, 20), (1, 30), (2, 9)]
        assert several.data["runs"] == ["one", "two", "grpo"]

    def test_what_differs_is_in_a_table(self, several: Page):
        start = several.source.index("What differs in the configuration")
        table = several.source[start : several.source.index("</table>", start)]
        rows = re.findall(r'<th scope="row">(.+?)</th>(.+?)</tr>', table)
        cells = {name: re.findall("<td>(.*?)</td>", rest) for name, rest in rows}
        assert cells["learning_rate"] == ["0.0002", "1e-06", "–"]
        assert cells["top_k"] == ["–", "20", "–"]

    def test_final_numbers_are_side_by_side(self, several: Page):
        row = re.search(r'<th scope="row">Last step</th>(.+?)</tr>', several.source)
        assert row is not None and re.findall("<td>(.*?)</td>", row[1]) == ["20", "30", "9"]

    def test_one_run_does_not_have_the_others_colours(self, several: Page):
        assert several.text.count("Not recorded in this run.") >= 2  # alarms and configuration of the GRPO run
        assert {"token-run", "token-step"} <= set(several.attributes("id"))


class TestAnyState:
    def test_a_run_that_has_not_logged(self, tmp_path: Path):
        folder = write_run(tmp_path / "run", num_steps=1)
        for file in [folder / "_opd/log.jsonl", *(folder / "completions").iterdir()]:
            file.unlink()
        write_status(folder, "running", step=0)
        page = Page(write_report(folder, tmp_path / "report.html"))
        assert "No line is logged yet" in page.text and "No completions are kept" in page.text
        assert page.data["figures"] == {}

    def test_a_killed_run(self, tmp_path: Path):
        folder = write_run(tmp_path / "run", num_steps=9, state="running", status={"pid": GONE, "max_steps": 90})
        page = Page(write_report(folder, tmp_path / "report.html"))
        assert "no sign of life since" in page.text and "step 9 of 90" in page.text
        assert "0.1000" in page.attributes("value")

    def test_a_run_of_one_line(self, tmp_path: Path):
        assert Page(write_report(write_run(tmp_path / "run", num_steps=1), tmp_path / "r.html")).data["lines"] == 1

    def test_a_checkpoint_alone(self, tmp_path: Path):
        write_checkpoint(tmp_path / "run" / "checkpoint-9", 9)
        page = Page(write_report(tmp_path / "run", tmp_path / "deep" / "er" / "report.html"))
        assert "No opd folder" in page.text and len(page.data["figures"]) > 20

    def test_facts_of_another_form(self, tmp_path: Path):
        folder = write_run(tmp_path / "run", num_steps=3)
        for facts in ({"student": None, "teacher": {"name": "x", "kind": "y", "members": ["a", {"z": 1}]}}, {}):
            write_json(folder / "_opd/run.json", {"format": 1, **facts})
            write_report(folder, tmp_path / "report.html")

    def test_the_page_is_written_anew(self, tmp_path: Path):
        folder = write_run(tmp_path / "run", num_steps=3)
        file = write_report(str(folder), str(tmp_path / "report.html"))
        write_run(folder, num_steps=7)
        assert Page(write_report(str(folder), file)).data["lines"] == 7
        assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["report.html"]

    def test_size(self, tmp_path: Path):
        """Three runs of 8,000 lines: the numbers that a picture cannot show are not carried along."""
        folder = write_run(tmp_path / "run", num_steps=1)
        lines = [{"step": s, "logs": {"loss": s / 7, "distill/gap_at/00000-00007": s / 3}} for s in range(8_000)]
        (folder / "_opd/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        data = Page(write_report([folder] * 3, tmp_path / "report.html")).scripts[0]
        assert len(data) < 300_000


class TestCommand:
    @pytest.mark.usefixtures("whole_pages")
    def test_writes_beside_the_run(self, tmp_path: Path, capsys):
        folder = write_run(tmp_path / "run", num_steps=3)
        assert main([str(folder)]) == 0
        assert (folder / "report.html").stat().st_size > 4e6
        assert capsys.readouterr().out.startswith(f"Wrote {folder / 'report.html'} (")

    def test_of_several_here(self, tmp_path: Path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        folders = [write_run(tmp_path / name, num_steps=3) for name in "ab"]
        assert main([str(folder) for folder in folders]) == 0
        assert (tmp_path / "report.html").exists()
        assert main([*map(str, folders), "-o", "other.html"]) == 0 and (tmp_path / "other.html").exists()

    def test_no_run(self, tmp_path: Path, capsys):
        assert main([str(tmp_path)]) == 2
        assert "none of _opd/run.json, _opd/log.jsonl" in capsys.readouterr().err
        assert main([str(tmp_path), "--terminal"]) == 2

    def test_a_file_that_cannot_be_written(self, tmp_path: Path, capsys):
        folder = write_run(tmp_path / "run", num_steps=3)
        (tmp_path / "taken").write_text("")
        assert main([str(folder), "-o", str(tmp_path / "taken" / "report.html")]) == 2
        assert "could not be written" in capsys.readouterr().err

    def test_opens_the_browser(self, tmp_path: Path, monkeypatch):
        opened: list[str] = []
        monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
        folder = write_run(tmp_path / "run with space", num_steps=3)
        assert main([str(folder), "--open"]) == 0
        assert opened == [(folder / "report.html").resolve().as_uri()]

    def test_help_is_for_people(self, capsys):
        with pytest.raises(SystemExit):
            main(["--help"])
        assert "examples:" in capsys.readouterr().out


class TestTerminal:
    def summary(self, folder: Path, monkeypatch, capsys) -> str:
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("TERM", "dumb")
        assert main([str(folder), "--terminal"]) == 0
        return capsys.readouterr().out

    def test_fits_80_columns_and_says_the_same(self, tmp_path: Path, monkeypatch, capsys):
        from rich.cells import cell_len

        text = self.summary(write_run(tmp_path / "run", num_steps=60, alarms=(5, 50)), monkeypatch, capsys)
        assert max(cell_len(line) for line in text.splitlines()) <= 80
        for part in ("finished at step 60", "Reverse KL, nats", "falls, healthy", "2 times, last at step 50"):
            assert part in text
        assert "kl_spike" in text and "eos (warning)" in text and "Try: Set generation_kwargs" in text
        assert "Tokens of step 60" in text and "[- two-]" in text and "mean gap -0." in text
        assert not (tmp_path / "run" / "report.html").exists()

    def test_texts_are_not_markup(self, tmp_path: Path, monkeypatch, capsys):
        hostile = "[red]x[/red] \x1b]0;owned\x07 [/nothing]"
        folder = write_run(tmp_path / "run", num_steps=6, text=hostile, alarms=(2,))
        text = self.summary(folder, monkeypatch, capsys)
        assert "[red]x[/red]" in text and "\x1b]0;" not in text and "\x07" not in text

    def test_a_run_that_has_not_logged(self, tmp_path: Path, monkeypatch, capsys):
        folder = write_run(tmp_path / "run", num_steps=1)
        (folder / "_opd/log.jsonl").write_text("")
        assert "No line is logged yet" in self.summary(folder, monkeypatch, capsys)

    def test_colours_in_a_terminal(self, tmp_path: Path):
        from rich.console import Console

        from trl_opd.report import load_run
        from trl_opd.report.terminal import print_summary

        console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=80)
        print_summary(load_run(write_run(tmp_path / "run", num_steps=6)), console)
        assert "\x1b[" in console.file.getvalue()
