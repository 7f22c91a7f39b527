"""Runs of toy recipes in real worker processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import toy_stages
from toy_stages import ToyTrainConfig, toy_recipe

from posttrain.cli import cancel, clean, live, logs, status
from posttrain.cli import verify as verify_command
from posttrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, RecipeError
from posttrain.launch import local
from posttrain.launch.signals import Interrupts
from posttrain.pipeline.files import remove_tree
from posttrain.pipeline.lock import Lock, held
from posttrain.pipeline.plan import make_plan
from posttrain.pipeline.progress import state_of
from posttrain.pipeline.run_dir import find_run
from posttrain.pipeline.runner import plan_and_run
from posttrain.pipeline.store import verify


class Recorder:
    """A display that remembers, and may act on what it sees."""

    def __init__(self, act=None):
        self.notes, self.events, self.act = [], [], act

    def event(self, event, state):
        self.events.append(event)
        if self.act is not None:
            self.act(event)

    def note(self, text):
        self.notes.append(text)


def run(display=None, *, selection=None, yes=True, **settings):
    return plan_and_run(lambda: make_plan(toy_recipe(**settings), **(selection or {})), display, yes=yes)


def kinds(result):
    return [event["event"] for event in result.run_dir.events() if event["event"] not in ("progress", "metrics")]


def history(result):
    return (result.run_dir.path / "artifacts" / "train" / "history" / "history.jsonl").read_bytes()


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def test_a_run_and_the_same_again(reports):
    first = run()
    assert first.exit_code == EXIT_DONE and first.report.exists()
    record = json.loads((first.run_dir.path / "run.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == ["data", "train", "evaluate"]
    assert record["stages"][1]["inputs"]["data"]["reference"] == "data.train"
    for stage in record["stages"]:
        folder = Path("outputs") / stage["artifact"]
        assert verify(folder) == []
        assert (first.run_dir.path / "artifacts" / stage["name"]).resolve() == folder.resolve()
        assert first.run_dir.logs(stage["name"])
    assert not list(Path("outputs/store").glob("*/.*"))
    assert kinds(first) == ["run_started", *["stage_started", "stage_finished"] * 3, "run_finished"]
    again = run()
    assert again.exit_code == EXIT_DONE and kinds(again)[-5:] == ["run_started", *["stage_cached"] * 3, "run_finished"]
    assert len(reports) == 1, "nothing had changed"
    changed = run(lr=2e-5)
    assert changed.run_dir.name != first.run_dir.name
    assert kinds(changed).count("stage_started") == 2 and kinds(changed).count("stage_cached") == 1


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        ("known", "do: lower lr"),
        ("unknown", "ZeroDivisionError"),
        ("exit", "ended with code 9 without saying why"),
        ("nan", "no numbers"),
    ],
)
def test_a_failed_stage_says_why_and_can_be_repaired(fail, said):
    result = run(fail=fail)
    assert result.exit_code == EXIT_FAILED and said in result.message and "attempt_1.log" in result.message
    assert ("Traceback" in result.message) == (fail == "unknown")
    assert kinds(result)[-2:] == ["stage_failed", "run_finished"]
    assert "failed" in status.screen(result.run_dir) and "posttrain resume" in status.screen(result.run_dir)
    repaired = run(frame={"run": {"name": "repaired"}})
    assert repaired.exit_code == EXIT_DONE


def test_cancel_stops_and_the_same_command_continues_to_the_same_result():
    undisturbed = history(run(steps=8, frame={"run": {"name": "undisturbed"}}, outputs="elsewhere"))

    def stop(event):
        if event["event"] == "metrics" and event["step"] == 2:
            assert cancel.request_stop(find_run("mine", Path("outputs")))

    frame = {"run": {"name": "mine"}}
    stopped = run(Recorder(stop), steps=8, pause=0.2, frame=frame)
    assert stopped.exit_code == EXIT_STOPPED and "posttrain resume mine" in stopped.message
    assert kinds(stopped)[-3:] == ["stop_requested", "stage_stopped", "run_finished"]
    assert "stopped" in status.screen(stopped.run_dir)
    assert make_plan(toy_recipe(steps=8, pause=0.2, frame=frame))["train"].resumes
    done = run(steps=8, pause=0.2, frame=frame)
    assert done.exit_code == EXIT_DONE and history(done) == undisturbed
    assert state_of(done.run_dir.events()).stages["train"].attempts == 2
    assert [path.name for path in done.run_dir.logs("train")] == ["attempt_1.log", "attempt_2.log"]


def test_cancel_now_kills_and_is_still_resumable():
    def kill(event):
        if event["event"] == "metrics" and event["step"] == 2:
            cancel.request_stop(find_run(None, Path("outputs")), now=True)

    assert run(Recorder(kill), steps=8, pause=0.2).exit_code == EXIT_STOPPED
    assert run(steps=8, pause=0.2).exit_code == EXIT_DONE


def test_first_ctrl_c_is_graceful_and_the_second_kills():
    def once(event):
        if event["event"] == "metrics" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    display = Recorder(once)
    assert run(display, steps=8, pause=0.2).exit_code == EXIT_STOPPED
    assert any("Ctrl-C again" in note for note in display.notes)

    def twice(event):
        if event["event"] == "metrics" and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    result = run(Recorder(twice), steps=8, pause=0.2)
    assert result.exit_code == EXIT_INTERRUPTED
    assert not any(held(path) for path in Path("outputs/store").glob("*/.work-*/lock"))
    assert run(steps=8, pause=0.2).exit_code == EXIT_DONE


def test_signals_count_and_are_given_back():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.count == 1
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.count == 2
    assert signal.getsignal(signal.SIGINT) is before


RUNNER = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
import toy_stages
from posttrain.config import registry
from posttrain.launch import local
from posttrain.pipeline.plan import make_plan
from posttrain.pipeline.runner import plan_and_run
import posttrain.report
registry.STAGES.update(toy_stages.TOYS)
script = str(Path(toy_stages.__file__).with_name("toy_worker.py"))
local.worker_command = lambda work_dir: [sys.executable, script, str(work_dir)]
posttrain.report.build = lambda run_dir: run_dir
recipe = toy_stages.toy_recipe(steps=60, pause=0.1)
sys.exit(plan_and_run(lambda: make_plan(recipe), yes=True).exit_code)
"""


