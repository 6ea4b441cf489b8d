"""Chat templates of well-known model families, cut down to what tells them apart."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, pre_tokenizers

from stateful_sglang.session.messages import ToolCall

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 and Qwen split text into words: line ends stay together, so that a prompt's last ones
don't depend on the answer."""

CHATML = """\
{%- for m in messages -%}
{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

LLAMA3 = """\
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] | trim -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n' -}}
{{- system + '<|eot_id|>' -}}
{%- for m in messages -%}
{%- if loop.first and tools -%}
{{- '<|start_header_id|>user<|end_header_id|>\n\nFunctions:\n' + (tools | tojson) + '\n\n' -}}
{{- m['content'] | trim + '<|eot_id|>' -}}
{%- elif m.tool_calls -%}
{%- if m.tool_calls | length != 1 -%}
{{- raise_exception('This model only supports single tool-calls at once!') -}}{%- endif -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' -}}
{{- m.tool_calls[0].function.name + '", "parameters": ' -}}
{{- m.tool_calls[0].function.arguments | tojson + '}<|eot_id|>' -}}
{%- elif m['role'] in ['tool', 'ipython'] -%}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m['content'] | tojson + '<|eot_id|>' -}}
{%- else -%}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' -}}
{{- m['content'] | trim + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"""

QWEN3 = """\
{%- if tools -%}
{{- '<|im_start|>system\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\n\n' -}}{%- endif -%}
{{- '# Tools\n<tools>' -}}
{%- for tool in tools -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}
{{- '\n</tools><|im_end|>\n' -}}
{%- elif messages[0].role == 'system' -%}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' -}}
{%- endif -%}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages | length - 1) -%}
{%- for message in messages[::-1] -%}
{%- set index = (messages | length - 1) - loop.index0 -%}
{%- if ns.multi_step_tool and message.role == 'user' and not (
    message.content.startswith('<tool_response>')
    and message.content.endswith('</tool_response>')) -%}
{%- set ns.multi_step_tool = false -%}{%- set ns.last_query_index = index -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- elif message.role == 'assistant' -%}
{%- set content = message.content -%}{%- set thought = '' -%}
{%- if '</think>' in content -%}
{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{%- if loop.index0 > ns.last_query_index and (loop.last or thought) -%}
{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' -}}
{{- content.lstrip('\n') -}}
{%- else -%}
{{- '<|im_start|>assistant\n' + content -}}
{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- if (loop.first and content) or not loop.first -%}{{- '\n' -}}{%- endif -%}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' -}}
{{- (call.function.arguments | tojson) + '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
{{- '<|im_end|>\n' -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}
{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}"""

THINKING_PROMPT = QWEN3[: QWEN3.index("{%- if enable_thinking")] + (
    "{{- '<think>\\n' -}}{%- endif -%}"
)
"""As the thinking-only Qwen3 models: the prompt opens the block, the answer only closes it."""

PHI3 = """\
{%- for m in messages -%}
{{- '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"""
"""Its turns begin with special tokens that the template puts together from the role."""

QWEN_CODER = """\
{%- if messages[0].role == 'system' or tools -%}
{{- '<|im_start|>system\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content -}}{%- endif -%}
{%- for tool in tools or [] -%}
{{- '\n<function>\n<name>' ~ tool.function.name ~ '</name>' -}}
{%- for name, fields in tool.function.parameters.properties | items -%}
{{- '\n<parameter>\n<name>' ~ name ~ '</name>' -}}
{%- for key in fields -%}{{- '\n<' ~ key ~ '>' ~ fields[key] ~ '</' ~ key ~ '>' -}}{%- endfor -%}
{{- '\n</parameter>' -}}
{%- endfor -%}
{{- '\n</function>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' and m.tool_calls -%}
{{- '<|im_start|>assistant\n' + (m.content + '\n' if m.content else '') -}}
{%- for call in m.tool_calls -%}
{{- '<tool_call>\n<function=' + call.function.name + '>\n' -}}
{%- for name, value in call.function.arguments | items -%}
{{- '<parameter=' + name + '>\n' ~ value ~ '\n</parameter>\n' -}}
{%- endfor -%}
{{- '</function>\n</tool_call>' -}}{%- if not loop.last -%}{{- '\n' -}}{%- endif -%}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- elif m.role == 'tool' -%}
{%- if loop.previtem is not defined or loop.previtem.role != 'tool' -%}
{{- '<|im_start|>user\n' -}}{%- endif -%}
{{- '<tool_response>\n' + m.content + '\n</tool_response>\n' -}}
{%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
{%- elif m.role != 'system' or not loop.first -%}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
"""As Qwen3-Coder: keys of tool definitions become tags, which may be spelled as tokens are."""

MISTRAL = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- set users = loop_messages | selectattr('role', 'equalto', 'user') | list -%}
{%- set ns = namespace(index=0) -%}{%- set asked = namespace(ids=[]) -%}
{%- for m in loop_messages -%}
{%- if not (m.role == 'tool' or (m.tool_calls is defined and m.tool_calls)) -%}
{%- if (m['role'] == 'user') != (ns.index % 2 == 0) -%}
{{- raise_exception('Conversation roles must alternate user/assistant') -}}{%- endif -%}
{%- set ns.index = ns.index + 1 -%}
{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for m in loop_messages -%}
{%- if m['role'] == 'user' -%}
{%- if tools and m == users[-1] -%}
{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
{%- if loop.last and system is defined -%}
{{- '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' -}}
{%- else -%}{{- '[INST] ' + m['content'] + '[/INST]' -}}{%- endif -%}
{%- elif m.tool_calls is defined and m.tool_calls -%}
{{- '[TOOL_CALLS] [' -}}
{%- for call in m.tool_calls -%}
{%- if call.id | length != 9 -%}{{- raise_exception('Tool call IDs need length 9') -}}{%- endif -%}
{%- set asked.ids = asked.ids + [call.id] -%}
{{- call.function | tojson -}}{%- if not loop.last -%}{{- ', ' -}}{%- endif -%}
{%- endfor -%}
{{- ']</s>' -}}
{%- elif m['role'] == 'assistant' -%}
{{- ' ' + m['content'] | trim + '</s>' -}}
{%- elif m['role'] == 'tool' -%}
{%- if m.tool_call_id not in asked.ids -%}
{{- raise_exception('A tool result answers no call') -}}{%- endif -%}
{{- '[TOOL_RESULTS] {"content": ' + m['content'] | tojson + '}[/TOOL_RESULTS]' -}}
{%- else -%}{{- raise_exception('Only user, assistant and tool roles are supported') -}}
{%- endif -%}
{%- endfor -%}"""

GEMMA = """\
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- for m in messages -%}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}
{{- '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"""


def hermes_call(call: ToolCall) -> str:
    arguments = json.dumps(call.arguments)
    return f'<tool_call>\n{{"name": "{call.name}", "arguments": {arguments}}}\n</tool_call>'


def _llama_call(call: ToolCall) -> str:
    return f'{{"name": "{call.name}", "parameters": {json.dumps(call.arguments)}}}'


def _coder_call(call: ToolCall) -> str:
    values = [
        f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in call.arguments.items()
    ]
    return f"<tool_call>\n<function={call.name}>\n{''.join(values)}</function>\n</tool_call>"


def _mistral_call(call: ToolCall) -> str:
    function = json.dumps({"name": call.name, "arguments": call.arguments})
    return f"[TOOL_CALLS] [{function}]"


@dataclass(frozen=True)
class Family:
    """A template and how a model trained on it answers."""

    name: str
    template: str | None
    """None: the tokenizer's own."""
    end: str
    specials: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    """Tokens that are found in text as specials are, and are not special."""
    bos: str | None = None
    call: Callable[[ToolCall], str] = hermes_call
    says: Callable[[str], str] = str
    """From a message's content to the text a model generates for it."""
    system: bool = True
    native_tools: bool = True
    rewrites: tuple[str, ...] = ()
    """Patterns (of the tests) in which appending a user message changes earlier text."""

    def tokenizer(self, base: Any) -> Any:
        """A copy of `base` with this template and its special tokens."""
        tokenizer = copy.deepcopy(base)
        if self.template is not None:
            tokenizer.chat_template = self.template
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        if self.specials:
            tokenizer.add_tokens(list(self.specials), special_tokens=True)
        if self.added:
            tokenizer.add_tokens([AddedToken(each, normalized=False) for each in self.added])
        if self.bos is not None:
            tokenizer.bos_token = self.bos
        return tokenizer

    def end_id(self, tokenizer: Any) -> int:
        (end,) = tokenizer.encode(self.end, add_special_tokens=False)
        return int(end)


QWEN_TAGS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    "<|object_ref_start|>",
)
"""Added tokens of Qwen 3, which the default model knows as text."""

FAMILIES = [
    Family("smollm", None, "<|im_end|>", native_tools=False),
    Family("chatml", CHATML, "<|im_end|>", native_tools=False),
    Family(
        "llama3",
        LLAMA3,
        "<|eot_id|>",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        call=_llama_call,
    ),
    Family("qwen3", QWEN3, "<|im_end|>", rewrites=("think",)),
    Family("qwen3-tags", QWEN3, "<|im_end|>", added=QWEN_TAGS, rewrites=("think",)),
    Family("qwen3-coder", QWEN_CODER, "<|im_end|>", added=QWEN_TAGS, call=_coder_call),
    Family(
        "phi3",
        PHI3,
        "<|end|>",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"),
        native_tools=False,
    ),
    Family(
        "mistral",
        MISTRAL,
        "</s>",
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        bos="<s>",
        call=_mistral_call,
        says=lambda content: " " + content,
        rewrites=("system", "tools"),
    ),
    Family(
        "gemma",
        GEMMA,
        "<end_of_turn>",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        system=False,
        native_tools=False,
    ),
]
