"""The pre-tokenizers a byte-level BPE file can name in `tokenizer.ggml.pre`.

A pre-tokenizer cuts text into words before merges are applied. Each is a list of steps, and every step cuts the pieces
the one before it left; what a step's expression does not match stays as a piece of its own. The expressions are those
of the models' own tokenizers in the form llama.cpp runs them, whose results are the reference: expressions with Unicode
categories see a *collapsed* text, in which every character beyond ASCII is replaced by one that stands for its category
(so upper and lower case differ for ASCII letters only), and the others see the text itself with all Unicode white space
turned into vertical tabs. Both keep one character per character, so positions carry over.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..errors import UnsupportedModelError
from ..gguf.header import quote
from .unicode_classes import WHITESPACE, is_han, major_category

# One stand-in per category; ASCII characters stand for themselves.
_STAND_IN = {"N": "\xd1", "L": "\xd2", "P": "\xd3", "M": "\xd4", "S": "\xd5"}
_OTHER = "\xd0"
_HAN_LETTER, _HAN_OTHER = "\xe0", "\xe1"

# What \p{X} means inside brackets over collapsed text.
_COLLAPSED_CLASS = {
    "N": "\xd10-9",
    "L": "\xd2A-Za-z",
    "P": "\xd3!-#%-*,-/:;?@\\[-\\]_{}",
    "M": "\xd4",
    "S": "\xd5$+<=>\\^`|~",
    "Upper": "\xd2A-Z",  # letters that are not ASCII lower case
    "Lower": "\xd2a-z",
    "Han": _HAN_LETTER + _HAN_OTHER,
    "HanLetter": _HAN_LETTER,
}


class _Collapse(dict[int, str]):
    """A str.translate table that finds each character's stand-in on first sight."""

    def __init__(self, split_han: bool):
        super().__init__((code, chr(code)) for code in range(128))
        self.split_han = split_han

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = major_category(char)
        if char in WHITESPACE:
            stand_in = "\x0b"
        elif self.split_han and is_han(code):
            stand_in = _HAN_LETTER if category == "L" else _HAN_OTHER
        else:
            stand_in = _STAND_IN.get(category, _OTHER)
        self[code] = stand_in
        return stand_in


_PLAIN_SPACES = {ord(char): "\x0b" for char in WHITESPACE if ord(char) > 0x7F}

Step = Callable[[str, list[int]], list[int]]
"""(text, ascending piece boundaries from 0 to len(text)) -> finer boundaries."""


@dataclass(frozen=True)
class _Stage:
    run: Step
    collapsed: bool


def _regex_step(expression: re.Pattern[str]) -> Step:
    def run(text: str, bounds: list[int]) -> list[int]:
        fine = [0]
        add = fine.append
        for start, end in pairwise(bounds):
            at = start
            for match in expression.finditer(text, start, end):
                first, last = match.span()
                if first > at:
                    add(first)
                add(last)
                at = last
            if at < end:
                add(end)
        return fine

    return run


def _categories(expression: str) -> _Stage:
    """A stage whose \\p{..} classes apply to the collapsed text."""
    out: list[str] = []
    inside = False
    i = 0
    while i < len(expression):
        char = expression[i]
        if char == "\\" and expression.startswith("\\p{", i):
            close = expression.index("}", i)
            members = _COLLAPSED_CLASS[expression[i + 3 : close]]
            out.append(members if inside else f"[{members}]")
            i = close + 1
            continue
        if char == "\\":
            out.append(expression[i : i + 2])
            i += 2
            continue
        if char == "[" and not inside:
            inside = True
        elif char == "]":
            inside = False
        out.append(char)
        i += 1
    return _Stage(_regex_step(re.compile("".join(out), re.ASCII)), collapsed=True)


def _plain(expression: str) -> _Stage:
    return _Stage(_regex_step(re.compile(expression, re.ASCII)), collapsed=False)


_NUMBER_RUN = re.compile(f"[{_COLLAPSED_CLASS['N']}]+")
_ASCII_DIGIT_RUN = re.compile("[0-9]+")


