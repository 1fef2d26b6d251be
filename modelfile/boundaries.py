"""Where a text can be cut before tokenising, so that the pieces give the tokens of the whole.

Used twice: to cut a prompt that is still arriving into pieces (`modelfile.incremental`), and to cut
a piece into words whose tokens are remembered (`modelfile.word_memo`).

Why a safe boundary is safe. A pre-tokenizer scans from left to right and never looks back, and
merging never crosses the words it finds. So a cut at p changes nothing if (a) the scan of the whole
text has a word boundary at p, and (b) the words left of p come out the same without the text right
of p. Take p between a character c that is not whitespace and a whitespace character w, where c is
an ASCII letter or digit (or a letter of a few large, long-settled blocks) and w any of space, tab
and line ends; or c is ASCII punctuation and w a plain space:
  (a) No alternative of any of our patterns matches c followed by w: runs of letters and of digits
      hold no whitespace, runs of whitespace hold no c, and a run of other characters takes only
      line ends after it (`[\\r\\n]*`), which is why after punctuation w must be a plain space.
  (b) Words before the last depend on what they hold and on at most one character more, all of it
      left of p. The last word ends in c: its run stops at w just as at the end of the text, and the
      one lookahead, `\\s+(?!\\S)`, belongs to a run of whitespace, which c is not.
The same holds between such a letter or digit and ideographic punctuation. Special tokens are found
before that scan; whoever cuts sees to it that no cut falls inside one.
"""

from __future__ import annotations

import re

# Letters in every version of Unicode's tables: U+0410 to U+044F (Cyrillic), U+3041 to U+307F
# (Hiragana), U+5000 to U+8FFF (CJK ideographs), U+B000 to U+CFFF (Hangul).
SAFE_BOUNDARY = re.compile(
    rb"(?:[0-9A-Za-z]"
    rb"|\xd0[\x90-\xbf]|\xd1[\x80-\x8f]"
    rb"|\xe3\x81[\x81-\xbf]"
    rb"|[\xe5-\xe8][\x80-\xbf]{2}"
    rb"|[\xeb\xec][\x80-\xbf]{2})"
    rb"(?=[ \t\r\n]|\xe3\x80[\x81\x82]|\xef\xbc[\x81\x8c\x9f])"  # ideographic comma, stop, ! , ?
    rb"|[!-/:-@\[-`{-~](?= )"
)

# Matches the stretches between safe boundaries at whitespace, one after the other, gaplessly.
_LETTER = r"0-9A-Za-z\u0410-\u044f\u3041-\u307f\u5000-\u8fff\ub000-\ucfff"
_SPACE, _OTHER = r"[ \t\r\n]", r"[^ \t\r\n]"
_NO_BOUNDARY = rf"(?<![{_LETTER}])(?:(?<![!-~])|(?! ))"
WORDS = re.compile(rf"{_SPACE}*{_OTHER}+(?:{_NO_BOUNDARY}{_SPACE}+{_OTHER}*)*|{_SPACE}+")
