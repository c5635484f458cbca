"""Which numbers are drawn where, and that what is drawn is what was logged."""

import math
import random
from pathlib import Path

import pytest
from report_runs import course, write_run

from trl_opd.report import load_run
from trl_opd.report.catalogue import GROUPS
from trl_opd.report.charts import FURTHER, TEACHERS, charts_of
from trl_opd.report.figures import MAX_COLUMNS, curve, heat_maps, marks, metrics_of, start_and_now, thin_out
from trl_opd.report.load import LogLine, Run
from trl_opd.report.numbers import blocks, config_differences, key_numbers, number, polyline, raised
from trl_opd.report.state import RunState


def make_run(lines: list[tuple[int, dict]], name: str = "run", **fields) -> Run:
    return Run(Path(name), name, RunState("finished", ""), [LogLine(s, logs) for s, logs in lines], **fields)


class TestThinOut:
    def test_short_curves_are_left_alone(self):
        assert thin_out([1, 2], [None, 3.0]) == ([1, 2], [None, 3.0])

    def test_spikes_and_ends_survive(self):
        rng = random.Random(0)
        values: list[float | None] = [rng.gauss(0, 1) for _ in range(10_001)]
        values[7777], values[5], values[100] = 50.0, -50.0, None
        steps, thin = thin_out(list(range(10_001)), values, 500)
        assert len(steps) <= 500
        assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == 10_000
        assert all(values[step] == value for step, value in zip(steps, thin, strict=True))
        assert {50.0, -50.0} <= set(thin)

    def test_of_every_stretch_the_extremes(self):
        steps, thin = thin_out(range(1002), [(-1.0) ** i * i for i in range(1002)], 12)
        assert len(steps) == 12 and max(thin) == 1000.0 and min(thin) == -1001.0


def test_start_and_now_are_means_of_a_tenth():
    assert start_and_now([4.0, 9.0]) == (4.0, 9.0)
    assert start_and_now([None, 4.0, None]) == (4.0, 4.0)
    assert start_and_now([]) is None and start_and_now([None]) is None
    assert start_and_now([float(i) for i in range(30)]) == (1.0, 28.0)
    assert start_and_now([float(i) for i in range(1000)]) == (2.0, 997.0)


class TestCharts:
    def test_every_number_is_in_one_chart(self):
        names = [*course(2)[0][1], "eval_distill/reverse_kl", "eval_runtime", "distill/math/reverse_kl"]
        shown = [name for chart in charts_of(names) for name in chart.metrics]
        assert len(shown) == len(set(shown))
        elsewhere = {"epoch"} | {name for name in names if "_at/" in name}
        assert set(shown) == {name.removeprefix("eval_") for name in names} - elsewhere

    def test_every_chart_says_what_is_healthy(self):
        for charts in GROUPS.values():
            for chart in charts:
                assert chart.healthy.endswith(".") and len(chart.healthy) > 40, chart.title

    def test_unknown_numbers_go_to_the_end(self):
        charts = charts_of(["my_own", "distill/overlap"])
        assert [chart.group for chart in charts] == ["Overlap with the teacher", FURTHER]
        assert charts[-1].title == "my_own"

    def test_several_teachers_share_a_chart(self):
        names = [f"distill/{t}/{n}" for t in ("math", "code/v2") for n in ("reverse_kl", "share")]
        charts = charts_of(["distill/reverse_kl", *names])
        by_teacher = [chart for chart in charts if chart.group == TEACHERS]
        assert [set(chart.metrics) for chart in by_teacher] == [{names[0], names[2]}, {names[1], names[3]}]
        figure = curve(by_teacher[0], [make_run([(1, dict.fromkeys(names, 1.0))])])
        assert figure.series == ["math", "code/v2"]

    def test_names_of_lines_lose_what_they_share(self):
        logs = dict.fromkeys(["completions/mean_length", "completions/min_length", "loss", "distill/loss"], 1.0)
        logs |= dict.fromkeys(["distill/loss_share/light", "distill/loss_share/heavy"], 1.0)
        logs |= dict.fromkeys(["rewards/a/mean", "rewards/<lambda>/mean", "entropy", "distill/teacher_entropy"], 1.0)
        run = make_run([(1, logs)])
        series = {chart.title: curve(chart, [run]).series for chart in charts_of(run.metrics)}
        assert series["Length"] == ["mean length", "min length"]
        assert series["Loss"] == ["loss", "distillation"]
        assert series["Share of the loss by token weight"] == ["light", "heavy"]
        assert series["Reward functions"] == ["a", "<lambda>"]
        assert series["Entropy of student and teacher"] == ["teacher entropy", "entropy"]


