"""The report of fabricated runs: complete, failed, of other stages; its table against the metrics; no outside parts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fabricated_run import (
    CONVERTED,
    DATA_SHA256,
    DISTILLED,
    LABEL,
    SOURCE_PERPLEXITY,
    FabricatedRun,
    complete_run,
    dataset_outputs,
    evaluation_artifact,
    failed_run,
    model_output,
)

from posttrain.errors import RecipeError
from posttrain.report import build


class Page(HTMLParser):
    """Tables as rows of cells, images, links, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.addresses: list[str] = []
        self.images: list[str] = []
        self.texts: list[str] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.addresses += [values[name] or "" for name in ("src", "href", "srcset", "data", "action") if name in values]
        if tag == "img":
            self.images.append(values.get("src") or "")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._cell:
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def page_of(run_dir: Path) -> Page:
    return Page(build(run_dir).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    run_dir = complete_run(tmp_path_factory.mktemp("outputs"))
    build(run_dir)
    return run_dir


def results(page: Page) -> dict[str, dict[str, str]]:
    header, *rows = page.tables[0]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def number(cell: str) -> float:
    return float(re.match(r"[\d,.]+", cell).group().replace(",", ""))


def test_the_table_holds_the_metrics_of_every_model(complete: Path) -> None:
    table = results(page_of(complete))
    assert list(table) == [f"source ({LABEL})", "after upcycle", "after distill"]
    source, *converted = table.values()
    assert number(source["perplexity (95 % interval)"]) == SOURCE_PERPLEXITY
    assert source["KL to source, nats/token"] == source["top-1 agreement"] == "–"
    assert number(source["KV B/token predicted"]) == number(source["KV B/token measured"]) == 46080
    for row, figures in zip(converted, (CONVERTED, DISTILLED), strict=True):
        value, low, high = re.findall(r"[\d.]+", row["perplexity (95 % interval)"])
        expected = [figures["perplexity"], figures["perplexity_low"], figures["perplexity_high"]]
        assert [float(value), float(low), float(high)] == expected
        assert number(row["KL to source, nats/token"]) == pytest.approx(figures["kl"], rel=5e-4)
        assert number(row["top-1 agreement"]) == pytest.approx(100 * figures["top1_agreement"], abs=0.051)
        assert number(row["KV B/token measured"]) == 7680 and number(row["parameters"]) == 1234567
        assert number(row["decode tokens/s"]) == pytest.approx(14.25, abs=0.051)
        assert row["data SHA-256"] == DATA_SHA256[:12]


def test_the_share_of_the_gap_is_that_of_the_definition(complete: Path) -> None:
    table = results(page_of(complete))
    assert table["after upcycle"]["gap recovered (in nll)"] == "–"
    share = 1 - (DISTILLED["perplexity"] - SOURCE_PERPLEXITY) / (CONVERTED["perplexity"] - SOURCE_PERPLEXITY)
    assert number(table["after distill"]["gap recovered (in nll)"]) == pytest.approx(100 * share, abs=0.051)


def test_the_page_needs_nothing_from_outside(complete: Path) -> None:
    page = page_of(complete)
    assert len(page.images) >= 5 and all(image.startswith("data:image/png;base64,iVBOR") for image in page.images)
    assert all(address.startswith("data:") for address in page.addresses)
    text = (complete / "report.html").read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "<script" not in text
    assert "@import" not in text and "url(" not in text


def test_plots_come_before_the_first_table(complete: Path) -> None:
    html = (complete / "report.html").read_text(encoding="utf-8")
    markdown = (complete / "report.md").read_text(encoding="utf-8")
    assert html.index("<img") < html.index("<table") and markdown.index("![") < markdown.index("| model")


def test_markdown_has_the_same_table_and_its_plots_exist(complete: Path) -> None:
    markdown = (complete / "report.md").read_text(encoding="utf-8")
    for cells in page_of(complete).tables[0]:
        assert "| " + " | ".join(cells) + " |" in markdown
    plots = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", markdown)
    assert len(plots) >= 5 and all((complete / plot).read_bytes().startswith(b"\x89PNG") for plot in plots)


def test_what_a_model_said_cannot_become_markup(complete: Path) -> None:
    html = (complete / "report.html").read_text(encoding="utf-8")
    assert "Maybe <b>no</b>." not in html and "Maybe &lt;b&gt;no&lt;/b&gt;." in html
    assert "Yes \\| it is." in (complete / "report.md").read_text(encoding="utf-8")


def test_control_characters_that_a_model_gave_are_shown_as_signs(complete: Path) -> None:
    """With a NUL in it report.md was a binary file to grep, and report.html no valid HTML."""
    for name in ("report.html", "report.md"):
        text = (complete / name).read_text(encoding="utf-8")
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text) and ".\u2400\u241b" in text, name


