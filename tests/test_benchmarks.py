"""The benchmarks run, resume and write their tables, and the documentation has the tables of the committed results."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from processes import PATIENCE
from test_examples import encoder  # noqa: F401  (a fixture)
from tiny import made_up_table
from transformers import AutoModelForSequenceClassification

from peft_sensi import SensiError


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_speed_in_its_quick_form(tmp_path):
    output, page = tmp_path / "speed.json", tmp_path / "speed.md"
    page.write_text("# Before\n<!-- speed.py: begin -->\nold\n<!-- speed.py: end -->\nafter\n")
    command = [sys.executable, "examples/benchmarks/speed.py", "--quick", "--device", "cpu", "--output", str(output)]
    command += ["--page", str(page), "--only", "full", "lora_all", "half", "far10_small"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=PATIENCE)
    methods = json.loads(output.read_text())["tiny/fp32/cpu"]["methods"]
    assert not [part for parts in methods.values() for part in parts.values() if "error" in part]
    assert methods["half"].keys() == {"step", "memory", "files", "wrap"}
    assert methods["half"]["memory"]["activations"] < methods["full"]["memory"]["activations"]
    assert methods["half"]["memory"]["gradients_and_state"] < methods["full"]["memory"]["gradients_and_state"]
    assert methods["far10_small"]["files"]["bytes"] > 0 and methods["half"]["wrap"]["wrap_steps"] > 0
    text = page.read_text()
    assert text.startswith("# Before") and text.endswith("after\n") and "old" not in text and "LoRA r=8" in text
    # In a second run, everything is already done.
    before = output.read_text()
    options = {"cwd": ROOT, "env": environment, "check": True, "timeout": PATIENCE}
    again = subprocess.run(command, **options, capture_output=True, text=True)
    assert output.read_text() == before and "step" not in again.stdout


@pytest.fixture
def speed(grid, monkeypatch):
    """The benchmark of speed, with processes that only count, and of which `fails` has the failing commands."""
    import speed

    speed.fails, speed.asked = set(), []

    class Process:
        def __init__(self, arguments):
            self.name = arguments["method"]

        def __call__(self, command, **fields):
            speed.asked.append((self.name, command))
            if (self.name, command) in speed.fails:
                raise RuntimeError("out of memory")
            return {"trained": 1} if command == "setup" else 1.0

        def close(self):
            pass

    monkeypatch.setattr(speed, "Process", Process)
    return speed


@pytest.mark.parametrize("command", ["setup", "step", "infer", "merge"])
def test_a_method_that_fails_does_not_stop_the_others(speed, command):
    arguments, names = {"compiled": False}, ["lora_all", "half"]
    speed.fails = {("lora_all", command)}
    found = speed.compare_steps(names, arguments, 2, {"lora_all", "half"})
    assert found["lora_all"] == {"error": "out of memory"}
    assert found["half"]["step_over_full"]["median"] == found["half"]["infer_merged_over_full"]["median"] == 1
    if command != "merge":  # nothing is merged in full fine-tuning
        speed.fails = {("full", command)}
        found = speed.compare_steps(names, arguments, 2, {"lora_all", "half"})
        assert all("out of memory" in values["error"] for values in found.values())


def test_a_failed_measurement_is_repeated_and_another_machine_is_refused(speed, tmp_path, monkeypatch, capsys):
    output = tmp_path / "speed.json"
    command = ["--quick", "--device", "cpu", "--output", str(output), "--only", "full", "half", "--parts", "step"]
    speed.fails = {("half", "step")}
    assert "error" in speed.main(command)["tiny/fp32/cpu"]["methods"]["half"]["step"]
    speed.fails.clear()
    assert "error" not in speed.main(command)["tiny/fp32/cpu"]["methods"]["half"]["step"]
    speed.asked.clear()
    monkeypatch.setattr("peft_sensi.utils.timing.processor_name", lambda: "another")
    speed.main(command)
    assert not speed.asked
    with pytest.raises(SystemExit, match="error: .*`cpu` is .* there, and 'another' in this run"):
        speed.main([*command, "--parts", "memory"])
    for mistake in (["--only", "halff"], ["--shapes", "tinny"]):
        with pytest.raises(SystemExit):
            speed.main(mistake)
        assert f"there is no {mistake[1]}; choose from" in capsys.readouterr().err


def test_copies_of_weights_are_told_from_activations_of_the_same_shape(grid):
    from memory_split import WeightCopies, saved_bytes
    from speed_methods import SHAPES

    shape, found = SHAPES["tiny"], []
    for rows in (2, 3):  # two rows have as many tokens as the model has hidden values
        model = shape.build().train()
        with WeightCopies(model) as copies, torch.autocast("cpu", torch.bfloat16):
            loss = model(**shape.batches(1, torch.device("cpu"), rows, 16)[0]).loss
        found.append(saved_bytes(model, loss, copies.found))
    (few, copied), (many, copied_too) = found
    assert copied == copied_too > 2 * 8 * 32 * 32  # 2 bytes; two layers with four matrices of this size, and more
    assert many == pytest.approx(1.5 * few, rel=0.01)


def test_a_page_is_written_as_a_whole_and_in_utf_8(grid, tmp_path, monkeypatch):
    import pages

    page = tmp_path / "page.md"
    page.write_bytes("± <!-- a: begin -->\n<!-- a: end --> 中".encode())
    pages.write_part(page, "a", "é")
    assert page.read_bytes().decode() == "± <!-- a: begin -->\né\n<!-- a: end --> 中"
    assert [*tmp_path.iterdir()] == [page]


def test_the_cost_of_a_wrap_is_measured_by_part(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    import wrap_cost

    threads, output = torch.get_num_threads(), tmp_path / "costs.json"
    few = ["--priming-steps", "4", "--calibration-steps", "4", "--batch-size", "4"]
    found = wrap_cost.main(["--shapes", "tiny", "--rows", "32", "--lengths", "8", "--output", str(output), *few])
    torch.set_num_threads(threads)
    assert json.loads(output.read_text()) == found
    (costs,) = found.values()
    parts = [costs[part] for part in (*wrap_cost.PARTS, "the rest")]
    assert all(part > 0 for part in parts) and sum(parts) == pytest.approx(costs["the wrap"])
    assert costs["share of an epoch"] == pytest.approx(costs["the wrap"] / 8)


def test_the_path_is_set_before_the_modules_of_the_examples_are_imported():
    benchmarks = ROOT / "examples" / "benchmarks"
    of_examples = {path.stem for path in benchmarks.parent.glob("*.py")}
    for path in benchmarks.glob("*.py"):
        code = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        lines = {}
        for node in code:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                lines[name] = min(node.lineno, lines.get(name, node.lineno))
        first = min((line for name, line in lines.items() if name in of_examples), default=None)
        assert first is None or lines.get("examples_path", first) < first, path.name


@pytest.mark.parametrize("name", ["learn_first", "systems"])
def test_a_benchmark_is_started_as_the_docs_say(name, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    script = ROOT / "examples" / "benchmarks" / f"{name}.py"
    found = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, env=environment, capture_output=True)
    assert found.returncode == 0, found.stderr.decode()


@pytest.fixture
def grid(monkeypatch):
    """The modules of the accuracy benchmarks."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    import grid

    AcceleratorState._reset_state()  # another test may have set its precision
    yield grid
    AcceleratorState._reset_state()