class TestCurve:
    def test_traces_hold_what_was_logged(self, tmp_path: Path):
        runs = [load_run(write_run(tmp_path / name, num_steps=20, seed=i)) for i, name in enumerate("ab")]
        charts = {chart.title: chart for chart in charts_of(metrics_of(runs))}
        found = curve(charts["Reverse and forward KL"], runs)
        metas = [(t.meta["run"], t.meta["series"], t.meta["kind"]) for t in found.figure.data]
        assert metas == [(r, s, k) for r in (0, 1) for s, k in ((0, "train"), (0, "eval"), (1, "train"))]
        assert found.has_eval
        trace = found.figure.data[3]
        expected = [logs["distill/reverse_kl"] for _, logs in course(20, seed=1)]
        assert list(trace.x) == list(range(1, 21))
        assert list(trace.y) == pytest.approx(expected, rel=1e-5)
        assert trace.name == "b: reverse kl"
        assert trace.line.dash == "solid" and found.figure.data[5].line.dash == "dash"

    def test_gaps_and_thinning_are_told(self):
        lines = [(i, {"grad_norm": math.sin(i)}) for i in range(5000)]
        lines[7] = (7, {"grad_norm": None})
        (chart,) = charts_of(["grad_norm"])
        found = curve(chart, [make_run(lines)])
        assert found.notes == [
            "grad_norm was not a number at step 7.",
            "5,000 points are drawn as 2,000: the extremes of each stretch are kept.",
        ]

    def test_names_are_no_tags_for_plotly(self):
        (chart,) = charts_of(["rewards/<b>x</b>/mean"])
        figure = curve(chart, [make_run([(1, {"rewards/<b>x</b>/mean": 1.0})], name="<i>")] * 2).figure
        assert "<" not in figure.data[0].name


BY_POSITION = [
    (step, {f"distill/gap_at/{b}": -step * (i + 1.0) for i, b in enumerate(("00000-00007", "00008-00015"))})
    for step in range(1, 5)
]


class TestHeatMaps:
    def test_rows_are_buckets_and_columns_steps(self):
        (found,) = heat_maps([make_run(BY_POSITION)])
        trace = found.figure.data[0]
        assert list(trace.y) == ["0-7", "8-15"] and list(trace.x) == [1, 2, 3, 4]
        assert [list(row) for row in trace.z] == [[-1, -2, -3, -4], [-2, -4, -6, -8]]
        assert trace.zmin == -8 and trace.zmax == 8 and trace.zmid == 0

    def test_buckets_are_in_order_of_position(self):
        lines = [(1, {f"distill/reverse_kl_at/{b}": 1.0 for b in ("00128-00255", "00000-00007", "00016-00031")})]
        (found,) = heat_maps([make_run(lines)])
        assert list(found.figure.data[0].y) == ["0-7", "16-31", "128-255"]
        assert found.figure.data[0].zmin == 0

    def test_many_steps_are_averaged(self):
        lines = [(i, {"distill/gap_at/00000-00007": -float(i % 2)}) for i in range(1, 1201)]
        (found,) = heat_maps([make_run(lines)])
        assert len(found.figure.data[0].x) == MAX_COLUMNS
        assert all(value == -0.5 for value in found.figure.data[0].z[0])
        assert found.notes == ["1,200 lines are averaged into 300 columns."]

    def test_runs_share_a_scale(self):
        small = [(step, {k: v / 100 for k, v in logs.items()}) for step, logs in BY_POSITION]
        for lines in ((BY_POSITION, small), (small, BY_POSITION)):
            one, two = heat_maps([make_run(found) for found in lines])
            assert one.figure.data[0].zmax == two.figure.data[0].zmax == 8
            assert (one.run, two.run) == (0, 1)

    def test_of_each_teacher(self):
        logs = {"distill/math/gap_at/00000-00007": 1.0, "distill/gap_at/00000-00007": 2.0}
        maps = heat_maps([make_run([(1, logs)])])
        assert [found.title.partition("position")[2] for found in maps] == ["", ", math"]


