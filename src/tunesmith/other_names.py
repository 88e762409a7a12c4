"""What PEFT, transformers, TRL, Axolotl and LLaMA-Factory call things, and how they are had here.

Somebody who brings an option's name along is not told "unknown", and not the nearest name by its
letters, but what it is called here or, where there is no such thing, what to do instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

import attrs

from tunesmith.errors import close_matches

__all__ = ["PLACES", "OtherName", "other_names", "unknown_option", "unknown_setting"]

PLACES = {
    "run": "a setting of the whole run: Tuner(model, {0}=…), or '{0}:' at the top of a recipe",
    "model": "what a Tuner is given first: Tuner(…), or 'model:' at the top of a recipe",
    "quantizer": "an option of the quantizer: .quantize(\"nf4\", {0}=…), or '- quantize: nf4'",
    "method": "an option of the method: .lora({0}=…), or '- peft: lora'",
    "trainer": "an option of a training step: .sft(data, {0}=…), or '- train: sft'",
    "sft": "an option of .sft(data, {0}=…), or '- train: sft'",
    "dpo": "an option of .dpo(data, {0}=…), or '- train: dpo'",
    "merge": "an option of .merge({0}=…), or '- export: merge'",
    "data": "what a training step is given: .sft(data), or 'data:' beside '- train: sft'",
}
"""Where an option is to be given, "{0}" standing for its name."""


@attrs.frozen
class OtherName:
    """What is to be said of a name."""

    option: str = ""
    """What it is called here; empty where there is no such option."""
    place: str = ""
    """One of `PLACES`: what takes it."""
    says: str = ""
    """How the two differ, or what to do where there is none: the second half of a sentence."""


@cache
def other_names() -> Mapping[str, OtherName]:
    """Return what is said of each name, which may be one of ours that belongs to another step."""
    table: dict[str, OtherName] = {}
    for place, rows in _CALLED.items():
        for option, names in rows.items():
            for row in names.split(";"):
                name, _, says = row.partition("|")
                table[name.strip()] = OtherName(option, place, says.strip())
    for says, names in _INSTEAD:
        table |= {name: OtherName(says=says) for name in names.split()}
    return table


def unknown_option(name: str, plugin: str, known: Iterable[str]) -> str:
    """Return what is said of an option that a plugin does not have, of those that it has."""
    options = list(known)
    said = f"unknown option '{name}' for {plugin}"
    found = other_names().get(name)
    if found is None:
        near = close_matches(name, options)
        return said + (near or f"; its options are: {', '.join(options) or 'none'}")
    if found.option in options:
        return f"{said}; it is called '{found.option}' here" + _more(found)
    return said + _told(name, found)


def unknown_setting(name: str, known: Iterable[str], what: str = "key") -> str:
    """Return what is said of a setting of a whole run that is none, of those that are."""
    settings = list(known)
    said = f"unknown {what} '{name}'"
    found = other_names().get(name)
    if found is None:
        return said + close_matches(name, settings)
    if found.option in settings:
        return f"{said}; it is called '{found.option}' here" + _more(found)
    return said + _told(name, found)


def _told(name: str, found: OtherName) -> str:
    if not found.option:
        return f"; {found.says}"
    called = "it is" if found.option == name else f"it is called '{found.option}' here, and is"
    return f"; {called} {PLACES[found.place].format(found.option)}{_more(found)}"


def _more(found: OtherName) -> str:
    return f"; {found.says}" if found.says else ""


_CALLED = {
    "model": {
        "model": "model; base_model; model_name_or_path; model_name; model_id; pretrained_model"
    },
    "run": {
        "precision": (
            'precision; bf16 | write "bf16" as its value; fp16 | write "fp16" as its value; '
            'fp32 | write "fp32" as its value; torch_dtype | its values are fp32, bf16 and fp16; '
            "bnb_4bit_compute_dtype | 4-bit weights compute in the precision of the run"
        ),
        "device": 'device; device_map | a model lies on one device; no_cuda | write "cpu"; '
        'use_cpu | write "cpu"',
        "chat_template": "chat_template; chat_template_jinja; template",
        "trust_remote_code": "trust_remote_code",
    },
    "quantizer": {
        "nested": "nested; bnb_4bit_use_double_quant; double_quantization",
        "blocksize": "blocksize; bnb_4bit_blocksize",
        "skip": "skip; llm_int8_skip_modules",
    },
    "method": {
        "r": "r; rank; lora_r; lora_rank",
        "alpha": "alpha; lora_alpha | unset, it is twice r",
        "dropout": "dropout; lora_dropout",
        "targets": (
            "targets; target_modules; lora_target_modules; lora_target; target_parameters; "
            'lora_target_linear | "all-linear", which is what it is unless given; '
            "layers_to_transform | a regular expression picks layers; "
            "layers_pattern | a regular expression picks layers; "
            "exclude_modules | name what shall be adapted, or give a regular expression"
        ),
        "rslora": "rslora; use_rslora; peft_use_rslora",
        "dora": "dora; use_dora; peft_use_dora",
        "bias": "bias",
    },
    "trainer": {
        "epochs": "epochs; num_train_epochs; num_epochs",
        "max_steps": "max_steps",
        "batch_size": (
            "batch_size; per_device_train_batch_size; micro_batch_size; train_batch_size; "
            "per_device_eval_batch_size | evaluations take the same; "
            "eval_batch_size | evaluations take the same"
        ),
        "gradient_accumulation": "gradient_accumulation; gradient_accumulation_steps",
        "learning_rate": "learning_rate; lr",
        "scheduler": "scheduler; lr_scheduler_type; lr_scheduler",
        "warmup": (
            "warmup; warmup_ratio | a share of the steps, below 1; "
            "warmup_steps | a whole number of steps"
        ),
        "max_length": (
            "max_length; max_seq_length; max_seq_len; sequence_len; cutoff_len; "
            "max_prompt_length | it is of prompt and answer together; "
            "max_completion_length | it is of prompt and answer together"
        ),
        "gradient_checkpointing": (
            "gradient_checkpointing; use_gradient_checkpointing; activation_checkpointing"
        ),
        "optimizer": "optimizer; optim; optimizer_type | such as adamw, adamw_8bit or adafactor",
        "weight_decay": "weight_decay",
        "max_grad_norm": "max_grad_norm; gradient_clipping; clip_grad_norm",
        "seed": "data_seed",
        "eval_data": "eval_data; eval_dataset; test_datasets; validation_file",
        "eval_split": "eval_split; val_set_size; val_size; test_size",
        "eval_steps": (
            "eval_steps; "
            "eval_strategy | what holds rows out is evaluated, once an epoch unless it is given; "
            "evaluation_strategy | what holds rows out is evaluated, once an epoch unless it is "
            "given; do_eval | what holds rows out is evaluated, once an epoch unless it is given; "
            "evals_per_epoch | it counts optimizer steps; unset, there is one an epoch"
        ),
        "early_stopping": (
            "early_stopping; early_stopping_patience; "
            "load_best_model_at_end | it keeps the best weights; "
            "metric_for_best_model | it goes by the evaluation's loss"
        ),
        "save_steps": ("save_steps; saves_per_epoch | it counts optimizer steps"),
        "save_strategy": "save_strategy",
        "save_total_limit": "save_total_limit",
        "logging_steps": "logging_steps; logging_strategy | it counts optimizer steps",
        "loggers": (
            'loggers; report_to; use_wandb | write "wandb" as its value; '
            'wandb_project | write "wandb" as its value; wandb itself reads WANDB_PROJECT; '
            'use_tensorboard | write "tensorboard" as its value'
        ),
        "deduplicate": "deduplicate",
        "chunked_loss": (
            "chunked_loss; use_liger_kernel | it is on unless switched off; "
            "use_liger | it is on unless switched off; "
            "cut_cross_entropy | it is on unless switched off"
        ),
        "varlen_attention": (
            "varlen_attention; flash_attention | it is on where a model lets it be used; "
            "attn_implementation | it is on where a model lets it be used; "
            "sdp_attention | it is on where a model lets it be used"
        ),
        "compile": "compile; torch_compile",
    },
    "sft": {
        "packing": "packing; sample_packing; "
        "group_by_length | it fills sequences, so that little is padded; "
        "padding_free | it fills sequences, so that nothing is padded",
        "completion_only_loss": (
            "completion_only_loss; assistant_only_loss; "
            "train_on_inputs | it says the opposite: false learns every token"
        ),
    },
    "dpo": {
        "beta": "beta; dpo_beta; pref_beta",
        "label_smoothing": "label_smoothing; label_smoothing_factor",
    },
    "merge": {
        "shard_gb": "shard_gb; max_shard_size | it is a number of GiB",
        "dtype": "save_dtype",
    },
    "data": {
        "data": (
            "datasets; dataset; dataset_name; dataset_path; dataset_dir; train_dataset; "
            "train_file; data_path"
        )
    },
}
"""Place to option to the names that it has elsewhere; behind a bar, what else is to be said."""

_QUANTIZE = (
    'a model is quantized by a step of its own, the first one: .quantize("nf4"), or '
    "'- quantize: nf4' in a recipe"
)
_METHOD = (
    "what is trained is said by a step of its own: .lora(r=16) before the training step, or "
    "'- peft: lora' in a recipe; without one all weights are"
)
_TRAINER = (
    "what is learned from is said by the training step's plugin: .sft(data), .dpo(pairs), or any "
    'other by .train("name", data); `tunesmith plugins` lists them'
)
_DIRECTORY = (
    'everything goes into the run directory, which is named when it is run: .run("runs/a"), or '
    "--out runs/a"
)
_FORMAT = (
    "the layout of the rows is detected, or named by format=…; docs/data.md has the layouts, and a "
    "layout of one's own is a plugin"
)
_NOTHING = "there is no such option, and nothing else has to be done; leave it out"

_INSTEAD = (
    (_QUANTIZE, "load_in_4bit quantization quantization_config quantization_bit loftq_config"),
    (
        "a model is held in 8 bits by a step of its own, the first one: "
        '.quantize("bitsandbytes", bits=8)',
        "load_in_8bit",
    ),
    (
        'it is said by the name of the quantizer: .quantize("nf4") or .quantize("fp4")',
        "bnb_4bit_quant_type",
    ),
    (_METHOD, "adapter peft_config use_peft finetuning_type peft_type"),
    (
        "an adapter is gone on with in the same recipe, by .use(name); one of PEFT's from "
        "elsewhere is merged into its base first",
        "lora_model_dir adapter_name_or_path",
    ),
    (
        "there is no such option: beside an adapter no layer is trained whole; name more layers in "
        "targets, or leave the method out, which trains all weights",
        "modules_to_save lora_modules_to_save additional_target trainable_token_indices",
    ),
    (
        "there is no such option: A begins at random and B with zeros, as in the paper, so that "
        "the adapter changes nothing at first; leave it out",
        "init_lora_weights lora_init_weights peft_init_lora_weights",
    ),
    (
        "there is no such option: r and alpha are those of all layers; several adapters with "
        "targets of their own may come one after the other",
        "rank_pattern alpha_pattern loraplus_lr_ratio",
    ),
    (
        "it is found out from the model and the training step; leave it out",
        "task_type inference_mode fan_in_fan_out model_type tokenizer_type is_llama_derived_model "
        "label_names remove_unused_columns pad_to_sequence_len padding_side",
    ),
    (
        "the tokenizer is the one that comes with the model; leave it out",
        "tokenizer tokenizer_name tokenizer_name_or_path processing_class tokenizer_config",
    ),
    (
        "special tokens are those of the model's tokenizer and its chat template; "
        'chat_template="chatml" is for a model without one',
        "special_tokens eos_token pad_token bos_token",
    ),
    (_TRAINER, "rl stage loss_type objective trainer_type"),
    (
        "the reference is the model as it stands when the step begins, and its log-probabilities "
        "are taken once, before the first update; leave it out",
        "ref_model ref_model_name_or_path precompute_ref_log_probs reference_free sync_ref_model",
    ),
    (_DIRECTORY, "output_dir run_name logging_dir overwrite_output_dir dataset_prepared_path"),
    (
        "running the same again goes on from the newest checkpoint; leave it out",
        "resume_from_checkpoint auto_resume_from_checkpoints",
    ),
    (
        "checkpoints are complete, and nothing in them is pickled; leave it out",
        "save_only_model save_safetensors",
    ),
    (
        "nothing is uploaded; a finished model is a plain directory, which the command `hf upload` "
        "takes",
        "push_to_hub hub_model_id hub_token hub_strategy hub_private_repo",
    ),
    (_FORMAT, "dataset_text_field formatting_func prompt_template field_messages dataset_format"),
    (
        "how much of each source is used is said by the data: Data(a).mix(b, weight=0.3)",
        "interleave_probs mix_strategy dataset_mixer",
    ),
    (
        "a share or a number of rows is said by the data: Data(source).limit(1000)",
        "max_samples max_train_samples",
    ),
    (
        "there is no such option: AdamW's betas and epsilon are torch's; leave it out",
        "adam_beta1 adam_beta2 adam_epsilon optim_args",
    ),
    (
        "there is no such option: a scheduler's own settings are transformers'; leave it out, or "
        "choose another scheduler",
        "lr_scheduler_kwargs lr_scheduler_args cosine_min_lr_ratio",
    ),
    (
        "several processes or GPUs are had by torchrun; docs/distributed.md says how",
        "deepspeed fsdp fsdp_config ddp_backend ddp_find_unused_parameters local_rank",
    ),
    (
        "there is no such option: noise on embeddings is not added; leave it out",
        "neftune_noise_alpha",
    ),
    (
        _NOTHING,
        "do_train strict dataloader_num_workers dataloader_pin_memory dataset_num_proc "
        "dataset_processes preprocessing_num_workers gradient_checkpointing_kwargs tf32 "
        "bnb_4bit_quant_storage disable_tqdm logging_first_step ddp_timeout low_cpu_mem_usage",
    ),
)
"""What is to be done instead, and the names of which it is said."""