def write_six_classes(folder: Path) -> None:
    """Rows for the task `trec6`: the label is a letter in the sentence."""
    (folder / "trec6").mkdir(parents=True)
    for file, count in (("train.tsv", 600), ("test.tsv", 24)):
        lines = ["sentence\tlabel", *(f"the {'abcdef'[i % 6]} is in\t{'abcdef'[i % 6]}" for i in range(count))]
        (folder / "trec6" / file).write_text("\n".join(lines))


def test_accuracy_runs_are_made_once_and_become_a_table(grid, encoder, tmp_path, monkeypatch, capsys):  # noqa: F811
    import methods
    import tables
    import tasks

    write_six_classes(tmp_path / "data")
    task = replace(tasks.TASKS["trec6"], rows=64, epochs=1)
    names = ["full fine-tuning", "head only", "BitFit", "LoRA r=8, all Linears", "random units 0.5", "learners(64)",
             "sensi_bert(0.5), in cuts", "binary_mask(0.1)"]  # fmt: skip
    chosen = {name: methods.SYSTEMS[name] for name in names}
    chosen["a third of two layers"] = methods.Method(methods.TRIMMING["lower layers"](0.3), 1e-4)  # left out
    common = (str(encoder), tmp_path / "data", tmp_path / "results")
    monkeypatch.setattr(grid, "bf16_pays", lambda device: False)
    grid.run_all([task], chosen, [0], *common)
    results = {r["method"]: r for r in tables.read_results(tmp_path / "results")}
    assert set(results) == set(names)
    assert not any(r["bf16"] for r in results.values())
    full = results["full fine-tuning"]
    assert full["trained_values"] > results["LoRA r=8, all Linears"]["trained_values"]
    assert results["LoRA r=8, all Linears"]["trained_values"] > results["head only"]["trained_values"]
    for name in ("random units 0.5", "sensi_bert(0.5), in cuts"):
        assert results[name]["params_share"] < 1 and results[name]["flops_share"] < 0.7
    assert results["binary_mask(0.1)"]["zeros_share"] == pytest.approx(0.1, abs=0.01)
    assert results["binary_mask(0.1)"]["bytes"] < full["bytes"] / 2
    assert all(0 <= r["dev"] <= 1 and 0 <= r["held_out"] <= 1 for r in results.values())
    table = tables.systems_table(list(results.values()), methods.SYSTEMS)
    assert len(table.splitlines()) == 2 + len(names)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*.json")}
    grid.run_all([task], chosen, [0], *common)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*.json")}
    # A result of another precision is kept, with a note, also one without these settings. One of another model is not
    # taken for one of this run.
    monkeypatch.setattr(grid, "bf16_pays", lambda device: True)
    grid.run_all([task], {"BitFit": chosen["BitFit"]}, [0], *common)
    path = tmp_path / "results" / "trec6" / "bitfit-0.001-0.json"
    assert f"note: {path} is kept, which was made with bf16 = False" in capsys.readouterr().err
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"model": "other"}))
    with pytest.raises(SensiError, match=r"bitfit.*`model` is 'other' there, and .* in this run. Remove"):
        grid.run_all([task], {"BitFit": chosen["BitFit"]}, [0], *common)
    path.write_text(json.dumps({k: v for k, v in row.items() if k not in ("bf16", "model")}))
    grid.run_all([task], {"BitFit": chosen["BitFit"]}, [0], *common)