def test_the_report_says_how_to_repeat_the_run_and_what_it_does_not_show(complete: Path) -> None:
    text = page_of(complete).text
    assert "posttrain run x_ecomla scale=demo stages.distill.lr=1e-4" in text
    assert "feedbeef" in text and DATA_SHA256 in text
    assert "What this does not show" in text and "One seed (7)" in text and "20,480 tokens of 24 documents" in text
    assert "max_steps = 40 (default 1000)" in text


def test_a_failed_run_shows_its_message_and_what_is_there(tmp_path: Path) -> None:
    page = page_of(failed_run(tmp_path))
    assert "Stage distill failed: the loss is <NaN> at step 3" in page.text
    assert "Without a result so far: evaluate" in page.text
    assert "random weights" in page.text
    assert "No model was evaluated" in page.text
    assert len(page.images) >= 2, "the training log so far and the conversion"


def test_a_stopped_run_says_where_and_how_to_go_on(tmp_path: Path) -> None:
    run = FabricatedRun(tmp_path)
    run.stage("model", "model_source", {}, artifact={"outputs": model_output(LABEL)})
    run.stage("upcycle", "mla_upcycle", {"model": "model"})
    run.events += [
        {"time": 1.0, "event": "stage_started", "stage": "upcycle", "attempt": 1, "pid": 1},
        {"time": 2.0, "event": "stage_stopped", "stage": "upcycle", "step": 5},
    ]
    text = page_of(run.finish()).text
    assert "Stage upcycle stopped" in text and "posttrain resume" in text


def test_other_stages_and_two_baselines_are_not_mixed(tmp_path: Path) -> None:
    run = FabricatedRun(tmp_path)
    run.stage("model", "model_source", {}, artifact={"outputs": model_output(LABEL)})
    run.stage("models.other", "model_source", {}, artifact={"outputs": model_output("Other-2B")})
    run.stage("data", "data_source", {}, artifact={"outputs": dataset_outputs()})
    run.stage(
        "tune", "somebody_elses", {"model": "model"}, artifact={"outputs": model_output(), "config": {"beta": 0.1}}
    )
    inputs = {"model": "tune.model", "data": "data.heldout"}
    for name, baseline, changes in (("first", "model", {}), ("second", "models.other", {"data_sha256": "cd" * 32})):
        entry = {**inputs, "baseline": baseline} if baseline == "model" else inputs
        folder = run.stage(name, "evaluate", entry, artifact=evaluation_artifact(DISTILLED, "A.", **changes))
        assert folder.exists()
    # A dotted source name cannot be written as a reference in the fabricated run: point the second one there by hand.
    other = next(item for item in run.stages if item["name"] == "models.other")
    second = run.stages[-1]
    second["inputs"]["baseline"] = {"stage": "models.other", "output": "model", "key": other["key"], "reference": ""}
    page = page_of(run.finish())
    table = page.tables[0]
    assert [row[0] for row in table[1:]] == [
        f"source ({LABEL})",
        "after tune",
        "source of second (Other-2B)",
        "after tune",
    ]
    assert all(row[table[0].index("gap recovered (in nll)")] == "–" for row in table[1:])
    assert "tune: beta = 0.1" in page.text
    assert "compare only those with the same SHA-256" in page.text


def test_an_unchanged_run_is_not_built_again(tmp_path: Path) -> None:
    run_dir = complete_run(tmp_path)
    page = build(run_dir)
    first = page.stat().st_mtime_ns
    events = run_dir / "events.jsonl"
    # A second run of the same recipe only adds events that say so.
    with events.open("a") as file:
        file.write(json.dumps({"time": 9.0, "event": "stage_cached", "stage": "model"}) + "\n")
    assert build(run_dir) == page and page.stat().st_mtime_ns == first
    (run_dir / "report.md").unlink()
    build(run_dir)
    assert page.stat().st_mtime_ns != first and (run_dir / "report.md").exists()


def test_a_changed_run_is_built_again(tmp_path: Path) -> None:
    run_dir = complete_run(tmp_path)
    build(run_dir)
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**record, "description": "Said anew."}))
    assert "Said anew." in page_of(run_dir).text


def test_a_manifest_edited_by_hand_is_refused(tmp_path: Path) -> None:
    run_dir = complete_run(tmp_path)
    manifest = next((tmp_path / "store" / "evaluate").glob("*/manifest.json"))
    manifest.write_text(manifest.read_text().replace("14.5", "11.5"))
    with pytest.raises(RecipeError, match="changed after it was written"):
        build(run_dir)


def test_no_run_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        build(tmp_path)


def test_building_a_report_imports_no_torch(tmp_path: Path) -> None:
    run_dir = complete_run(tmp_path)
    code = (
        "import sys, pathlib\nfrom posttrain.report import build\nassert 'matplotlib' not in sys.modules\n"
        f"build(pathlib.Path({str(run_dir)!r}))\nassert not {{'torch', 'transformers'}} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
