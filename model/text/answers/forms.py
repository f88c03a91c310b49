"""How models write reasoning and calls of tools: response templates, in the language of transformers' parser.

The first three are those of transformers itself, which keeps them where torch is imported
(`transformers.cli.serving.utils`); names of tools may have a hyphen in all. The others are of models that come without
one. None ends in what may be there or not: where an output comes in pieces, the parser takes the shorter match.
"""

from typing import Any

from .call_syntax import deepseek

AFTER_CALLS = "after_calls"  # a field for what ends several calls; text after that is content
_FUNCTION = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_THINK = {"open": "<think>", "close": "</think>", "content": "text"}
_ASSISTANT = {"role": "assistant"}

CHATML: dict[str, Any] = {
    "defaults": _ASSISTANT,
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": _THINK,
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>|<\|eot_id\|>)", "content": "text"},
    },
}
QWEN_XML: dict[str, Any] = {
    "defaults": _ASSISTANT,
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": _THINK,
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
            "transform": _FUNCTION,
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)", "content": "text"},
    },
}
GEMMA: dict[str, Any] = {
    "defaults": _ASSISTANT,
    "start_anchor": ["<|turn>model\n", "<tool_response|>"],
    "fields": {
        "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>[\w-]+)",
            "close": "<tool_call|>",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            "transform": _FUNCTION,
        },
        "content": {"close": ["<turn|>", "<|tool_response>", "<eos>"], "content": "text"},
    },
}
# https://cookbook.openai.com/articles/openai-harmony: a recipient stands before the channel or after it.
HARMONY: dict[str, Any] = {
    "defaults": _ASSISTANT,
    "start_anchor": "<|start|>assistant",
    "fields": {
        "reasoning_content": {
            "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>",
            "close": "<|end|>",
            "content": "text",
        },
        "tool_calls": {
            "open_pattern": r"(?:<\|start\|>assistant)?"
            r"(?:<\|channel\|>(?:commentary|analysis) to=functions\.(?P<name>[\w-]+)"
            r"| to=functions\.(?P<name>[\w-]+)<\|channel\|>(?:commentary|analysis)) ?(?:<\|constrain\|>)?(?:json)?"
            r"<\|message\|>",
            "close": "<|call|>",
            "repeats": True,
            "content": "json",
            "transform": _FUNCTION,
        },
        "content": {
            "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary)(?: <\|constrain\|>\w+)?"
            r"<\|message\|>",
            "close": ["<|end|>", "<|return|>"],
            "content": "text",
        },
    },
}
LLAMA: dict[str, Any] = {
    "defaults": _ASSISTANT,
    "start_anchor": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "fields": {
        "tool_calls": {
            # At the beginning of the answer only: the call has no marks of its own.
            "open_pattern": r'(?<!.)(?:<\|python_tag\|>)?\s*(?=\{\s*"name"\s*:)',
            "close": ["<|eot_id|>", "<|eom_id|>"],
            "repeats": True,
            "content": "json",
            "transform": {
                "type": "function",
                "function": {"name": "{content.name}", "arguments": "{content.parameters}"},
            },
        },
        "content": {"content": "text"},
    },
}
_MISTRAL_ANCHOR = ["[/INST]", "[/TOOL_RESULTS]"]
MISTRAL_LIST: dict[str, Any] = {
    "defaults": _ASSISTANT,
    "start_anchor": _MISTRAL_ANCHOR,
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*\[TOOL_CALLS\]",
            "close": "</s>",
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
            "transform_each": True,
        },
        "content": {"content": "text"},
    },
}
MISTRAL: dict[str, Any] = {
    "defaults": _ASSISTANT,
    "start_anchor": _MISTRAL_ANCHOR,
    "fields": {
        "reasoning_content": {"open": "[THINK]", "close": "[/THINK]", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*\[TOOL_CALLS\]\s*(?P<name>[\w-]+)(?:\[CALL_ID\][\w-]+)?(?:\[ARGS\])?(?=\{)",
            "close_pattern": r"(?=\[TOOL_CALLS\])|</s>",
            "repeats": True,
            "content": "json",
            "transform": _FUNCTION,
        },
        "content": {"content": "text"},
    },
}
_DEEPSEEK_ANCHOR = [deepseek(f"<|{name}|>") for name in ("Assistant", "tool▁outputs▁end", "tool▁output▁end")]
_CALL_BEGIN = deepseek(r"\s*(?:<|tool▁calls▁begin|>)?\s*<|tool▁call▁begin|>")
_CALL_END = deepseek(r"<|tool▁call▁end|>")
_AFTER_CALLS = {"open": deepseek("<|tool▁calls▁end|>"), "content": "text"}
DEEPSEEK: dict[str, Any] = {
    "defaults": _ASSISTANT,
    "start_anchor": _DEEPSEEK_ANCHOR,
    "fields": {
        "reasoning_content": _THINK,
        "tool_calls": {
            "open_pattern": _CALL_BEGIN + deepseek(r"(?P<name>[\w-]+)<|tool▁sep|>(?=\{)"),
            "close": _CALL_END,
            "repeats": True,
            "content": "json",
            "transform": _FUNCTION,
        },
        AFTER_CALLS: _AFTER_CALLS,
        "content": {"content": "text"},
    },
}
DEEPSEEK_FENCED: dict[str, Any] = {
    "defaults": _ASSISTANT,
    "start_anchor": _DEEPSEEK_ANCHOR,
    "fields": {
        "reasoning_content": _THINK,
        "tool_calls": {
            "open_pattern": _CALL_BEGIN + deepseek(r"function<|tool▁sep|>(?P<name>[\w-]+)\s*```json\s*"),
            "close_pattern": r"\s*```\s*" + _CALL_END,
            "repeats": True,
            "content": "json",
            "transform": _FUNCTION,
        },
        AFTER_CALLS: _AFTER_CALLS,
        "content": {"content": "text"},
    },
}

FORMS = (CHATML, QWEN_XML, GEMMA, HARMONY, LLAMA, MISTRAL, MISTRAL_LIST, DEEPSEEK, DEEPSEEK_FENCED)


def thinking(anchor: str) -> dict[str, Any]:
    """The response template of a model that thinks and calls no tools; its turn begins with `anchor`."""
    return {
        "defaults": _ASSISTANT,
        "start_anchor": anchor,
        "fields": {"reasoning_content": _THINK, "content": {"content": "text"}},
    }
