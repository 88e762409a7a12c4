"""A signal in any phase of a run: a status of its own, a true message, a report, and it goes on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tunesmith import Tuner
from tunesmith.cli import main
from tunesmith.engine.signals import Interrupted, Terminated, current, stoppable

# runs the command line, and sends this very process a signal when a function is called again
CHILD = """
import importlib, os, signal, sys
# whoever starts this in the background of a shell starts it deaf to Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)
place, count, number, again, *arguments = sys.argv[1:]
module, _, path = place.partition(":")
*parents, name = path.split(".")
holder = importlib.import_module(module)
for each in parents:
    holder = getattr(holder, each)
stock, calls = getattr(holder, name), []
def called(*a, **k):
    calls.append(1)
    if len(calls) == int(count):
        os.kill(os.getpid(), int(number))
        if again == "again":
            os.kill(os.getpid(), int(number))
    return stock(*a, **k)
setattr(holder, name, called)
from tunesmith.cli import main
sys.exit(main(arguments))
"""

STEPS = 4
# where it is, which call of it, the stage at work, and the step it then goes on from
PHASES: dict[str, tuple[str, int, str, int | None]] = {
    "planning": ("tunesmith.engine.plan:find_device", 1, "", None),
    "reading data": ("tunesmith.engine.preparing:load_data", 2, "", None),
    "loading": ("tunesmith.plugin.quantizers:Quantizer.load", 1, "02-sft", None),
    "rendering": ("tunesmith.data.render:Renderer.sequences", 3, "02-sft", None),
    "a training's first step": ("transformers:Trainer.training_step", 1, "02-sft", 1),
    "training": ("transformers:Trainer.training_step", 4, "02-sft", 2),
    "evaluation inside training": (
        "transformers.trainer_callback:CallbackHandler.on_prediction_step",
        1,
        "02-sft",
        2,
    ),
    "a training's last step": ("transformers:Trainer.training_step", 7, "02-sft", STEPS),
    "saving": ("peft:PeftModel.save_pretrained", 1, "02-sft", STEPS),
    "reference": ("tunesmith.data.pack:PreferenceCollator.__call__", 2, "03-dpo", None),
    "training again": ("transformers:Trainer.training_step", 11, "03-dpo", 2),
    "evaluating": ("tunesmith.nn.logps:completion_logps", 14, "04-evaluate-loss", None),
    "merging": ("tunesmith.nn.checkpoint:ShardWriter.add", 4, "05-merge", None),
}
SAMPLE = {("training", signal.SIGINT), ("merging", signal.SIGTERM)}
CASES = [
    pytest.param(
        phase,
        number,
        id=f"{phase}-{number.name}",
        marks=[] if (phase, number) in SAMPLE else pytest.mark.slow,
    )
    for phase in PHASES
    for number in (signal.SIGINT, signal.SIGTERM)
]


@pytest.fixture(autouse=True)
def hears_ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a recipe of every phase, and the run of it that nobody stops."""
    from tunesmith.testing.tiny import tiny_llama

    root = tmp_path_factory.mktemp("signals")
    tiny_llama(root / "model")
    rows = [{"instruction": f"say {n}", "output": f"the number is {n}"} for n in range(12)]
    pairs = [
        {"prompt": f"say {n}", "chosen": f"the number is {n}", "rejected": f"no, not {n}"}
        for n in range(8)
    ]
    (root / "train.json").write_text(json.dumps(rows))
    (root / "prefs.json").write_text(json.dumps(pairs))
    common: dict[str, Any] = {"batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-2}
    tuner = Tuner(root / "model", precision="fp32").lora(r=2, dropout=0.1)
    tuner = tuner.sft(root / "train.json", max_steps=STEPS, eval_split=3, eval_steps=2, **common)
    tuner = tuner.dpo(root / "prefs.json", max_steps=STEPS, **common)
    tuner = tuner.evaluate("loss", root / "train.json", batch_size=2).merge()
    tuner.to_yaml(root / "recipe.yaml")
    assert main(["run", str(root / "recipe.yaml"), "--out", str(root / "whole"), "--quiet"]) == 0
    return root


def made(directory: Path) -> dict[str, Any]:
    """The bytes of all weights of a run, and its figures, but for those of clocks."""
    found: dict[str, Any] = {
        str(file.relative_to(directory)): file.read_bytes()
        for file in sorted((directory / "stages").rglob("*.safetensors"))
        if "checkpoints" not in file.parts
    }
    for file in (directory / "stages").glob("*/stage.json"):
        clocks = re.compile(r"seconds|second$|runtime|memory")
        metrics = json.loads(file.read_text())["metrics"]
        found[file.parent.name] = {k: v for k, v in metrics.items() if not clocks.search(k)}
    return found


def stopped(
    place: Path, directory: Path, where: str, call: int, number: int, again: str = ""
) -> subprocess.CompletedProcess[str]:
    arguments = ["run", str(place / "recipe.yaml"), "--out", str(directory)]
    return subprocess.run(
        [sys.executable, "-c", CHILD, where, str(call), str(int(number)), again, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


@pytest.mark.parametrize(("phase", "number"), CASES)
def test_a_signal_stops_a_run_in_any_phase_and_it_goes_on(phase, number, place, tmp_path, capsys):
    where, call, stage, step = PHASES[phase]
    directory = tmp_path / "run"
    done = stopped(place, directory, where, call, number)
    assert done.returncode == 128 + number, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    said = done.stderr.replace("\n", " ")
    assert f"stopped by {'Ctrl-C (SIGINT)' if number == signal.SIGINT else 'SIGTERM'};" in said
    if not stage:
        assert "no stage was begun: run the same again" in said
    elif step is None:
        assert f"run the same again, which begins {stage} anew and keeps the stages before" in said
    else:
        assert f"run the same again, which goes on from step {step} of {stage}" in said
    assert "<html" in (directory / "report.html").read_text()
    assert (directory / "recipe.yaml").exists()
    # what was said is true, and the run makes what one makes that nobody stopped
    capsys.readouterr()
    assert main(["run", str(place / "recipe.yaml"), "--out", str(directory)]) == 0
    heard = capsys.readouterr()
    if step is not None:
        assert f"{stage} goes on from checkpoint-{step}" in heard.out + heard.err
    else:
        assert "goes on from checkpoint" not in heard.out + heard.err
    assert made(directory) == made(place / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait_for_the_step(number, place, tmp_path):
    done = stopped(
        place, tmp_path / "run", "transformers:Trainer.training_step", 6, number, "again"
    )
    assert done.returncode == 128 + number, done.stdout + done.stderr
    assert "which begins 02-sft anew" in done.stderr
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
def test_a_signal_from_outside_stops_the_command(place, tmp_path):
    recipe = (place / "recipe.yaml").read_text().replace("max_steps: 4", "max_steps: 5000")
    (tmp_path / "recipe.yaml").write_text(recipe)
    log = tmp_path / "run" / "stages" / ".02-sft.partial" / "log.jsonl"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tunesmith",
            "run",
            tmp_path / "recipe.yaml",
            "--out",
            log.parents[2],
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        while not log.exists() or log.read_text().count("\n") < 5:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - asked < 20
    assert process.returncode == 143
    [step] = re.findall(r"goes on from step (\d+) of 02-sft", said)
    assert (log.parent / "checkpoints" / f"checkpoint-{step}").is_dir()


# in a script or a notebook


def test_ctrl_c_in_a_script_is_a_keyboard_interrupt_and_handlers_are_put_back(
    tiny_model, alpaca_file, tmp_path
):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def press(run: Any, event: Any) -> None:
        if getattr(event, "step", 0) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    tuner = Tuner(tiny_model).lora(r=2).sft(alpaca_file, max_steps=5, batch_size=2)
    with pytest.raises(KeyboardInterrupt, match=r"goes on from step [23] of 02-sft"):
        tuner.run(tmp_path / "run", progress=False, listeners=[press])
    assert {number: signal.getsignal(number) for number in before} == before
    assert (tmp_path / "run" / "report.html").exists()
    assert tuner.run(tmp_path / "run", progress=False).metrics["02-sft"]["tokens"] > 0


def test_sigterm_in_a_script_ends_the_process_with_143():
    with pytest.raises(SystemExit) as caught, stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143
    assert isinstance(caught.value, Terminated)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_was_swallowed_is_not_lost():
    def swallows() -> None:
        with stoppable() as stopping:
            # as a callback out of C does
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            assert stopping.asked == signal.SIGINT

    with pytest.raises(Interrupted):
        swallows()


def test_another_thread_installs_nothing():
    found: list[Any] = []

    def work() -> None:
        with stoppable() as stopping:
            found.extend([signal.getsignal(signal.SIGINT), stopping is current()])

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before, True]


def test_a_forked_process_takes_signals_as_it_would_have():
    code = """
    import os, signal, sys, time
    from tunesmith.engine.signals import stoppable
    with stoppable():
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(str(os.waitstatus_to_exitcode(status)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert done.stdout == str(-signal.SIGTERM)