def _digits_from_the_right(text: str, bounds: list[int]) -> list[int]:
    """Cut after every group of three digits counted from the right; the text before a number joins its first group.

    That the text before is not cut off is how llama.cpp does it; the expressions that follow cut there."""
    fine = [0]
    for start, end in pairwise(bounds):
        for match in _NUMBER_RUN.finditer(text, start, end):
            first, last = match.span()
            head = (last - first) % 3
            if head:
                fine.append(first + head)
            fine.extend(range(first + head + 3, last + 1, 3))
        if fine[-1] < end:
            fine.append(end)
    return fine


def _before_digit_triples(text: str, bounds: list[int]) -> list[int]:
    """Cut where a multiple of three ASCII digits follows, up to the end of their run: (?=(\\d{3})+(?!\\d))."""
    fine = [0]
    for start, end in pairwise(bounds):
        for match in _ASCII_DIGIT_RUN.finditer(text, start, end):
            first, last = match.span()
            fine.extend(at for at in range(first + (last - first) % 3, last, 3) if at > fine[-1])
        if fine[-1] < end:
            fine.append(end)
    return fine


def _trailing_spaces(text: str, bounds: list[int]) -> list[int]:
    """Cut before the white space that ends a piece: \\s+$, in linear time."""
    fine = [0]
    for start, end in pairwise(bounds):
        at = end
        while at > start and text[at - 1] in " \t\n\r\x0b\x0c":
            at -= 1
        if start < at < end:
            fine.append(at)
        fine.append(end)
    return fine


def _ranges(listing: str) -> str:
    """The inside of a bracket expression from hexadecimal code points and ranges: "41-5a b5"."""
    return "".join("-".join(chr(int(code, 16)) for code in item.split("-")) for item in listing.split())


_KANA_AND_HAN = _ranges("4e00-9fa5 3040-309f 30a0-30ff")
_DEEPSEEK_EAST_ASIAN = _ranges("4e00-9fa5 800-4e00 ac00-d7ff")
_HANGUL = _ranges("ac00-d7a3 3131-318e")
_BOPOMOFO = _ranges("3105-312f")
_EAST_ASIAN_PUNCTUATION = _ranges("ff01 2026 201c 201d 2018 2019 2014 ff1a ff1b ff0c 3001-303f fe30-fe4f")
_AFMOE_SCRIPTS = _ranges(
    "4e00-9fff 3400-4dbf 8c48-faff 3040-309f 30a0-30ff ff65-ff9f 2f00-2fdf e40-e7f e80-eff 1780-17ff 1000-109f "
    "aa60-aa7f a9e0-a9ff ac00-d7af 1100-11ff"
)

# The cased letters of Unicode 11, as DeepSeek's first tokenizers list them.
_CASED_LETTERS = _ranges(
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 388-38a 38c "
    "38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b "
    "1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 "
    "1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 "
    "2115 2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 2c00-2c7b "
    "2c7e-2ce4 2ceb-2cee 2cf2 2cf3 a640-a66d a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 "
    "fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df "
    "1e900-1e943"
)

