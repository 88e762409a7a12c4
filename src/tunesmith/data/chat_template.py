"""A tokenizer's chat template: its own, the built-in one, or one that a recipe brings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.data import templates
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHATML", "begins_with_bos", "needs_template", "set_chat_template", "template_source"]

CHATML = """\
{%- set first = messages[0] if messages else {'role': ''} -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if first.role == 'system' -%}{{- first.content + '\\n\\n' -}}{%- endif -%}
{{- 'You may call these tools, each given as a JSON schema:\\n<tools>\\n' -}}
{%- for tool in tools -%}{{- tool | tojson + '\\n' -}}{%- endfor -%}
{{- '</tools>\\nTo call one, write its name and arguments as JSON:\\n' -}}
{{- '<tool_call>\\n{"name": "...", "arguments": {...}}\\n</tool_call><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if not (tools and loop.first and message.role == 'system') -%}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function or call -%}
{%- if message.content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
{{- '<tool_call>\\n{"name": ' + function.name | tojson -}}
{{- ', "arguments": ' + function.arguments | tojson + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""The built-in template "chatml", which also writes tools and tool calls (as Hermes does)."""

_END = "<|im_end|>"


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Give a tokenizer the chat template that a recipe asks for.

    None keeps the tokenizer's own; "chatml" takes the built-in one, which ends turns with
    <|im_end|>, or with the tokenizer's eos token where <|im_end|> is no token of its vocabulary,
    and begins with the bos token where the tokenizer begins a text with one; else the path of a
    .jinja file, or Jinja source. Errors: `DataError` if there is none, the file
    cannot be read, or the source is not valid Jinja.
    """
    if template is None:
        needs_template(tokenizer)
        templates.probe(tokenizer)
        return
    if template == "chatml":
        source = CHATML if _is_token(tokenizer, _END) else _chatml_ending_with_eos(tokenizer)
        if begins_with_bos(tokenizer):
            source = "{{- bos_token -}}\n" + source
    else:
        source = template_source(template) or ""
    tokenizer.chat_template = source
    templates.probe(tokenizer)


def template_source(template: str | None) -> str | None:
    """Return what decides a chat template: the text of the file, where it is the path of one.

    Errors: `DataError` for a file that cannot be read.
    """
    if template is None or template == "chatml" or "{%" in template or "{{" in template:
        return template
    return _template_file(template)


def _template_file(template: str) -> str:
    path = Path(template)
    if path.suffix != ".jinja":
        raise DataError(
            f'chat_template: got {template!r}; expected "chatml", the path of a .jinja file, or '
            "Jinja source"
        )
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"chat_template: no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"chat_template: {path} cannot be read: {error}") from error


def _chatml_ending_with_eos(tokenizer: PreTrainedTokenizerBase) -> str:
    # text such as "<|im_end|>" spelled in pieces would end nothing: generation stops at one token
    if tokenizer.eos_token is None:
        raise DataError(
            'chat_template="chatml" ends a turn with <|im_end|> or the eos token, and this '
            "tokenizer has neither; set tokenizer.eos_token"
        )
    return CHATML.replace(f"{_END}\\n'", "' + eos_token + '\\n'")


def _is_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer, by its own rule, begins a text with its bos token."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a", verbose=False)["input_ids"][:1]) == [bos]


def needs_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `DataError` unless the tokenizer has a chat template."""
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, as is usual for base models; pass "
            'chat_template="chatml" or the path of a .jinja template'
        )
