"""llama.cpp as a GPU build finds it: its libraries, its buffers, and its warm-up's shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from skim.errors import ConfigError
from target_svc.llama import library as module
from target_svc.llama.context import ContextBuffers
from target_svc.llama.library import CUDA_DRIVER, CUDA_LIBRARIES, Library, preload_cuda
from tests.fixtures.contexts import library, open_context
from tests.fixtures.engine import tiny_model


@pytest.mark.parametrize("missing", [CUDA_DRIVER, *CUDA_LIBRARIES])
def test_a_cuda_build_without_one_of_its_libraries_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(module, "_loads", lambda path: Path(path).name != missing)
    with pytest.raises(ConfigError, match="\\A[^\n]*cannot be loaded: [^\n]*\\Z") as refused:
        preload_cuda()
    assert refused.value.reason == "CUDA_LIBRARY_MISSING"
    assert refused.value.metadata["got"] == missing


def test_cuda_libraries_are_found_in_wheels_on_the_import_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheels = tmp_path / "nvidia" / "cu13" / "lib"
    tried: list[str] = []

    def loads(path: str) -> bool:
        tried.append(path)
        return path == CUDA_DRIVER or Path(path).parent == wheels

    monkeypatch.setattr(module, "_loads", loads)
    monkeypatch.syspath_prepend(str(tmp_path))
    preload_cuda()
    assert [path for path in tried if Path(path).parent == wheels] == [
        str(wheels / name) for name in CUDA_LIBRARIES
    ]


@pytest.mark.parametrize("file", ["libggml-cuda.so", "libggml-cuda.so.0"])
def test_a_cuda_build_is_known_by_its_backend_with_or_without_a_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str
) -> None:
    (tmp_path / file).touch()
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    monkeypatch.setattr(module, "_loads", lambda path: False)
    with pytest.raises(ConfigError) as refused:
        Library()
    assert refused.value.metadata["got"] == CUDA_DRIVER


def test_buffers_on_a_gpu_leave_out_what_lies_on_the_host() -> None:
    made = {
        ("CUDA0", "KV"): 1000,
        ("CUDA0", "RS"): 200,
        ("CUDA0", "compute"): 30,
        ("CUDA_Host", "compute"): 7,
        ("CUDA_Host", "output"): 5,
        ("CPU_Mapped", "model"): 9000,
    }
    assert ContextBuffers.of(made, gpu=True) == ContextBuffers(1000, 200, 30)


def test_a_context_tells_its_buffers_and_its_graph_grows_by_two_bytes_a_cell_and_token() -> None:
    with open_context(tiny_model(), cells=1024) as small:
        few = small.buffers
    with open_context(tiny_model(), cells=5120) as large:
        many, batch, _ = large.buffers, large.n_batch, large.warm_up()
    assert few.cells * 5 == many.cells > 0
    assert few.states == many.states == 0  # no recurrent layers
    # llama.cpp prints hundredths of a MiB.
    assert many.scratch - few.scratch == pytest.approx(4096 * 2 * batch, abs=2 * (1 << 20) / 100)


def test_the_first_warm_up_on_a_gpu_runs_every_shape_and_forgets_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with open_context(tiny_model(), cells=1024, draft_tokens_max=3) as context:
        monkeypatch.setattr(context.model, "gpu", True)
        shapes: list[tuple[int, int]] = []
        decode = context.decode

        def noted(tokens: np.ndarray, positions: np.ndarray, slot: int, rows: np.ndarray) -> None:
            shapes.append((len(tokens), int(rows.sum())))
            decode(tokens, positions, slot, rows)

        monkeypatch.setattr(context, "decode", noted)
        context.warm_up(every_shape=True)
        assert context.last_position(0) == -1
    chunks = [(512, 1), (1, 1), (256, 1), (128, 1), (64, 1), (32, 1), (16, 1)]
    assert sorted(shapes) == sorted([*chunks, (2, 2), (3, 3), (4, 4)])  # 1,024 and 512 do not fit


def test_a_library_hands_each_buffer_out_once() -> None:
    with open_context(tiny_model()):
        assert library().take_buffers() == {}  # the context took them