def test_rankings_are_compared_with_the_reference(grid, encoder, tmp_path):  # noqa: F811
    import rankings

    write_six_classes(tmp_path)
    settings = ["--settings", "1x8/1", "3x8/2", "--reference", "3x8/2", "--seeds", "0"]
    table = rankings.main(["--model", str(encoder), "--data", str(tmp_path), "--tasks", "trec6", *settings])
    assert [line.split(" | ")[1] for line in table.splitlines()[2:]] == ["1x8/1", "3x8/2"]
    a, b = torch.arange(8.0), torch.arange(8.0).flip(0)
    assert [rankings.in_common(a, other, 0.25) for other in (a, b)] == [1.0, 0.0]
    assert rankings.in_common(a, b, 0.75) == pytest.approx(4 / 6)


def test_learning_first_is_compared_and_resumed(grid, encoder, tmp_path, capsys):  # noqa: F811
    import learn_first
    import tables
    import tasks

    write_six_classes(tmp_path)
    data = tasks.load_task(replace(tasks.TASKS["trec6"], rows=64, epochs=1), tmp_path, str(encoder), 0)
    common = {"model": "tiny", "task": "trec6", "seed": 0}
    settings = learn_first.settings_of(str(encoder), bf16=False)
    rows = learn_first.Rows(tmp_path / "results", common, data, settings)
    learn_first.run_seed(rows, str(encoder), [0.5], models=tmp_path / "models")
    results = tables.read_results(tmp_path / "results")
    found = {r["method"] for r in results}
    assert {"full", "fine-tuned, trimmed to 0.5", "fast to 0.5", "late to 0.5"} <= found
    assert {"thorough to 0.5, 0 epochs after", "fine-tuned, trimmed to 0.5, 1 epoch after, taught"} <= found
    assert len(tables.ways_table(results).splitlines()) == 2 + len(found)
    without_full = [r for r in results if r["method"] != "full"]
    assert len(tables.ways_table(without_full).splitlines()) == 1 + len(found)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*.json")}
    learn_first.run_seed(rows, str(encoder), [0.5])
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*.json")}
    # Neither a row nor a kept model of another rate is used.
    rows.settings = learn_first.settings_of(str(encoder), bf16=False, usual_rates=(1e-3, 1e-4))
    with pytest.raises(SensiError, match=r"`usual_rates` is \[5e-05, 0.0001\] there, and \[0.001, 0.0001\]"):
        learn_first.run_seed(rows, str(encoder), [0.5])
    rows.folder = tmp_path / "others"
    with pytest.raises(SensiError, match=r"seconds.json .*`rate` is 5e-05 there, and 0.001 in this run"):
        learn_first.run_seed(rows, str(encoder), [0.5], models=tmp_path / "models")


