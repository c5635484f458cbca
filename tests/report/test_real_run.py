"""A tiny training run and what the report shows of it: names of files, columns and metrics agree."""

import json
import re
from pathlib import Path

import pytest
from page_reader import Page
from steps import build
from tiny import make_model

from trl_opd.report import load_run, write_report
from trl_opd.report.charts import FURTHER, charts_of
from trl_opd.report.figures import heat_maps
from trl_opd.report.tokens import load_completions


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("real")

    def by_length(completions, **kwargs):
        return [float(len(completion)) for completion in completions]

    trainer = build(
        path,
        teacher=make_model(seed=1).double(),
        arguments={"reward_funcs": by_length},
        max_steps=3,
        num_generations=2,
        log_completions=True,
        num_completions_to_print=0,
        recipe="todi",
        eval_strategy="no",
    )
    trainer.train()
    return path


def test_what_was_logged_is_read(folder: Path):
    run = load_run(folder)
    assert run.state.name == "finished" and run.state.step == 3 and run.notes == []
    assert {line.step for line in run.lines} == {1, 2, 3}
    assert run.info["recipe"]["name"] == "todi" and run.info["student"]["class"] == "Qwen3ForCausalLM"


def test_every_metric_has_a_picture_that_explains_it(folder: Path):
    run = load_run(folder)
    summary = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
    unknown = {name for chart in charts_of(run.metrics) if chart.group == FURTHER for name in chart.metrics}
    assert unknown <= summary
    maps = [found.title for found in heat_maps([run])]
    assert maps == ["Log-prob gap (teacher minus student) by position", "Reverse KL by position"]


def test_tokens_are_those_of_the_completions(folder: Path):
    completions, notes = load_completions(load_run(folder))
    assert notes == [] and {completion.step for completion in completions} == {1, 2, 3}
    for completion in completions:
        assert completion.tokens and any(gap is not None for gap in completion.numbers["gap"])
        assert {"by_length", "advantage"} <= set(completion.scores)
        for gap, student, teacher in zip(*(completion.numbers[n] for n in ("gap", "student", "teacher")), strict=True):
            if gap is not None:
                assert gap == pytest.approx(teacher - student, abs=2e-4)


def test_the_page_tells_it(folder: Path):
    page = Page(write_report(folder, folder / "report.html"))
    for text in ("finished at step 3", "todi", "max_completion_length", "Copy BibTeX"):
        assert text in page.text
    step, value = load_run(folder).series("distill/reverse_kl")
    (name,) = re.findall(r'id="t-(chart-\d+)">Reverse and forward KL', page.source)
    trace = page.data["figures"][name]["data"][0]
    assert trace["x"] == step and trace["y"] == pytest.approx(value, rel=1e-5)
    logged = [json.loads(line) for line in (folder / "_opd/log.jsonl").read_text().splitlines()]
    assert value == [line["logs"]["distill/reverse_kl"] for line in logged if "distill/reverse_kl" in line["logs"]]
