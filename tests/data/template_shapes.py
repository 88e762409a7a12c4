"""Chat templates in the shapes that public models have, written anew after their documented rules.

Each says what a turn of the assistant is there: what stands between the generation prompt and the
content, whether content is stripped, what ends the turn, and which conversations the template
cannot hold. `test_label_parity.py` measures the labels against that.
"""

from __future__ import annotations

import attrs

THINK = ("<think>", "</think>")


@attrs.frozen
class Shape:
    """A chat template and what is true of it."""

    source: str
    specials: tuple[str, ...]
    end: str
    """What ends a turn as the last one; "" where the tokenizer's eos has to be put there."""
    lead: str = ""
    """What the model has to write before the content, such as a space."""
    strips: bool = False
    """Whether white space around a content is taken away."""
    eos: str = "</s>"
    bos: str | None = "<s>"
    cannot: frozenset[str] = attrs.field(default=frozenset(), converter=frozenset)
    """Tags of conversations that the template refuses or loses, and no rendering could save."""


def headed(
    system: str,
    user: str,
    assistant: str,
    end: str,
    *,
    tool: str = "",
    user_end: str | None = None,
    after: str = "",
    prompt: str | None = None,
    bos: bool = False,
    strip: bool = False,
) -> str:
    """A template of headers: `header + content + end + after` for every turn."""
    content = "m.content | trim" if strip else "m.content"
    user_end = end if user_end is None else user_end
    heads = {"system": system, "user": user, "assistant": assistant, "tool": tool or user}
    lines = ["{{- bos_token -}}"] if bos else []
    lines.append("{%- for m in messages -%}")
    for number, (role, head) in enumerate(heads.items()):
        word = "if" if number == 0 else "elif"
        lines.append(f"{{%- {word} m.role == {role!r} -%}}")
        close = end if role == "assistant" else user_end
        lines.append(f"{{{{- {head!r} + ({content}) + {close!r} + {after!r} -}}}}")
    lines.append("{%- endif -%}{%- endfor -%}")
    header = assistant if prompt is None else prompt
    lines.append(f"{{%- if add_generation_prompt -%}}{{{{- {header!r} -}}}}{{%- endif -%}}")
    return "".join(lines)


def im(role: str) -> str:
    return f"<|im_start|>{role}\n"


TEXT_ONLY = {"calls", "tools", "thoughts"}
CHATML = headed(
    im("system"), im("user"), im("assistant"), "<|im_end|>", tool=im("tool"), after="\n"
)

_JSON_CALLS = (
    "{%- for c in m.tool_calls or [] -%}"
    "{{- '\n<tool_call>\n' + {'name': c.function.name, 'arguments': c.function.arguments} | tojson"
    " + '\n</tool_call>' -}}{%- endfor -%}"
)
_TOOLS = "{%- if tools -%}{{- '<tools>' + tools | tojson + '</tools>\n' -}}{%- endif -%}"

HERMES = (
    _TOOLS + "{%- for m in messages -%}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content -}}" + _JSON_CALLS + "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)

# thoughts of turns before the last question are left out; a last answer always has a block
QWEN3 = (
    _TOOLS + "{%- set ns = namespace(last=0) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}"
    "{%- endif -%}{%- endfor -%}{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{%- set content = m.content -%}{%- set thought = '' -%}"
    "{%- if m.reasoning_content is string -%}{%- set thought = m.reasoning_content -%}"
    "{%- elif '</think>' in content -%}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{- '<|im_start|>assistant\n' -}}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) -%}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') -}}"
    "{%- else -%}{{- content -}}{%- endif -%}" + _JSON_CALLS + "{{- '<|im_end|>\n' -}}"
    "{%- elif m.role == 'tool' -%}{{- '<|im_start|>user\n<tool_response>\n' + m.content"
    " + '\n</tool_response><|im_end|>\n' -}}"
    "{%- else -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# the model is given an open block to think in
QWEN3_THINKING = QWEN3.replace(
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}",
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}",
)
QWEN35 = QWEN3_THINKING.replace(
    "{%- set ns = namespace(last=0) -%}",
    "{%- set ns = namespace(last=-1) -%}",
).replace(
    "{%- endif -%}{%- endfor -%}{%- for m in messages -%}{%- if m.role == 'assistant'",
    "{%- endif -%}{%- endfor -%}{%- if ns.last < 0 -%}{{- raise_exception('No user query') -}}"
    "{%- endif -%}{%- for m in messages -%}{%- if m.role == 'assistant'",
)

