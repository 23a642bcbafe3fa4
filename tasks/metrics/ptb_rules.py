r"""Penn Treebank tokens of plain English sentences, equal to CoreNLP 3.4.1, without Java.

It exists so that ROUGE-L and CIDEr of E2E need no Java: else BLEU and NIST would be all there is.

A restatement of what ``PTBTokenizer -lowerCase`` does with the sentences of E2E-like corpora: ASCII
letters, é, digits, £, $ and everyday punctuation. It works like the original, a lexer whose longest
rule wins (what a rule demands to follow counts as length; on a tie the earlier rule wins). Where
the answer hangs on a list that is not restated here (abbreviations, addresses, telephone numbers,
smileys) or on any other character, it raises `UncertainError` and never guesses: a nearly official
score is not official. Equality with the jar is tested on the E2E data and on random strings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


class UncertainError(ValueError):
    """Only the CoreNLP jar is certain about the tokens of this text."""


_KNOWN = re.compile(r"[A-Za-z0-9é£$.,;:!?'\" -]*")

_LETTER = "[A-Za-zé]"
_CHARACTER = "[A-Za-zé0-9]"
_CLITIC = "'(?:[msdMSD]|(?i:re|ve|ll))"
_ELISION = f"(?:[dDoOlL]'{_CHARACTER})?"
_WORD = f"{_LETTER}{_CHARACTER}*(?:[.!?]{_LETTER}{_CHARACTER}*)*"
_HYPHENATED = f"{_ELISION}{_CHARACTER}+(?:-{_ELISION}{_CHARACTER}+)*"
_ASCII_HYPHENATED = "[A-Za-z0-9][A-Za-z0-9.,]*(?:-[A-Za-z0-9]+)+"
_WITH_APOSTROPHE = [
    "'(?i:n)'?",
    "[lLdDjJ]'",
    "(?i:dunkin|somethin|ol)'",
    "'(?i:em|till?|cause)",
    f"[A-HJ-XZn]'{_LETTER}{{2,}}",
    "'[2-9]0(?i:s)",
    f"{_LETTER}+[aeiouyAEIOUY]'[aeiouA-Z]{_LETTER}*",
    r"(?i:cont'd)\.?",
    "(?i:nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|o'o)",
]

# Token, what has to follow, and how many characters at its end are left for the next token.
_RULES = [
    (re.compile(f"({token})(?:{context})"), num_returned)
    for token, context, num_returned in [
        ("(?i:cannot)", "", 3),
        ("(?i:'twas)", "", 3),
        ("(?i:'tis|gonna|gotta|lemme|gimme|wanna)", "", 2),
        (_WORD, _CLITIC, 0),
        ("[A-Za-z]*[A-MO-Za-mo-z]", "(?i:n't)", 0),
        (_WORD, "", 0),
        *((form, "", 0) for form in _WITH_APOSTROPHE),
        ("(?i:y')", _LETTER, 0),
        (_CLITIC, "[^A-Za-z]", 0),
        ("(?i:n't)", "[^A-Za-z]", 0),
        ("[-+]?(?:[0-9]*(?:[.:,][0-9]+)+|[0-9]+)", "", 0),
        ("(?i:-[lr][crs]b-|pro-|anti-|cap'n|c'est)", "", 0),
        (r"[A-Z]*\$|£", "", 0),
        ("'[0-9][0-9]", r"[ \n]", 0),
        (rf"{_WORD}\.", "[,;:]", 0),
        ('"', "", 0),
        ("-+", "", 0),
        ("[,;:]", "", 0),
        ("[?!]+", "", 0),
        (r"\.{3,5}|(?:\. ){2,4}\.|\.", "", 0),
        (rf"{_ASCII_HYPHENATED}\.", "[,;:]", 0),
        (_ASCII_HYPHENATED, "", 0),
        (rf"{_HYPHENATED}\.", "[,;:]", 0),
        (_HYPHENATED, "", 0),
        ("'", r"[A-Za-z][^ \n]", 0),
        (_CLITIC, "", 0),
        ("(?i:n't)", "", 0),
        ("''?", "", 0),
    ]
]

_ABBREVIATION = re.compile(
    r"""(?:[a-z]
    | adj | adm | adv | al | ala | alex | apr | ariz | ark | assn | assoc | asst | attys? | aug
    | ave | az | bancorp | bhd | bldg | blvd | brig | bros | calif | capt | cf | cie | co?mdr
    | col | colo | conn | corp | cos? | cpl | ct | dak | dec | del | dept | det | drs? | ed\.d
    | elec | ens | esq | est | etc | ext | feb | fla | fri | ft | ga | gen | govs? | hon | ill
    | inc | ind | insp | intl | invt | jan | jos | jr | jul | jun | kans? | ky | la | lieut | lt
    | ltd | maj | mar | mass | md | messrs | mfg | mich | minn | miss | mlle | mme | mo | mon
    | mont | mrs? | ms | msgr | mt | mtg | natl | neb | nev | nov | oct | okla | ore | pa | penn
    | pfc | ph | plc | pp?t[ye]s? | pres | profs? | pvt | rd | reps? | rev | rt | sens? | sep
    | sept | seq | sfc | sgt | spc | sq | sr | ste? | supts? | sys | tel | tenn | tex | thu
    | thurs | treas | tues? | univ | va | vs | vt | wash | wed | wisc? | wm | wyo)\.
    | (?:art|bldg|ca|figs?|nos?|op|pp|prop)\.[\ \n]?[0-9]""",
    re.IGNORECASE | re.VERBOSE,
)
# Most words: by far the fastest way through a text.
_PLAIN_WORD = re.compile("(?!(?i:cannot|gonna|gotta|lemme|gimme|wanna) )[A-Za-zé]+(?= )")
_ELSEWHERE_UNCERTAIN = re.compile(
    r"""www\. | \.(?:com|net|org|edu)(?![a-zé])  # addresses
    | [0-9][a-zé0-9.]*\.[a-zé][a-zé0-9]{0,4}(?![a-zé0-9])  # file names
    | -[a-z]\.[a-z]  # abbreviations within hyphens
    | [0-9]{2,4}[-. ][0-9]{3,4}[-. ]?[0-9]{3,5}  # telephone numbers
    | [:;][-o']?[dpo](?![a-z0-9])  # smileys
    """,
    re.IGNORECASE | re.VERBOSE,
)


def tokenize(texts: Sequence[str]) -> list[list[str]]:
    """Return the lower-cased tokens of every text, punctuation included.

    The texts are lines of one file, as for the jar: a line can begin what ends the one before.

    Args:
        texts: lines without line breaks.

    Raises:
        UncertainError: a text is none that these rules know for certain.
    """
    for text in texts:
        known = _KNOWN.match(text)
        if known is None or known.end() < len(text):
            strange = text[known.end() if known else 0]
            raise UncertainError(f"character {strange!r} in {text!r}")
        found = _ELSEWHERE_UNCERTAIN.search(text)
        if found:
            raise UncertainError(f"{found.group()!r} in {text!r}")
    whole = "\n".join(texts)
    lines: list[list[str]] = [[]]
    position = 0
    while position < len(whole):
        if whole[position] == "\n":
            lines.append([])
            position += 1
        elif whole[position] == " ":
            position += 1
        else:
            plain = _PLAIN_WORD.match(whole, position)
            end = plain.end() if plain else _longest(whole, position, texts[len(lines) - 1])
            lines[-1].append(_normalize(whole[position:end]))
            position = end
    return lines


def _longest(whole: str, position: int, line: str) -> int:
    """Return the end of the token that starts at `position`, in the given line."""
    abbreviation = _ABBREVIATION.match(whole, position)
    if abbreviation:
        raise UncertainError(f"abbreviation {abbreviation.group()!r} in {line!r}")
    best = position
    end = position
    for rule, num_returned in _RULES:
        match = rule.match(whole, position)
        if match and match.end() > best:
            best = match.end()
            end = match.end(1) - num_returned
    if end == position:
        raise UncertainError(f"{whole[position : position + 10]!r} in {line!r}")
    return end


def _normalize(written: str) -> str:
    """Return the token for what was written."""
    if written == "£":
        return "#"
    if written == '"':
        return "''"
    if written.startswith(("...", ". .")):
        return "..."
    if written in ("---", "----"):
        return "--"
    return written.lower()
