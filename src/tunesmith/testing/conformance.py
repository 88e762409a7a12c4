"""The conformance kit: subclass what your plugin is, say where it lies, and pytest does the rest.

::

    from tunesmith.testing.conformance import MethodConformance

    class TestLoraFA(MethodConformance):
        plugin = "my_package.plugin"
        name = "lora_fa"

The built-in plugins pass the same tests. Everything runs on a tiny random Llama on the CPU.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest

from tunesmith.data.clean import DropLog
from tunesmith.data.examples import EXAMPLE_TYPES, Prompt, Sourced
from tunesmith.errors import OptionError, RowError, TunesmithError
from tunesmith.nn.tasks import CAUSAL_LM, Task
from tunesmith.plugin import API_VERSION, Spec
from tunesmith.plugin.conditions import Conditions
from tunesmith.plugin.exporters import Exporter
from tunesmith.plugin.formats import Format
from tunesmith.plugin.methods import Method, PeftMethod
from tunesmith.plugin.metrics import Measured, Metric
from tunesmith.plugin.options import field_docs, given_options, plain_options, structure
from tunesmith.plugin.quantizers import Quantizer
from tunesmith.plugin.registry import Registry
from tunesmith.plugin.rewards import Reward
from tunesmith.plugin.session import Session
from tunesmith.plugin.trainers import Trainer, TrainerConfig, TrainingData
from tunesmith.plugin.transforms import Transform, check_rows
from tunesmith.recipe import VERBS, Recipe, Step
from tunesmith.testing.tiny import (
    END,
    OWN_PAD,
    tiny_examples,
    tiny_llama,
    tiny_session,
    tiny_tokenizer,
)

__all__ = [
    "ExporterConformance",
    "FormatConformance",
    "MethodConformance",
    "MetricConformance",
    "PluginConformance",
    "QuantizerConformance",
    "RewardConformance",
    "TrainerConformance",
    "TransformConformance",
]

PADS: Mapping[str, str | None] = {
    "no token": None,
    "a token of its own": OWN_PAD,
    "its end token": END,
}
"""What a tokenizer may pad with; a plugin gives the same with each."""
PADDING = (
    "pad with tunesmith.data.pack.padding_id(tokenizer), by PaddingCollator or PreferenceCollator, "
    "and tell padding by its place and never by its id"
)

_LISTING = """
import importlib, sys
from tunesmith.plugin.registry import Registry
plugin, kind, name = sys.argv[1:]
registry = Registry([(plugin, "under-test", "0", lambda: importlib.import_module(plugin))])
sys.exit(
    "".join(broken.traceback for broken in registry.broken)
    or not any((item.kind, item.spec.name) == (kind, name) for item in registry)
    and f"{plugin} registers no {name} among its {kind}"
    or ", ".join({"torch", "transformers", "peft", "trl", "datasets"} & set(sys.modules))
    or 0
)
"""


class PluginConformance:
    """What holds for a plugin of any kind."""

    # PEFT reads a property that transformers is about to rename: no affair of a plugin's author,
    # whose project may well turn warnings into errors
    pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

    plugin: ClassVar[str]
    """Module that the entry point names, such as "my_package.plugin"."""
    name: ClassVar[str]
    """Name of the Spec under test."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Options as a user would write them; at least those that have no default."""

    kind: ClassVar[str]
    interface: ClassVar[type]

    @pytest.fixture
    def spec(self) -> Spec:
        """Return the Spec, found through the plugin's own hook."""
        module = importlib.import_module(self.plugin)
        registry = Registry([(self.plugin, "under-test", "0", lambda: module)])
        return registry.find(self.kind, self.name).spec

    @pytest.fixture
    def config(self, spec: Spec) -> Any:
        """Return the config instance made from `options`."""
        return structure(spec.config, self.options, name=spec.name)

    @pytest.fixture
    def instance(self, spec: Spec, config: Any) -> Any:
        """Return the implementation, built as a run builds it."""
        return spec.load()(config)

    def test_listing_it_works_and_imports_nothing_heavy(self) -> None:
        """`tunesmith plugins` and `--help` list it without torch and its like."""
        listing = subprocess.run(
            [sys.executable, "-c", _LISTING, self.plugin, self.kind, self.name],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=False,
        )
        assert listing.returncode == 0, f"while listing {self.plugin}: {listing.stderr}"

    def test_the_spec_is_written_for_this_api_and_says_what_it_is(self, spec: Spec) -> None:
        """The API version is today's and the summary is one line."""
        assert spec.api == API_VERSION
        assert spec.summary, "give the Spec a summary, which `tunesmith plugins` shows"
        assert "\n" not in spec.summary

    def test_the_implementation_serves_its_kind(self, spec: Spec, instance: Any) -> None:
        """The lazy path leads to a subclass of the kind's interface."""
        assert issubclass(spec.load(), self.interface), f"{spec.impl} is no {self.interface}"
        assert isinstance(instance, self.interface)

    def test_every_option_has_a_help_text(self, spec: Spec) -> None:
        """A docstring stands under each field of the config class."""
        silent = [name for name, text in field_docs(spec.config).items() if not text]
        assert not silent, f"put a docstring under {', '.join(silent)}"

    def test_options_without_a_default_are_all_that_must_be_given(self, spec: Spec) -> None:
        """The defaults are sound, by the config's own validators."""
        required = {
            field.name: self.options[field.name]
            for field in attrs.fields(spec.config)
            if field.default is attrs.NOTHING
        }
        assert structure(spec.config, required, name=spec.name) is not None

    def test_the_config_cannot_be_changed(self, config: Any) -> None:
        """The config class is `attrs.frozen`."""
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            config.anything = 1

    def test_the_config_goes_through_a_recipe_and_comes_back_equal(
        self, spec: Spec, config: Any
    ) -> None:
        """Options survive YAML, so a run can be repeated from its recipe."""
        verb = next((name for name, row in VERBS.items() if row.kind == self.kind), "train")
        recipe = Recipe("model", (Step(verb, spec.name, given_options(config)),))
        options = Recipe.from_yaml(recipe.to_yaml()).steps[0].options
        assert structure(spec.config, options, name=spec.name) == config

    def test_an_unknown_option_is_refused(self, spec: Spec) -> None:
        """A misspelt option is never ignored."""
        with pytest.raises(OptionError, match="no_such_option"):
            structure(spec.config, {**self.options, "no_such_option": 1}, name=spec.name)


