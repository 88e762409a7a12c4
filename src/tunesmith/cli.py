"""The command line: run, explain, chat, plugins, schema, doctor; no torch before it has to be."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith import __version__
from tunesmith.engine.signals import Interrupted, Terminated, stoppable
from tunesmith.errors import TunesmithError
from tunesmith.scaffold import add_command

if TYPE_CHECKING:
    from tunesmith.plugin.registry import Registered

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    0 done, 1 a problem, 2 wrong usage, 130 stopped by Ctrl-C (SIGINT), 143 by SIGTERM. With
    `--json` standard output is one JSON document, an error's as well.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        status: int = options.command(options)
    except TunesmithError as error:
        if not _told_elsewhere():
            notes = [f"  {note}" for note in getattr(error, "__notes__", ())]
            _tell(error, "\n".join([str(error), *notes]), options)
        return 1
    except (Interrupted, Terminated) as stop:
        if not _told_elsewhere():
            _tell(stop, str(stop), options)
        return stop.status
    except KeyboardInterrupt as stop:
        _tell(stop, "stopped", options)
        return Interrupted.status
    except BrokenPipeError:
        # whoever read the output has read enough; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit:
        raise
    except BaseException as error:
        if _told_elsewhere():
            return 1
        # also what Rust panics with, which is no Exception
        from tunesmith.unforeseen import unforeseen

        _tell(error, unforeseen(error, _run_directory(options)), options)
        return 1
    return status


def _tell(error: BaseException, text: str, options: argparse.Namespace) -> None:
    """Say what has ended a command, with --json also as its document."""
    print(f"tunesmith: {text}", file=sys.stderr)
    if getattr(options, "json", False):
        from tunesmith.json_output import document, error_values

        print(document(error_values(error, text)))


def _told_elsewhere() -> bool:
    """Whether the main process of several tells what has ended this one."""
    from tunesmith.engine.world import current

    try:
        return current().told
    except TunesmithError:  # the environment tells of no world: this is what is told
        return False


def _run_directory(options: argparse.Namespace) -> Path | None:
    """Return the run directory that a command was given, if there is one."""
    given = getattr(options, "out", None) or getattr(options, "run", None)
    return given if isinstance(given, Path) and (given / "recipe.yaml").is_file() else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tunesmith", description="Fine-tune language models: from quantize to merge."
    )
    parser.add_argument("--version", action="version", version=f"tunesmith {__version__}")
    parser.set_defaults(command=None)
    verbs = parser.add_subparsers(title="commands", metavar="")

    recipe = argparse.ArgumentParser(add_help=False)
    recipe.add_argument("recipe", type=Path, help="recipe file, YAML or JSON")
    recipe.add_argument(
        "--set",
        action="append",
        default=[],
        dest="changes",
        metavar="TARGET=VALUE",
        help="change the recipe: seed=1, or an option of a step by name or number: "
        "sft.learning_rate=1e-4, 3.epochs=2; may be given several times",
    )
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print one JSON document")

    run = verbs.add_parser(
        "run", parents=[recipe, as_json], help="run a recipe, reusing stages that are done"
    )
    run.add_argument("--out", type=Path, required=True, help="run directory, such as runs/a")
    run.add_argument("--quiet", action="store_true", help="show no progress")
    run.set_defaults(command=_run)

    explain = verbs.add_parser(
        "explain",
        parents=[recipe, as_json],
        help="say what a recipe will do, take, and what is wrong",
    )
    explain.set_defaults(command=_explain)

    chat = verbs.add_parser("chat", help="talk to the model of a finished run")
    chat.add_argument("run", type=Path, help="run directory")
    chat.add_argument("--system", help="system prompt")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    chat.set_defaults(command=_chat)

    plugins = verbs.add_parser(
        "plugins", parents=[as_json], help="list plugins, and those that failed to load"
    )
    plugins.add_argument("--options", metavar="NAME", help="show one plugin's options")
    plugins.add_argument("--traceback", action="store_true", help="show why broken ones failed")
    plugins.set_defaults(command=_plugins)
    add_command(plugins)

    schema = verbs.add_parser(
        "schema", help="print the JSON schema of recipes, for editors; of all installed plugins"
    )
    schema.set_defaults(command=_schema)

    doctor = verbs.add_parser(
        "doctor", help="check this machine: versions, kernels, what is missing"
    )
    doctor.set_defaults(command=_doctor)
    return parser


def _run(options: argparse.Namespace) -> int:
    from tunesmith.engine.world import current

    if current().several:
        # of each process, that its search for unused parameters has found none
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with _output(options), stoppable(), current().together():
        from tunesmith.plugin.recipe_files import read_recipe
        from tunesmith.tuner import Tuner

        tuner = Tuner.from_recipe(read_recipe(options.recipe, changes=options.changes))
        result = tuner.run(options.out, progress=not options.quiet)
    if not current().main:
        return 0
    if options.json:
        from tunesmith.json_output import document, run_values

        print(document(run_values(result)))
        return 0
    print(f"run      {result.path}")
    for label, directory in result.adapters.items():
        print(f"adapter  {label}: {directory}")
    if result.model_path is not None:
        print(f"model    {result.model_path}")
    print(f"report   {result.path / 'report.html'}")
    return 0


def _explain(options: argparse.Namespace) -> int:
    from tunesmith.plugin.recipe_files import read_recipe
    from tunesmith.tuner import Tuner

    recipe = read_recipe(options.recipe, changes=options.changes)
    if not options.json:
        return 1 if Tuner.from_recipe(recipe).explain().problems else 0
    from tunesmith.engine.plan import make_plan
    from tunesmith.json_output import document, plan_values
    from tunesmith.plugin.registry import registry

    with _output(options):
        plan = make_plan(recipe, registry())
    print(document(plan_values(plan)))
    return 1 if plan.problems else 0


def _output(options: argparse.Namespace) -> AbstractContextManager[None]:
    """Keep standard output for the document, if there is to be one."""
    if not options.json:
        return nullcontext()
    from tunesmith.json_output import nothing_else

    return nothing_else()


def _chat(options: argparse.Namespace) -> int:
    from tunesmith.engine.result import RunResult

    result = RunResult.open(options.run)
    if result.standing.ahead:
        print(f"tunesmith: {options.run}: {result.standing}", file=sys.stderr)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    interactive = sys.stdin.isatty()
    if interactive:
        print("an empty line or Ctrl-D ends the talk", file=sys.stderr)
    while True:
        try:
            said = input("you> " if interactive else "")
        except EOFError:
            return 0
        if not said.strip():
            return 0
        messages.append({"role": "user", "content": said})
        answer = result.generate(
            messages, max_new_tokens=options.max_new_tokens, temperature=options.temperature
        )
        messages.append({"role": "assistant", "content": answer})
        print(answer, flush=True)


def _plugins(options: argparse.Namespace) -> int:
    from tunesmith.plugin.registry import registry
    from tunesmith.plugin.spec import API_VERSION, KINDS

    found = registry()
    if options.json:
        return _plugins_as_json(options.options)
    if options.options:
        return _plugin_options(options.options)
    for kind in KINDS:
        print(kind)
        for item in found.of_kind(kind):
            origin = "" if item.builtin else f"  [{item.distribution} {item.version}]"
            old = "" if item.spec.api == API_VERSION else f"  unusable: API {item.spec.api}"
            print(f"  {item.spec.name:<22}{item.spec.summary}{origin}{old}")
    for broken in found.broken:
        print(f"broken  {broken.distribution} {broken.version} ({broken.entry}): {broken.problem}")
        if options.traceback:
            print(broken.traceback)
    for name in found.disabled:
        print(f"switched off  {name}")
    return 0


def _plugins_as_json(name: str | None) -> int:
    from tunesmith.json_output import document, plugin_values
    from tunesmith.plugin.registry import registry

    values = plugin_values(registry(), None if name is None else _called(name))
    print(document(values))
    return 0


def _called(name: str) -> list[Registered]:
    """Return the plugins of a name, of whatever kind; `UnknownPluginError` if there is none."""
    from tunesmith.errors import UnknownPluginError, close_matches, listed
    from tunesmith.plugin.registry import registry

    found = [item for item in registry() if name in (item.spec.name, item.key)]
    if not found:
        known = {item.spec.name for item in registry()}
        raise UnknownPluginError(
            f"unknown plugin '{name}'{close_matches(name, known)}; installed: {listed(known)}"
        )
    return found


def _plugin_options(name: str) -> int:
    import attrs

    from tunesmith.plugin.options import field_docs

    for item in _called(name):
        print(f"{item.key}  {item.kind.removesuffix('s')}  {item.spec.summary}")
        docs = field_docs(item.spec.config)
        for field in attrs.fields(item.spec.config):
            default = "required" if field.default is attrs.NOTHING else repr(field.default)
            print(f"  {field.name} = {default}\n      {' '.join(docs[field.name].split())}")
    return 0


def _schema(options: argparse.Namespace) -> int:
    from tunesmith.json_output import document
    from tunesmith.plugin.registry import registry
    from tunesmith.plugin.schema import recipe_schema

    print(document(recipe_schema(registry())))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from tunesmith.doctor import examine

    text, healthy = examine()
    print(text)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