def start_runner():
    tests = Path(toy_stages.__file__).parent
    source = RUNNER.format(paths=[str(tests), str(tests.parent)])
    return subprocess.Popen([sys.executable, "-c", source], start_new_session=True)


def steps_done():
    runs = list(Path("outputs/runs").glob("*/run.json"))
    stages = state_of(find_run(None, Path("outputs")).events(), ["train"]).stages if runs else {}
    return stages["train"].step or 0 if stages else 0


def test_the_worker_ends_with_its_runner_and_the_run_continues():
    runner = start_runner()
    wait_for(lambda: steps_done() > 1)
    (lock,) = Path("outputs/store/toy_train").glob(".work-*/lock")
    runner.kill()
    runner.wait()
    assert "interrupted" in status.screen(find_run(None, Path("outputs")))
    wait_for(lambda: not held(lock), 10)
    assert (lock.parent / "STOP").exists()
    before = steps_done()
    assert 0 < before < 60
    result = run(steps=60, pause=0.1)
    assert result.exit_code == EXIT_DONE
    steps = [event["step"] for event in result.run_dir.events() if event["event"] == "metrics"]
    assert steps == list(range(1, 61)), "no step came twice"


def test_a_second_runner_follows_the_first():
    runner = start_runner()
    wait_for(lambda: steps_done() > 1)
    display = Recorder()
    result = run(display, steps=60, pause=0.1)
    assert result.followed and result.exit_code == EXIT_DONE and runner.wait() == 0
    assert "following it" in display.notes[0]
    assert any(event["event"] == "stage_finished" for event in display.events)


def test_a_follower_with_more_to_do_goes_on_after_the_one_it_followed():
    first = threading.Thread(target=run, kwargs={"steps": 25, "pause": 0.1, "selection": {"until": "train"}})
    first.start()
    wait_for(lambda: steps_done() > 1)
    display = Recorder()
    whole = run(display, steps=25, pause=0.1)
    first.join()
    assert any("had another selection of stages" in note for note in display.notes)
    assert whole.exit_code == EXIT_DONE and whole.run_dir.artifact("evaluate") is not None
    assert started(whole) == ["evaluate"]


def test_two_damaged_inputs_of_one_stage_are_repaired_together():
    inputs = {"inputs": {"more": "data.heldout"}}
    first = run(**inputs)
    data = first.run_dir.artifact("data").folder
    for name in ("train", "heldout"):
        (data / name / "rows.jsonl").write_text((data / name / "rows.jsonl").read_text().replace("row 0", "row X"))
    remove_tree(first.run_dir.artifact("train").folder)
    display = Recorder()
    result = run(display, **inputs)
    assert result.exit_code == EXIT_DONE and verify_command.command("all", Path("outputs")) == EXIT_DONE
    assert sum("its artifact is damaged" in note for note in display.notes) == 1