# rows as other formats have them; a format with none of their fields must leave them alone
_FOREIGN_ROWS: tuple[Mapping[str, Any], ...] = (
    {"instruction": "Add.", "input": "1 1", "output": "2"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
    {"prompt": "Hi", "completion": "Hello", "label": True},
    {"text": "It was a dark and stormy night."},
    {"unheard_of": 1},
    {},
)


class FormatConformance(PluginConformance):
    """What holds for a data format."""

    kind = "formats"
    interface = Format

    good_rows: ClassVar[Sequence[Mapping[str, Any]]]
    """Rows it must recognise and convert, one for each variant of the layout."""
    bad_rows: ClassVar[Sequence[Mapping[str, Any]]]
    """Rows it must refuse with a RowError: a field missing, or of another type."""

    def test_good_rows_are_recognised_by_the_fields_they_have(self, instance: Any) -> None:
        """No more fields are claimed than there are."""
        assert self.good_rows, "give at least one good row"
        for row in self.good_rows:
            claimed = instance.recognise(row)
            assert 0 < claimed <= len(row), f"recognise({row}) gave {claimed}"

    def test_good_rows_become_examples(self, instance: Any) -> None:
        """Each is one of the five shapes, and the row is left as it was."""
        for row in self.good_rows:
            before = copy.deepcopy(dict(row))
            example = instance.convert(row)
            assert isinstance(example, tuple(EXAMPLE_TYPES.values())), f"{row} gave {example!r}"
            assert dict(row) == before, f"convert changed the row {before}"

    def test_bad_rows_are_refused_with_the_field_named(self, instance: Any) -> None:
        """RowError says field, what was got and what is allowed; the reader adds the place."""
        assert self.bad_rows, "give at least one bad row"
        for row in self.bad_rows:
            with pytest.raises(RowError) as raised:
                instance.convert(row)
            error = raised.value
            assert error.field, f"the error for {row} names no field"
            assert error.got, f"the error for {row} does not say what it got"
            assert error.allowed, f"the error for {row} does not say what is allowed"

    def test_rows_with_none_of_its_fields_are_left_to_other_formats(self, instance: Any) -> None:
        """Claiming a stranger's row would read data as what it is not."""
        own = {key for row in self.good_rows for key in row}
        for row in _FOREIGN_ROWS:
            if own.isdisjoint(row):
                assert instance.recognise(row) == 0, f"recognise({row}) is not 0"

    def test_recognising_never_raises(self, instance: Any) -> None:
        """Detection tries every format on every row."""
        values: tuple[Any, ...] = (None, 7, "", [])
        odd = [dict.fromkeys(row, value) for row in self.good_rows for value in values]
        for row in (*self.bad_rows, *odd):
            assert isinstance(instance.recognise(row), int)


class TransformConformance(PluginConformance):
    """What holds for a transform of rows."""

    kind = "transforms"
    interface = Transform

    @pytest.fixture
    def rows(self, instance: Any) -> Sequence[Sourced]:
        """Return rows of a shape it takes, one of them twice; override for others."""
        shape = (*instance.examples, "conversation")[0]
        examples = tiny_examples(shape)
        return [
            Sourced(example, f"row {number}")
            for number, example in enumerate([*examples, examples[0]], 1)
        ]

    def test_it_takes_shapes_that_there_are(self, instance: Any) -> None:
        """Each is a key of `EXAMPLE_TYPES`."""
        assert set(instance.examples) <= EXAMPLE_TYPES.keys()

    def test_every_row_is_returned_or_dropped(self, instance: Any, rows: Sequence[Sourced]) -> None:
        """Rows in are rows out and rows told to `drop`, and what was given is left as it was."""
        given = tuple(copy.deepcopy(rows))
        log = DropLog()
        made = instance.apply(given, seed=0, drop=log.add)
        check_rows(self.name, given, made, log.entries, adds_rows=instance.adds_rows)
        assert list(given) == list(rows), "apply changed the rows it was given"
        assert all(entry.reason for entry in log.entries), "a row was dropped without a reason"

    def test_the_same_rows_and_seed_give_the_same(
        self, instance: Any, spec: Spec, config: Any, rows: Sequence[Sourced]
    ) -> None:
        """Whatever was done before, and by another instance."""
        first = instance.apply(tuple(rows), seed=3, drop=DropLog().add)
        instance.apply(tuple(rows), seed=4, drop=DropLog().add)
        assert spec.load()(config).apply(tuple(rows), seed=3, drop=DropLog().add) == first


class RewardConformance(PluginConformance):
    """What holds for a reward."""

    kind = "rewards"
    interface = Reward

    @pytest.fixture
    def prompts(self) -> Sequence[Prompt]:
        """Return prompts with the columns it needs; override for others than `answer`."""
        return [each for each in tiny_examples("prompt") if isinstance(each, Prompt)]

    @pytest.fixture
    def completions(self, prompts: Sequence[Prompt]) -> Sequence[str]:
        """Return a completion for each prompt: one blank, one of many words, the right ones."""
        said = [str(prompt.extra.get("answer", "Yes.")) for prompt in prompts]
        return ["", "word " * 100, *said[2:]]

    def _scored(
        self, instance: Any, prompts: Sequence[Prompt], completions: Sequence[str]
    ) -> list[float | None]:
        ids = [[ord(letter) % 97 for letter in text] for text in completions]
        return list(instance.score(prompts, completions, ids))

    def test_each_completion_gets_a_finite_number_or_none(
        self, instance: Any, prompts: Sequence[Prompt], completions: Sequence[str]
    ) -> None:
        """One score for each, and at least one of them is a number."""
        scores = self._scored(instance, prompts, completions)
        assert len(scores) == len(completions)
        numbers = [score for score in scores if score is not None]
        assert numbers, "no completion was scored"
        assert all(math.isfinite(number) for number in numbers)
        assert self._scored(instance, [], []) == []

    def test_a_score_does_not_depend_on_the_others(
        self, instance: Any, prompts: Sequence[Prompt], completions: Sequence[str]
    ) -> None:
        """Alone, or in another order, a completion is worth the same."""
        together = self._scored(instance, prompts, completions)
        alone = [
            self._scored(instance, [prompt], [text])[0]
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        assert alone == together
        assert self._scored(instance, prompts[::-1], completions[::-1]) == together[::-1]


class _StepConformance(PluginConformance):
    """What holds for a plugin that a step of a recipe is done by."""

    def test_it_says_of_each_option_how_it_will_act(self, instance: Any, config: Any) -> None:
        """`effective` names every option, in plain values; what was given stands as it was."""
        effective = instance.effective(Conditions(seed=7))
        missing = [field.name for field in attrs.fields(type(config))]
        missing = [name for name in missing if name not in effective]
        assert not missing, f"effective leaves out {', '.join(missing)}"
        json.dumps(dict(effective))  # a stage's record holds it
        given = plain_options(config)
        changed = [
            name
            for name in given_options(config)
            if given[name] not in ("auto", None) and effective[name] != given[name]
        ]
        assert not changed, f"effective says otherwise than what was given: {', '.join(changed)}"


class QuantizerConformance(_StepConformance):
    """What holds for a quantizer."""

    kind = "quantizers"
    interface = Quantizer

    tolerance: ClassVar[float] = 0.12
    """Largest |W - dense_weight| / |W| of a layer (Frobenius); 4-bit NF4 stays below 0.1."""
    nbytes_tolerance: ClassVar[float] = 0.25
    """Largest share by which `nbytes` may miss what the layers hold."""

    @pytest.fixture(params=[True, False], ids=["tied", "untied"])
    def base(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        """Return a tiny model whose head is, or is not, its embedding."""
        return tiny_llama(tmp_path / "base", request.param, hidden_size=64, intermediate_size=128)

    @pytest.fixture
    def original(self, base: Path) -> Any:
        """Return the model as it is without a quantizer, in fp32."""
        return _loaded(base)

    @pytest.fixture
    def loaded(self, instance: Any, base: Path) -> Any:
        """Return the model as the quantizer loads it."""
        import torch

        return instance.load(base, dtype=torch.float32, device=torch.device("cpu"), task=CAUSAL_LM)

    def test_every_linear_layer_reads_back_as_dense_fp32(
        self, instance: Any, original: Any, loaded: Any
    ) -> None:
        """Its shape is the original's and its values are near."""
        import torch

        for name, linear in _linears(original):
            dense = instance.dense_weight(loaded.get_submodule(name))
            assert dense.dtype == torch.float32, f"{name}: dense_weight is {dense.dtype}"
            assert dense.shape == linear.weight.shape, f"{name}: dense_weight is {dense.shape}"
            weight = linear.weight.detach()
            error = float((dense - weight).norm() / weight.norm())
            assert error <= self.tolerance, f"{name}: relative error {error:.3f}"

    def test_it_computes_near_what_the_original_computes(self, original: Any, loaded: Any) -> None:
        """The forward pass runs and its logits are finite and near."""
        ours, theirs = _logits(loaded), _logits(original)
        assert ours.shape == theirs.shape
        assert bool(ours.isfinite().all())
        error = float((ours - theirs).norm() / theirs.norm())
        # errors of the layers add up on the way through the model
        assert error <= 10 * self.tolerance, f"relative error of the logits {error:.3f}"

    def test_gradients_pass_through_it(self, loaded: Any) -> None:
        """An adapter below a quantized layer can only learn through it."""
        embedded = loaded.get_input_embeddings()(_ids()).detach().requires_grad_()
        loaded(inputs_embeds=embedded).logits.square().mean().backward()
        assert embedded.grad is not None
        assert bool(embedded.grad.isfinite().all())
        assert float(embedded.grad.abs().sum()) > 0

    def test_evaluating_generating_and_saving_change_nothing(
        self, instance: Any, original: Any, loaded: Any, tmp_path: Path
    ) -> None:
        """Training goes on, and a merge reads its weights, from what was there before."""
        import torch

        names = [name for name, _ in _linears(original)]

        def weights() -> list[Any]:
            return [instance.dense_weight(loaded.get_submodule(name)) for name in names]

        def gradient() -> Any:
            loaded.train()
            embedded = loaded.get_input_embeddings()(_ids()).detach().requires_grad_()
            loaded(inputs_embeds=embedded).logits.square().mean().backward()
            return embedded.grad

        before, slope = weights(), gradient()
        assert slope is not None, "no gradient reaches the input"
        loaded.eval()
        with torch.no_grad():
            loaded(input_ids=_ids())
            loaded.generate(
                input_ids=_ids(),
                attention_mask=torch.ones_like(_ids()),
                max_new_tokens=2,
                do_sample=False,
                pad_token_id=0,
            )
        loaded.save_pretrained(tmp_path / "saved")
        for name, was, now in zip(names, before, weights(), strict=True):
            assert torch.equal(was, now), f"{name}: dense_weight differs after the model was used"
        again = gradient()
        assert again is not None, "no gradient reaches the input after the model was used"
        assert torch.equal(again, slope), "the gradient differs after the model was used"

    def test_nbytes_is_what_the_layers_hold(
        self, instance: Any, original: Any, loaded: Any
    ) -> None:
        """The plan's prediction of memory rests on it."""
        predicted = held = 0
        head = original.get_output_embeddings()
        for name, linear in _linears(original):
            if linear is head:
                continue
            predicted += instance.nbytes(tuple(linear.weight.shape), 4)
            module = loaded.get_submodule(name)
            tensors = [*module.named_parameters(), *module.named_buffers()]
            held += sum(t.numel() * t.element_size() for key, t in tensors if key != "bias")
        assert abs(predicted - held) <= self.nbytes_tolerance * held, (
            f"nbytes predicts {predicted} bytes for layers that hold {held}"
        )


class MethodConformance(_StepConformance):
    """What holds for a PEFT method, on a plain base and on one in NF4."""

    kind = "methods"
    interface = Method

    identity_at_start: ClassVar[bool] = True
    """Whether a fresh adapter leaves the model's output as it was."""
    tolerance: ClassVar[float] = 1e-5
    """Largest difference of logits that count as equal."""

    @pytest.fixture(params=["plain", "nf4"])
    def base(self, request: pytest.FixtureRequest, tmp_path: Path) -> Any:
        """Return a function that loads the base model anew."""
        directory = tiny_llama(tmp_path / "base")
        quantizer = _NF4() if request.param == "nf4" else Quantizer[None](None)

        def load() -> Any:
            import torch

            return quantizer.load(directory, dtype=torch.float32, device=torch.device("cpu"))

        load.directory, load.quantizer = directory, quantizer  # type: ignore[attr-defined]
        return load

    def test_a_plan_can_wrap_a_skeleton_of_it(self, instance: Any, base: Any) -> None:
        """It counts what is trained while the model is on the meta device, and goes on with it."""
        import torch
        from transformers import AutoModelForCausalLM

        config = base().config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        names = [name for name, _ in model.named_parameters()]
        assert instance.check(model) == ()
        wrapped = instance.wrap(model)
        assert _trainable(wrapped)
        instance.unwrap(wrapped)
        assert [name for name, _ in model.named_parameters()] == names

    def test_only_the_adapter_is_trained(self, instance: Any, base: Any) -> None:
        """Every parameter of the base is frozen, unless the method says otherwise."""
        model = base()
        ours = {id(parameter) for parameter in model.parameters()}
        trained = _trainable(instance.wrap(model))
        assert trained, "wrap leaves nothing to train"
        thawed = [name for name, parameter in trained.items() if id(parameter) in ours]
        if instance.trains_base:
            assert thawed, "trains_base is set, and no weight of the base is trained"
        else:
            assert not thawed, f"wrap leaves the base's {', '.join(thawed)} trainable"

    def test_a_fresh_adapter_changes_nothing(self, instance: Any, base: Any) -> None:
        """Training starts from the base model, if the method promises so."""
        if self.identity_at_start:
            self.assert_equal(_logits(instance.wrap(base())), _logits(base()))

    def test_one_step_moves_the_adapter_and_nothing_else(self, instance: Any, base: Any) -> None:
        """Gradients reach the adapter, through whatever the base is made of."""
        import torch

        model = instance.wrap(base())
        before = _snapshot(model)
        trained = _trainable(model)
        optimizer = torch.optim.SGD(trained.values(), lr=1.0)
        model(input_ids=_ids(), labels=_ids()).loss.backward()
        optimizer.step()
        moved = _moved(before, model)
        assert moved, "a step moves nothing: no gradient reaches the adapter"
        assert moved <= set(trained), f"a step moves frozen {', '.join(moved - set(trained))}"

    def test_what_it_saves_opens_in_stock_peft(
        self, instance: Any, base: Any, tmp_path: Path
    ) -> None:
        """`PeftModel.from_pretrained` computes what was saved."""
        from peft import PeftModel

        if not isinstance(instance, PeftMethod):
            pytest.skip("it is no PeftMethod")

        expected = self.saved(instance, base, tmp_path / "adapter")
        opened = PeftModel.from_pretrained(base(), tmp_path / "adapter", local_files_only=True)
        self.assert_equal(_logits(opened), expected)

    def test_what_it_saves_it_loads_ready_to_train_on(
        self, instance: Any, base: Any, tmp_path: Path
    ) -> None:
        """The same values, and the same parameters trainable as when it was fresh."""
        expected = self.saved(instance, base, tmp_path / "adapter")
        loaded = instance.load(base(), tmp_path / "adapter", trainable=True)
        self.assert_equal(_logits(loaded), expected)
        fresh = set(_trainable(instance.wrap(base())))
        assert set(_trainable(loaded)) == fresh, "load trains other parameters than wrap"
        loaded = instance.load(base(), tmp_path / "adapter", trainable=False)
        self.assert_equal(_logits(loaded), expected)
        assert not _trainable(loaded), "load leaves something to train without being asked"

    def test_what_is_merged_is_what_it_computes(self, instance: Any, base: Any) -> None:
        """If it can be merged; if not, it says so by its flag, and does not merge in silence."""
        from tunesmith.errors import ModelError

        model = instance.wrap(base())
        _shake(model)
        expected = _logits(model)
        if not instance.mergeable:
            with pytest.raises(ModelError):
                instance.merge(model, base.quantizer)
            return
        merged = instance.merge(model, base.quantizer)
        plain = _loaded(base.directory)
        plain.load_state_dict({name: make() for name, make in merged.weights.items()}, strict=False)
        distance = float((_logits(plain) - expected).abs().max())
        assert distance <= 1e-4, f"logits of the merged model differ by {distance:.2e}"

    def test_it_says_whether_it_puts_tokens_before_a_row(self, instance: Any, base: Any) -> None:
        """The second of two rows in one sequence gets what it gets alone, or the flag is set."""
        from tunesmith.data.pack import packing_supported

        model = instance.wrap(base())
        _shake(model)
        model.eval()
        longer = model(input_ids=_ids()).logits.shape[1] > _ids().shape[1]
        prefix = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
        leaks = "it adds tokens" if longer or prefix else packing_supported(model)
        assert instance.adds_tokens == (leaks is not None), (
            f"adds_tokens is {instance.adds_tokens}: {leaks or 'nothing is added'}"
        )

    def saved(self, instance: Any, base: Any, directory: Path) -> Any:
        """Save an adapter that says something and return the logits it gives."""
        model = instance.wrap(base())
        _shake(model)
        logits = _logits(model)
        distance = float((logits - _logits(base())).abs().max())
        assert distance > 10 * self.tolerance, "the adapter has no effect on the model's output"
        instance.save(model, directory)
        return logits

    def assert_equal(self, ours: Any, theirs: Any) -> None:
        """Fail if logits differ by more than the tolerance."""
        distance = float((ours - theirs).abs().max())
        assert distance <= self.tolerance, f"logits differ by {distance:.2e}"


class TrainerConformance(_StepConformance):
    """What holds for a trainer."""

    kind = "trainers"
    interface = Trainer

    evaluates: ClassVar[bool] = True
    """Whether it evaluates held-out rows; one that cannot says why in its documentation."""
    learns_to_stop: ClassVar[bool] = True
    """Whether the end token of an answer is among the labels of its batches, if they have some."""

    @pytest.fixture
    def examples(self, spec: Spec) -> list[Any]:
        """Return examples of the trainer's shape; override it where these will not do."""
        assert spec.example is not None
        return list(tiny_examples(spec.example))

    @pytest.fixture
    def build(self, spec: Spec, examples: list[Any], tmp_path: Path) -> Any:
        """Return a function that builds the trainer's `transformers.Trainer` anew.

        It is over a tiny model with a LoRA adapter. Its tokenizer pads by a token of PADS; there is
        none unless one is named. `evaluation` holds the examples out as well; `given` are others,
        and further options go on top of the kit's.
        """

        def build(
            pad: str = "no token",
            *,
            evaluation: bool = False,
            given: Sequence[Any] = examples,
            **options: Any,
        ) -> Any:
            from transformers import set_seed

            asked = {**self._asked(), **options}
            config: Any = structure(spec.config, asked, name=spec.name)
            place = tmp_path / f"padded by {pad}"
            session = tiny_session(place / "base", method=_LoRA(None), pad_token=PADS[pad])
            session = session.at_work(task=spec.load().task, trains=True)
            tokens = dict(session.tokenizer.special_tokens_map)
            rows = [Sourced(example, f"row {n}") for n, example in enumerate(given, 1)]
            dropped: list[str] = []
            data = TrainingData(
                rows,
                rows if evaluation else [],
                lambda where, reason: dropped.append(f"{where}: {reason}"),
            )
            set_seed(0)
            built = spec.load()(config).build(session, data, place / "work")
            assert len(dropped) < len(rows), f"every row was dropped: {dropped}"
            assert dict(session.tokenizer.special_tokens_map) == tokens, (
                "build changed the session's tokenizer, which later steps have and an export "
                "keeps; give a library that does so copy.deepcopy(session.tokenizer)"
            )
            return built

        return build

    @pytest.fixture
    def built(self, build: Any) -> Any:
        """Return the trainer's `transformers.Trainer`, with a tokenizer that has no pad token."""
        return build()

    def _asked(self) -> Mapping[str, Any]:
        two_steps = {"max_steps": 2, "batch_size": 2, "gradient_accumulation": 1}
        return {"learning_rate": 1e-2, "warmup": 0, **two_steps, **self.options}

    def test_its_spec_says_which_examples_it_takes(self, spec: Spec) -> None:
        """So that data of another shape is refused before a weight is read."""
        assert spec.example in EXAMPLE_TYPES
        assert issubclass(spec.config, TrainerConfig)

    def test_it_builds_a_transformers_trainer_that_obeys_the_options(self, built: Any) -> None:
        """The shared options reach `TrainingArguments`."""
        import transformers

        assert isinstance(built, transformers.Trainer)
        assert built.args.max_steps == 2
        assert built.args.per_device_train_batch_size == 2

    def test_what_it_says_of_its_options_is_what_it_trains_with(
        self, spec: Spec, built: Any
    ) -> None:
        """`effective` is what a plan, a report and the record of a stage tell."""
        config: Any = structure(spec.config, self._asked(), name=spec.name)
        told = spec.load()(config).effective(Conditions(seed=0))
        args = built.args
        assert told["learning_rate"] == args.learning_rate
        assert told["seed"] == args.seed
        assert told["warmup"] == args.warmup_steps
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        assert told["effective_batch_size"] == batch

    def test_two_steps_learn_and_touch_only_what_is_trainable(self, built: Any) -> None:
        """The loss of a batch changes; the base model does not."""
        model = built.model
        before = _snapshot(model)
        first, last = self._losses(built)
        assert built.state.global_step == 2
        assert math.isfinite(first), f"the first loss is {first}"
        assert last != first, "two steps leave the loss as it was"
        moved = _moved(before, model)
        assert moved, "two steps move no parameter"
        assert moved <= set(_trainable(model)), "a frozen parameter has moved"

    def test_what_the_tokenizer_pads_with_changes_nothing(self, build: Any) -> None:
        """Padding is known by its place and never by its id; a tokenizer may have none for it."""
        losses = {}
        for pad in PADS:
            try:
                losses[pad] = self._losses(build(pad))
            except Exception as error:
                error.add_note(f"with a tokenizer that pads by {pad}; {PADDING}")
                raise
        wanted = losses["a token of its own"]
        for pad, found in losses.items():
            for ours, theirs, when in zip(found, wanted, ("first", "last"), strict=True):
                # the same rows in the same shape: padding is all that is another
                assert abs(ours - theirs) <= 1e-5 * max(1.0, abs(theirs)), (
                    f"the {when} loss is {ours:.5f} with a tokenizer that pads by {pad}, and "
                    f"{theirs:.5f} with one that pads by a token of its own; {PADDING}"
                )

    def test_the_token_that_ends_an_answer_is_learned(self, built: Any) -> None:
        """A model that never learns it talks on for ever."""
        from transformers import set_seed

        if not self.learns_to_stop:
            pytest.skip("it says that it does not teach where to end")
        set_seed(0)
        batch = next(iter(built.get_train_dataloader()))
        labels = batch.get("labels")
        if labels is None or labels.dim() != 2:
            pytest.skip("its batches have no labels by token")
        end = tiny_tokenizer().eos_token_id
        silent = [at for at, row in enumerate((labels == end).any(dim=1).tolist(), 1) if not row]
        assert not silent, (
            f"in a batch of {len(labels)} rows, {len(silent)} have no label for the end token; "
            f"{PADDING}"
        )

    def test_accumulated_batches_count_as_one(
        self, spec: Spec, examples: list[Any], build: Any
    ) -> None:
        """Two forward passes of two rows make the step, and log the loss, of one of four."""
        from transformers import set_seed

        if spec.load().objective != "loss":
            pytest.skip("what it optimizes is no loss of the rows alone")
        logged = {}
        for passes in (1, 2):
            size = {"batch_size": 4 // passes, "gradient_accumulation": passes, "max_steps": 1}
            # one row four times: a mean over rows or tokens is the same however they are batched
            built = build(given=examples[:1] * 4, **size)
            set_seed(0)
            built.train()
            logged[passes] = next(row["loss"] for row in built.state.log_history if "loss" in row)
        whole, parted = logged[1], logged[2]
        assert abs(parted - whole) <= 1e-3 * max(1e-3, abs(whole)), (
            f"one row has a loss of {whole:.4f} in one forward pass, and of {parted:.4f} where a "
            "step has two: losses of forward passes are summed and not averaged; use "
            "tunesmith.plugin.counted.counted(), or set self.model_accepts_loss_kwargs = False "
            "after super().__init__() in a class whose compute_loss returns the mean of a batch"
        )

    def test_held_out_rows_are_evaluated(self, spec: Spec, build: Any) -> None:
        """`eval_split` and `eval_data` are options of every trainer: none may pass them over."""
        if not self.evaluates:
            pytest.skip("it says that it does not evaluate")
        built = build(evaluation=True)
        assert built.args.eval_strategy != "no", "held-out rows would never be looked at"
        figures = built.evaluate()
        name = f"eval_{spec.load().objective or 'loss'}"
        assert name in figures, (
            f"an evaluation gives {', '.join(sorted(figures))} and no {name}; pass eval_dataset, "
            'and label_names=["labels"] to training_arguments where a batch has other labels'
        )
        assert math.isfinite(figures[name])

    def _losses(self, built: Any) -> tuple[float, float]:
        """Return the loss of a batch before and after the training."""
        import torch
        from transformers import set_seed

        model = built.model
        set_seed(0)
        batch = built._prepare_inputs(next(iter(built.get_train_dataloader())))

        def loss() -> float:
            model.eval()
            set_seed(1)
            with torch.no_grad():
                return float(built.compute_loss(model, dict(batch)))

        first = loss()
        model.train()
        set_seed(0)
        built.train()
        return first, loss()


class MetricConformance(_StepConformance):
    """What holds for a metric."""

    kind = "metrics"
    interface = Metric

    @pytest.fixture
    def examples(self, spec: Spec) -> list[Any]:
        """Return examples of the metric's shape; override it where these will not do."""
        assert spec.example is not None, "say in the Spec which example shape the metric takes"
        return list(tiny_examples(spec.example))

    def test_it_measures_finite_numbers_and_leaves_the_model_as_it_was(
        self, instance: Any, examples: list[Any], tmp_path: Path
    ) -> None:
        """Values by name; no parameter, mode or gradient is changed."""
        import torch

        session = tiny_session(tmp_path / "base").at_work(task=instance.task)
        model = session.model
        model.eval()
        before = _snapshot(model)
        tokens = dict(session.tokenizer.special_tokens_map)
        with torch.no_grad():
            measured = instance.measure(session, examples)
        assert isinstance(measured, Measured)
        values = measured.values
        assert values, "measure returned nothing"
        assert dict(session.tokenizer.special_tokens_map) == tokens, (
            "measure changed the session's tokenizer, which later steps have"
        )
        for name, value in values.items():
            assert isinstance(name, str)
            assert isinstance(value, (int, float)), f"{name} is a {type(value).__name__}"
            assert math.isfinite(value), f"{name} is {value}"
        assert session.model is model
        assert not model.training, "measure left the model in training mode"
        assert not _moved(before, model), "measure changed the model"

    def test_what_the_tokenizer_pads_with_changes_nothing(
        self, instance: Any, examples: list[Any], tmp_path: Path
    ) -> None:
        """Padding is known by its place and never by its id; a tokenizer may have none for it."""
        import torch
        from transformers import set_seed

        found = {}
        for pad, token in PADS.items():
            session = tiny_session(tmp_path / pad, pad_token=token).at_work(task=instance.task)
            session.model.eval()
            set_seed(0)
            with torch.no_grad():
                found[pad] = dict(instance.measure(session, examples).values)
        wanted = found["a token of its own"]
        for pad, values in found.items():
            off = [
                f"{name} is {values.get(name)} and not {value}"
                for name, value in wanted.items()
                if not math.isclose(values.get(name, math.nan), value, rel_tol=1e-5, abs_tol=1e-7)
            ]
            assert not off, f"with a tokenizer that pads by {pad} {'; '.join(off)}; {PADDING}"


class ExporterConformance(_StepConformance):
    """What holds for an exporter, on a plain base and on one in NF4, with and without adapter."""

    kind = "exporters"
    interface = Exporter

    tolerance: ClassVar[float] = 1e-4
    """Largest difference of logits that count as equal."""
    needs_adapter: ClassVar[bool] = False
    """Whether it refuses a session that has trained nothing, by an error of tunesmith's."""

    @pytest.fixture(params=["plain", "nf4"])
    def quantizer(self, request: pytest.FixtureRequest) -> Any:
        """Return how the base is loaded; None is without a quantizer."""
        return _NF4() if request.param == "nf4" else None

    @pytest.fixture(params=["adapter", "base alone"])
    def session(
        self, request: pytest.FixtureRequest, quantizer: Any, instance: Any, tmp_path: Path
    ) -> Session:
        """Return a session after training, or before any."""
        if request.param == "base alone" and instance.reads(instance.config):
            pytest.skip("it reads adapters, and there is none")
        method = _LoRA(None) if request.param == "adapter" else None
        session = tiny_session(tmp_path / "base", quantizer=quantizer, method=method)
        figures = _Watched({"loss": 1.0})
        session = session.with_stage("01-sft", artefacts={}, metrics=figures)
        if not instance.reads_run:
            session = attrs.evolve(session, record=None)
        if method is not None:
            _shake(session.model)
            method.save(session.model, tmp_path / "adapter")
            session = session.with_adapter("sft", tmp_path / "adapter")
        return session

    def test_what_it_writes_is_what_the_session_computes(
        self, instance: Any, session: Session, tmp_path: Path
    ) -> None:
        """Stock transformers opens it with equal logits; the session's model stays as it was."""
        from transformers import AutoTokenizer

        expected = _logits(session.model)
        directory = tmp_path / "export"
        directory.mkdir()
        if self.needs_adapter and not session.adapters:
            with pytest.raises(TunesmithError):
                instance.export(session, directory)
            return
        artefacts = instance.export(session, directory)
        assert any(directory.iterdir()), "nothing was written"
        assert artefacts, "export names nothing of what it has written"
        for name, place in artefacts.items():
            assert place.exists(), f"{name}: {place} is not there"
            assert place.is_relative_to(directory), f"{name}: {place} is elsewhere"
        figures = session.metrics["01-sft"]
        assert instance.reads_run or not getattr(figures, "read", False), (
            "export reads session.metrics; set reads_run = True, so that its stage is made anew "
            "where a figure is another"
        )
        distance = float((_logits(session.model) - expected).abs().max())
        assert distance <= self.tolerance, f"export moved the session's logits by {distance:.2e}"
        if instance.makes_adapter:
            self._opens(artefacts["adapter"], session)
        if not instance.makes_model:
            return
        path = artefacts["model"]
        distance = float((_logits(_loaded(path)) - expected).abs().max())
        assert distance <= self.tolerance, f"the export's logits differ by {distance:.2e}"
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        assert tokenizer.chat_template == session.tokenizer.chat_template

    def _opens(self, adapter: Path, session: Session) -> None:
        """Open what was made by the method of the adapters that it was made of."""
        assert session.method is not None
        session.unload()
        base = session.quantizer.load(session.base, dtype=session.dtype, device=session.device)
        loaded = session.method.load(base, adapter, trainable=False)
        assert bool(_logits(loaded).isfinite().all())


class _Watched(Mapping[str, float]):
    """Figures that know whether they were read."""

    def __init__(self, figures: Mapping[str, float]) -> None:
        self.figures = figures
        self.read = False

    def __getitem__(self, name: str) -> float:
        self.read = True
        return self.figures[name]

    def __iter__(self) -> Iterator[str]:
        self.read = True
        return iter(self.figures)

    def __len__(self) -> int:
        self.read = True
        return len(self.figures)


class _LoRA(PeftMethod[None]):
    """A plain LoRA, so that trainers and exporters are tested without any plugin but theirs."""

    mixable = True

    def peft_config(self, model: Any) -> Any:
        import peft

        return peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


class _NF4(Quantizer[None]):
    """NF4 in the decoder's linear layers, so that methods and exporters meet a quantized base."""

    def __init__(self) -> None:
        super().__init__(None)

    def load(self, directory: Path, *, dtype: Any, device: Any, task: Task = CAUSAL_LM) -> Any:
        from tunesmith.nn.nf4_linear import NF4Linear

        model = self.from_pretrained(directory, dtype=dtype, device=device, task=task)
        head = model.get_output_embeddings()
        for name, linear in list(_linears(model)):
            if linear is not head:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, NF4Linear.from_linear(linear))
        return model


def _loaded(directory: Path) -> Any:
    """Return a model as stock transformers loads it, in fp32."""
    import torch

    plain = Quantizer[None](None)
    return plain.load(directory, dtype=torch.float32, device=torch.device("cpu"))


def _ids() -> Any:
    """Return two sequences of tokens [2, 12]."""
    import torch

    return torch.arange(24).reshape(2, 12) * 7 % 256


def _logits(model: Any) -> Any:
    """Return logits [2, 12, vocabulary] in eval mode; the mode is put back."""
    import torch

    mode = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=_ids()).logits.float()
    model.train(mode)
    return logits[:, -_ids().shape[1] :]  # what is more stands before the first token


def _linears(model: Any) -> Iterator[tuple[str, Any]]:
    from torch import nn

    return ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))


def _trainable(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _snapshot(model: Any) -> dict[str, Any]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def _moved(before: Mapping[str, Any], model: Any) -> set[str]:
    """Return the names of parameters and buffers that are not what they were."""
    after = _snapshot(model)
    return {name for name, tensor in before.items() if not tensor.equal(after[name])}


def _shake(model: Any) -> None:
    """Move every trainable parameter, so that an adapter says something."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in _trainable(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
