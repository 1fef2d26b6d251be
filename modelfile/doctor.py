"""`python -m modelfile.doctor PATH...`: print what each model file says, one JSON line a file.

Run by people and by `skim doctor`. Refuses nothing: whatever is wrong with a file becomes an entry
of its `problems`, and the exit status is 1 when any file has one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from modelfile.chat_template import ChatTemplate
from modelfile.gguf_file import GgufFile
from modelfile.hparams import FORWARD_ARCHITECTURES, ModelShape
from modelfile.tokenizer import Tokenizer
from skim.errors import SkimError

# What a chat of ours looks like; a template should be able to stream it.
_TYPICAL_ROLES = ("system", "user")
_SAMPLE = "It's 4821 — naïve, 東京.\r\n  <|im_end|>".encode()


def examine(path: str) -> dict[str, Any]:
    """Look at one file. Never raises; fields that could not be read are absent.

    Returns:
        path, ok, problems (list of sentences), open_s, and as far as they can be read: size_bytes,
        tensors, model_digest, layout_digest, shape, drafter (whether our own forward pass runs
        it), tokenizer, template.
    """
    report: dict[str, Any] = {"path": path}
    problems: list[str] = []
    started = time.perf_counter()
    try:
        gguf = GgufFile.open(path)
    except SkimError as error:
        return {**report, "ok": False, "problems": [error.message]}
    with gguf:
        report |= {
            "size_bytes": gguf.size_bytes,
            "tensors": len(gguf.tensors),
            "model_digest": gguf.model_digest,
            "layout_digest": gguf.layout_digest,
        }
        for look in (_shape, _tokenizer):
            try:
                report |= look(gguf, problems)
            except SkimError as error:
                problems.append(error.message)
    report["open_s"] = round(time.perf_counter() - started, 3)
    return {**report, "ok": not problems, "problems": problems}


def _shape(gguf: GgufFile, problems: list[str]) -> dict[str, Any]:
    shape = ModelShape.from_gguf(gguf, any_architecture=True)
    drafter = shape.arch in FORWARD_ARCHITECTURES
    if drafter:
        try:
            ModelShape.from_gguf(gguf)
        except SkimError as error:
            problems.append(error.message)
            drafter = False
    fields = asdict(shape)
    if fields["rope"]["freq_factors"] is not None:
        fields["rope"]["freq_factors"] = f"{len(fields['rope']['freq_factors'])} values"
    return {"shape": fields, "drafter": drafter}


def _tokenizer(gguf: GgufFile, problems: list[str]) -> dict[str, Any]:
    tokenizer = Tokenizer.from_gguf(gguf)
    back = b"".join(tokenizer.token_bytes(token) for token in tokenizer.encode(_SAMPLE).ids)
    if back != _SAMPLE:
        problems.append("the tokenizer does not give back a sample text")
    report: dict[str, Any] = {
        "tokenizer": {
            "pre": tokenizer.vocabulary.pre_name,
            "vocab_size": tokenizer.vocab_size,
            "merges": len(tokenizer.vocabulary.merges),
            "eos_ids": sorted(tokenizer.eos_ids),
            "bos_id": tokenizer.bos_id,
            "add_bos": tokenizer.add_bos,
            "fingerprint": tokenizer.fingerprint,
        }
    }
    template = ChatTemplate.from_gguf(gguf, tokenizer)
    report["template"] = None
    if template is not None:
        try:
            pieces = template.render_streamable(_TYPICAL_ROLES)
            report["template"] = {"streamable": True, "pieces": list(pieces)}
        except SkimError as error:
            report["template"] = {"streamable": False, "why": error.message}
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line a path; 0 when no file has a problem."""
    parser = argparse.ArgumentParser(prog="python -m modelfile.doctor", description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="GGUF files")
    healthy = True
    for path in parser.parse_args(arguments).paths:
        report = examine(path)
        healthy &= report["ok"]
        print(json.dumps(report, ensure_ascii=False), flush=True)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