class TestNumbers:
    def test_as_a_person_writes_them(self):
        values = [None, 0, 0.123456, -0.5, 1234.5, 12.0, 2e-5, -3e9]
        assert [number(v) for v in values] == ["–", "0", "0.1235", "−0.5", "1,234", "12", "2.00e-05", "−3.00e+09"]
        assert number(0.914, percent=True) == "91.4%"

    @pytest.mark.parametrize(
        ("metric", "start", "now", "change", "verdict"),
        [
            ("distill/reverse_kl", 1.0, 0.5, "falls, healthy", "good"),
            ("distill/reverse_kl", 0.5, 1.0, "rises, unhealthy", "bad"),
            ("distill/overlap", 0.7, 0.9, "rises, healthy", "good"),
            ("distill/overlap", 0.9, 0.7, "falls, unhealthy", "bad"),
            ("distill/overlap", 0.90, 0.91, "steady", ""),
            ("distill/overlap_advantage", -0.5, -0.1, "nears 0, healthy", "good"),
            ("distill/overlap_advantage", -0.1, -0.5, "leaves 0, unhealthy", "bad"),
            ("completions/mean_length", 100.0, 200.0, "rises", ""),
        ],
    )
    def test_directions(self, metric: str, start: float, now: float, change: str, verdict: str):
        (shown,) = key_numbers(make_run([(1, {metric: start}), (2, {metric: now})]))
        assert (shown.change, shown.verdict) == (change, verdict)

    def test_small_curves(self):
        assert polyline([0.0, 1.0, 0.5]) == "0.0,26.0 50.0,2.0 100.0,14.0"
        assert polyline([]) == "" and polyline([3.0]).count(",") == 2
        assert blocks([0.0, 1.0, 2.0, 3.0], 4) == "▁▃▆█" and blocks([5.0, 5.0]) == "▁▁"

    def test_config_differences(self):
        infos = [{"config": {"a": 1, "b": 2, "c": "x"}}, {"config": {"a": 1, "b": 3}}, {}]
        rows = config_differences([make_run([], info=info) for info in infos])
        assert [(row.name, row.cells) for row in rows] == [
            ("a", ["1", "1", "–"]),
            ("b", ["2", "3", "–"]),
            ("c", ["x", "–", "–"]),
        ]

    def test_an_adapter_and_all_weights_differ(self):
        infos = [{"student": {"name": "s", "adapter": "LORA r=8"}}, {"student": {"name": "s", "adapter": None}}]
        rows = config_differences([make_run([], info=info) for info in infos])
        assert [(row.name, row.cells) for row in rows] == [("trained", ["LORA r=8", "all weights"])]

    def test_alarms_of_one_name_are_one(self):
        alarms = [{"step": s, "alarm": a, "seen": f"{a}{s}"} for s, a in ((3, "x"), (4, "y"), (9, "x"))]
        run = make_run([], alarms=alarms)
        found = [(group.last["seen"], group.steps, group.before) for group in raised(run)]
        assert found == [("x9", [3, 9], [(3, "x3")]), ("y4", [4], [])]
        assert [(mark["step"], mark["names"]) for mark in marks([run])] == [(3, ["x"]), (4, ["y"]), (9, ["x"])]
