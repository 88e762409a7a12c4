"""A chat template writes what transformers makes it write, and cannot hang or fill the machine."""

from __future__ import annotations

import time

import pytest
import transformers.utils.chat_template_utils as theirs

from tunesmith.data import templates
from tunesmith.data.chat_template import CHATML, set_chat_template
from tunesmith.data.templates import TemplateLimitError, render
from tunesmith.errors import DataError
from tunesmith.testing.tiny import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]

LOOP = "{% for i in range(60) %}"
HOSTILE = {
    "a million passes": "{% for a in range(1000) %}{% for b in range(1000) %}{% endfor %}"
    "{% endfor %}",
    "loops in loops": "{% for a in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3,
    "many outputs in a loop": "{% for a in range(9999) %}" + "{{ a }}" * 900 + "{% endfor %}",
    "a string times a number": "{{ 'a' * 10**9 }}",
    "a number times a string": "{{ 10**9 * 'a' }}",
    "a list times a number": "{{ ['a'] * 10**9 }}",
    "a power": "{{ 10**(10**9) }}",
    "numbers squared": "{% set n = namespace(x=3) %}" + LOOP + "{% set n.x = n.x * n.x %}"
    "{% endfor %}",
    "center": "{{ 'a'|center(10**9) }}",
    "center as a method": "{{ 'a'.center(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "center by map": "{{ ['a']|map('center', 10**9)|list }}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a wide format by filter": "{{ '%1000000000d'|format(1) }}",
    "a width as argument": "{{ '%*d' % (10**9, 1) }}",
    "a wide field": "{{ '{:1000000000d}'.format(1) }}",
    "a field in a field": "{{ '{:{w}}'.format(1, w='999999999') }}",
    "doubled by +": "{% set n = namespace(x='a') %}" + LOOP + "{% set n.x = n.x + n.x %}"
    "{% endfor %}",
    "doubled by ~": "{% set n = namespace(x='a') %}" + LOOP + "{% set n.x = n.x ~ n.x %}"
    "{% endfor %}",
    "doubled by a block": "{% set n = namespace(x='a') %}" + LOOP + "{% set n.x %}{{ n.x }}"
    "{{ n.x }}{% endset %}{% endfor %}",
    "a list of itself twice": "{% set n = namespace(x=[1]) %}" + LOOP + "{% set n.x = [n.x, n.x] %}"
    "{% endfor %}{{ n.x }}",
    "lists compared": "{% set n = namespace(x=[1], y=[1]) %}" + LOOP + "{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "tuples as keys": "{% set n = namespace(x=(1, n)) %}" + LOOP + "{% set n.x = (n.x, n.x) %}"
    "{% endfor %}{{ {n.x: 1} }}",
    "dicts of dicts": "{% set n = namespace(x={}) %}" + LOOP + "{% set n.x = dict(a=n.x, b=n.x) %}"
    "{% endfor %}{{ n.x|tojson }}",
    "a list doubled": "{% set n = namespace(x=[1]) %}" + LOOP + "{% set n.x = n.x + n.x %}"
    "{% endfor %}",
    "batch filled up": "{% set n = namespace(x=[1]) %}" + LOOP + "{% set n.x = "
    "[1]|batch(999, n.x)|list %}{% endfor %}",
    "batches without a list": "{% set n = namespace(x=[1]) %}" + LOOP + "{% for r in "
    "[1]|batch(999, n.x) %}{% set n.x = r %}{% endfor %}{% endfor %}{{ n.x }}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that fans out": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(40) }}",
    "a recursive loop": "{% for x in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}"
    "{% endif %}{% endfor %}",
    "a block in itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "replace": "{% set a = 'a' * 99999 %}{{ a|replace('a', a) }}",
    "replace as a method": "{% set a = 'a' * 99999 %}{{ a.replace('', a) }}",
    "join": "{% set a = 'a' * 99999 %}{{ range(99999)|join(a) }}",
    "join as a method": "{% set a = 'a' * 99999 %}{{ a.join(range(99999)|map('string')) }}",
    "indent": "{{ 'a'|indent(10**9) }}",
    "indent of JSON": "{{ [1]|tojson(indent=10**9) }}",
    "separators of JSON": "{{ range(9999)|list|tojson(separators=('a' * 99999, ':')) }}",
    "round": "{{ 5|round(-10**9) }}",
    "round up": "{{ 5|round(10**9, 'ceil') }}",
    "sum of lists": "{{ ([range(999)|list] * 999)|sum(start=[]) }}",
    "a list that grows": "{% set n = namespace(l=[]) %}{% for i in range(99999) %}"
    "{% set n.l = n.l + [i] %}{% endfor %}",
    "a list nested deep": "{% set n = namespace(l=[]) %}{% for i in range(99999) %}"
    "{% set n.l = [n.l] %}{% endfor %}{{ n.l }}",
    "searches": "{% set a = 'a' * 400000 %}" + "{% if a in a ~ 'b' %}{% endif %}" * 1500,
    "the counter by name": "{{ [-10**12]|map('enter:')|list }}{% for a in range(999) %}"
    "{% for b in range(999) %}{% endfor %}{% endfor %}",
    "parentheses": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "a chain of attributes": "{{ a" + ".a" * 40_000 + " }}",
    "a chain of sums": "{{ 1" + "+1" * 40_000 + " }}",
    "blocks in blocks": "{% for a in [1] %}" * 50 + "{% endfor %}" * 50,
    "a long template": "{{ a }}" * 1_000_000,
    "many parts": "{{ a.b }}" * 14_000,
}
FORBIDDEN = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ cycler.__init__.__globals__ }}",
    "the template itself": "{{ self.__init__.__globals__.__builtins__ }}",
    "a format's attribute": "{{ '{0.__class__.__mro__}'.format('') }}",
    "a file": "{% include '/etc/passwd' %}",
    "a module": "{% import 'os' as os %}",
    "bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "tabs": "{{ '\t'.expandtabs(10**9) }}",
    "a translation": "{{ 'a'.translate({97: 'b' * 10**5}) }}",
    "a list's append": "{{ messages.append(1) }}",
    "filler text": "{{ lipsum(n=10**6) }}",
}