def test_accuracy_at_equal_latency_is_measured_once(grid, encoder, tmp_path, monkeypatch):  # noqa: F811
    import latency
    import tables
    import tasks

    write_six_classes(tmp_path)
    monkeypatch.setitem(tasks.TASKS, "trec6", replace(tasks.TASKS["trec6"], rows=64, epochs=1))

    def made_up(function, model, *others, **options):
        return made_up_table(model) if function is latency.measure_latency else (6e-3, 1e-2)

    monkeypatch.setattr(latency, "in_new_process", made_up)
    monkeypatch.setattr(latency, "processor_name", lambda: "x")  # as in the made-up table
    page = tmp_path / "page.md"
    page.write_text("<!-- latency_accuracy: begin -->\n<!-- latency_accuracy: end -->\n")
    command = ["accuracy", "--model", f"tiny={encoder}", "--data", tmp_path, "--results", tmp_path / "results",
               "--tasks", "trec6", "--seeds", 0, "--shares", 0.75, "--page", page,
               "--length", 8, "--picture", tmp_path / "picture.png"]  # fmt: skip
    latency.main(list(map(str, command)))
    results = tables.read_results(tmp_path / "results" / "accuracy")
    assert {r["method"] for r in results} == {"full", *latency.METHODS}
    assert {(r["limit"], r["latency"]) for r in results if r["method"] != "full"} == {(0.75, 0.6)}
    assert "| tiny | trec6 | nothing (the whole model) | 1 |" in page.read_text()
    assert (tmp_path / "picture.png").exists()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*.json")}
    latency.main(list(map(str, command)))
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*.json")}


def test_accuracy_at_equal_latency_is_averaged_over_seeds(grid, tmp_path):
    import latency

    folder = tmp_path / "accuracy"
    folder.mkdir()
    rows = {
        0: [("full", None, 0.9), ("latency", 0.5, 0.8), ("flops", 0.6, 0.8)],
        1: [("full", None, 0.7), ("latency", 0.4, 0.6), ("flops", 0.5, 0.5)],
    }
    for seed, found in rows.items():
        for method, share, dev in found:
            row = {"model": "tiny", "task": "trec6", "seed": seed, "method": method, "dev": dev}
            (folder / f"{method}{seed}.json").write_text(json.dumps(row | ({"latency": share} if share else {})))
    (folder / "other.json").write_text(json.dumps(row | {"model": "whole only", "method": "full", "dev": 0.5}))
    table = latency.accuracy_table(tmp_path, [0.75, 0.5]).splitlines()[2:]
    assert table.pop() == "| whole only | trec6 | nothing (the whole model) | 1 | 0.500 | 0.500 |"
    assert table == [
        # The first run's plan by FLOPs takes 60 %, so it has no value at 50 %.
        "| tiny | trec6 | flops | 2 | 0.719 ± 0.119 | 0.500 (1) |",
        "| tiny | trec6 | latency | 2 | 0.754 ± 0.096 | 0.708 ± 0.092 |",
        "| tiny | trec6 | nothing (the whole model) | 2 | 0.800 ± 0.100 | 0.800 ± 0.100 |",
        "| tiny | trec6 | latency, points above flops | 2 | +3.5 ± 2.3 | +11.7 (1) |",
    ]


def test_a_picture_has_one_point_for_each_limit_and_one_metric(grid):
    import latency

    def run(method, dev, task="trec6", **more):
        return {"method": method, "dev": dev, "task": task, **more}

    runs = [run("full", 0.9), run("params", 0.7, limit=0.5, latency=0.41), run("params", 0.8, limit=0.5, latency=0.43)]
    whole, *others = latency.points(runs)
    assert whole == {"method": "whole model", "dev": 0.9}
    assert [r["dev"] for r in others] == [0.7, 0.8] and [r["latency"] for r in others] == pytest.approx([0.42] * 2)
    with pytest.raises(SensiError, match=r"one metric, but these have accuracy and f1: draw one picture for each"):
        latency.points([*runs, run("full", 0.5, "wnut17")])


