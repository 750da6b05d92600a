"""The tokenizer of the caption literature without Java.

pycocoevalcap tokenises with the Penn Treebank tokenizer of Stanford CoreNLP 3.4.1 (a Java program)
in lower case and drops punctuation. This does the same by regular expressions; its output is equal
to the Java program's on all texts of tests/odvla/metrics/test_ptb.py, which hold what captions
hold: contractions, possessives, numbers and coordinates, units, abbreviations, hyphens, slashes,
brackets, quotes, dashes. It is not the whole of CoreNLP: rare abbreviations, other alphabets and
emoticons may come out differently.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# What pycocoevalcap drops. It writes brackets in capitals here, but the tokenizer writes them in
# small letters, so that -lrb- and its kind stay: reproduced, for scores depend on it.
DROPPED = frozenset(
    [
        "''",
        "'",
        "``",
        "`",
        "-LRB-",
        "-RRB-",
        "-LCB-",
        "-RCB-",
        ".",
        "?",
        "!",
        ",",
        ":",
        "-",
        "--",
        "...",
        ";",
    ]
)
_QUOTES = frozenset('"\u201c\u201d\u2018\u2019')  # become `` and '', which are dropped
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_ABBREVIATIONS = (
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri sat sun "
    "mr mrs ms dr drs prof sen rep lt col gen gov adm rev maj sgt capt st ste mt ave pres hon "
    "inc co cos corp ltd plc dept assn univ intl sr jr esq bldg rd blvd vs etc ph.d wm cf"
)
# Words that begin a sentence, so that a letter and full stop before them end one: all those of
# 12,518 capitalised words that the Java program takes for one, and two titles.
_STARTERS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last "
    "Many More Now Once One Other Our She Since So Some Such That The Their Then There These They "
    "This We What When While Yet You Mr. Ms."
)
_STARTER = "|".join(re.escape(word) for word in _STARTERS.split())
_ABBREVIATION = "|".join(re.escape(word) for word in _ABBREVIATIONS.split())
_TOKEN = re.compile(
    rf"""
      https?://[^\s"'()<>]*[^\s"'()<>.,;:?!]          # addresses
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | </?[A-Za-z!?][^>\s]*>                           # <tags>
    | (?:[A-Za-z]\.){{2,}}                            # U.S. e.g. p.m.
    | \b(?:{_ABBREVIATION})\.(?![A-Za-z0-9])          # Mr. etc.
    | \bno\.(?=\s*\d)                                 # No. 5
    | (?<![A-Za-z_'])[A-Za-z]\.(?!\w|[ \n]+(?-i:{_STARTER})\s|[ \n]*<)  # an initial
    | [+-]?\d+(?:[.,]\d+)+(?:[:/-]\d+)*               # 3.5 100,000.50 -20.15,41.87
    | '\d\ds\b | '(?:tis|twas)\b                      # '90s 'tis
    | (?<!\w)'?n'(?!\w) | (?<!\w)'n\b                 # rock 'n' roll
    | [A-Za-z]\+\+                                    # c++
    | [\#@][A-Za-z_]\w*                               # #tag @name
    | (?:(?<!\w)[+-])?\d+(?:[:/-]\d+)+                # 10:30 5/12/2019 3-4
    | (?<!\w)[+-]\d+\b                                # -5
    | [^\W_](?:\w|(?<=\w)[-/&.](?=\w))*               # words, 5th, t-shirt, km/h, stops.the
      (?:['\u2019](?:\w+))*                           # with what apostrophes add
    | \.{{2,}} | \u2026                               # ...
    | -{{2,}} | [\u2013\u2014]                        # dashes
    | [?!]+
    | ['`\u2018\u2019]{{1,2}}
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CLITIC = re.compile(r"(.+?)(n['\u2019]t|['\u2019](?:s|re|ve|ll|d|m))$")
_OTHER_SIGNS = {"\u2013": "--", "\u2014": "--", "\u20ac": "$", "\u00a3": "#"}
_JOINED = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "wanna": ("wan", "na"),
    "gotta": ("got", "ta"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
    "'tis": ("'t", "is"),
    "'twas": ("'t", "was"),
}


def ptb_tokens(text: str, following: str = "") -> list[str]:
    """Tokens of a text in lower case, punctuation dropped.

    Args:
        text: a caption.
        following: the caption of the next line. Whether "14 m." at the end of a text keeps its full
            stop depends on the first word there, because the Java program reads all captions as
            one file.
    """
    text = text.replace("\n", " ")
    tokens: list[str] = []
    for found in _TOKEN.finditer(f"{text}\n{following.lstrip()} " if following else text):
        if found.start() >= len(text):
            break
        tokens.extend(_parts(found[0].lower()))
    return [token for token in tokens if token not in DROPPED and token not in _QUOTES]


def tokenise(text: str, following: str = "") -> str:
    """The tokens joined by single spaces, as pycocoevalcap's scorers take them."""
    return " ".join(ptb_tokens(text, following))


def tokenise_all(texts: Sequence[str]) -> list[str]:
    """Captions of a corpus, each as it comes out in its place of the file; see `ptb_tokens`."""
    tokenised: list[str] = []
    following = ""
    for text in reversed(texts):
        tokenised.append(tokenise(text, following))
        following = text if text.strip() else following
    return tokenised[::-1]


def _parts(token: str) -> list[str]:
    if token in _BRACKETS:
        return [_BRACKETS[token]]
    if token in _JOINED:
        return list(_JOINED[token])
    if token == "\u2026" or (len(token) > 1 and set(token) == {"."}):
        return ["..."]
    if token in _OTHER_SIGNS:
        return [_OTHER_SIGNS[token]]
    clitic = _CLITIC.fullmatch(token)
    if clitic:
        return [*_parts(clitic[1]), clitic[2].replace("\u2019", "'")]
    return [token]
