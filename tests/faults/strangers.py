"""Files as a stranger may give them: rows, tables, templates, weights and configurations that lie."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import string
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

GOOD = b'{"prompt": "q", "response": "a"}'
ACCEPTED = ""
"""What is said of a row that is one: nothing."""


def row(**values: object) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")


def conversation(*turns: object) -> bytes:
    return row(conversations=list(turns))


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}

LINES: dict[str, tuple[bytes, str]] = {
    # What is a row, if an odd one.
    "a byte order mark": (b"\xef\xbb\xbf" + GOOD, ACCEPTED),
    "line ends of another system": (GOOD + b"\r", ACCEPTED),
    "blanks around": (b" \t" + GOOD + b"  ", ACCEPTED),
    "a key twice: the last one holds, as in every reader": (b'{"prompt": 1, "prompt": "q", "response": "a"}', ACCEPTED),
    "NUL as an escape": (b'{"prompt": "q\\u0000", "response": "a"}', ACCEPTED),
    "a surrogate pair": (b'{"prompt": "\\ud83d\\ude00", "response": "a"}', ACCEPTED),
    "a noncharacter": (row(prompt="\uffff\U0010ffff", response="a"), ACCEPTED),
    "words that run the other way": (row(prompt="\u202eabc\u2066", response="a"), ACCEPTED),
    "a thousand combining marks": (row(prompt="e" + "\u0301" * 1000, response="a"), ACCEPTED),
    "empty texts": (row(prompt="", response=""), ACCEPTED),
    "special tokens as text": (row(prompt="</s><s><|im_end|>", response="<|im_start|>"), ACCEPTED),
    "a column called like Python's own": (row(prompt="q", response="a", __class__="os.system"), ACCEPTED),
    "a NaN beside": (b'{"prompt": "q", "response": "a", "score": NaN}', ACCEPTED),
    "an infinity beside": (b'{"prompt": "q", "response": "a", "score": -Infinity}', ACCEPTED),
    "a number without end beside": (b'{"prompt": "q", "response": "a", "score": 1e999999}', ACCEPTED),
    "a megabyte of text": (row(prompt="x" * 2**20, response="a"), ACCEPTED),
    "ten thousand turns": (conversation(*[USER, ANSWER] * 5000), ACCEPTED),
    "a system turn alone": (conversation({"role": "system", "content": "s"}), ACCEPTED),
    "ten thousand columns": (row(prompt="q", response="a", **{f"c{i}": i for i in range(10_000)}), ACCEPTED),
    # What would fill or steer a terminal.
    "columns of 15 megabytes": (row(**{"x" * 1000 + str(i): 0 for i in range(15_000)}), "none of the known columns"),
    "a column that rings and clears": (row(**{"\x1b[2J\x07\x1b]0;owned\x07": "q"}), "among \\x1b[2J\\x07"),
    "a column that turns around": (row(**{"\u202eabc": "q"}), "among \\u202eabc"),
    "a column that is half a character": (b'{"\\ud83d": "q"}', "among \\ud83d"),
    "a column with a line's end": (row(**{"a\nb\u2028c": "q"}), "among a\\nb\\u2028c"),
    "a role of 15 megabytes": (conversation({"role": "x" * 15 * 2**20, "content": "q"}), "turn 1: role 'xxx"),
    "a turn with a field that rings": (conversation({"role": "user", "\x07": "q"}), "not one with role, \\x07"),
    # What is no JSON.
    "lists in lists, 100 thousand deep": (b"[" * 100_000, "not JSON"),
    "lists in lists, closed": (b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "not JSON"),
    "objects in objects": (b'{"a":' * 20_000, "not JSON"),
    "a number of 5,000 digits": (b'{"prompt": ' + b"9" * 5000 + b"}", "not JSON"),
    "half an object": (GOOD[:-1], "not JSON"),
    "two objects": (GOOD + GOOD, "not JSON"),
    "a comma too many": (b'{"prompt": "q", "response": "a",}', "not JSON"),
    "single quotes": (b"{'prompt': 'q', 'response': 'a'}", "not JSON"),
    "a comment": (GOOD + b" // and so on", "not JSON"),
    "NUL": (b"\0" * 100, "not JSON"),
    "NUL inside": (GOOD.replace(b"q", b"\0"), "not JSON"),
    "a line break inside a text": (b'{"prompt": "q\x0b\x00", "response": "a"}', "not JSON"),
    "a word": (b"undefined", "not JSON"),
    "Python": (b"__import__('os').system('touch ran')", "not JSON"),
    "a pickle": (pickle.dumps({"prompt": "q"}, 0).splitlines()[0], "not JSON"),
    "YAML": (b"prompt: !!python/object/apply:os.system ['touch ran']", "not JSON"),
    # What is no UTF-8.
    "Latin-1": ('{"prompt": "né", "response": "a"}'.encode("latin-1"), "not UTF-8"),
    "GBK": ('{"prompt": "你好", "response": "a"}'.encode("gbk"), "not UTF-8"),
    "UTF-16": ('{"prompt": "q"}'.encode("utf-16"), "not UTF-8"),
    "half a surrogate pair as bytes": (GOOD.replace(b"q", b"\xed\xa0\x80"), "not UTF-8"),
    "a letter longer than it needs": (GOOD.replace(b"q", b"\xc0\xaf"), "not UTF-8"),
    "a letter beyond Unicode": (GOOD.replace(b"q", b"\xf5\x80\x80\x80"), "not UTF-8"),
    "a letter cut off": (GOOD.replace(b"q", b"\xe4\xbd"), "not UTF-8"),
    # What is no row.
    "half a surrogate pair": (b'{"prompt": "\\ud83d", "response": "a"}', "is not text at character 1"),
    "half a pair in a turn": (conversation(USER, {"role": "assistant", "content": "\ud83d"}), "not UTF-8"),
    "a list": (b"[1, 2]", "an object was expected"),
    "a text": (b'"text"', "an object was expected"),
    "null": (b"null", "an object was expected"),
    "a NaN alone": (b"NaN", "an object was expected"),
    "an empty object": (b"{}", "none of the known columns"),
    "other columns": (row(question="q", reply="a"), "none of the known columns"),
    "columns in capitals": (row(Prompt="q", Response="a"), "none of the known columns"),
    "a number as a text": (row(prompt=1, response="a"), "`prompt` must be text"),
    "null as a text": (row(prompt="q", response=None), "`response` must be text"),
    "a list as a text": (row(prompt="q", response=["a"]), "`response` must be text"),
    "truth as a text": (row(text=True), "`text` must be text"),
    "a NaN as a text": (b'{"text": NaN}', "`text` must be text"),
    "no turn": (conversation(), "must be a list of turns"),
    "turns as an object": (row(conversations={"role": "user"}), "must be a list of turns"),
    "turns as a text": (row(conversations="user: q"), "must be a list of turns"),
    "a turn that is none": (conversation(USER, 5), "turn 2"),
    "a turn without a role": (conversation({"content": "q"}), "turn 1"),
    "a role that is none": (conversation({"role": "root", "content": "q"}), "role 'root'"),
    "a role that is a list": (conversation({"role": ["user"], "content": "q"}), "turn 1"),
    "a turn's text as a list": (conversation(USER, {"role": "assistant", "content": [{"type": "text"}]}), "turn 2"),
    "a turn as another trainer has it": (conversation({"from": "human", "value": "q"}), "turn 1"),
}
"""One line each, and what has to be said of it."""


def generated_lines(count: int, seed: int) -> Iterator[bytes]:
    """Yield good lines that were changed at random: bytes flipped, cut, doubled, spliced, values replaced."""
    random.seed(seed)
    values: list[object] = ["", "a", 0, -1, 1e308, True, None, [], {}, [[]], {"a": 1}, "\ud800", "\x00", "😀" * 50]
    good = [line for line, said in LINES.values() if said == ACCEPTED and len(line) < 3000]
    for _ in range(count):
        line = bytearray(random.choice(good))
        for _ in range(random.randint(1, 4)):
            at = random.randrange(len(line) + 1)
            match random.randrange(6):
                case 0:
                    line[at : at + 1] = bytes([random.randrange(256)])
                case 1:
                    del line[at : at + random.randint(1, 20)]
                case 2:
                    line[at:at] = line[at : at + 30]
                case 3:
                    line[at:at] = random.choice((b"[", b"{", b'"', b"\\u", b"\\", b"}", b",", b":", b"1e9", b"\xff"))
                case 4:
                    names = random.choice(
                        (("prompt", "response"), ("conversations",), ("text",), ("instruction", "output"))
                    )
                    given = {name: random.choice(values) for name in names}
                    line = bytearray(json.dumps(given).encode())
                case 5:
                    turns = [{"role": random.choice(values), "content": random.choice(values)} for _ in range(3)]
                    line = bytearray(
                        json.dumps({"conversations": random.choices([*turns, USER, ANSWER], k=3)}).encode()
                    )
        yield bytes(line).replace(b"\n", b" ") or b"{"


def damaged(content: bytes) -> bytes:
    """Damage a file at random: bits, bytes, pages of zeros, its end cut, pieces swapped, its footer."""
    changed = bytearray(content)
    match random.randrange(7):
        case 0:
            for _ in range(random.choice((1, 1, 3, 30))):
                at = random.randrange(len(changed))
                changed[at] ^= 1 << random.randrange(8)
        case 1:
            del changed[random.randrange(len(changed)) :]
        case 2:
            at = random.randrange(len(changed))
            changed[at : at + 512] = bytes(len(changed[at : at + 512]))
        case 3:
            first, second = sorted(random.randrange(len(changed)) for _ in range(2))
            changed[first : first + 64], changed[second : second + 64] = (
                changed[second : second + 64], changed[first : first + 64],
            )  # fmt: skip
        case 4:  # what the last eight bytes say of the footer
            changed[-8:-4] = random.randrange(2**32).to_bytes(4, "little")
        case 5:
            at = random.randrange(max(1, len(changed) - 300), len(changed))
            changed[at] = random.randrange(256)
        case 6:
            at = random.randrange(len(changed))
            changed[at:at] = random.randbytes(random.randint(1, 100))
    return bytes(changed)


# Programs that look like files. Each would make the file `canary`.


class Payload:
    """Runs a command as it is unpickled."""

    def __init__(self, how: Callable[..., Any], *arguments: object) -> None:
        self._what = (how, arguments)

    def __reduce__(self) -> Any:
        return self._what


def pickles(canary: Path) -> Iterator[tuple[str, bytes]]:
    """Yield pickles of many kinds, by the name of a file in which weights are looked for."""
    touch, code = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    payloads = [Payload(os.system, touch), Payload(eval, code), Payload(exec, code), Payload(open, str(canary), "w")]
    made = [pickle.dumps(payload, protocol) for payload in payloads for protocol in (0, 2, 4)]
    archive, tar = BytesIO(), BytesIO()
    with zipfile.ZipFile(archive, "w") as file:  # as torch.save writes
        file.writestr("model/data.pkl", made[1])
        file.writestr("model/version", "3")
    with tarfile.open(fileobj=tar, mode="w") as old:
        info = tarfile.TarInfo("pickle")
        info.size = len(made[0])
        old.addfile(info, BytesIO(made[0]))
    names = ("pytorch_model.bin", "model.safetensors", "model.pth", "model.pt", "optimizer.bin", "model.ckpt")
    for name in names:
        for content in (*made[:4], archive.getvalue(), tar.getvalue()):
            yield name, content


def pickled_weights(canary: Path) -> Iterator[tuple[str, bytes]]:
    """Yield pickles that would run something, or take all memory, as torch saves weights: whole, or among them."""
    import torch

    payloads = [
        Payload(os.system, f"touch {canary}"),
        Payload(eval, f"open({str(canary)!r}, 'w')"),
        Payload(exec, f"open({str(canary)!r}, 'w')"),
        Payload(open, str(canary), "w"),
        Payload(subprocess.check_call, ["touch", str(canary)]),
        Payload(Path.touch, canary),
        Payload(shutil.copy, __file__, str(canary)),
        Payload(getattr, canary, "touch"),
        Payload(bytearray, 2**36),
    ]
    for i, payload in enumerate(payloads):
        for weights in (payload, {"model.norm.weight": torch.ones(2), "model.embed_tokens.weight": payload}):
            for new in (True, False):
                content = BytesIO()
                torch.save(weights, content, _use_new_zipfile_serialization=new)
                yield f"{i}-{type(weights).__name__}-{new}.pth", content.getvalue()


def configurations() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what a config.json may ask for besides being one."""
    for kind in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"):
        for module in ("evil.Evil", "../evil.Evil", "stranger/repository--evil.Evil"):
            for known in ("llama", "evil"):
                yield f"auto_map {kind} {module} of {known}", {"model_type": known, "auto_map": {kind: module}}
    kernels = (
        "stranger/kernel",
        "stranger/kernel:evil",
        "stranger/kernel@main",
        "flash_attention_9",
        "../evil",
        5,
        ["sdpa"],
    )
    for kernel in kernels:
        yield f"attention {kernel}", {"_attn_implementation_internal": kernel}
        yield f"attention, by its public name, {kernel}", {"_attn_implementation": kernel}
        yield f"experts {kernel}", {"_experts_implementation_internal": kernel}
        yield f"attention of a part {kernel}", {"text_config": {"_attn_implementation_internal": kernel}}
    yield "trust", {"trust_remote_code": True, "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    for place in ("../evil.safetensors", "/etc/passwd", "evil.bin", "..//..//model.safetensors"):
        yield f"weights from {place}", {"transformers_weights": place}
    for method in ("bitsandbytes", "gptq", "awq", "evil", "fp8"):
        yield f"quantized by {method}", {"quantization_config": {"quant_method": method}}
    for kind in ("", "no_such", "../llama", "__init__", 7, None, ["llama"]):
        yield f"a model of type {kind!r}", {"model_type": kind}
    for name, value in (
        ("vocab_size", -1), ("vocab_size", 2**62), ("hidden_size", 0), ("num_hidden_layers", "many"),
        ("num_attention_heads", 0), ("hidden_act", "__import__('os').system"), ("dtype", "os.system"),
        ("torch_dtype", "load"), ("rope_parameters", {"rope_type": "evil"}), ("num_hidden_layers", 10**9),
    ):  # fmt: skip
        yield f"{name} {value}", {name: value}


def templates(canary: Path) -> Iterator[tuple[str, str]]:
    """Yield chat templates that try to leave their sandbox."""
    classes = "''.__class__.__mro__[1].__subclasses__()"
    escapes = (
        "{{ CLASSES }}", "{{ cycler.__init__.__globals__.os.systemRUN }}",
        "{{ joiner.__init__.__globals__['os'].popenRUN.read() }}", "{{ lipsum.__globals__.os.systemRUN }}",
        "{{ self.__init__.__globals__.__builtins__ }}", "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}", "{{ ''['__cl' ~ 'ass__'] }}",
        "{{ raise_exception.__globals__ }}", "{{ raise_exception.__code__ }}", "{{ strftime_now.__globals__.json }}",
        "{{ messages.__class__.__base__.__subclasses__() }}", "{{ ().__class__.__bases__[0] }}",
        "{{ namespace.__init__.__globals__ }}", "{% set n = namespace(__class__=1) %}{{ n.__class__ }}",
        "{% set n = namespace() %}{% set n.__class__ = dict %}{{ n }}", "{{ dict.__call__.__globals__ }}",
        "{{ dict.fromkeys.__func__.__globals__ }}", "{{ tojson.__globals__ }}",
        "{{ (messages|map(attribute='__class__'))|list }}",
        "{{ messages|groupby('__class__') }}", "{{ messages|sort(attribute='__class__.__name__') }}",
        "{{ ''.__format__.__self__.__class__ }}", "{% import 'os' as os %}{{ os.systemRUN }}",
        "{% include '/etc/passwd' %}", "{% extends '/etc/passwd' %}", "{% from 'os' import system %}{{ systemRUN }}",
        "{{ get_flashed_messages.__globals__ }}", "{{ config }}{{ request.application }}",
        "{{ open('/etc/passwd').read() }}",
        "{{ __import__('os').systemRUN }}", "{{ eval('1') }}", "{{ messages.append({'role': 'user'}) }}",
        "{{ messages.clear() }}", "{% set x = messages.pop() %}{{ x }}", "{{ messages[0].update({'content': ''}) }}",
        "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
        "{{ '%c' % 2**70 }}", "{{ ''.join.__self__ }}{{ loop.__init__ }}",
        "{{ strftime_now('%s' ~ '%Y' * 3).__class__ }}",
    )  # fmt: skip
    for i, text in enumerate(escapes):
        yield f"escape {i}: {text[:40]}", text.replace("CLASSES", classes).replace("RUN", f"('touch {canary}')")


BOMBS = (
    "{% for a in range(9**5) %}{% for b in range(9**5) %}{% for c in a|string %}{% endfor %}{% endfor %}{% endfor %}",
    "{{ 9**9**9 }}", "{{ (9**9**9)|string|length }}", "{{ 'a' * 10**10 }}", "{{ ['a'] * 10**10 }}",
    "{{ '%010000000000d' % 1 }}",
    "{{ 'a'.center(10**10) }}", "{{ 'a'.ljust(10**11) }}", "{{ range(99999)|list|string * 99999 }}",
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "{{ lipsum(n=10**7) }}", "{{ messages|string * 10**9 }}",
    "{{ ('a' * 40)|replace('a', 'a' * 10**9) }}", "{{ '{:>10000000000}'.format('a') }}", "{{ 'a'|indent(10**10) }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}", "{{ 10**10**7 % 7 }}",
    "{{ (messages * 10**9)|length }}", "{{ 'a'|format(*range(99999) * 9999) }}",
)  # fmt: skip
"""Chat templates that would take all time or all memory."""


def file_names(count: int) -> Iterator[str]:
    """Yield names of folders that a shell would make something of."""
    yield from (
        "a b", "a'b", 'a"b', "$(touch ran)", "`touch ran`", "a;touch ran", "a&touch ran", "a|touch ran", "a>ran",
        "-n", "--help",
        "a\\b", "a\tb", "a\nb", "*", "?", "[a]", "{a,b}", "~", "~root", "!a", "#a", "a=b", "$HOME", "${IFS}",
        "%s", "你好 世界",
        "a\u202eb", "'", '"', "\\", "a'$(touch ran)'b", 'a"$(touch ran)"b', "\u00a0", "😀", "a\rb", "\x1b[31mred",
        "=a", "a,b", "@a",
    )  # fmt: skip
    random.seed(6)
    for _ in range(count - 40):
        yield (
            "".join(random.choices(string.printable.replace("/", "") + "你好", k=random.randint(1, 30))).strip(".")
            or "x"
        )