def test_a_quick_check_leaves_the_committed_results_alone(grid, monkeypatch, capsys):
    import latency

    used = []
    monkeypatch.setattr(latency, "promise", lambda options: used.append(options.results))
    latency.main(["promise", "--quick"])
    latency.main(["promise"])
    assert used[0] != latency.RESULTS == used[1] and not used[0].exists()


def test_a_latency_table_of_another_processor_is_refused(grid, tmp_path):
    from tiny import tiny_model

    import latency

    file, table = tmp_path / "tables" / "minilm.json", made_up_table(tiny_model())
    where = {"batch_size": table.batch_size, "sequence_length": table.sequence_length}
    assert latency.table_at(file, where, lambda: table) == table
    with pytest.raises(SensiError, match=r"`device` is .* there, and .* in this run"):
        latency.table_at(file, where, lambda: table)


@pytest.mark.slow
def test_a_new_process_times_a_trained_model(grid, encoder):  # noqa: F811
    import latency

    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=6).eval()
    options = {"batch_size": 1, "sequence_length": 16, "runtime": "torch", "threads": 1, "rounds": 1}
    own, base = latency.in_new_process(latency.compare_latency, model, model, **options)
    assert own > 0 and base > 0


def test_the_page_on_latency_has_the_tables_of_the_committed_results(grid):
    import latency

    page = (ROOT / "docs" / "latency.md").read_text()
    accuracy = latency.accuracy_table(latency.RESULTS, [0.75, 0.5, 0.35])
    for name, table in (("latency", latency.promise_table(latency.RESULTS)), ("latency_accuracy", accuracy)):
        assert f"<!-- {name}: begin -->\n{table}\n<!-- {name}: end -->" in page


@pytest.mark.parametrize("name", ["quality", "systems", "learn_first_shares", "learn_first_means", "learn_first_rows"])
def test_the_documentation_has_the_table_of_the_committed_results(grid, name):
    import methods
    import tables

    folder = "learn_first" if name.startswith("learn_first") else name
    results = tables.read_results(ROOT / "examples" / "benchmarks" / "results" / folder)
    page = ROOT / "docs" / ("results-systems.md" if name == "systems" else "quality.md")
    table = {
        "quality": tables.quality_table,
        "systems": lambda found: tables.systems_table(found, methods.SYSTEMS),
        "learn_first_rows": tables.ways_table,
        "learn_first_shares": tables.shares_table,
        "learn_first_means": tables.ways_summary,
    }[name](results)
    assert f"<!-- {name}: begin -->\n{table}\n<!-- {name}: end -->" in page.read_text()


def test_the_readme_quotes_the_table(grid):
    import tables

    results = tables.read_results(ROOT / "examples" / "benchmarks" / "results" / "quality")
    rows = tables.quality_table([r for r in results if r["task"] in ("trec6", "sst2")]).splitlines()
    readme = (ROOT / "README.md").read_text().splitlines()
    quoted = {
        "full fine-tuning": "full",
        "LoRA, 1 % of the values": "tune 0.01 LoRA",
        "`budget=0.5`": "trim 0.5 ours",
        "`budget=0.25`": "trim 0.25 ours",
        "`budget=0.1`": "trim 0.1 ours",
        "`budget=0.5`, random ranking": "trim 0.5 random, refitted",
    }
    for label, method in quoted.items():
        _, _, *shown = cells(next(line for line in readme if line.startswith(f"| {label} |")))
        expected = cells(next(row for row in rows if row.startswith(f"| {method} |")))[1:4]
        assert shown == [cell.partition("±")[0].strip().replace("%", " %") for cell in expected], label