def test_a_repair_that_comes_out_differently_has_earlier_stages_made_again():
    """`evaluate` is in the store, and its turn is over when `later` finds that `train` is damaged."""
    first = run()
    history = first.run_dir.artifact("train").folder / "history" / "history.jsonl"
    history.write_text(history.read_text().replace("0.5", "0.6"))
    more = {"later": ToyTrainConfig(lr=3e-5, inputs={"data": "data.train", "before": "train.history"})}
    done = run(extra=more, noise=0.25)
    assert done.exit_code == EXIT_DONE
    assert sorted(started(done)) == ["evaluate", "later", "later", "train"]
    assert all(done.run_dir.artifact(name) is not None for name in ("data", "train", "evaluate", "later"))


def test_a_follower_goes_on_when_the_runner_it_follows_is_killed():
    runner = start_runner()
    wait_for(lambda: steps_done() > 1)

    def kill(event):
        if event["event"] == "metrics" and runner.poll() is None:
            runner.kill()
            runner.wait()

    display = Recorder(kill)
    result = run(display, steps=60, pause=0.1)
    assert result.exit_code == EXIT_DONE and not result.followed
    assert any("is gone; going on with it here" in note for note in display.notes)
    steps = [event["step"] for event in result.run_dir.events() if event["event"] == "metrics"]
    assert steps == list(range(1, 61)), "no step came twice"


