"""No secret that is planted anywhere survives, and ordinary text is left as it is."""

from __future__ import annotations

import base64
import json
import string
from typing import Any

import facts
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cli.masking import Private, is_secret, mask_data, mask_setting, mask_text

ANN = Private(home="/home/ann", user="ann", host="thinkpad.lan", secrets=("correct horse battery",))
LETTERS = string.ascii_letters + string.digits

random_words = st.text(LETTERS, min_size=24, max_size=40)
tokens = (
    st.builds(
        "{}{}".format,
        st.sampled_from(
            [
                "hf_",
                "sk-",
                "sk-proj-",
                "ghp_",
                "gho_",
                "github_pat_",
                "glpat-",
                "xoxb-",
                "pypi-",
                "npm_",
                "nvapi-",
                "gsk_",
                f"SG.{'a' * 12}.",
            ]
        ),
        random_words,
    )
    | st.builds("dop_v1_{}".format, st.text("0123456789abcdef", min_size=64, max_size=64))
    | st.builds("AKIA{}".format, st.text(string.ascii_uppercase + string.digits, min_size=16, max_size=16))
)
names = st.sampled_from(
    ["HF_TOKEN", "WANDB_API_KEY", "api_key", "apiKey", "password", "DB_PASSWORD", "client-secret",
     "AWS_SECRET_ACCESS_KEY", "credentials", "access.token", "auth_token", "ssh_key", "passphrase", "Authorization",
     "GITHUB_PAT", "db_pw"]
)  # fmt: skip
frames = st.sampled_from(
    ["{name}={secret}", "{name} = {secret}", "{name}: {secret}", '"{name}": "{secret}"', "'{name}': '{secret}'",
     '{name} = "{secret}"  # command line', "--{name} {secret}", "--{name}={secret}", "export {name}={secret}",
     "https://host/x?{name}={secret}&page=2", '{{\\"{name}\\": \\"{secret}\\"}}']
)  # fmt: skip
UNNAMED = (
    *("Bearer {secret}", "authorization: bearer {secret}", "https://ann:{secret}@host/x", "git+https://{secret}@h"),
    *(
        "https://h/x?Expires=1&Signature={secret}&Key-Pair-Id=2",
        "https://h/x?X-Amz-Signature={secret}",
        "?sig={secret}",
    ),
    *(
        "https://h/x?Policy={secret}",
        "https%3A%2F%2Fh%3Fpage%3D1%26access_token%3D{secret}",
        "?u=h%253Ftoken%253D{secret}",
    ),
    *("https://hooks.slack.com/services/T01/B02/{secret}", "Cookie: session={secret}", "curl -u alice:{secret} h"),
    *("postgres://u:p@ss/{secret}@h/db", "postgres://u:{secret}/w0rd@h/db", "pw={secret}"),
)


@st.composite
def planted(draw: st.DrawFn) -> tuple[str, str]:
    """A secret, and a text that gives it away."""
    if draw(st.booleans()):
        token = draw(tokens)
        return token, token
    secret = draw(random_words)
    frame = draw(frames | st.sampled_from(UNNAMED))
    return secret, frame.format(name=draw(names), secret=secret)


around = st.text(string.ascii_letters + string.digits + " .,;()[]{}<>/\n\"'=:-_你好", max_size=20)
"""Shorter than a secret: it holds none itself."""
gaps = st.sampled_from([" ", "\n", "\t", " (", "; ", ", "])


@given(planted(), around, around, gaps, gaps)
@example(("hunter2hunter2", "password: hunter2hunter2 and more of it"), "", "", " ", " ")
def test_no_secret_survives_in_text_whatever_stands_around_it(
    planted: tuple[str, str], before: str, after: str, gap: str, other_gap: str
) -> None:
    secret, told = planted
    masked = mask_text(before + gap + told + other_gap + after, ANN)
    assert secret not in masked
    assert mask_text(masked, ANN) == masked, "what is masked is not masked again"


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(trees, planted(), names, st.lists(st.integers(0, 3), max_size=4), st.integers(0, 2))
def test_no_secret_survives_in_any_field_of_data(
    tree: Any, planted: tuple[str, str], name: str, path: list[int], how: int
) -> None:
    secret, told = planted
    leaf = [told, {name: secret}, {told: 1}][how]
    if how == 2 and "Bearer" not in told and told != secret:
        leaf = {name: [{"value": secret}]}
    for step in path:
        leaf = [[leaf], {"field": leaf}, [tree, leaf], {"a": tree, "b": leaf}][step]
    masked = mask_data(leaf, ANN)
    assert secret not in json.dumps(masked, ensure_ascii=False)
    assert mask_data(masked, ANN) == masked


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ann/runs/x", "~/runs/x"),
        ("saved to /home/ann.", "saved to /home/<user>."),
        ("/home/anna/runs and joann", "/home/anna/runs and joann"),
        ("ann@thinkpad: hi Ann", "<user>@<host>: hi <user>"),
        ("thinkpad.lan, thinkpad", "<host>, <host>"),
        ("he typed correct horse battery here", "he typed *** here"),
        ("password = correct horse", "password = ***"),
        ("{'token': 'abcdefgh', 'loss': 2.5}", "{'token': '***', 'loss': 2.5}"),
        ("postgres://ann:p@ss@db/x", "postgres://***@db/x"),
        ("postgres://u:p@ss/w0rd@h/db", "postgres://***@h/db"),
        ("http://localhost:8080/x@2 and mail@host", "http://localhost:8080/x@2 and mail@host"),
        ("git+https://github.com/a/b@v1", "git+https://github.com/a/b@v1"),
        ("curl -u alice:pw https://h; docker run -u 1000:1000 x", "curl -u *** https://h; docker run -u 1000:1000 x"),
        ("https://h/x?sig=ab&page=2", "https://h/x?sig=***&page=2"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\ndef\n-----END RSA PRIVATE KEY-----\nloss 2", "***\nloss 2"),
        ("-----BEGIN PRIVATE KEY-----\nabc\ndef", "***"),
    ],
)
def test_what_is_masked_says_what_it_was(text: str, shown: str) -> None:
    assert mask_text(text, ANN) == shown