def rendered(source, messages=MESSAGES, **options):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    return render(tokenizer, messages, **options)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_template_out_of_bounds_ends_in_an_error_within_seconds(what, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.5)  # less than in use, for the tests' sake
    began = time.thread_time()
    with pytest.raises(DataError) as caught:
        rendered(HOSTILE[what])
    assert time.thread_time() - began < 3
    assert len(str(caught.value)) < 400
    assert "chat_template" in str(caught.value)


def test_time_is_bounded_whatever_the_template_does():
    began = time.thread_time()
    with pytest.raises(TemplateLimitError, match="has run for 2 seconds"):
        rendered(HOSTILE["many outputs in a loop"])
    assert time.thread_time() - began < 5


@pytest.mark.parametrize("what", FORBIDDEN)
def test_a_template_reaches_nothing_outside_it(what):
    with pytest.raises(DataError):
        rendered(FORBIDDEN[what])


def test_a_namespace_is_not_written_out():
    source = "{% set n = namespace(x=1) %}" + LOOP + "{% set n.x = namespace(a=n.x, b=n.x) %}"
    assert rendered(source + "{% endfor %}{{ n }}{{ n.x|string }}") == "<namespace><namespace>"


@pytest.mark.parametrize(
    "source",
    [
        CHATML,
        "{{ bos_token }}{% for m in messages %}"
        "{% set c = '[' ~ m.role ~ '] ' + m['content']|trim %}{{ c }}"
        "{% if not loop.last %}{{ ', ' }}{% else %}{{ eos_token }}{% endif %}{% endfor %}",
        "{% for m in messages[::-1] %}{{ loop.index }}/{{ loop.length }}{{ m.role.upper() }}"
        "{{ m.content.split('a')[0].rstrip() }}{% endfor %}",
        "{% macro say(m, n=2) %}{{ m.role }}{{ m.content * n }}{% endmacro %}"
        "{% for m in messages %}{{ say(m) }}{{ loop.cycle('a', 'b') }}{% endfor %}",
        "{% set n = namespace(s='', l=[]) %}{% for m in messages %}{% set n.s = n.s + m.role %}"
        "{% set n.l = n.l + [m.content|length] %}{% endfor %}{{ n.s }}{{ n.l }}{{ n.l|sum }}",
        "{{ tools|tojson(indent=2) }}{{ messages|map(attribute='role')|join(', ') }}"
        "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}",
        "{% for t in tools or [] %}{% for k, v in t.function.items() %}{{ k ~ '=' ~ v }}"
        "{% endfor %}{% endfor %}{{ {'a': [1, messages[0].role], 'b': (1, 2.5)} }}",
        "{{ '%s says %5.1f' % (messages[0].role, 3.14159) }}{{ '{:>8}|{}'.format('a', 2) }}"
        "{{ 'a b'|replace(' ', '--')|indent(2) }}{{ 7 // 2 + 2 ** 3 - 1 * 4 % 3 }}",
        "{% set x %}{{ messages[0].content }}{% endset %}{{ x }}{% for c in 'abc' if c != 'b' %}"
        "{{ c }}{% endfor %}{{ none }}{{ undefined_name }}{{ true }}{{ 1.0 }}{{ [1] + [2] }}",
    ],
)
def test_a_template_writes_what_transformers_makes_it_write(source):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": {"type": "int"}}}}]
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what is <this> & that?"},
        {"role": "assistant", "content": "nothing at all "},
    ]
    expected = theirs._cached_compile_jinja_template(source).render(
        messages=messages,
        tools=tools,
        documents=None,
        add_generation_prompt=True,
        **tiny_tokenizer().special_tokens_map,
    )
    assert rendered(source, messages, tools=tools, answer=True) == expected


def test_a_long_conversation_may_take_more_than_a_short_one():
    # some 6 million characters: more than any bound that does not grow with the data
    messages = [{"role": "user", "content": "word " * 600}] * 2000
    source = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    assert len(rendered(source, messages)) > templates.LARGEST


def test_one_rendering_takes_nothing_from_the_next():
    source = "{% for a in range(300) %}{% for b in range(300) %}{% endfor %}{% endfor %}done"
    assert {rendered(source) for _ in range(6)} == {"done"}


def test_every_rendering_of_transformers_is_bounded_too():
    templates.bound_templates()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = HOSTILE["a million passes"]
    with pytest.raises(TemplateLimitError):
        tokenizer.apply_chat_template(MESSAGES, tokenize=False)


def test_spans_marked_in_a_hostile_template_are_bounded():
    source = "{% generation %}a{% endgeneration %}" + HOSTILE["loops in loops"]
    templates.bound_templates()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    with pytest.raises(TemplateLimitError):
        tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)


@pytest.mark.parametrize("given", [None, HOSTILE["loops in loops"]])
def test_a_template_that_never_ends_is_found_when_it_is_set(given):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = HOSTILE["loops in loops"]
    with pytest.raises(TemplateLimitError, match="loops more often"):
        set_chat_template(tokenizer, given)


def test_a_models_own_template_that_is_not_jinja_says_the_line():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}\n{{ m. }}{% endfor %}"
    with pytest.raises(DataError, match="chat_template, line 2: not valid Jinja"):
        set_chat_template(tokenizer, None)
