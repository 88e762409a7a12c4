"""What a user downloads is data: none of it runs, hangs or leads out of its directory.

Each hostile artefact carries a payload that would write a canary file.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from tests.engine.damage import CONFIG, SETTINGS, WEIGHTS, header, points_to, setting, sharded
from tunesmith import Tuner
from tunesmith.engine.models import describe_model, find_model
from tunesmith.engine.plan import make_plan
from tunesmith.errors import ModelError, OptionError, TunesmithError
from tunesmith.nn.gguf_header import check_gguf
from tunesmith.nn.pretrained import code_is_trusted, load_config, load_tokenizer, trusting
from tunesmith.plugin.registry import registry
from tunesmith.recipe import Recipe

ROWS = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(4)]
QUICK = {"max_steps": 1, "batch_size": 2, "gradient_accumulation": 1, "max_length": 128}
SECONDS = 5


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


class Payload:
    """Writes the canary when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def code(model, canary, name="evil.py"):
    """Put Python beside a model that writes the canary when it is imported."""
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text(
        f"open({str(canary)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig): model_type = 'evil'\n"
        "class Model(LlamaForCausalLM): config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast): pass\n"
        "def generate(*a, **k): pass\n"
    )


def mapped(**names):
    return {"auto_map": names}


CODE = {
    "the config's class": lambda m: setting(
        CONFIG, model_type="evil", **mapped(AutoConfig="evil.Config")
    )(m),
    "the config's class, of a known kind": lambda m: setting(
        CONFIG, **mapped(AutoConfig="evil.Config")
    )(m),
    "the model's class": lambda m: setting(
        CONFIG, **mapped(AutoModelForCausalLM="evil.Model", AutoModel="evil.Model")
    )(m),
    "config and model": lambda m: setting(
        CONFIG,
        model_type="evil",
        **mapped(AutoConfig="evil.Config", AutoModelForCausalLM="evil.Model"),
    )(m),
    "another repository": lambda m: setting(
        CONFIG, model_type="evil", **mapped(AutoConfig="someone/else--evil.Config")
    )(m),
    "a file outside": lambda m: setting(
        CONFIG, model_type="evil", **mapped(AutoConfig="../evil.Config")
    )(m),
    "the tokenizer's class": lambda m: setting(
        SETTINGS, tokenizer_class="Tokenizer", **mapped(AutoTokenizer=["evil.Tokenizer", None])
    )(m),
    "the fast tokenizer's class": lambda m: setting(
        SETTINGS, tokenizer_class="Tokenizer", **mapped(AutoTokenizer=[None, "evil.Tokenizer"])
    )(m),
    "the tokenizer's class in the config": lambda m: setting(
        CONFIG, **mapped(AutoTokenizer="evil.Tokenizer")
    )(m),
    "a processor": lambda m: setting(
        "processor_config.json",
        processor_class="Evil",
        **mapped(AutoProcessor="evil.Tokenizer", AutoImageProcessor="evil.Tokenizer"),
    )(m),
    "a preprocessor": lambda m: setting(
        "preprocessor_config.json", **mapped(AutoFeatureExtractor="evil.Tokenizer")
    )(m),
    "a generation method": lambda m: code(m, m.parent / "canary", "custom_generate/generate.py"),
    "attention by name": lambda m: setting(CONFIG, _attn_implementation="evil/kernel")(m),
    "experts by name": lambda m: setting(CONFIG, experts_implementation="evil/kernel@main")(m),
    "a kernel in a part": lambda m: setting(
        CONFIG, text_config={"attn_implementation": "evil/kernel:fn"}
    )(m),
    "auto_map as text": lambda m: setting(CONFIG, model_type="evil", auto_map="evil.Config")(m),
    "auto_map as a list": lambda m: setting(CONFIG, model_type="evil", auto_map=["evil.Config"])(m),
    "a package's name": lambda m: (
        code(m, m.parent / "canary", "tokenizers.py"),
        code(m, m.parent / "canary", "sitecustomize.py"),
    ),
}


def pickled(name, whole=True):
    def damage(model, canary):
        if whole:
            (model / WEIGHTS).unlink()
        (model / name).write_bytes(pickle.dumps({"weight": Payload(canary)}))

    return damage


def torch_saved(name):
    def damage(model, canary):
        import torch

        (model / WEIGHTS).unlink()
        torch.save({"weight": Payload(canary)}, model / name)

    return damage


