"""Text and data -> the same without what is not to be pasted: secrets, the home folder, names of user and host.

Pure. What cannot be told from a secret is masked: a word too few is asked for again, a secret cannot be taken back.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from typing import Any

MASKED = "***"
SECRET_WORDS = {
    *("secret", "secrets", "password", "passwords", "passwd", "pwd", "passphrase", "credential", "credentials"),
    *("authorization", "apikey", "authtoken", "accesskey", "secretkey", "privatekey", "accesstoken"),
    *("pw", "cookie", "cookies"),
}
"""In a name: whatever it is set to is a secret."""
OFTEN_SECRET = {"token", "key", "pass", "auth", "pat", "signature"}
"""The same, but for what language models and Python call so."""
HARMLESS_WORDS = {
    *("pad", "padding", "eos", "bos", "unk", "sep", "cls", "mask", "special", "added", "image", "end", "start"),
    *("type", "types", "error", "errors", "per", "count", "new", "max", "min", "missing", "unexpected"),
}
"""Beside one of those often secret: pad_token, KeyError, seconds_per_token."""
FOLDERS = {"PWD", "OLDPWD"}
"""Variables that a shell sets to a folder."""
TOLD_ALOUD = {"root", "user", "users", "admin", "ubuntu", "debian", "home", "localhost", "localdomain", ""}
"""Names of users and hosts that tell nobody anything."""
SHORTEST_SECRET = 8
"""That is looked for in all text by itself: a shorter one may be any word."""

TOKENS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----|.*)"
    r"|(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{20,}"
    r"|(?:sk|pk|rk)[-_][\w-]{20,}"
    r"|gh[a-z]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|A[A-Z]{2}A[A-Z0-9]{16,}"
    r"|xox[a-z]-[\w-]{10,}|AIza[\w-]{30,}|ya29\.[\w-]{20,}|pypi-[\w-]{20,}|npm_[A-Za-z0-9]{20,}"
    r"|nvapi-[\w-]{20,}|gsk_[A-Za-z0-9]{20,}|do[opr]_v1_[a-f0-9]{20,}|SG\.[\w-]{10,}\.[\w-]{10,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?"
    r")",
    re.DOTALL,
)
"""Those that say by their beginning whose they are."""
BEARER = re.compile(r"\b(bearer\s+)(?!\*)\S{8,}", re.IGNORECASE)
BASIC = re.compile(r"\b(basic\s+)([A-Za-z0-9+/]{6,}={0,2})", re.IGNORECASE)
IN_ADDRESS = re.compile(r"""(?<=://)(?:[^\s/@:]*:(?!\d{1,5}/)[^\s"'<>]*@(?:[^\s/@]+@)*|[^\s/@]+(?:@[^\s/@]+)*@)""")
"""Of a URL, what stands before the host: user and password, in which there may be @ and /, but where a port stands."""
SIGNED = re.compile(
    r"""((?:[?&;]|%(?:25)*(?:3F|26|3B))(?:[\w-]*signature|sig|policy)(?:=|%(?:25)*3D))[^\s&"'<>#]+""", re.IGNORECASE
)
"""Of a URL, what lets whoever has it in."""
WEBHOOK = re.compile(r"(hooks\.slack\.com/\w+/|discord(?:app)?\.com/api/webhooks/)[\w/+-]+", re.IGNORECASE)
HEX_KEY = r"(?<![A-Za-z0-9])[0-9a-fA-F]{40}(?![A-Za-z0-9])"
"""A key of WandB's, or a commit of git's."""
NAMED_HEX_KEY = re.compile(
    r"((?:key|token|secret|password|credential|login)s?\b[^\n\w]{1,4}(?:[a-z]{1,12}[ :=]{1,3}){0,3}?)" + HEX_KEY,
    re.IGNORECASE,
)
VALUE = r"""(?P<value>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|[^\s]+)"""
SET = re.compile(
    r"""(?<![\w.-])(?:(?<=%)(?:25)*[0-9A-Fa-f]{2})?(?P<name>[\w.-]+)"""
    r"""(?P<sep>\\*["']?[ \t]*(?:=>|:=|=|:|%(?:25)*3[ADad])[ \t]*)""" + VALUE
)
"""NAME=value, name: value, "name": "value"; in a URL within one, = and : have other forms."""
USER = re.compile(r"(?<![\w-])(?:-u|--user|--proxy-user)(?P<sep>[ \t]+|=)" + VALUE)
"""Of curl: a name, and a password behind a colon; of docker, two numbers."""
OPTION = re.compile(r"(?<![\w-])(?P<name>--?[A-Za-z][\w.-]*)(?P<sep>[ \t]+)(?!-)" + VALUE)


@dataclass(frozen=True)
class Private:
    """What is masked wherever it stands, beside what looks like a secret."""

    home: str
    user: str
    host: str
    secrets: tuple[str, ...] = ()
    """Known ones, such as the values of HF_TOKEN and its like."""


def mask_text(text: str, private: Private) -> str:
    """Return a text without secrets, with ~ for the home folder, <user> and <host>."""
    text = _without_secrets(text, private)
    for word, shown in _names(private):
        text = re.sub(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", shown, text, flags=re.IGNORECASE)
    return text


def mask_data(value: Any, private: Private, name: str = "") -> Any:
    """Return data as JSON has it with every text in it masked, and whatever stands under a secret name."""
    if isinstance(value, dict):
        return {
            _without_secrets(str(key), private): mask_data(under, private, str(key) if not is_secret(name) else name)
            for key, under in value.items()
        }
    if isinstance(value, list | tuple):
        return [mask_data(one, private, name) for one in value]
    if is_secret(name) and (isinstance(value, str) or (_is_number(value) and _words(name) & SECRET_WORDS)):
        return MASKED if value != "" else ""
    return mask_text(value, private) if isinstance(value, str) else value


def mask_setting(name: str, value: str) -> str:
    """Return the value of a variable, or nothing of it where its name, or its form, says that it is secret."""
    return MASKED if value and is_secret(name) else re.sub(HEX_KEY, MASKED, value)


def is_secret(name: str) -> bool:
    """Say whether a name is that of a secret, by its words: HF_TOKEN, awsSecretKey, db-password."""
    if name in FOLDERS:
        return False
    words = _words(name)
    return bool(words & SECRET_WORDS) or bool(words & OFTEN_SECRET and not words & HARMLESS_WORDS)


def _words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _without_secrets(text: str, private: Private) -> str:
    """Return a text without what is secret, and with ~ for the home folder."""
    for secret in sorted(private.secrets, key=len, reverse=True):
        if len(secret) >= SHORTEST_SECRET:
            for form in {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}:
                text = text.replace(form, MASKED)
    text = TOKENS.sub(MASKED, text)
    text = BEARER.sub(rf"\1{MASKED}", text)
    text = BASIC.sub(_basic, text)
    text = IN_ADDRESS.sub(f"{MASKED}@", text)
    for pattern in (SIGNED, WEBHOOK, NAMED_HEX_KEY):
        text = pattern.sub(rf"\1{MASKED}", text)
    text = "\n".join(_line(line) for line in text.split("\n"))
    for home in _forms_of(private.home):
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    return text


def _basic(found: re.Match[str]) -> str:
    """Mask what is a user and a password in base64; basic things of other kinds are no such."""
    try:
        told = base64.b64decode(found[2].rstrip("=") + "=" * (-len(found[2].rstrip("=")) % 4))
        secret = told.isascii() and b":" in told and told.decode().isprintable()
    except ValueError:
        secret = False
    return found[1] + MASKED if secret else found[0]


def _line(line: str) -> str:
    """Mask what a line sets names of secrets to: all that follows where there is no doubt, else the next word."""
    for pattern in (USER, OPTION, SET):
        at = 0
        while found := pattern.search(line, at):
            at = found.end("sep")
            if _is_set(found):
                end = len(line) if _to_the_end(found) else found.end("value")
                shown = _like(found["value"])
                line = line[:at] + shown + line[end:]
                at += len(shown)
    return line


def _is_set(found: re.Match[str]) -> bool:
    """Say whether a name that is set is a secret's: a word alone before a colon is often prose, key: lm_head."""
    if found.re is USER:
        return re.fullmatch(r"""["']?\d+:\d+["']?""", found["value"]) is None and ":" in found["value"]
    name, value = found["name"], found["value"]
    if not is_secret(name):
        return False
    words = _words(name)
    if words & SECRET_WORDS:
        return True
    if re.fullmatch(r"\d{1,5}[,;.)}\]]*", value):
        return False
    alone = len(words) == 1 and ":" in found["sep"] and not re.match(r"""\\*["']""", found["sep"])
    return not alone or re.fullmatch(r"""["']?[\w+/=-]{12,}["']?[,;.)}\]]*""", value) is not None


def _to_the_end(found: re.Match[str]) -> bool:
    """Say whether what follows on the line belongs to it: a password may have blanks, where nothing quotes it."""
    return found.re is SET and bool(_words(found["name"]) & SECRET_WORDS) and found["value"][0] not in "\"'"


def _like(value: str) -> str:
    """Return the mask, quoted as the value was, so that a file still reads as what it is."""
    quoted = len(value) > 1 and value[0] in "\"'" and value[-1] == value[0]
    return f"{value[0]}{MASKED}{value[0]}" if quoted else MASKED


def _forms_of(home: str) -> list[str]:
    """Return the ways in which a home folder is written, the longest first; none for the root of the disk."""
    plain = home.rstrip("/\\")
    if len(plain) < 2:
        return []
    return sorted({plain, plain.replace("\\", "/"), plain.replace("\\", "\\\\")}, key=len, reverse=True)


def _names(private: Private) -> list[tuple[str, str]]:
    """Return the names of user and host and what stands for them, the longest first."""
    short = private.host.split(".")[0]
    named = [(private.host, "<host>"), (short, "<host>"), (private.user, "<user>")]
    told = [(word, shown) for word, shown in named if len(word) > 1 and word.lower() not in TOLD_ALOUD]
    return sorted(told, key=lambda pair: -len(pair[0]))