# Pieces that many expressions share. Order matters: the first alternative that matches wins.
_SUFFIX = r"'(?:[sS]|[tT]|[mM]|[dD]|[rR][eE]|[vV][eE]|[lL][lL])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKED_WORD = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_PUNCTUATION_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_ASCII_PUNCTUATION = r"[!-/:-@\[-`{-~]"
_CASED_WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Upper}]*[\p{Lower}]+SUFFIX|[^\r\n\p{L}\p{N}]?[\p{Upper}]+[\p{Lower}]*SUFFIX|\p{N}DIGITS|"
    + _PUNCTUATION_SLASH
    + "|"
    + _SPACES
)

_GPT2 = _categories(r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
_LLAMA3 = _categories("|".join([_SUFFIX, _WORD, r"\p{N}{1,3}", _PUNCTUATION, _SPACES]))
_QWEN2 = _categories("|".join([_SUFFIX, _WORD, r"\p{N}", _PUNCTUATION, _SPACES]))
_NEWLINES = _plain(r"[^\n]+|\n+")
_DIGIT = _categories(r"\p{N}")
_DIGITS3 = _categories(r"\p{N}{1,3}")
_DIGITS_RIGHT = _Stage(_digits_from_the_right, collapsed=True)
_BLOOM = _plain(r" ?[^(\s|.,!?" + _ranges("2026 3002 ff0c 3001 964 6d4 60c") + ")]+")
_CJK = _plain(f"[{_KANA_AND_HAN}]+")
_DEEPSEEK_REST = (
    _ASCII_PUNCTUATION + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+NEWLINES|" + _SPACES
)
_DEEPSEEK3 = (_DIGITS3, _CJK, _categories(_DEEPSEEK_REST.replace("NEWLINES", r"[\r\n]*")))
_CASED_MARKS_WORD = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+(?:" + _SUFFIX + ")?"


_STAGES: dict[str, tuple[_Stage, ...]] = {
    "default": (_categories(r"[\p{P}$+<=>\^~|]+"), _GPT2, _categories(r"\p{N}+"), _plain("[0-9][0-9][0-9]")),
    "llama3": (_LLAMA3,),
    "jais2": (
        _categories(
            "|".join(
                [_SUFFIX, _WORD, r"\p{N}{1,3}", _PUNCTUATION, r"\s*[\r\n]+"]
                + [rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)]
                + [r"\s{1,2}(?!\S)", r"\s"]
            )
        ),
    ),
    "deepseek-llm": (
        _plain(r"[\r\n]"),
        _plain(rf"\s?[{_CASED_LETTERS}]+"),
        _plain(r"\s?[!-/:-~" + _ranges("ff01-ff0f ff1a-ff5e 2018-201f 3000-3002") + "]+"),
        _Stage(_trailing_spaces, collapsed=False),
        _plain(f"[{_DEEPSEEK_EAST_ASIAN}]+"),
        _categories(r"\p{N}+"),
    ),
    "deepseek-coder": (
        _plain(r"[\r\n]"),
        _categories(r"\s?\p{L}+"),
        _categories(r"\s?\p{P}+"),
        _plain(f"[{_DEEPSEEK_EAST_ASIAN}]+"),
        _DIGIT,
    ),
    "deepseek-v3": _DEEPSEEK3,
    "spark2_5": (
        _DIGITS3,
        _CJK,
        _categories(
            _ASCII_PUNCTUATION + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"
        ),
        _DIGIT,
    ),
    "youtu": (
        _plain(f"[{_HANGUL}]+|[{_EAST_ASIAN_PUNCTUATION}]+|[{_BOPOMOFO}]+|[{_KANA_AND_HAN}]+"),
        _categories("|".join([_CASED_MARKS_WORD, r"\p{N}", _PUNCTUATION_SLASH, _SPACES])),
    ),
    "falcon": (_categories(r"[\p{P}$+<=>\^~|`]+"), _GPT2, _plain("[0-9][0-9][0-9]")),
    "digits-gpt2": (_DIGIT, _GPT2),
    "gpt2": (_GPT2,),
    "qwen2": (_QWEN2,),
    "qwen35": (
        _categories(
            "|".join([_SUFFIX, _MARKED_WORD, r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _SPACES]),
        ),
    ),
    "bloom": (_BLOOM,),
    "viking": (_BLOOM, _DIGIT),
    "tekken": (_categories(_CASED_WORD.replace("SUFFIX", "").replace("DIGITS", "")),),
    "chameleon": (
        _plain("<sentinel:[0-9]+>"),
        _plain("IMGIMG[A-I]{1,4}Z"),
        _plain("[\t\n]|    |  "),
        _DIGIT,
        _categories(r"[\p{P}!-/:-@\[-`{-~]"),
        _GPT2,
    ),
    "gpt-4o": (_categories(_CASED_WORD.replace("SUFFIX", f"(?:{_SUFFIX})?").replace("DIGITS", "{1,3}")),),
    "granite-embed": (
        _categories(
            _CASED_WORD.replace(r"{Upper}", r"{Upper}\p{M}")
            .replace(r"{Lower}", r"{Lower}\p{M}")
            .replace("SUFFIX", f"(?:{_SUFFIX})?")
            .replace("DIGITS", "{1,3}")
        ),
    ),
    "tiny_aya": (
        _DIGITS_RIGHT,
        _categories("|".join([_CASED_MARKS_WORD, r"\p{N}{1,3}", _PUNCTUATION_SLASH, _SPACES])),
    ),
    "kimi-k2": (
        _categories(
            r"\p{Han}+|[^\r\n\p{L}\p{N}\p{Han}]?\p{L}+(?:"
            + _SUFFIX
            + r")?|\p{N}{1,3}| ?[^\s\p{L}\p{N}\p{HanLetter}]+[\r\n]*|"
            + _SPACES
        ),
    ),
    "superbpe": (_categories(r"\p{N}+"), _Stage(_before_digit_triples, collapsed=False)),
    "seed-coder": (_categories("|".join([_SUFFIX, _WORD, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", _SPACES])),),
    "ufakzeka": (_categories("|".join([_WORD, r"\p{N}", _PUNCTUATION, _SPACES])),),
    "afmoe": (
        _DIGITS_RIGHT,
        _plain(f"[{_AFMOE_SCRIPTS}]+"),
        _DEEPSEEK3[2],
    ),
    "laguna": (_NEWLINES, _QWEN2),
    "exaone-moe": (
        _categories(
            "|".join(
                [
                    _SUFFIX,
                    r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                    r"\p{N}",
                    r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
                    r"\s*[\r\n]|\s+(?!\S)|\s+",
                ]
            )
        ),
    ),
    "newlines": (_NEWLINES,),
    "minicpm5": (_DIGITS3, _categories("|".join([_SUFFIX, _WORD, r"\p{N}+", _PUNCTUATION, _SPACES]))),
    "whitespace": (_plain(r"\S+"),),
}


@dataclass(frozen=True)
class PreTokenizer:
    """One named way to cut text into words, and the tokenizer settings that come with the name.

    ignore_merges: a word that is a token as a whole is taken without merging. byte_encode: words are mapped to GPT-2's
    printable stand-ins for bytes; otherwise tokens hold plain UTF-8 and unknown characters become `<0xXX>` tokens.
    add_bos: the default where the file does not say. clean_spaces: llama.cpp's detokenizer drops spaces
    before punctuation. escape_whitespaces: spaces become U+2581 first. newline_runs: a run of line feeds that is a
    token is taken as a whole."""

    name: str
    stages: tuple[_Stage, ...]
    split_han: bool = False
    ignore_merges: bool = False
    byte_encode: bool = True
    add_bos: bool = False
    no_bos: bool = False
    clean_spaces: bool = True
    escape_whitespaces: bool = False
    newline_runs: bool = False

    def split(self, text: str, collapse: dict[int, str]) -> list[str]:
        """Cut text into words, whose concatenation is the text. collapse is the table of `collapse_table()`."""
        if not text:
            return []
        bounds = [0, len(text)]
        ascii_only = text.isascii()
        collapsed = plain = text
        if not ascii_only:
            if any(stage.collapsed for stage in self.stages):
                collapsed = text.translate(collapse)
            if not all(stage.collapsed for stage in self.stages):
                plain = text.translate(_PLAIN_SPACES)
        for stage in self.stages:
            bounds = stage.run(collapsed if stage.collapsed else plain, bounds)
        return [text[start:end] for start, end in pairwise(bounds)]

    def collapse_table(self) -> dict[int, str]:
        """A fresh translation table for `split`; it fills itself, with one entry per distinct character seen."""
        return _Collapse(self.split_han)


# name -> (stages, settings that differ from PreTokenizer's defaults)
_KEEP = {"clean_spaces": False}
_LLAMA3_LIKE = {"ignore_merges": True, "add_bos": True}
_SPM_LIKE = {"byte_encode": False, "escape_whitespaces": True}
_NAMES: dict[str, tuple[Sequence[str], str, dict[str, bool]]] = {
    "default": (("default",), "default", {}),
    "minicpm5": (("minicpm5",), "minicpm5", {"ignore_merges": True}),
    "llama3": (
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        "llama3",
        _LLAMA3_LIKE,
    ),
    "deepseek-llm": (("deepseek-llm",), "deepseek-llm", _KEEP),
    "deepseek-coder": (("deepseek-coder",), "deepseek-coder", _KEEP),
    "deepseek-v3": (("deepseek-v3", "hunyuan-dense", "hy_v4", "joyai-llm"), "deepseek-v3", _KEEP),
    "spark2_5": (("spark2_5",), "spark2_5", _KEEP),
    "youtu": (("youtu",), "youtu", _KEEP | {"ignore_merges": True}),
    "falcon": (("falcon",), "falcon", {}),
    "gpt2": (
        (
            *("mpt", "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0"),
            *("mellum", "modern-bert", "olmo", "jais", "exaone4", "jina-v1-en", "jina-v2-code", "roberta-bpe"),
        ),
        "gpt2",
        {},
    ),
    "gpt2-keep": (("trillion", "granite-docling"), "gpt2", _KEEP),
    "digits-gpt2": (("starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"), "digits-gpt2", {}),
    "digits-gpt2-keep": (("command-r", "smollm"), "digits-gpt2", _KEEP),
    "jais-2": (("jais-2",), "jais2", {}),
    "gemma4": (
        ("gemma4", "granite-embed-multi-311m"),
        "newlines",
        _SPM_LIKE | {"add_bos": True, "newline_runs": True},
    ),
    "sarvam-moe": (("sarvam-moe",), "newlines", _SPM_LIKE | _KEEP),
    "whitespace": (("whitespace",), "whitespace", {"byte_encode": False}),
    "qwen2": (
        (
            *("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "hunyuan", "grok-2", "solar-open"),
            *("bailingmoe", "bailingmoe2", "llada-moe"),
        ),
        "qwen2",
        _KEEP,
    ),
    "qwen2-clean": (("stablelm2", "megrez"), "qwen2", {}),
    "qwen35": (("qwen35",), "qwen35", _KEEP),
    "llama3-merges": (("dbrx", "smaug-bpe"), "llama3", {}),
    "chatglm-bpe": (("chatglm-bpe",), "llama3", {"no_bos": True}),
    "glm4": (("glm4", "glm5"), "llama3", {"no_bos": True, "ignore_merges": True}),
    "poro-chat": (("poro-chat",), "bloom", _KEEP),
    "bloom": (("bloom", "gpt3-finnish"), "bloom", {}),
    "viking": (("viking",), "viking", _KEEP),
    "tekken": (("tekken",), "tekken", _KEEP | _LLAMA3_LIKE),
    "chameleon": (("chameleon",), "chameleon", _KEEP | {"add_bos": True}),
    "exaone-moe": (("exaone-moe",), "exaone-moe", {}),
    "gpt-4o": (("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), "gpt-4o", _KEEP),
    "granite-embed": (("granite-embed-multi-97m",), "granite-embed", _KEEP | {"ignore_merges": True}),
    "tiny_aya": (("tiny_aya", "cohere2moe"), "tiny_aya", _KEEP),
    "superbpe": (("superbpe",), "superbpe", _KEEP),
    "seed-coder": (("seed-coder",), "seed-coder", _KEEP),
    "kimi-k2": (("kimi-k2",), "kimi-k2", _KEEP | {"split_han": True}),
    "ufakzeka": (("ufakzeka",), "ufakzeka", _KEEP),
    "afmoe": (("afmoe",), "afmoe", _KEEP),
    "laguna": (("laguna",), "laguna", _KEEP),
}

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    name: PreTokenizer(name, _STAGES[stages], **settings)
    for names, stages, settings in _NAMES.values()
    for name in names
}
"""Every name accepted in `tokenizer.ggml.pre`."""


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer of that name; UnsupportedModelError if it is not known."""
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        raise UnsupportedModelError(
            f"tokenizer.ggml.pre: unknown pre-tokenizer {quote(name)}; known: {', '.join(sorted(PRE_TOKENIZERS))}"
        ) from None