PICKLES = {
    "pytorch_model.bin": torch_saved("pytorch_model.bin"),
    "an old pytorch_model.bin": pickled("pytorch_model.bin"),
    "model.pt": torch_saved("model.pt"),
    "consolidated.00.pth": torch_saved("consolidated.00.pth"),
    "a pickle called model.safetensors": pickled("model.safetensors"),
    "training_args.bin beside the weights": pickled("training_args.bin", whole=False),
    "optimizer.pt beside the weights": pickled("optimizer.pt", whole=False),
    "pytorch_model.bin beside the weights": pickled("pytorch_model.bin", whole=False),
    "adapter_model.bin by the config": lambda m, c: (
        pickled("adapter_model.bin")(m, c),
        setting(CONFIG, transformers_weights="adapter_model.bin")(m),
    ),
    "an index of pickles": lambda m, c: (
        pickled("pytorch_model-00001-of-00001.bin")(m, c),
        (m / "pytorch_model.bin.index.json").write_text(
            json.dumps({"weight_map": {"weight": "pytorch_model-00001-of-00001.bin"}})
        ),
    ),
    "an index of safetensors to a pickle": lambda m, c: (
        pickled("weights.bin")(m, c),
        (m / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"weight": "weights.bin"}})
        ),
    ),
    "a distributed checkpoint": lambda m, c: (
        pickled(".metadata")(m, c),
        pickled("shard-00001-model-00001-of-00001.safetensors", whole=False)(m, c),
    ),
}


def examined(model, tmp_path):
    """Plan and, unless the plan refuses, run; return the plan's problems. Nothing may ask."""
    plan = make_plan(Tuner(model).lora(r=2).sft(ROWS, **QUICK).recipe, registry())
    if not plan.problems:
        Tuner(model).lora(r=2).sft(ROWS, **QUICK).run(tmp_path / "run", progress=False)
    return plan.problems


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch):
    def asked(prompt=""):
        raise AssertionError(f"asked on standard input: {prompt}")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))


@pytest.mark.parametrize("what", CODE)
def test_no_code_that_comes_with_a_model_runs(model, canary, tmp_path, what):
    code(model, canary)
    CODE[what](model)
    began = time.thread_time()
    problems = examined(model, tmp_path)
    assert not canary.exists()
    assert all("Traceback" not in problem for problem in problems)
    assert time.thread_time() - began < SECONDS


@pytest.mark.parametrize("what", PICKLES)
def test_no_pickle_is_opened(model, canary, tmp_path, what):
    PICKLES[what](model, canary)
    problems = examined(model, tmp_path)
    assert not canary.exists()
    if "beside" not in what:
        assert problems
    else:
        assert problems == ()


def test_pickled_weights_are_refused_with_the_way_to_convert_them(model, canary):
    PICKLES["pytorch_model.bin"](model, canary)
    (problem,) = make_plan(Tuner(model).lora().sft(ROWS).recipe, registry()).problems
    assert "its weights are pickled (pytorch_model.bin)" in problem
    assert "save_pretrained(new) writes model.safetensors" in problem
    with pytest.raises(ModelError, match=r"a \.bin file"):
        find_model(str(model / "pytorch_model.bin"))