def test_a_home_folder_of_windows_is_found_as_json_and_as_posix_write_it() -> None:
    private = Private(home=r"C:\Users\Ann Lee", user="Ann Lee", host="PC-7")
    for path in (r"C:\Users\Ann Lee\runs", r"C:\\Users\\Ann Lee\\runs", "C:/Users/Ann Lee/runs"):
        assert mask_text(path, private).startswith("~")
    assert mask_text("on pc-7", private) == "on <host>"


def test_names_that_tell_nothing_and_no_home_are_left() -> None:
    text = "root: /root/x, user on localhost, /"
    assert mask_text(text, Private(home="/", user="root", host="localhost")) == text


ORDINARY = [
    "step 500/2,000, loss 2.3456, 5,677 tokens/s, 3.26 s a step",
    'tokens_per_second = 512.5, target_tokens: 12345678, tokenizer = "chatlm"  # profile',
    "pad_token: [PAD], eos_token_id=2, bos_token='<s>', max_new_tokens=256",
    "KeyError: 'model.layers.0.self_attn.q_proj.weight'",
    "Missing key(s) in state_dict: lm_head.weight; unexpected key: model.layers.0.mlp",
    "Traceback (most recent call last):\n  File \"trainer/loop.py\", line 62, in train\nRuntimeError: size mismatch",
    "transformers.models.hf_argparser and hf_hub_download; task-specific-parameters-of-the-model",
    "chatlm train --auto --max-seq-len 512 --keep-last 3 --tokenizer DIR --save-every 10m",
    "data_fingerprint 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "你好，世界。http://127.0.0.1:8080/x 2026-11-28 12:00:00 [rank 0]",
    "the token: 5, the key: lm_head, sort_key=3",
]  # fmt: skip


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert mask_text(text, ANN) == text


@given(st.lists(st.sampled_from(" ".join(ORDINARY).split()) | st.floats().map(str) | st.integers().map(str)))
def test_ordinary_words_in_any_order_hold_no_secret(words: list[str]) -> None:
    text = " ".join(word for word in words if word.rstrip(":,=") not in ("token", "key"))
    assert mask_text(text, ANN) == text


def test_a_plan_holds_nothing_that_is_masked() -> None:
    plan = facts.plan().model_dump(mode="json", by_alias=True)
    assert mask_data(plan, ANN) == plan


@pytest.mark.parametrize("name", ["HF_TOKEN", "awsSecretKey", "db-password", "KEY", "GOOGLE_APPLICATION_CREDENTIALS"])
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)
    assert mask_setting(name, "x") == "***"
    assert mask_setting(name, "") == ""


@pytest.mark.parametrize(
    "name", ["OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "tokens", "KeyError", "monkey", "passes", "PWD", "path"]
)
def test_names_of_no_secrets(name: str) -> None:
    assert mask_setting(name, "x") == "x"


def test_numbers_are_masked_under_names_that_leave_no_doubt() -> None:
    given = {"password": 1234, "token": 1234, "secret": {"a": ["b", 5]}, "key": True}
    assert mask_data(given, ANN) == {"password": "***", "token": 1234, "secret": {"a": ["***", "***"]}, "key": True}


HEX = "0123456789abcdef" * 2 + "01234567"
FINGERPRINT = HEX + HEX[:24]


def test_forty_digits_are_a_key_beside_a_word_for_one_or_in_a_variable_and_else_a_commit() -> None:
    for told in ("wandb key {}", "API token: {}", "your secret is {}", "login = {}", "key was set to {}"):
        assert HEX not in mask_text(told.format(HEX), ANN), told
    for told in (f"commit {HEX}", f"sha1 {HEX}, a monkey", f"data_fingerprint {FINGERPRINT}", f"a key {FINGERPRINT}"):
        assert mask_text(told, ANN) == told
    assert mask_setting("WANDB_RUN", HEX) == "***"
    assert mask_setting("CHATLM_DATA", FINGERPRINT) == FINGERPRINT


@given(st.text(LETTERS, min_size=2, max_size=12), st.text(LETTERS + "!@/", min_size=2, max_size=20))
def test_a_user_and_a_password_in_base64_are_masked_and_words_behind_basic_are_not(user: str, password: str) -> None:
    told = base64.b64encode(f"{user}:{password}".encode()).decode()
    for form in (told, told.rstrip("=")):
        assert mask_text(f"sent Basic {form}, refused", ANN) == "sent Basic ***, refused"
    words = "Basic arithmetic, basic training, basic tokenization"
    assert mask_text(words, ANN) == words