def cells(line: str) -> list[str]:
    """The cells of a row of a Markdown table."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_words_are_scored_as_entities_of_whole_sentences(grid, encoder, tmp_path):  # noqa: F811
    import methods
    import tables
    import tasks

    folder = tmp_path / "data" / "wnut17"
    folder.mkdir(parents=True)
    for file, count in (("train.conll", 90), ("dev.conll", 21)):
        sentences = [[f"{'ab' * (i % 5)}\tO", "here\tO", "cab\tB-x", *["bad\tI-x"] * (i % 3)] for i in range(1, count)]
        (folder / file).write_text(
            "\n\n".join("\n".join(sentence[i % 5 == 0 :]) for i, sentence in enumerate(sentences))
        )
    task = replace(tasks.TASKS["wnut17"], classes=3, epochs=1, held_out=20)
    data = tasks.load_task(task, tmp_path / "data", str(encoder), seed=0)

    class Perfect(torch.nn.Module):
        device, wrong = torch.device("cpu"), 0

        def forward(self, labels, **inputs):
            logits = torch.nn.functional.one_hot(labels.clamp(min=0), 3).float()
            logits[: self.wrong] = 0.0
            return SimpleNamespace(logits=logits)

    assert grid.score(Perfect(), data, "dev") == grid.score(Perfect(), data, "held_out") == 1.0
    model = Perfect()
    model.wrong = 5
    assert 0.5 < grid.score(model, data, "dev") < 1.0
    chosen = {name: methods.Method(methods.TRIMMING[name](0.5), 1e-3) for name in ("ours", "random, refitted")}
    grid.run_all([task], chosen, [0], str(encoder), tmp_path / "data", tmp_path / "results")
    results = tables.read_results(tmp_path / "results")
    assert len(results) == 2 and all(r["metric"] == "f1" and 0 <= r["dev"] <= 1 for r in results)


def test_answers_are_scored_as_texts_of_whole_articles(grid, encoder, tmp_path):  # noqa: F811
    import learn_first
    import tables
    import tasks

    articles = []
    for number in range(20):
        text = f"the cab is in {'abcdefgh'[number % 8]} " * (1 + number % 3)
        answer = {"text": "cab", "answer_start": text.index("cab")}
        entries = [{"id": str(i), "question": "who is in", "answers": [answer]} for i in range(3)]
        articles.append({"title": str(number), "paragraphs": [{"context": text, "qas": entries}]})
    (tmp_path / "mlqa_en").mkdir()
    (tmp_path / "mlqa_en" / "dev.json").write_text(json.dumps({"data": articles}))
    task = replace(tasks.TASKS["mlqa_en"], epochs=1)
    data = tasks.load_task(task, tmp_path, str(encoder), seed=0)
    assert [len(data.metrics), len(data.dev), len(data.held_out)] == [3, 18, 6]

    class Perfect(torch.nn.Module):
        device, wrong = torch.device("cpu"), 0

        def forward(self, start_positions, end_positions, input_ids, **inputs):
            one_hot = torch.nn.functional.one_hot
            starts, ends = (one_hot(p, input_ids.shape[1]).float() for p in (start_positions, end_positions))
            starts[: self.wrong], ends[: self.wrong] = 0.0, 0.0
            return SimpleNamespace(start_logits=starts, end_logits=ends)

    assert grid.score(Perfect(), data, "dev") == grid.score(Perfect(), data, "held_out") == 1.0
    model = Perfect()
    model.wrong = 5
    assert 0.5 < grid.score(model, data, "dev") < 1.0
    common, settings = {"model": "tiny", "task": "mlqa_en", "seed": 0}, learn_first.settings_of(str(encoder), False)
    rows = learn_first.Rows(tmp_path / "results", common, data, settings)
    learn_first.run_seed(rows, str(encoder), [0.5], ways=["trimmed", "taught", "late"], late_cuts=[0.3])
    results = tables.read_results(tmp_path / "results")
    assert len(results) == 3 and all(0 <= r["dev"] <= 1 for r in results)


def test_noisy_tasks_are_shown_but_decide_nothing(grid):
    import tables

    def run(task, method, dev):
        return {"task": task, "method": method, "dev": dev, "held_out": 0.5, "rate": 1e-4, "seed": 0}

    runs = [run("trec6", "full", 0.9), run("cola", "full", 0.5), run("trec6", "trim 0.5 ours", 0.9)]
    line = tables.quality_table([*runs, run("cola", "trim 0.5 ours", 0.1)]).splitlines()[3]
    assert "0.900 | 0.100 | 100.0% |" in line
    drawn = tables.budgets_series([*runs, run("cola", "trim 0.5 ours", 0.1)])
    assert [record["method"] for record in drawn] == ["full fine-tuning", "peft_sensi"]
    # A row without all tasks of `ours` is not drawn.
    runs += [run("sst2", "full", 0.9), run("sst2", "trim 0.5 ours", 0.8), run("trec6", "trim 0.5 random", 0.9)]
    assert {record["method"] for record in tables.budgets_series(runs)} == {"full fine-tuning", "peft_sensi"}


def test_tables_tell_who_loses_to_a_control_and_choose_rates_on_held_out_rows(grid):
    import methods
    import tables

    def run(method, dev, held_out=0.5, rate=1e-4, seed=0):
        return {"task": "trec6", "method": method, "dev": dev, "held_out": held_out, "rate": rate, "seed": seed,
                "trained_values": 1, "params_share": 1, "flops_share": 1, "zeros_share": 0, "bytes": 1}  # fmt: skip

    rows = [run("far(0.1)", 0.7), run("far, random", 0.8), run("far(0.1)", 0.8, seed=1), run("BitFit", 0.5)]
    _, _, bitfit, far, control = tables.systems_table(rows, methods.SYSTEMS).splitlines()
    assert far.endswith("| trec6 -10.0 (far, random) |") and bitfit.endswith("| - |") and control.endswith("| - |")
    far = tables.systems_table([*rows, run("far, random", 0.7, seed=1)], methods.SYSTEMS).splitlines()[3]
    assert far.endswith("| trec6 +0.0 ± 10.0 (far, random) |")
    runs = [run("full", 0.9, 0.9, 1e-4), run("full", 0.99, 0.8, 3e-4), run("full", 0.7, 0.0, 1e-4, seed=1),
            run("trim 0.5 ours", 0.8), run("trim 0.25 ours", 0.276)]  # fmt: skip
    kept = {(r["method"], r["seed"]): r["retention"] for r in tables.retentions(runs)}
    assert ("full", 1) in kept and kept["trim 0.25 ours", 0] == 0
    assert kept["trim 0.5 ours", 0] == pytest.approx((0.8 - 0.276) / (0.8 - 0.276))
    started = [run("full, head started", score, seed=seed) for seed, score in enumerate((0.9, 1.0, 0.8))]
    for used, share in ((started[:2], 1.0), (started, (0.8 - 0.276) / (0.9 - 0.276))):  # of three seeds or more
        kept = {r["method"]: r["retention"] for r in tables.retentions([*runs, *used])}
        assert kept["trim 0.5 ours"] == pytest.approx(share)
    drawn = tables.budgets_series([*runs, run("tune 0.01 LoRA", 0.8), run("tune 0.01 SHiRA", 0.8)])
    assert [r["budget"] for r in drawn if "budget" in r] == [0.5, 0.25]
    assert {r["method"] for r in drawn if "budget" not in r} == {"full fine-tuning", "LoRA, 1% trained"}
    lines = tables.quality_table(runs).splitlines()
    assert lines[2].startswith("| full |") and lines[3].startswith("| trim 0.5 ours |")
    lines = tables.quality_table([*runs, run("full, embeddings frozen", 0.9)]).splitlines()
    assert lines[3].startswith("| full, embeddings frozen |")
    runs += [run("trim 0.25 random", 0.276 - 0.0524), run("trim 0.25 random", 0.9, seed=1)]  # ours has no seed 1
    random = next(line for line in tables.quality_table(runs).splitlines() if line.startswith("| trim 0.25 random |"))
    assert "| 10.0% |" in random
    runs += [run("trim 0.25 ours", 0.276 + 0.0524 * seed, seed=seed) for seed in (2, 3)]
    runs += [run("trim 0.25 random", 0.276, seed=seed) for seed in (2, 3)]
    random = next(line for line in tables.quality_table(runs).splitlines() if line.startswith("| trim 0.25 random |"))
    assert "| 20.0% ± 5.8% |" in random, "of 10, 20 and 30 points"
    # Tasks count the same, however many seeds they have, and their difference is no error.
    found = tables.over_tasks([(0.9, 0.03), (1.0, 0.04)])
    assert found == pytest.approx((0.95, 0.025))


def test_the_means_of_a_way_are_paired_by_seed_and_need_three(grid):
    import tables

    def runs(model, task, method, *scores):
        common = {"model": model, "task": task, "method": method}
        return [common | {"seed": seed, "dev": score, "held_out": score} for seed, score in enumerate(scores)]

    results = [
        *runs("a", "trec6", "full", 0.676, 0.776, 0.876),  # a gain of 0.5 over the constant answer
        *runs("a", "trec6", "late to 0.5", 0.626, 0.726, 0.826),
        *runs("b", "wnut17", "full", 0.4, 0.4, 0.4),
        *runs("b", "wnut17", "late to 0.5", 0.4, 0.44, 0.48),
        *runs("b", "cola", "full", 0.2, 0.2, 0.2),
        *runs("b", "cola", "late to 0.5", 0.1, 0.1),  # too few seeds
        *runs("c", "wnut17", "full", 0.0, 0.0, 0.0),  # learns nothing, so there is nothing to keep
        *runs("c", "wnut17", "late to 0.5", 0.1, 0.1, 0.1),
    ]
    header, _, row = tables.ways_summary(results).splitlines()
    assert cells(header) == ["way", "trec6 + sst2 + wnut17, dev", "trec6 + sst2 + wnut17, held-out"]
    # 90 % without an error (91 % on the held-out rows, of which fewer are of the most frequent class), and 100, 110
    # and 120 % with a standard error of 5.77 points.
    assert cells(row) == ["late to 0.5", "100.0% ± 2.9% (2)", "100.3% ± 2.9% (2)"]
    header, _, *rows = tables.shares_table(results).splitlines()
    assert cells(header) == ["model", "way", "trec6 / sst2 / wnut17 at 50%"]
    assert list(map(cells, rows)) == [["a", "late", "90% / - / -"], ["b", "late", "- / - / 110%"]]


def test_every_row_builds_and_has_the_stated_size(grid):
    from tiny import tiny_batches, tiny_model

    import methods

    run = methods.Run(tiny_batches(), steps=4, epochs=1, seed=0)
    whole = tiny_model().base_model.num_parameters()

    def count(module):
        return sum(p.numel() for p in module.parameters())

    for kind, rows in (("tune", methods.TUNING), ("trim", methods.TRIMMING)):
        for name, make in rows.items():
            budget = 0.5 if kind == "trim" else 0.2
            model = make(budget)(tiny_model(), run)
            model(**tiny_batches()[0]).loss.backward()
            named = model.named_parameters()
            trained = sum(p.numel() for n, p in named if p.requires_grad and "classifier" not in n)
            assert trained > 0, name
            if kind == "tune" and name not in ("BitFit", "LayerNorm"):
                most = 0.3 if name == "AdaLoRA" else 0.2  # its ranks shrink during training
                assert 0.1 * whole < trained <= most * whole, name
            if kind == "trim":
                merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
                blocks, was = merged.base_model.encoder, tiny_model().base_model.encoder
                assert count(blocks) == pytest.approx(0.5 * count(was), rel=0.1), name


def test_adalora_loses_ranks_while_it_trains(grid, encoder, tmp_path):  # noqa: F811
    import methods
    import tasks

    folder = tmp_path / "data" / "trec6"
    folder.mkdir(parents=True)
    lines = "\n".join(f"{label}\t{'ab ' * (i % 5)}cab" for i in range(40) for label in "xyzuvw")
    for file in ("train.tsv", "test.tsv"):
        (folder / file).write_text("label\tsentence\n" + lines)
    task = replace(tasks.TASKS["trec6"], epochs=6, held_out=20)
    data = tasks.load_task(task, tmp_path / "data", str(encoder), seed=0)
    built = []

    def build(base, run):
        built.append(methods.adalora_of(0.2)(base, run))
        return built[0]

    grid.train(data, methods.Method(build, 1e-3), str(encoder), 1e-3, 0)
    config = built[0].peft_config["default"]
    assert config.target_r * len(config.rank_pattern) >= sum(map(sum, config.rank_pattern.values())) > 0


def test_the_picture_of_the_readme_has_rows_with_all_tasks(grid, tmp_path):
    import plots
    import tables

    def run(task, method, dev, seed=0, flops=0.5):
        return {"task": task, "method": method, "dev": dev, "held_out": 0.5, "rate": 1e-4, "seed": seed,
                "flops_share": flops}  # fmt: skip

    runs = [run(task, "full", dev, seed, 1.0) for task in ("trec6", "sst2") for seed, dev in enumerate((0.8, 0.9))]
    runs += [
        run("trec6", "trim 0.5 ours", 0.7),
        run("sst2", "trim 0.5 ours", 0.9),
        run("trec6", "trim 0.25 ours", 0.9),
    ]
    series = tables.front_series(runs, {"full": "all", "trim ours": "ours"})
    (all_of_it,) = series["all"]
    assert all_of_it == pytest.approx((1.0, 0.85, 0.05 / 2**0.5))  # the errors of the tasks are independent
    assert [point[:2] for point in series["ours"]] == [pytest.approx((0.5, 0.8))]
    plots.plot_front(series, tmp_path / "front.png", "all", xlabel="x", ylabel="y")
    assert (tmp_path / "front.png").stat().st_size > 5000