def test_a_model_that_needs_its_code_says_how_to_trust_it(model, canary):
    code(model, canary)
    CODE["config and model"](model)
    with pytest.raises(ModelError, match=r"needs code that comes with it \(evil\.py\).*trust_rem"):
        load_config(model)
    CODE["the tokenizer's class"](model)
    setting(CONFIG, model_type="llama", auto_map={})(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        load_tokenizer(model)


def test_the_command_line_neither_asks_nor_shows_a_traceback(model, canary, tmp_path):
    code(model, canary)
    CODE["config and model"](model)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(Recipe(str(model)).to_yaml() + "\n")
    Tuner(model).lora(r=2).sft([{"instruction": "a", "output": "b"}]).to_yaml(recipe)
    for command in (["explain"], ["run", "--out", str(tmp_path / "run")]):
        done = subprocess.run(
            [sys.executable, "-m", "tunesmith", command[0], str(recipe), *command[1:]],
            input="y\ny\n",
            text=True,
            capture_output=True,
            check=False,
        )
        said = done.stdout + done.stderr
        assert done.returncode == 1
        assert "[y/N]" not in said
        assert "Traceback" not in said
        assert "trust_remote_code=True" in said
        assert not canary.exists()


def test_trusted_code_runs_and_the_lock_names_it(model, canary, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    code(model, canary)
    CODE["config and model"](model)
    tuner = Tuner(model, trust_remote_code=True).lora(r=2, targets=("q_proj",)).sft(ROWS, **QUICK)
    result = tuner.run(tmp_path / "run", progress=False)
    assert canary.exists()
    lock = json.loads((result.path / "lock.json").read_text())
    described = describe_model(model, tuner.recipe)
    assert lock["model"]["code"] == described["code"] is not None
    assert Recipe.from_yaml(result.path / "recipe.yaml").trust_remote_code is True
    code(model, tmp_path / "another")
    assert describe_model(model, tuner.recipe)["code"] != described["code"]
    assert not code_is_trusted()


def test_code_of_another_repository_is_not_run_though_the_model_is_trusted(model, canary):
    CODE["another repository"](model)
    with trusting(True), pytest.raises(ModelError, match="takes code from someone/else"):
        load_config(model)


def test_trust_is_a_truth_value_and_nothing_else():
    with pytest.raises(OptionError, match="trust_remote_code: got 'yes'"):
        Tuner("m", trust_remote_code="yes")
    with pytest.raises(TunesmithError, match="'trust_remote_code' is 'yes'; expected true or fal"):
        Recipe.from_dict({"model": "m", "trust_remote_code": "yes", "steps": []})
    assert Tuner("m", trust_remote_code=True).recipe.to_dict()["trust_remote_code"] is True
    assert "trust_remote_code" not in Tuner("m").recipe.to_dict()


# --- files that lie -------------------------------------------------------------------------------

PATHS = ["../elsewhere.safetensors", "{parent}/elsewhere.safetensors", "a/../../x.safetensors"]
PATHS += ["..", ".", "", "/etc/passwd", "model\\..\\..\\x.safetensors", "sub/model.safetensors"]


@pytest.mark.parametrize("target", PATHS)
def test_an_index_leads_nowhere_but_into_its_directory(model, target, tmp_path):
    points_to(target)(model)
    problems = examined(model, tmp_path)
    assert any("expected the name of a file in the same directory" in text for text in problems)


LIES = {
    "a header of 2**63 bytes": lambda m: lengthened(m, 2**63 - 1),
    "a header of 2**64 bytes": lambda m: lengthened(m, 2**64 - 1),
    "a header of 100 MB": lambda m: lengthened(m, 100_000_001),
    "a header as long as the file": lambda m: lengthened(m, (m / WEIGHTS).stat().st_size),
    "a shape of 2**62": header(lambda row: first(row).update(shape=[2**62, 4])),
    "a shape of many sides": header(lambda row: first(row).update(shape=[1] * 100_000)),
    "offsets of 2**63": header(lambda row: first(row).update(data_offsets=[0, 2**63])),
    "overlapping offsets": header(
        lambda row: [value.update(data_offsets=[0, 64]) for value in tensors_of(row)]
    ),
    "a tensor twice": header(lambda row: twice(row)),
    "nested without end": header(lambda row: '{"a":' * 100_000 + "1" + "}" * 100_000),
    "far too many tensors": header(
        lambda row: row.update(
            {
                f"w{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                for n in range(150_000)
            }
        )
    ),
    "an unknown dtype": header(lambda row: first(row).update(dtype="PY_OBJECT")),
    "an index of numbers": sharded(lambda d, row: row.update(weight_map={"a": 1})),
}


def tensors_of(row):
    return [value for key, value in row.items() if key != "__metadata__"]


def first(row):
    return tensors_of(row)[0]


def twice(row):
    text = json.dumps(row)
    name = next(key for key in row if key != "__metadata__")
    return text[:-1] + f', "{name}": {json.dumps(row[name])}}}'


def lengthened(model, length):
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])


@pytest.mark.parametrize("what", LIES)
def test_weights_that_lie_about_themselves_are_refused_at_once(model, what, tmp_path, measured_rss):
    LIES[what](model)
    began = time.thread_time()
    with measured_rss(512 << 20):
        problems = make_plan(
            Tuner(model).lora(r=2).sft(ROWS, **QUICK).recipe, registry(), estimates=False
        ).problems
    assert time.thread_time() - began < SECONDS
    assert problems or what == "a tensor twice"