LLAMA2 = (
    "{%- set first = messages[0] -%}"
    "{%- set system = '<<SYS>>\n' + first.content + '\n<</SYS>>\n\n' if first.role == 'system'"
    " else '' -%}"
    "{%- set rest = messages[1:] if first.role == 'system' else messages -%}"
    "{%- for m in rest -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/...') -}}{%- endif -%}"
    "{%- if m.role == 'user' -%}"
    "{{- bos_token + '[INST] ' + ((system if loop.first else '') + m.content) | trim"
    " + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + m.content | trim + ' ' + eos_token -}}{%- endif -%}{%- endfor -%}"
)
LLAMA3 = (
    "{{- bos_token -}}"
    "{%- if tools -%}{{- '<|start_header_id|>system<|end_header_id|>\n\nTools: ' + tools | tojson"
    " + '<|eot_id|>' -}}{%- endif -%}"
    "{%- for m in messages -%}"
    "{{- '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role)"
    " + '<|end_header_id|>\n\n' -}}"
    "{%- if m.tool_calls -%}{%- if m.tool_calls | length != 1 -%}"
    "{{- raise_exception('This model only supports single tool-calls at once!') -}}{%- endif -%}"
    "{%- set c = m.tool_calls[0].function -%}{{- m.content | trim -}}"
    "{{- '{\"name\": \"' + c.name + '\", \"parameters\": ' + c.arguments | tojson + '}' -}}"
    "{%- elif m.role == 'tool' -%}{{- m.content | tojson -}}"
    "{%- else -%}{{- m.content | trim -}}{%- endif -%}{{- '<|eot_id|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"
)
MISTRAL = (
    "{{- bos_token -}}{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{{- '[INST] ' + m.content + ' [/INST]' -}}"
    "{%- elif m.role == 'assistant' -%}{{- ' ' + m.content + eos_token -}}"
    "{%- else -%}{{- raise_exception('Only user and assistant roles are supported!') -}}"
    "{%- endif -%}{%- endfor -%}"
)
MISTRAL_TOOLS = (
    "{{- bos_token -}}{%- if tools -%}{{- '[AVAILABLE_TOOLS]' + tools | tojson"
    " + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' -}}"
    "{%- elif m.role == 'user' -%}{{- '[INST]' + m.content + '[/INST]' -}}"
    "{%- elif m.role == 'tool' -%}"
    "{%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 -%}"
    "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}"
    "{%- endif -%}"
    '{{- \'[TOOL_RESULTS]{"content": \' + m.content | tojson + \', "call_id": "\''
    " + m.tool_call_id + '\"}[/TOOL_RESULTS]' -}}"
    "{%- elif m.tool_calls -%}{{- m.content + '[TOOL_CALLS][' -}}{%- for c in m.tool_calls -%}"
    "{%- if c.id is not defined or c.id | length != 9 -%}"
    "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}"
    "{%- endif -%}"
    "{{- (c.function | tojson)[:-1] + ', \"id\": \"' + c.id + '\"}' -}}"
    "{{- '' if loop.last else ', ' -}}{%- endfor -%}{{- ']' + eos_token -}}"
    "{%- else -%}{{- m.content + eos_token -}}{%- endif -%}{%- endfor -%}"
)
GEMMA = (
    "{{- bos_token -}}{%- for m in messages -%}"
    "{%- if m.role not in ['user', 'assistant'] -%}"
    "{{- raise_exception('System role not supported') -}}{%- endif -%}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/...') -}}{%- endif -%}"
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
    " + m.content | trim + '<end_of_turn>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
)
GEMMA3 = (
    "{{- bos_token -}}"
    "{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' -%}"
    "{%- for m in (messages[1:] if system else messages) -%}"
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
    " + (system if loop.first else '') + m.content | trim + '<end_of_turn>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
)
# the end of text follows only where no answer is asked for
PHI3 = (
    "{%- for m in messages -%}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}"
    "{%- else -%}{{- eos_token -}}{%- endif -%}"
)
PHI4_MINI = (
    "{%- for m in messages -%}{{- '<|' + m.role + '|>' + m.content + '<|end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
DEEPSEEK_V2 = (
    "{{- bos_token -}}{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{{- 'User: ' + m.content + '\n\n' -}}"
    "{%- elif m.role == 'assistant' -%}{{- 'Assistant: ' + m.content + eos_token -}}"
    "{%- else -%}{{- m.content + '\n\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)
# arguments have to be text; a call closes with special tokens of its own
DEEPSEEK_V3 = (
    "{{- bos_token -}}{%- if tools -%}{{- '## Tools ' + tools | tojson -}}{%- endif -%}"
    "{%- for m in messages -%}{%- if m.role == 'system' -%}{{- m.content -}}"
    "{%- elif m.role == 'user' -%}{{- '<|User|>' + m.content -}}"
    "{%- elif m.role == 'tool' -%}{{- '<|tool_output|>' + m.content + '<|/tool_output|>' -}}"
    "{%- else -%}{{- '<|Assistant|>' + m.content -}}"
    "{%- for c in m.tool_calls or [] -%}"
    "{{- '<|call|>' + c.type + '<|sep|>' + c.function.name + '\n```json\n'"
    " + c.function.arguments + '\n```<|/call|>' -}}{%- endfor -%}"
    "{{- '<|end_of_sentence|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|Assistant|>' -}}{%- endif -%}"
)
# opens a thought in the prompt and never writes one
DEEPSEEK_R1 = (
    "{{- bos_token -}}{%- for m in messages -%}{%- if m.role == 'system' -%}{{- m.content -}}"
    "{%- elif m.role == 'user' -%}{{- '<|User|>' + m.content -}}"
    "{%- elif m.role == 'assistant' -%}"
    "{{- '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end_of_sentence|>' -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\n' -}}{%- endif -%}"
)
GLM4 = (
    "{{- '[gMASK]<sop>' -}}{%- for m in messages -%}"
    "{{- '<|' + ('observation' if m.role == 'tool' else m.role) + '|>\n' + m.content -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
)
GLM45 = (
    "{{- '[gMASK]<sop>' -}}"
    "{%- if tools -%}{{- '<|system|>\n' + tools | tojson -}}{%- endif -%}"
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}{%- for m in messages -%}"
    "{%- if m.role == 'assistant' -%}{{- '<|assistant|>' -}}"
    "{%- set content = m.content -%}{%- set thought = m.reasoning_content or '' -%}"
    "{%- if '</think>' in content -%}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1] -%}"
    "{%- set content = content.split('</think>')[-1] -%}{%- endif -%}"
    "{{- '\n<think>' + (thought | trim if loop.index0 > ns.last else '') + '</think>' -}}"
    "{%- if content | trim -%}{{- '\n' + content | trim -}}{%- endif -%}"
    "{%- for c in m.tool_calls or [] -%}{{- '\n<tool_call>' + c.function.name -}}"
    "{%- for key, value in c.function.arguments.items() -%}"
    "{{- '\n<arg_key>' + key + '</arg_key>\n<arg_value>' -}}"
    "{{- value if value is string else value | tojson -}}{{- '</arg_value>' -}}{%- endfor -%}"
    "{{- '\n</tool_call>' -}}{%- endfor -%}"
    "{%- elif m.role == 'tool' -%}{{- '<|observation|>\n' + m.content -}}"
    "{%- else -%}{{- '<|' + m.role + '|>\n' + m.content -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# a last answer returns, an earlier one ends; thoughts stay only within the last exchange
GPT_OSS = (
    "{%- if tools -%}{{- '<|start|>developer<|message|>' + tools | tojson + '<|end|>' -}}"
    "{%- endif -%}{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{%- set thought = m.thinking -%}"
    "{%- if thought and loop.index0 > ns.last -%}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + thought + '<|end|>' -}}"
    "{%- endif -%}{%- if m.tool_calls -%}{%- if m.tool_calls | length != 1 -%}"
    "{{- raise_exception('one call at a time') -}}{%- endif -%}"
    "{%- if m.content -%}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.content + '<|end|>' -}}"
    "{%- endif -%}"
    "{{- '<|start|>assistant to=functions.' + m.tool_calls[0].function.name"
    " + '<|channel|>commentary json<|message|>' + m.tool_calls[0].function.arguments | tojson"
    " + '<|call|>' -}}"
    "{%- else -%}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content -}}"
    "{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' -}}{%- endif -%}"
    "{%- else -%}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"
)
COMMAND_R = headed(
    "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    bos=True,
    strip=True,
)
VICUNA = (
    "{%- if messages[0].role == 'system' -%}{{- messages[0].content + ' ' -}}"
    "{%- else -%}{{- 'A chat between a curious user and an assistant. ' -}}{%- endif -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{{- 'USER: ' + m.content + ' ' -}}"
    "{%- elif m.role == 'assistant' -%}{{- 'ASSISTANT: ' + m.content + eos_token -}}"
    "{%- elif not loop.first -%}{{- raise_exception('unknown role ' + m.role) -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
PLAIN = headed(
    "", "Question: ", "Answer: ", "", tool="Result: ", user_end="\n\n", after="", prompt=None
)
ALPACA = headed(
    "", "### Instruction:\n", "### Response:\n", "</s>\n\n", user_end="\n\n", tool="### Input:\n"
)
FALCON = headed("", "User: ", "Falcon: ", "\n", user_end="\n", tool="Tool: ", prompt="Falcon:")
ZEPHYR = headed("<|system|>\n", "<|user|>\n", "<|assistant|>\n", "</s>", after="\n")
OLMO = (
    "{{- eos_token -}}{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{{- '<|assistant|>\n' + m.content + eos_token + ('' if loop.last else '\n') -}}"
    "{%- else -%}{{- '<|' + m.role + '|>\n' + m.content + '\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
)
SMOLLM2 = (
    "{%- for m in messages -%}{%- if loop.first and m.role != 'system' -%}"
    "{{- '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' -}}{%- endif -%}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
SMOLLM3 = (
    "{{- '<|im_start|>system\n## Metadata\nReasoning Mode: /think\n' -}}"
    "{%- if tools -%}{{- tools | tojson + '\n' -}}{%- endif -%}"
    "{%- if messages[0].role == 'system' -%}{{- messages[0].content | trim + '\n' -}}"
    "{%- endif -%}{{- '<|im_end|>\n' -}}{%- for m in messages -%}"
    "{%- if m.role == 'assistant' -%}{{- '<|im_start|>assistant\n' -}}"
    "{% generation %}{{- m.content.lstrip('\n') + '<|im_end|>\n' -}}{% endgeneration %}"
    "{%- elif m.role == 'tool' -%}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' -}}"
    "{%- elif m.role == 'user' -%}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
YI = headed(im("system"), im("user"), im("assistant"), "<|im_end|>", after="\n")
INTERNLM = headed(im("system"), im("user"), im("assistant"), "<|im_end|>", after="\n", bos=True)
OPENCHAT = headed(
    "",
    "GPT4 Correct User: ",
    "GPT4 Correct Assistant: ",
    "<|end_of_turn|>",
    bos=True,
    prompt="GPT4 Correct Assistant:",
)
SOLAR = headed(
    "### System:\n", "### User:\n", "### Assistant:\n", "", user_end="\n\n", after="", tool=""
)
NEMOTRON = headed(
    "<extra_id_0>System\n",
    "<extra_id_1>User\n",
    "<extra_id_1>Assistant\n",
    "\n",
    user_end="\n",
    strip=True,
)
MINICPM = headed("", "<User>", "<AI>", "", strip=True)
BAICHUAN = headed("", "<reserved_106>", "<reserved_107>", "")
JAMBA = (
    "{{- bos_token -}}{%- for m in messages -%}"
    "{{- '<|bom|><|' + m.role + '|> ' + m.content + '<|eom|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|bom|><|assistant|>' -}}{%- endif -%}"
)
EXAONE = (
    "{%- for m in messages -%}{{- '[|' + m.role + '|]' + m.content | trim -}}"
    "{{- '\n' if m.role == 'user' else '[|endofturn|]\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '[|assistant|]' -}}{%- endif -%}"
)
GRANITE = (
    "{%- if tools -%}{{- '<|start_of_role|>available_tools<|end_of_role|>' + tools | tojson"
    " + '<|end_of_text|>\n' -}}{%- endif -%}{%- for m in messages -%}"
    "{{- '<|start_of_role|>' + ('tool_response' if m.role == 'tool' else m.role)"
    " + '<|end_of_role|>' + m.content -}}"
    "{%- if m.tool_calls -%}{{- '<|tool_call|>' + m.tool_calls | map(attribute='function') | list"
    " | tojson -}}{%- endif -%}{{- '<|end_of_text|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_of_role|>assistant<|end_of_role|>' -}}"
    "{%- endif -%}"
)
KIMI = (
    "{%- if tools -%}{{- '<|im_system|>tools<|im_middle|>' + tools | tojson + '<|im_end|>' -}}"
    "{%- endif -%}{%- for m in messages -%}"
    "{{- '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' -}}"
    "{%- if m.role == 'tool' -%}{{- '## Return of ' + m.tool_call_id + '\n' -}}{%- endif -%}"
    "{{- m.content -}}{%- for c in m.tool_calls or [] -%}"
    "{{- '<|call_begin|>' + c.id + '<|argument|>' -}}"
    "{{- c.function.arguments if c.function.arguments is string else c.function.arguments | tojson"
    " -}}{{- '<|call_end|>' -}}{%- endfor -%}{{- '<|im_end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_assistant|>assistant<|im_middle|>' -}}{%- endif -%}"
)
# writes arguments as Python prints them unless they are text
OLD_TOOLS = (
    "{%- if tools -%}{{- tools | tojson + '\n' -}}{%- endif -%}{%- for m in messages -%}"
    "{{- m.role | upper + ': ' + m.content -}}{%- for c in m.tool_calls or [] -%}"
    "{{- ' CALL ' ~ c.function.name ~ ' ' ~ c.function.arguments -}}{%- endfor -%}"
    "{{- (eos_token if m.role == 'assistant' else '') + '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
# the header of an answer has a line break that is gone once the answer is there
SHRINKING = (
    "{%- for m in messages -%}"
    "{{- '<|' + m.role + '|>' + m.content | trim + '<|end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
)

_ALTERNATE = {"tool turns", "roles in a row", "assistant first"}
_IM = ("<|im_start|>", "<|im_end|>")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")

SHAPES: dict[str, Shape] = {
    "chatml": Shape(CHATML, _IM, "<|im_end|>", cannot=TEXT_ONLY, bos=None),
    "hermes": Shape(HERMES, _IM, "<|im_end|>", cannot={"thoughts"}),
    "qwen2": Shape(SMOLLM2, _IM, "<|im_end|>", eos="<|im_end|>", bos=None, cannot=TEXT_ONLY),
    "qwen3": Shape(QWEN3, (*_IM, *THINK), "<|im_end|>", "<think>\n\n</think>\n\n", bos=None),
    "qwen3 thinking": Shape(QWEN3_THINKING, (*_IM, *THINK), "<|im_end|>", "\n</think>\n\n"),
    "qwen3.5": Shape(
        QWEN35, (*_IM, *THINK), "<|im_end|>", "\n</think>\n\n", cannot={"assistant first"}
    ),
    "llama2": Shape(
        LLAMA2,
        (),
        " </s>",
        " ",
        strips=True,
        cannot=TEXT_ONLY | _ALTERNATE,
    ),
    "llama3": Shape(
        LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        strips=True,
        eos="<|eot_id|>",
        cannot={"thoughts", "parallel"},
    ),
    "mistral": Shape(
        MISTRAL, ("[INST]", "[/INST]"), "</s>", " ", cannot=TEXT_ONLY | {"system", "tool turns"}
    ),
    "mistral tools": Shape(
        MISTRAL_TOOLS,
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        "</s>",
        cannot={"thoughts"},
    ),
    "gemma": Shape(
        GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        strips=True,
        cannot=TEXT_ONLY | _ALTERNATE | {"system"},
    ),
    "gemma3": Shape(
        GEMMA3, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", strips=True, cannot=TEXT_ONLY
    ),
    "phi3": Shape(PHI3, _ROLES, "<|end|>", eos="<|endoftext|>", cannot=TEXT_ONLY),
    "phi4": Shape(
        headed(
            "<|im_start|>system<|im_sep|>",
            "<|im_start|>user<|im_sep|>",
            "<|im_start|>assistant<|im_sep|>",
            "<|im_end|>",
        ),
        (*_IM, "<|im_sep|>"),
        "<|im_end|>",
        cannot=TEXT_ONLY,
    ),
    "phi4 mini": Shape(PHI4_MINI, _ROLES, "<|end|>", cannot=TEXT_ONLY),
    "deepseek v2": Shape(DEEPSEEK_V2, (), "</s>", " ", cannot=TEXT_ONLY),
    "deepseek v3": Shape(
        DEEPSEEK_V3,
        ("<|User|>", "<|Assistant|>", "<|end_of_sentence|>", "<|call|>", "<|/call|>", "<|sep|>"),
        "<|end_of_sentence|>",
        eos="<|end_of_sentence|>",
        cannot={"thoughts"},
    ),
    "deepseek r1": Shape(
        DEEPSEEK_R1,
        ("<|User|>", "<|Assistant|>", "<|end_of_sentence|>"),
        "<|end_of_sentence|>",
        "\n</think>\n\n",
        eos="<|end_of_sentence|>",
        cannot={"calls", "tools", "tool turns", "assistant first"},
    ),
    "glm4": Shape(GLM4, (*_ROLES[:3], "<|observation|>", "[gMASK]", "<sop>"), "", cannot=TEXT_ONLY),
    "glm4.5": Shape(
        GLM45,
        (*_ROLES[:3], "<|observation|>", "[gMASK]", "<sop>"),
        "",
        "\n<think></think>\n",
        strips=True,
    ),
    "gpt-oss": Shape(
        GPT_OSS,
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
        "<|return|>",
        "<|channel|>final<|message|>",
        eos="<|return|>",
        cannot={"parallel"},
    ),
    "granite": Shape(
        GRANITE,
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"),
        "<|end_of_text|>",
        eos="<|end_of_text|>",
        cannot={"thoughts"},
    ),
    "command-r": Shape(
        COMMAND_R,
        (
            "<|START_OF_TURN_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
        ),
        "<|END_OF_TURN_TOKEN|>",
        strips=True,
        cannot=TEXT_ONLY,
    ),
    "vicuna": Shape(VICUNA, (), "</s>", " ", cannot=TEXT_ONLY | {"tool turns"}),
    "plain": Shape(PLAIN, (), "", cannot=TEXT_ONLY),
    "alpaca": Shape(ALPACA, (), "</s>", cannot=TEXT_ONLY),
    "falcon": Shape(FALCON, (), "", " ", cannot=TEXT_ONLY),
    "zephyr": Shape(ZEPHYR, (), "</s>", cannot=TEXT_ONLY),
    "olmo": Shape(OLMO, (), "<|endoftext|>", eos="<|endoftext|>", bos=None, cannot=TEXT_ONLY),
    "smollm2": Shape(SMOLLM2, _IM, "<|im_end|>", eos="<|im_end|>", cannot=TEXT_ONLY),
    "smollm3": Shape(SMOLLM3, _IM, "<|im_end|>", eos="<|im_end|>", cannot={"thoughts", "calls"}),
    "yi": Shape(YI, _IM, "<|im_end|>", cannot=TEXT_ONLY),
    "internlm": Shape(INTERNLM, _IM, "<|im_end|>", cannot=TEXT_ONLY),
    "openchat": Shape(OPENCHAT, ("<|end_of_turn|>",), "<|end_of_turn|>", " ", cannot=TEXT_ONLY),
    "solar": Shape(SOLAR, (), "", cannot=TEXT_ONLY),
    "nemotron": Shape(
        NEMOTRON, ("<extra_id_0>", "<extra_id_1>"), "", strips=True, cannot=TEXT_ONLY
    ),
    "minicpm": Shape(MINICPM, ("<User>", "<AI>"), "", strips=True, cannot=TEXT_ONLY),
    "baichuan": Shape(
        BAICHUAN, ("<reserved_106>", "<reserved_107>"), "", bos=None, cannot=TEXT_ONLY
    ),
    "jamba": Shape(
        JAMBA,
        ("<|bom|>", "<|eom|>", "<|assistant|>", "<|user|>", "<|system|>", "<|tool|>"),
        "<|eom|>",
        " ",
        cannot=TEXT_ONLY,
    ),
    "exaone": Shape(
        EXAONE,
        ("[|assistant|]", "[|user|]", "[|system|]", "[|endofturn|]"),
        "[|endofturn|]",
        strips=True,
        cannot=TEXT_ONLY,
    ),
    "kimi": Shape(
        KIMI,
        ("<|im_middle|>", "<|im_end|>", "<|call_begin|>", "<|argument|>", "<|call_end|>"),
        "<|im_end|>",
        cannot={"thoughts"},
    ),
    "old tools": Shape(OLD_TOOLS, (), "</s>", " ", cannot={"thoughts"}),
    "shrinking": Shape(
        SHRINKING, _ROLES, "<|end|>", strips=True, cannot=TEXT_ONLY | {"assistant first", "empty"}
    ),
}