def test_two_runs_that_want_the_same_key_do_the_work_once():
    results = {}

    def go(name):
        results[name] = run(steps=6, pause=0.1, frame={"run": {"name": name}})

    threads = [threading.Thread(target=go, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    started = [
        event["stage"]
        for result in results.values()
        for event in result.run_dir.events()
        if event["event"] == "stage_started"
    ]
    assert all(result.exit_code == EXIT_DONE for result in results.values())
    assert sorted(started) == ["data", "evaluate", "train"]


def test_selection_needs_its_inputs_in_the_store():
    with pytest.raises(RecipeError, match="--until train"):
        run(selection={"only": "evaluate"})
    assert not Path("outputs").exists()
    assert run(selection={"until": "train"}).exit_code == EXIT_DONE
    result = run(selection={"only": "evaluate"})
    assert result.exit_code == EXIT_DONE and (result.run_dir.path / "artifacts" / "evaluate").exists()


def test_force_makes_it_again_and_keeps_the_old_one_when_that_fails():
    first = run()
    made = first.run_dir.artifact("train").manifest["started"]
    forced = run(selection={"force": ["train"]})
    assert forced.run_dir.artifact("train").manifest["started"] > made
    assert not list(Path("outputs/store").glob("*/.*"))
    made = forced.run_dir.artifact("train").manifest["started"]
    failed = run(selection={"force": ["train"]}, fail="known", frame={"run": {"name": "other"}})
    assert failed.exit_code == EXIT_FAILED
    assert forced.run_dir.artifact("train").manifest["started"] == made


def test_a_name_in_use_by_other_settings_is_refused():
    run(frame={"run": {"name": "mine"}})
    with pytest.raises(RecipeError, match="--name"):
        run(frame={"run": {"name": "mine"}}, lr=1.0)


def test_force_starts_from_nothing(monkeypatch):
    plan = make_plan(toy_recipe())
    run(selection={"until": "train"})
    work_dir = plan.store.work_dir("toy_train", plan["train"].key)
    work_dir.mkdir()
    (work_dir / "partial.jsonl").write_text("{}")
    (work_dir / "checkpoints").mkdir()
    seen = []
    real = local.LocalWorker.start.__func__

    def start(cls, job, folder):
        seen.extend(path.name for path in folder.iterdir())
        return real(cls, job, folder)

    monkeypatch.setattr(local.LocalWorker, "start", classmethod(start))
    assert run(selection={"until": "train", "force": ["train"]}).exit_code == EXIT_DONE
    assert seen == ["runner"]


def started(result):
    """The stages that the last execution of a run has started."""
    events = result.run_dir.events()
    first = max(index for index, event in enumerate(events) if event["event"] == "run_started")
    return [event["stage"] for event in events[first:] if event["event"] == "stage_started"]


def test_force_runs_what_comes_after_only_when_the_outputs_differ():
    frame = {"run": {"name": "mine"}}
    run(frame=frame)
    display = Recorder()
    assert started(run(display, frame=frame, selection={"force": ["train"]})) == ["train"] and not display.notes
    other = {"frame": {"run": {"name": "other"}}, "noise": 1.0}
    again = run(display, selection={"force": ["train"]}, **other)
    assert again.exit_code == EXIT_DONE and started(again) == ["train", "evaluate"]
    assert display.notes == ["evaluate: made from outputs of train that were replaced; it runs again"]
    made = again.run_dir.artifact("evaluate").manifest["started"]
    assert made > again.run_dir.artifact("train").manifest["started"]
    assert started(run(**other)) == []


def test_force_retires_what_is_left_out_and_clean_removes_it():
    first = run()
    display = Recorder()
    other = {"frame": {"run": {"name": "other"}}, "noise": 1.0}
    run(display, selection={"force": ["train"], "until": "train"}, **other)
    assert display.notes == [
        "evaluate: made from outputs of train that were replaced; left out now, the next run makes it again"
    ]
    assert first.run_dir.artifact("evaluate") is None
    clean.command(True, Path("outputs"))
    assert not list(Path("outputs/store").glob("*/.*"))
    assert started(run(**other)) == ["evaluate"]


def test_a_forced_rerun_that_was_killed_still_counts_when_it_is_continued():
    run()
    frame = {"run": {"name": "other"}}

    def kill(event):
        if event["event"] == "metrics" and event["step"] == 2:
            cancel.request_stop(find_run("other", Path("outputs")), now=True)

    settings = {"noise": 1.0, "pause": 0.2, "frame": frame}
    assert run(Recorder(kill), selection={"force": ["train"]}, **settings).exit_code == EXIT_STOPPED
    assert started(run(**settings)) == ["train", "evaluate"]


def test_the_report_follows_what_another_run_has_made(reports):
    a, b = {"frame": {"run": {"name": "a"}}}, {"frame": {"run": {"name": "b"}}}
    run(selection={"until": "train"}, **a)
    run(**b)
    result = run(**a)
    assert started(result) == [] and [folder.name for folder in reports] == ["a", "b", "a"]
    run(**a)
    assert len(reports) == 3, "nothing had changed"


def test_a_fix_of_the_recipe_is_not_contradicted():
    frame = {"run": {"name": "mine"}}
    lines = run(fail="known", frame=frame).message.splitlines()
    assert "  do: lower lr" in lines
    assert lines[-1] == "  or, when the cause lies outside the recipe: posttrain resume mine"
    lines = run(fail="unknown", frame={"run": {"name": "other"}}).message.splitlines()
    assert lines[-1] == "  do: posttrain resume other, once the cause is gone"


def test_clean_leaves_what_a_runner_has_claimed_meanwhile():
    folder = Path("outputs/store/toy_train/.work-x")
    folder.mkdir(parents=True)
    found = clean.leftovers(Path("outputs"))
    assert [one.folder for one in found] == [folder]
    with Lock.acquire(folder / "runner"):
        clean.remove(found)
        assert folder.exists()
    clean.remove(found)
    assert not folder.exists()


def test_clean_removes_runs_with_what_only_they_use(capsys):
    one = run(frame={"run": {"name": "one"}}).run_dir
    two = run(lr=2e-5, frame={"run": {"name": "two"}}).run_dir
    clean.command(False, Path("outputs"), ["one"])
    shown = capsys.readouterr().out
    assert shown.endswith("would be freed: posttrain clean one --yes\n")
    assert "runs/one  run" in shown and shown.count("no run refers to it") == 2 and one.exists()
    clean.command(True, Path("outputs"), ["one"])
    assert not one.path.exists() and two.exists()
    assert verify_command.command("all", Path("outputs")) == EXIT_DONE
    assert "3 of 3 artifacts" in capsys.readouterr().out
    week_ago = time.time() - 7 * 86400
    os.utime(two.events_path, (week_ago, week_ago))
    with Lock.acquire(two.lock_path):
        clean.command(True, Path("outputs"), None, 6)
        assert two.exists(), "it is running"
        with pytest.raises(RecipeError, match="run two is running"):
            clean.command(True, Path("outputs"), ["two"])
    clean.command(True, Path("outputs"), None, 8)
    assert two.exists()
    clean.command(True, Path("outputs"), None, 6)
    assert not two.path.exists() and not list(Path("outputs/store").glob("*/*"))


def test_what_is_to_be_typed_names_an_outputs_folder_that_lies_elsewhere(capsys):
    def stop(event):
        if event["event"] == "metrics" and event["step"] == 2:
            cancel.request_stop(find_run("mine", Path("on a larger disk")))

    frame = {"run": {"name": "mine"}}
    stopped = run(Recorder(stop), steps=8, pause=0.2, frame=frame, outputs="on a larger disk")
    resume = f"posttrain resume mine --outputs '{Path('on a larger disk').resolve()}'"
    assert stopped.message.endswith(resume)
    assert resume in status.screen(stopped.run_dir) and resume in cancel.how_it_ended(stopped.run_dir)
    failed = run(fail="known", frame={"run": {"name": "other"}}, outputs="on a larger disk")
    assert "posttrain resume other --outputs" in failed.message
    clean.command(False, Path("on a larger disk"), ["other"], 30)
    typed = "posttrain clean other --older-than 30 --outputs 'on a larger disk' --yes\n"
    assert capsys.readouterr().out.endswith(typed)
    with pytest.raises(RecipeError, match="--outputs DIR"):
        find_run(None, Path("outputs"))


def test_a_missing_outputs_folder_is_an_error():
    for command in (verify_command.command, clean.command):
        with pytest.raises(RecipeError, match="no outputs folder elsewhere"):
            command("all" if command is verify_command.command else False, Path("elsewhere"))


def test_cancel_says_how_the_run_ended():
    def stop(event):
        if event["event"] == "metrics" and event["step"] == 2:
            cancel.request_stop(find_run("mine", Path("outputs")))

    frame = {"run": {"name": "mine"}}
    stopped = run(Recorder(stop), steps=8, pause=0.2, frame=frame)
    assert "posttrain resume mine" in cancel.how_it_ended(stopped.run_dir)
    done = run(steps=8, pause=0.2, frame=frame)
    assert cancel.how_it_ended(done.run_dir) == "run mine finished before it could be stopped"
    failed = run(fail="known", frame={"run": {"name": "other"}})
    assert "failed before" in cancel.how_it_ended(failed.run_dir)


def test_find_run_by_beginning_and_nearest_name():
    for name in ("alpha", "alpine", "beta"):
        run(frame={"run": {"name": name}})
    outputs = Path("outputs")
    assert find_run("b", outputs).name == "beta" == find_run(None, outputs).name
    with pytest.raises(RecipeError, match="alpha, alpine|alpine, alpha"):
        find_run("al", outputs)
    with pytest.raises(RecipeError, match="write beta"):
        find_run("beat", outputs)


def test_status_logs_verify_and_clean(capsys):
    result = run()
    screen = status.screen(result.run_dir)
    assert "train" in screen and "5/5 step" in screen and "done" in screen
    logs.command("toy", "train", False, None, Path("outputs"))
    assert "stage train (toy_train), attempt 1" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="write train"):
        logs.log_of(result.run_dir, "trian", None)
    assert verify_command.command(None, Path("outputs")) == EXIT_DONE
    artifact = result.run_dir.artifact("train").folder
    (artifact / "history" / "history.jsonl").write_text("{}\n")
    assert verify_command.command("all", Path("outputs")) == EXIT_FAILED
    assert "changed: history/history.jsonl" in capsys.readouterr().out
    abandoned = Path("outputs/store/toy_train/.work-abandoned")
    busy = Path("outputs/store/toy_train/.work-busy")
    abandoned.mkdir()
    busy.mkdir()
    result.run_dir.record_path.unlink()
    with Lock.acquire(busy / "lock"):
        clean.command(False, Path("outputs"))
        assert abandoned.exists() and artifact.exists()
        clean.command(True, Path("outputs"))
    assert not abandoned.exists() and not artifact.exists() and busy.exists()


def test_live_lines_on_a_terminal_and_elsewhere(monkeypatch):
    import io

    monkeypatch.setattr(live, "PLAIN_SECONDS", 0.0)
    plain = io.StringIO()
    with live.Live(plain) as display:
        run(display)
    assert "train: started" in plain.getvalue() and "step 5/5" in plain.getvalue() and "\x1b" not in plain.getvalue()

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(live, "REDRAW_SECONDS", 0.0)
    terminal = Terminal()
    with live.Live(terminal) as display:
        run(display, lr=1.0)
    assert "\r\x1b[2Ktrain  step 5/5" in terminal.getvalue() and terminal.getvalue().endswith("\n")


def test_an_orphan_that_does_not_end_is_killed(tmp_path):
    lock = tmp_path / "lock"
    tests = Path(toy_stages.__file__).parent
    source = (
        f"import sys; sys.path.insert(0, {str(tests.parent)!r})\n"
        "import time; from pathlib import Path; from posttrain.pipeline.lock import Lock\n"
        f"kept = Lock.acquire(Path({str(lock)!r})); time.sleep(100)"
    )
    process = subprocess.Popen([sys.executable, "-c", source], start_new_session=True)
    wait_for(lambda: held(lock))
    local.end_orphan(tmp_path, patience=0.2)
    assert not held(lock) and process.wait() == -signal.SIGKILL
