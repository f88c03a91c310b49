"""Chat templates with tools in the forms that models have them, as short as can be, and tokenizers that have one."""

from dataclasses import dataclass
from pathlib import Path

from support.tiny_model import make_byte_tokenizer
from transformers import AddedToken, AutoTokenizer

from isthmus.model.text.answers.call_syntax import deepseek

HERMES = """{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}# Tools
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not (loop.first and tools)) %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' %}<|im_start|>assistant
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}
{%- for call in m.tool_calls %}{% if not loop.first or m.content %}
{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking %}<think>
{% endif %}{% endif %}"""
QWEN_XML = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls %}{% if not loop.first or m.content %}

{% endif %}<tool_call>
<function={{ call.function.name }}>
{% for key, value in call.function.arguments | items %}<parameter={{ key }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor %}</function>
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
<think>

</think>

{% endif %}"""
LLAMA = """{{ bos_token }}
{%- for m in messages %}
{%- if m.tool_calls %}<|start_header_id|>assistant<|end_header_id|>

{% if m.tool_calls | length != 1 %}{{ raise_exception("This model only supports single tool-calls at once!") }}
{%- endif %}{%- set call = m.tool_calls[0].function %}{"name": "{{ call.name }}", "parameters": {{- ' ' }}
{{- call.arguments | tojson }}
{{- '}' }}<|eot_id|>
{%- elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>

{{ m.content | tojson }}<|eot_id|>
{%- else %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if tools is not none and loop.last %}{% for t in tools %}{{ t | tojson(indent=4) }}

{% endfor %}{% endif %}{{ m.content | trim }}<|eot_id|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
MISTRAL_LIST = """{{ bos_token }}{%- for m in messages %}
{%- if m.role == 'user' %}{% if tools is not none and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}
{{- '[/AVAILABLE_TOOLS]' }}
{%- endif %}[INST]{{ m.content }}[/INST]
{%- elif m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}
{{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{% endif %}
{{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + ', "id": "' + call.id
 + '"}' }}{{ ", " if not loop.last else "]" + eos_token }}{% endfor %}
{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}
{%- elif m.role == 'tool' %}[TOOL_RESULTS] {{ {"content": m.content, "call_id": m.tool_call_id} | tojson }}
{{- '[/TOOL_RESULTS]' }}
{%- endif %}{% endfor %}"""
MISTRAL = """{{ bos_token }}{% if tools is not none %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}[INST]{{ m.content }}[/INST]
{%- elif m.role == 'assistant' %}{{ m.content }}
{%- for call in m.tool_calls %}[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}
{%- endfor %}
{{- eos_token }}
{%- elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]
{%- endif %}{% endfor %}"""
GPT_OSS = """<|start|>system<|message|>You are a model.<|end|>
{%- if tools %}<|start|>developer<|message|># Tools
{% for t in tools %}// {{ t.function.description }}
type {{ t.function.name }} = (_: {{ t.function.parameters | tojson }}) => any;
{% endfor %}<|end|>{% endif %}
{%- for m in messages %}
{%- if m.role in ('developer', 'system', 'user') %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>
{%- elif m.role == 'assistant' %}
{%- if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}
{%- if m.tool_calls %}{% set call = m.tool_calls[0].function %}<|start|>assistant to=functions.{{ call.name }}
{{- '<|channel|>commentary json<|message|>' }}{{ call.arguments | tojson }}<|call|>
{%- else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}
{%- elif m.role == 'tool' %}<|start|>functions.x to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}
{{- '<|end|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""
_DEEPSEEK = """{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}<|User|>{{ m.content }}
{%- elif m.role == 'assistant' %}{% if messages[loop.index0 - 1].role == 'user' %}<|Assistant|>{% endif %}
{%- if m.tool_calls %}{{ m.content }}<|tool▁calls▁begin|>
{%- for call in m.tool_calls %}CALL{% endfor %}<|tool▁calls▁end|>{{ eos_token }}
{%- else %}{{ m.content.split('</think>') | last }}{{ eos_token }}{% endif %}
{%- elif m.role == 'tool' %}<|tool▁output▁begin|>{{ m.content }}<|tool▁output▁end|>
{%- endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|>PROMPT{% endif %}"""
DEEPSEEK = deepseek(
    _DEEPSEEK.replace("PROMPT", "{{ '<think>' if thinking else '</think>' }}").replace(
        "CALL",
        "<|tool▁call▁begin|>{{ call.function.name }}<|tool▁sep|>"
        "{{ call.function.arguments | tojson }}<|tool▁call▁end|>",
    )
)
# The arguments are joined to a text: an object is refused.
DEEPSEEK_FENCED = deepseek(
    _DEEPSEEK.replace("PROMPT", "<think>\n").replace(
        "CALL",
        "{{ ('' if loop.first else '\n') + '<|tool▁call▁begin|>' + call.type + '<|tool▁sep|>' + call.function.name "
        "+ '\n```json\n' + call.function.arguments + '\n```<|tool▁call▁end|>' }}",
    )
)
GEMMA = """{{ bos_token }}{% macro value(v) %}{% if v is string %}<|"|>{{ v }}<|"|>{% elif v is mapping %}{
{%- for k, x in v | items %}{{ k }}:{{ value(x) }}{{ "," if not loop.last }}{% endfor %}}
{%- else %}{{ v | tojson }}{% endif %}{% endmacro %}
{%- if tools %}<|turn>system
{% for t in tools %}<|tool>declaration:{{ t.function.name }}{{ t.function.parameters | tojson }}<tool|>{% endfor %}
{{- '<turn|>' }}
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<|tool_response>response:{{ m.content }}<tool_response|>
{%- else %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content }}{% for call in m.tool_calls %}<|tool_call>call:{{ call.function.name }}
{{- value(call.function.arguments) }}<tool_call|>{% endfor %}<turn|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|turn>model
{% endif %}"""
R1_DISTILL = deepseek(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
    "<|Assistant|>{{ (m.content.split('</think>')) [-1] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Chat:
    """A template, and the tokens that its tokenizer adds."""

    template: str
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()  # that are not special: they have their text in an output

    def make(self, folder: Path) -> None:
        """A folder with a tokenizer of bytes and these."""
        make_byte_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in self.special])
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in self.added])
        tokenizer.chat_template = self.template
        tokenizer.save_pretrained(folder)


_IM = ("<|im_start|>", "<|im_end|>")
_QWEN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_BARS = tuple(
    deepseek(f"<|{name}|>")
    for name in (
        *("User", "Assistant", "tool▁calls▁begin", "tool▁calls▁end", "tool▁call▁begin", "tool▁call▁end"),
        *("tool▁sep", "tool▁output▁begin", "tool▁output▁end"),
    )
)
_HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>")
_INST = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")
_INST += ("[/TOOL_RESULTS]", "[ARGS]", "[CALL_ID]")
_TURNS = ("<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool>", "<tool|>", '<|"|>', "<|channel>")
_TURNS += ("<channel|>", "<|tool_response>", "<tool_response|>")
CHATS = {
    "hermes": Chat(HERMES, _IM, _QWEN),
    "hermes-special": Chat(HERMES, (*_IM, *_QWEN)),
    "qwen-xml": Chat(QWEN_XML, _IM, _QWEN),
    "llama": Chat(LLAMA, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")),
    "mistral": Chat(MISTRAL, _INST),
    "mistral-list": Chat(MISTRAL_LIST, _INST),
    "gpt-oss": Chat(GPT_OSS, _HARMONY),
    "deepseek": Chat(DEEPSEEK, (), (*_BARS, "<think>", "</think>")),
    "deepseek-fenced": Chat(DEEPSEEK_FENCED, (), (*_BARS, "<think>", "</think>")),
    "gemma": Chat(GEMMA, _TURNS),
}