@pytest.fixture
def measured_rss():
    """Asserts that the process grows by no more than so many bytes inside."""
    import resource
    from contextlib import contextmanager

    @contextmanager
    def watch(most):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        yield
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < most

    return watch


def text_of(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf(*, tensors=0, keys=0, body=b"", magic=b"GGUF", version=3):
    return magic + struct.pack("<IQQ", version, tensors, keys) + body


ARCHITECTURE = text_of("general.architecture") + struct.pack("<I", 8) + text_of("llama")
LYING_GGUF = {
    "nothing": b"",
    "four bytes": b"GGUF",
    "another magic": gguf(magic=b"GGML"),
    "another version": gguf(version=99),
    "2**60 tensors": gguf(tensors=2**60),
    "2**60 keys": gguf(keys=2**60),
    "keys that are not there": gguf(keys=1000),
    "tensors that are not there": gguf(tensors=1000),
    "a key of 2**60 bytes": gguf(keys=1, body=struct.pack("<Q", 2**60) + b"a"),
    "text of 2**60 bytes": gguf(keys=1, body=text_of("a") + struct.pack("<IQ", 8, 2**60)),
    "text of 2**64 bytes": gguf(keys=1, body=text_of("a") + struct.pack("<IQ", 8, 2**64 - 1)),
    "a list of 2**60 texts": gguf(keys=1, body=text_of("a") + struct.pack("<IIQ", 9, 8, 2**60)),
    "a vocabulary of 10**9": gguf(
        keys=1, body=text_of("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 10**9)
    ),
    "a list of 10**9 bytes": gguf(keys=1, body=text_of("a") + struct.pack("<IIQ", 9, 0, 10**9)),
    "lists in lists": gguf(
        keys=1, body=text_of("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 1000
    ),
    "lists of 10**6 lists": gguf(
        keys=1, body=text_of("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 10**6) * 100
    ),
    "an unknown type": gguf(keys=1, body=text_of("a") + struct.pack("<I", 77)),
    "a tensor of 2**40 sides": gguf(tensors=1, body=text_of("t") + struct.pack("<I", 2**31)),
    "a tensor beyond the file": gguf(
        tensors=1, body=text_of("t") + struct.pack("<IQIQ", 1, 2**40, 0, 0)
    ),
    "an offset beyond the file": gguf(
        tensors=1, body=text_of("t") + struct.pack("<IQIQ", 1, 32, 0, 2**50)
    ),
    "an alignment of zero": gguf(
        keys=1, body=text_of("general.alignment") + struct.pack("<II", 4, 0)
    ),
    "an alignment of 2**31": gguf(
        keys=1, body=text_of("general.alignment") + struct.pack("<II", 4, 2**31)
    ),
    "an architecture and nothing else": gguf(keys=1, body=ARCHITECTURE),
}


@pytest.mark.parametrize("what", LYING_GGUF)
def test_a_gguf_file_that_lies_is_refused_at_once(what, tmp_path, measured_rss):
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    path.write_bytes(LYING_GGUF[what])
    began = time.thread_time()
    with measured_rss(256 << 20):
        if what != "an architecture and nothing else":
            with pytest.raises(ModelError, match=r"is no whole \.gguf file"):
                check_gguf(path)
        tuner = Tuner(path).lora(r=2).sft(ROWS, **QUICK)
        with pytest.raises(TunesmithError) as caught:
            tuner.run(tmp_path / "run", progress=False)
    assert "Traceback" not in str(caught.value)
    assert time.thread_time() - began < SECONDS


def test_a_sound_gguf_file_has_a_sound_header(real_gguf):
    check_gguf(real_gguf)


def test_a_model_in_the_place_of_a_pipe_is_not_waited_for(model, tmp_path):
    for file in (CONFIG, "tokenizer.json", WEIGHTS):
        place = shutil.copytree(model, tmp_path / f"pipe-{file}")
        (place / file).unlink()
        os.mkfifo(place / file)
        began = time.perf_counter()
        assert make_plan(Tuner(place).lora().sft(ROWS).recipe, registry()).problems
        assert time.perf_counter() - began < 4 * SECONDS


def test_a_canary_is_written_where_code_does_run(canary, model):
    # the payloads above are no duds
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.is_dir()
    canary.rmdir()
    code(model, canary)
    subprocess.run([sys.executable, str(model / "evil.py")], check=True)
    assert canary.exists()
    assert load_file(model / WEIGHTS)
