"""How a text is cut into words before byte-pair merging, by the name in `tokenizer.ggml.pre`.

The patterns are those of llama.cpp, which chooses them by the same name; a vocabulary only means
what it was trained to mean under its own. Refuses names that are not listed: a wrong pattern would
give plausible, wrong tokens.

llama.cpp's tables know Unicode 15.1, the regex library knows 16: `_NEWER` are the 17 ranges that
hold letters, numbers or marks for the younger table alone; taken out, both agree on every code
point (tested).
"""

from __future__ import annotations

from dataclasses import dataclass

_NEWER = (
    r"\x{897}\x{1C89}-\x{1C8A}\x{A7CB}-\x{A7CD}\x{A7DA}-\x{A7DC}\x{105C0}-\x{105F3}"
    r"\x{10D40}-\x{10D85}\x{10EC2}-\x{10EFC}\x{11380}-\x{113E2}\x{116D0}-\x{116E3}"
    r"\x{11BC0}-\x{11BF9}\x{11F5A}\x{13460}-\x{143FA}\x{16100}-\x{16139}\x{16D40}-\x{16D79}"
    r"\x{18CFF}\x{1CCF0}-\x{1CCF9}\x{1E5D0}-\x{1E5FF}"
)
_L = rf"[\p{{L}}&&[^{_NEWER}]]"
_M = rf"[\p{{M}}&&[^{_NEWER}]]"
_N = rf"[\p{{N}}&&[^{_NEWER}]]"
_P = rf"[\p{{P}}&&[^{_NEWER}\x{{1B4E}}-\x{{1B4F}}\x{{1B7F}}]]"

_CONTRACTIONS = "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _modern(digits: str, letters: str, other: str) -> str:
    """Build the pattern that Llama 3 and Qwen share but for digits and combining marks."""
    return rf"{_CONTRACTIONS}|[^\r\n{_L}{_N}]?{letters}+|{digits}| ?{other}+[\r\n]*|{_SPACES}"


_OTHER = rf"[^\s{_L}{_N}]"
_GPT2 = rf"'(?:[stmd]|re|ve|ll)| ?{_L}+| ?{_N}+| ?{_OTHER}+|\s+(?!\S)|\s+"
_QWEN2 = _modern(_N, _L, _OTHER)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way to cut.

    Attributes:
        patterns: Oniguruma patterns, applied one after the other to the pieces that the one before
            left; matches and what lies between them are pieces.
        ignore_merges: a piece that is a token as a whole is taken as it is.
        add_bos: whether a text begins with BOS when the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_FAMILIES: dict[PreTokenizer, tuple[str, ...]] = {
    PreTokenizer((_QWEN2,)): ("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan"),
    PreTokenizer((_modern(_N, f"[{_L}{_M}]", rf"[^\s{_L}{_M}{_N}]"),)): ("qwen35",),
    PreTokenizer((_modern(f"{_N}{{1,3}}", _L, _OTHER),), ignore_merges=True, add_bos=True): (
        "llama-bpe",
        "llama3",
        "llama-v3",
        "falcon3",
    ),
    PreTokenizer((_GPT2,)): ("gpt-2", "phi-2"),
    PreTokenizer((_N, _GPT2)): ("smollm", "starcoder"),
    # What llama.cpp does when a file names none.
    PreTokenizer((rf"[{_P}$+<=>^~|]+", _GPT2, f"{_N}+", "[0-9]{3}")): ("default", ""),
}

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    name: family for family, names in _FAMILIES.items() for name in names
}
