"""Templates that try to take the gateway's time or memory are refused, each by itself and soon; sound ones are not."""

import asyncio
import json
import subprocess
import sys
import time

import pytest

from isthmus.model.text.chat_template import ChatTemplate
from isthmus.model.text.conversation import Conversation
from isthmus.proto.errors import InvalidRequest

# Each is a whole attack: what grows, and by which of Jinja's ways.
HOSTILE = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "condition": "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
    "literal in a macro": "{% macro m() %}{% for i in range(99999) %}"
    + "x" * 9999
    + "{% endfor %}{% endmacro %}{{ m() }}",
    "times": "{{ 'x' * 10**9 }}",
    "times in a set": "{% set x = [0] * 10**9 %}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "product": "{% set n = namespace(x=7) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent with an argument": "{{ '%*d' % (10**9, 1) }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 10**9) }}",
    "format by attribute": "{{ (['{:>1000000000}'] | map(attribute='format') | first)(1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "center": "{{ 'x' | center(10**9) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "zfill": "{{ '1'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "translate": "{{ 'aaaa'.translate({97: 'x' * 10000}) }}",
    "to_bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "indent": "{{ ('x\n' * 10000) | indent(10000) }}",
    "wordwrap": "{{ 'x y' | wordwrap(1, wrapstring='z' * 10**6) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "round": "{{ 5 | round(-10**9) }}",
    "tojson": "{{ ['x'] | tojson(indent=10**9) }}",
    "lipsum": "{{ lipsum(10**6) }}",
    "doubling": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling by a block": "{% set n = namespace(s='x') %}{% for i in range(60) %}"
    "{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}",
    "doubling by join": "{% set n = namespace(s='xy') %}{% for i in range(60) %}"
    "{% set n.s = n.s.join(['x', n.s]) %}{% endfor %}",
    "doubling by replace": "{% set n = namespace(s='xy') %}{% for i in range(60) %}"
    "{% set n.s = n.s.replace('x', n.s) %}{% endfor %}",
    "doubling by a filter": "{% set n = namespace(s='xy') %}{% for i in range(60) %}"
    "{% set n.s = n.s | replace('x', n.s) %}{% endfor %}",
    "doubling lists": "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "laughs": "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "laughs as JSON": "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = {'a': n.s, 'b': n.s} %}"
    "{% endfor %}{{ n.s | tojson }}",
    "laughs compared": "{% set n = namespace(s=[1], t=[1]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}"
    "{% set n.t = [n.t, n.t] %}{% endfor %}{{ n.s == n.t }}",
    "laughs in": "{% set n = namespace(s=[1], t=[1]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}"
    "{% set n.t = [n.t, n.t] %}{% endfor %}{{ n.s in [n.t] }}",
    "laughs hashed": "{% set n = namespace(s=(1,)) %}{% for i in range(60) %}{% set n.s = (n.s, n.s) %}{% endfor %}"
    "{% set d = {n.s: 1} %}",
    "laughs as a key": "{% set n = namespace(s=(1,)) %}{% for i in range(60) %}{% set n.s = (n.s, n.s) %}{% endfor %}"
    "{% set d = {} %}{{ d[n.s] }}",
    "laughs by a filter": "{% set n = namespace(s=(1,)) %}{% for i in range(60) %}"
    "{% set n.s = (n.s, n.s) %}{% endfor %}{{ [n.s] | unique | list }}",
    "laughs by a test": "{% set n = namespace(s=[1], t=[1]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}"
    "{% set n.t = [n.t, n.t] %}{% endfor %}{{ n.s is eq(n.t) }}",
    "laughs in namespaces": "{% set n = namespace(s=[1]) %}{% for i in range(60) %}"
    "{% set n.s = namespace(a=n.s, b=n.s) %}{% endfor %}{{ n.s }}",
    "laughs said": "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}"
    "{{ raise_exception(n.s) }}",
    "a circle": "{% set n = namespace() %}{% set n.n = n %}{{ n }}",
    "loop.changed": "{% set n = namespace(s=[1], t=[1]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}"
    "{% set n.t = [n.t, n.t] %}{% endfor %}{% for i in [n.s, n.t] %}{{ loop.changed(i) }}{% endfor %}",
    "blocks": "".join(
        f"{{% block b{i} %}}{{{{ self.b{i + 1}() }}}}{{{{ self.b{i + 1}() }}}}{{% endblock %}}" for i in range(60)
    )
    + "{% block b60 %}{% endblock %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "searching": "{% set s = 'a' * 10**6 %}{% for i in range(99999) %}{% if (s + 'b') in s %}{% endif %}{% endfor %}",
    "slicing": "{% set s = 'a' * 10**6 %}{% set n = namespace() %}{% for i in range(99999) %}"
    "{% set n.s = s[1:] %}{% endfor %}",
    "splitting": "{% set s = 'a ' * 10**6 %}{% for i in range(99999) %}{% set x = s.split(' ') %}{% endfor %}",
    "sorting": "{% set s = ['a' * 10**6] * 1000 %}{% for i in range(99999) %}{% set x = s | sort %}{% endfor %}",
    "mapping": "{% for i in range(999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    "selecting": "{% for i in range(9999) %}{{ range(99999) | select('odd') | list | length }}{% endfor %}",
    "summing": "{% set x = [[1] * 1000] * 100000 %}{{ x | sum(start=[]) | length }}",
    "long expressions": "{% for i in range(99999) %}{% if " + "a and " * 20000 + "a %}{% endif %}{% endfor %}",
    "wide bodies": "{% for i in range(99999) %}{% set x = [" + "i," * 100000 + "] %}{% endfor %}",
    "deep source": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep statements": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "long source": "x" * (2 << 20),
    "files": "{% include '/etc/passwd' %}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attributes by a filter": "{{ [''] | map(attribute='__class__') | list | first.__mro__ }}",
    "globals of a macro": "{{ raise_exception.__globals__['__builtins__'] }}",
    "generator frames": "{{ ([1] | map('string')).gi_frame.f_globals }}",
    "namespace": "{% set n = namespace(__class__=1) %}",
    "list changed": "{{ messages.append(messages) }}",
}

_ALONE = """
import json, sys, time
from isthmus.model.text.chat_template import ChatTemplate
from isthmus.model.text.conversation import Conversation
from isthmus.proto.errors import InvalidRequest
messages = [{"role": "user", "content": "x" * 1000}]
found = {}
for name, source in json.load(sys.stdin).items():
    began = time.thread_time()
    try:
        said = "it gave " + ChatTemplate(source, {}, []).render(Conversation(messages=messages))[:100]
    except InvalidRequest as error:
        said = str(error)
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    peak_mib = int(status["VmHWM"].split()[0]) >> 10
    found[name] = (said, time.thread_time() - began, peak_mib)
print(json.dumps(found))
"""
_MOST_S, _MOST_MIB = 6.0, 500


def test_hostile_templates_are_refused_in_bounded_time_and_memory() -> None:
    """In a process of their own, so that the most memory ever in use is theirs."""
    done = subprocess.run(
        [sys.executable, "-c", _ALONE], input=json.dumps(HOSTILE), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert {
        name: said for name, (said, _, _) in found.items() if not said.startswith("the model's chat template")
    } == {}
    assert {name: s for name, (_, s, _) in found.items() if s > _MOST_S} == {}
    assert {name: mib for name, (_, _, mib) in found.items() if mib > _MOST_MIB} == {}
    assert max(len(said) for said, _, _ in found.values()) < 600


async def test_the_event_loop_lives_while_a_hostile_template_runs() -> None:
    template = ChatTemplate(HOSTILE["laughs"], {}, [])
    rendering = asyncio.create_task(
        asyncio.to_thread(template.render, Conversation(messages=[{"role": "user", "content": "x"}]))
    )
    longest, last = 0.0, time.monotonic()
    while not rendering.done():
        await asyncio.sleep(0.005)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    with pytest.raises(InvalidRequest, match="it computes"):
        await rendering
    assert longest < 1.0


SOUND = (
    "{{ messages | map(attribute='content') | join(', ') }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ (messages | last).content.split('x')[-1].lstrip('y') ~ 1 }}",
    "{% for m in messages if m.role != 'user' %}{{ m.content | upper }}{% else %}none{% endfor %}",
    "{{ '%s and %5d' % ('a', 3) }}{{ '{} {x:>4}'.format(1, x='b') }}{{ '%(a)s' | format(a=1) }}",
    "{{ messages | tojson }}{{ {'a': [1, 2.5, none, true]} | tojson(indent=2) }}",
    "{% set n = namespace(found=false, all=[]) %}{% for m in messages %}{% set n.all = n.all + [m.role] %}"
    "{% if 'x' in m.content and not n.found %}{% set n.found = true %}{% endif %}{% endfor %}{{ n.found }}{{ n.all }}",
    "{% macro say(m, end='.') %}{{ m['content'] | trim }}{{ end }}{% endmacro %}"
    "{{ say(messages[0]) }}{{ say(messages[-1], end='!') }}",
    "{% set text %}a{{ messages[0].role }}{% endset %}{{ text | length }}{{ text[1:3] }}{{ messages[1:] | length }}",
    "{{ dict(a=1, **{'b': 2}).items() | list }}{{ [3, 1, 2] | sort | reverse | list }}"
    "{{ [1, 2] | sum }}{{ 2 ** 10 // 3 }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ 2.345 | round(1) }}{{ [1] * 3 }}{{ 'ab' * 2 }}",
    "{{ undefined_name is defined }}{{ undefined_name | default('d') }}{{ 'a' in {'a': 1} }}{{ 3 in [1, 2] }}",
    "{% filter upper %}abc{% endfilter %}{% with a = 1 %}{{ a }}{% endwith %}{{ 'a b' | title | replace('A', 'c') }}",
    "{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ loop.index }}{{ k }}{{ v }}"
    "{% if loop.last %}.{% endif %}{% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.index0 }}{% break %}{% endfor %}",
    "{{ 'a\nb' | indent(2) }}{{ ' x ' | center(9) }}{{ '<' | e }}{{ ['b', 'a', 'b'] | unique | list }}"
    "{{ 1 + 2 * 3 - 4 / 5 % 6 }}",
)
MESSAGES = [
    {"role": "system", "content": "Be x."},
    {"role": "user", "content": "axyb "},
    {"role": "assistant", "content": "z"},
]


@pytest.mark.parametrize("source", SOUND)
def test_sound_templates_give_what_transformers_gives(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs, _ = render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=True, tools=[])
    assert ChatTemplate(source, {}, []).render(Conversation(messages=MESSAGES)) == theirs[0]


def test_a_chat_as_long_as_can_be_is_rendered_by_a_common_template() -> None:
    source = (
        "{% for message in messages %}{% if message.role == 'assistant' and '</think>' in message.content %}"
        "{% set content = message.content.split('</think>')[-1].lstrip('\n') %}{% else %}"
        "{% set content = message.content | trim %}{% endif %}"
        "{{ '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}{% endfor %}"
    )
    template = ChatTemplate(source, {}, [])
    few = [{"role": "assistant", "content": "<think>x</think>" + "y" * (1 << 19)}] * 2
    assert len(template.render(Conversation(messages=few))) > 1 << 20
    many = [{"role": "user", "content": "y" * 250}] * 4096
    assert len(template.render(Conversation(messages=many))) > 1 << 20


def test_no_template_is_in_the_way_of_another_thread() -> None:
    """A budget is of one rendering: those of other threads go on with theirs."""
    from concurrent.futures import ThreadPoolExecutor

    sound, hostile = ChatTemplate(SOUND[0], {}, []), ChatTemplate(HOSTILE["macros"], {}, [])

    def fails() -> None:
        with pytest.raises(InvalidRequest):
            hostile.render(Conversation(messages=MESSAGES))

    with ThreadPoolExecutor(4) as threads:
        tasks = [
            threads.submit(
                fails if number % 2 else sound.render, *([] if number % 2 else [Conversation(messages=MESSAGES)])
            )
            for number in range(8)
        ]
        assert {task.result() for task in tasks} == {None, "Be x., axyb , z"}
