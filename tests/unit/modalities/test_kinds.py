"""What is particular to single kinds, each against a plain computation."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from moemm.config.schema import ModalityConfig
from moemm.data.catalogue import ModalityInfo
from moemm.data.sample import PackedModality, Table
from moemm.data.vocabulary import Vocabulary, fit_subwords, fit_words
from moemm.errors import ConfigError, DataError
from moemm.modalities import build_tokenizer, fit_modalities
from moemm.modalities.logmel import LogMel, mel_filters
from moemm.modalities.signal import Frames, fit_statistics, normalize_rows, patches_of, ranges
from moemm.modalities.tabular import NUM_BINS
from moemm.testing.modality_cases import fit_case, pack_values


def test_image_blocks_are_the_pixels_of_each_patch() -> None:
    info = ModalityInfo(name="image", kind="image", ragged=False, shape=(1, 4, 6))
    spec = fit_modalities([info], {"image": ModalityConfig(patch=[2, 3], normalize="none")}, lambda _: [])["image"]
    tokenizer = build_tokenizer(spec, 8)
    image = torch.arange(24.0).reshape(1, 1, 4, 6)
    blocks = tokenizer.blocks(image[:, None])[0]
    expected = [image[0, 0, y : y + 2, x : x + 3].flatten() for y in (0, 2) for x in (0, 3)]
    assert torch.equal(blocks, torch.stack(expected))


def test_video_positions_name_frame_row_and_column_and_seconds() -> None:
    spec, values = fit_case("video", config=ModalityConfig(patch=[2, 6, 6]))
    tokens = build_tokenizer(spec, 8)(pack_values(spec.info, values[:1]))
    assert tokens.row_T.shape[0] == 3 * 2 * 2, "5 frames in tubelets of 2 are 3 along time"
    assert tokens.position_TP[:, 0].unique().tolist() == [0.0, 1.0, 2.0]
    assert tokens.position_TP[:, 1].unique().tolist() == [-0.5, 0.5]
    assert tokens.time_T[:4].tolist() == pytest.approx([0.04] * 4), "the middle of 2 frames at 25 Hz"


def test_wrong_number_of_patch_axes_is_refused() -> None:
    spec, _ = fit_case("video")
    with pytest.raises(ConfigError, match=r"video.patch is \[4, 4\].*frames, height, width"):
        build_tokenizer(replace(spec, options={**spec.options, "patch": [4, 4]}), 8)


def test_patches_of_ragged_rows() -> None:
    lengths = torch.tensor([3, 1, 4])
    frames = Frames(torch.arange(8.0)[:, None], *ranges(lengths), lengths)
    patches = patches_of(frames, 2)
    nan = float("nan")
    expected = torch.tensor([[0, 1], [2, nan], [3, nan], [4, 5], [6, 7]])
    torch.testing.assert_close(patches.values_TpF[..., 0], expected, equal_nan=True)
    assert patches.row_T.tolist() == [0, 0, 1, 2, 2] and patches.index_T.tolist() == [0, 1, 0, 0, 1]


def test_statistics_ignore_missing_numbers_and_constant_channels() -> None:
    values = [np.array([[1.0, 5.0], [np.nan, 5.0]]), np.array([[3.0, 5.0]])]
    fitted = fit_statistics(values)
    assert fitted["mean"] == pytest.approx([2.0, 5.0]) and fitted["deviation"] == pytest.approx([1.0, 1.0])


def test_normalising_a_row_uses_that_row_alone() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([50, 7])
    values = torch.randn(57, 3) * 9 + 4
    values[3, 1] = float("nan")
    rows = normalize_rows(Frames(values, *ranges(lengths), lengths))
    assert torch.isnan(rows[3, 1]) and torch.isfinite(rows).sum() == rows.numel() - 1
    torch.testing.assert_close(rows[50:].mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows[50:].std(0, correction=0), torch.ones(3), atol=1e-3, rtol=0)


def test_sensor_tells_channels_apart() -> None:
    spec, values = fit_case("sensor")
    tokenizer = build_tokenizer(spec, 8)
    same = np.repeat(values[0][:, :1], 3, axis=1)
    spec_free = replace(spec, options={**spec.options, "normalize": "none"})
    tokenizer.spec = spec_free
    tokens = tokenizer(pack_values(spec.info, [same]))
    assert tokens.row_T.shape[0] == 3 * -(-len(same) // 8)
    assert not torch.allclose(tokens.values_TD[0], tokens.values_TD[1])


def test_log_mel_finds_the_tone_and_knows_no_padding() -> None:
    rate = 8000.0
    mel = LogMel(rate, num_mels=32, window_ms=25, hop_ms=10)
    wave = torch.sin(2 * torch.pi * 1000.0 * torch.arange(4000) / rate)
    joined = torch.cat([wave, torch.zeros(777), wave[:90]])
    frames, counts = mel(joined, torch.tensor([4000, 777, 90]))
    assert counts.tolist() == [(4000 - 200) // 80 + 1, (777 - 200) // 80 + 1, 1]
    alone, _ = mel(wave, torch.tensor([4000]))
    torch.testing.assert_close(frames[: counts[0]], alone)
    band = mel_filters(mel.size, 32, rate)[round(1000 / rate * mel.size)].argmax()
    assert (alone.argmax(1) == band).all()


def test_log_mel_agrees_with_torch_stft() -> None:
    mel = LogMel(16000.0, num_mels=40, window_ms=32, hop_ms=10)
    assert mel.size == mel.window == 512, "no zeros behind the window, so that both see the same transform"
    wave = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    power = torch.stft(wave, 512, mel.hop, window=mel.hann_W, center=False, return_complex=True).abs().square()
    frames, _ = mel(wave, torch.tensor([3000]))
    torch.testing.assert_close(frames, torch.log(power.T @ mel.mel_BF + 1e-6), rtol=1e-4, atol=1e-4)


def test_a_waveform_without_a_rate_says_what_to_do() -> None:
    info = ModalityInfo(name="speech", kind="audio", ragged=True, shape=())
    with pytest.raises(DataError, match="set the attribute rate_hz"):
        fit_modalities([info], {}, lambda _: [np.zeros(100, np.float32)])


def test_numbers_are_coded_piecewise_linearly() -> None:
    spec, values = fit_case("tabular")
    tokenizer = build_tokenizer(spec, 8)
    low, high = spec.fitted["edges"][0][0], spec.fitted["edges"][0][-1]

    def token(number: float) -> torch.Tensor:
        row = Table(np.array([number, 0.0], np.float32), values[0].cat)
        return tokenizer(pack_values(spec.info, [row])).values_TD[0]

    base = tokenizer.column_CD[0]
    torch.testing.assert_close(token(low - 1), base)
    torch.testing.assert_close(token(high + 1), base + tokenizer.bins_NBD[0].sum(0))
    torch.testing.assert_close(token(float("nan")), base + tokenizer.missing_ND[0])
    assert len(spec.fitted["edges"][0]) == NUM_BINS + 1


def test_word_vocabulary_falls_back_to_bytes() -> None:
    words = fit_words(["a cat. A cat!", "a dog"], size=300)
    assert words == ["a", "cat"], "most frequent first, singletons left out"
    vocabulary = Vocabulary("word", words, max_tokens=6)
    assert vocabulary("A cat").tolist() == [256, 257]
    assert vocabulary("zoë").tolist() == list("zoë".encode())
    assert vocabulary("a a a a a a a a").shape == (6,)
    assert vocabulary(" \n ").tolist() == [32], "a text never has no token"


def test_subwords_are_those_of_byte_pair_encoding() -> None:
    merges = fit_subwords(
        ["low low low low low lower lower newest newest newest newest newest newest widest widest widest"], size=266
    )
    spelled = {i: bytes([i]) for i in range(256)}
    for number, (left, right) in enumerate(merges):
        spelled[256 + number] = spelled[left] + spelled[right]
    learned = [spelled[256 + i].decode() for i in range(len(merges))]
    assert learned[:4] == ["es", "est", "lo", "low"] and "newest" in learned, learned
    vocabulary = Vocabulary("subword", merges, max_tokens=50)
    for text in ("lowest", "newer", "snow"):
        assert b"".join(spelled[i] for i in vocabulary(text).tolist()) == text.encode()


@pytest.mark.parametrize("mode", ["word", "subword", "bytes"])
def test_vocabularies_travel_to_worker_processes(mode: str) -> None:
    texts = ["the cat sat on the mat", "the dog sat"]
    entries = {"word": fit_words(texts, size=400), "subword": fit_subwords(texts, size=300), "bytes": []}[mode]
    vocabulary = Vocabulary(mode, entries, max_tokens=64)
    again = pickle.loads(pickle.dumps(vocabulary))
    assert again("the dog sat down").tolist() == vocabulary("the dog sat down").tolist()
    assert again.size == vocabulary.size


def test_an_unknown_kind_is_read_as_features_with_a_warning() -> None:
    info = ModalityInfo(name="spec", kind="spectrum", ragged=False, shape=(7, 5))
    with pytest.warns(UserWarning, match="kind 'spectrum', which is not known.*plain features"):
        spec = fit_modalities([info], {}, lambda _: [np.ones((7, 5), np.float32)])["spec"]
    tokens = build_tokenizer(spec, 8)(PackedModality({"data": torch.ones(2, 7, 5)}, None, torch.arange(2)))
    assert tokens.values_TD.shape == (14, 8)
    with pytest.raises(ConfigError, match="nearest: video"):
        fit_modalities([info], {"spec": ModalityConfig(kind="vido")}, lambda _: [])


def test_a_series_without_frames_has_no_tokens_and_its_neighbours_keep_theirs() -> None:
    spec, _ = fit_case("timeseries")
    rows = [np.ones((0, 3), np.float32), np.ones((9, 3), np.float32)]
    tokens = build_tokenizer(spec, 8)(pack_values(spec.info, rows))
    assert tokens.row_T.tolist() == [1, 1]


@pytest.mark.parametrize("columns", ["num", "cat"])
def test_a_table_of_one_sort_of_columns_has_no_parameter_without_elements(columns: str) -> None:
    names = {"num_names": ("a",)} if columns == "num" else {"cat_names": ("c",), "cat_sizes": (3,)}
    info = ModalityInfo(name="side", kind="tabular", ragged=False, **names)
    number, category = np.ones(int(columns == "num"), np.float32), np.ones(int(columns == "cat"), np.int32)
    rows = [Table(number * i, category) for i in range(4)]
    spec = fit_modalities([info], {}, lambda _: rows)["side"]
    tokenizer = build_tokenizer(spec, 8)
    assert all(parameter.numel() for parameter in tokenizer.parameters())
    assert tokenizer(pack_values(info, rows)).values_TD.shape == (4, 8)
