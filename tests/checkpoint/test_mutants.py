"""Mutants of a weight file: with a manifest all are refused, without one each is sound or refused in one line."""

import json
import shutil
import struct
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load

from ldm.checkpoint.build import read_part
from ldm.checkpoint.folder import vae_layout
from ldm.checkpoint.model import load_vae
from ldm.checkpoint.parts import save_parts
from ldm.checkpoint.safety import ITEM_BYTES
from ldm.errors import ModelError
from tests.anew import write_anew

FILE = "diffusion_pytorch_model.safetensors"
MUTATIONS = []


def mutation(function):
    """Lists function(random, raw, table, data) -> bytes; raw is 8 bytes, the table as JSON, the data."""
    MUTATIONS.append(function)
    return function


def pack(table, data):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def two(random, table):
    names = [name for name in table if name != "__metadata__"]
    return [names[i] for i in random.choice(len(names), 2, replace=False)]


@mutation
def bits(random, raw, table, data):
    raw = bytearray(raw)
    for _ in range(random.integers(1, 4)):
        raw[random.integers(len(raw))] ^= 1 << random.integers(8)
    return bytes(raw)


@mutation
def bits_of_the_header(random, raw, table, data):
    raw = bytearray(raw)
    for _ in range(random.integers(1, 3)):
        raw[random.integers(len(raw) - len(data))] ^= 1 << random.integers(8)
    return bytes(raw)


@mutation
def characters_of_the_header(random, raw, table, data):
    raw = bytearray(raw)
    for _ in range(random.integers(1, 5)):
        raw[random.integers(8, len(raw) - len(data))] = random.choice(list(b'0123456789[]{},:"\\- \x00\xff'))
    return bytes(raw)


@mutation
def cut(random, raw, table, data):
    return raw[: random.integers(len(raw))]


@mutation
def longer(random, raw, table, data):
    return raw + bytes(random.integers(1, 100))


@mutation
def a_piece_out_or_in(random, raw, table, data):
    begin, size = random.integers(len(raw)), random.integers(1, 50)
    return raw[:begin] + (b"" if random.random() < 0.5 else random.bytes(size)) + raw[begin + size * (size % 2) :]


@mutation
def length_of_the_header(random, raw, table, data):
    length = int.from_bytes(raw[:8], "little")
    wrong = [0, length - 1, length + 1, length + 8, 1 << 40, (1 << 64) - 1, len(raw) - 8, len(raw)]
    return struct.pack("<Q", wrong[random.integers(len(wrong))]) + raw[8:]


@mutation
def offsets_swapped(random, raw, table, data):
    a, b = two(random, table)
    table[a]["data_offsets"], table[b]["data_offsets"] = table[b]["data_offsets"], table[a]["data_offsets"]
    return pack(table, data)


@mutation
def offsets_moved(random, raw, table, data):
    offsets = table[two(random, table)[0]]["data_offsets"]
    offsets[random.integers(2)] += int(random.choice([-(1 << 40), -4, -1, 1, 4, 1 << 40, 1 << 70 - 8]))
    return pack(table, data)


@mutation
def another_dtype(random, raw, table, data):
    table[two(random, table)[0]]["dtype"] = [*ITEM_BYTES, "F4", "", None, 3][random.integers(len(ITEM_BYTES) + 4)]
    return pack(table, data)


@mutation
def another_dtype_of_all_and_wider_shapes(random, raw, table, data):
    for name, entry in table.items():
        if name != "__metadata__":
            entry["dtype"] = "F16"
            entry["shape"] = [*entry["shape"], 2]
    return pack(table, data)


@mutation
def another_shape(random, raw, table, data):
    shape = table[two(random, table)[0]]["shape"]
    change = random.integers(5)
    if change == 0:
        shape.reverse()
    elif change == 1:
        shape.append(int(random.choice([0, 1, 2, -1])))
    elif change == 2:
        shape[0] = float(shape[0])
    elif change == 3:
        shape[:] = [int(np.prod(shape))]
    else:
        shape.insert(0, 1 << 62)
    return pack(table, data)


@mutation
def a_key_twice(random, raw, table, data):
    a, b = two(random, table)
    text = json.dumps(table)
    return pack(text.replace(json.dumps(a), json.dumps(b), 1).encode(), data)


@mutation
def a_key_renamed(random, raw, table, data):
    name = two(random, table)[0]
    new = ["stranger", "", name + "\x00", name.upper(), "é" * 300, "../" + name, "__metadata__", "\ud800"]
    table[new[random.integers(len(new))]] = table.pop(name)
    return pack(table, data)


@mutation
def an_entry_less_or_more(random, raw, table, data):
    if random.random() < 0.5:
        table.pop(two(random, table)[0])
    else:
        table["more"] = {"dtype": "U8", "shape": [0], "data_offsets": [len(data), len(data)]}
    return pack(table, data)


@mutation
def an_entry_of_another_kind(random, raw, table, data):
    wrong = [None, [], {}, "", 0, True, {"dtype": "F32"}, {**table[two(random, table)[0]], "more": 1}]
    table[two(random, table)[0]] = wrong[random.integers(len(wrong))]
    return pack(table, data)


@mutation
def another_metadata(random, raw, table, data):
    wrong = [None, [], {"a": 1}, {"a": None}, "text", {"format": "np"}, {"a": "b" * 9999}]
    return pack({**table, "__metadata__": wrong[random.integers(len(wrong))]}, data)


@mutation
def a_header_that_is_no_table(random, raw, table, data):
    texts = [b"", b"{", b"[]", b"null", b"NaN", b'{"a":' * 5000, b"[" * 5000, b"\xff" * 9, b"\x80\x04.", b'{"a":1e999}']
    return pack(texts[random.integers(len(texts))], data)


@mutation
def numbers_that_are_none(random, raw, table, data):
    data, position = bytearray(data), 4 * random.integers(len(data) // 4)
    data[position : position + 4] = struct.pack("<f", random.choice([np.nan, np.inf, -np.inf]))
    return pack(table, bytes(data))


@mutation
def other_numbers(random, raw, table, data):
    data, position = bytearray(data), 4 * random.integers(len(data) // 4)
    data[position : position + 4] = struct.pack("<f", random.normal())
    return pack(table, bytes(data))


def mutants(raw, count):
    """`count` different mutants, the same ones each time."""
    random, end, found = np.random.default_rng(0), 8 + int.from_bytes(raw[:8], "little"), set()
    while len(found) < count:
        function = MUTATIONS[random.integers(len(MUTATIONS))]
        mutant = function(random, raw, json.loads(raw[8:end]), raw[end:])
        if mutant != raw and mutant not in found:
            found.add(mutant)
            yield function.__name__, mutant


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An autoencoder's folder with a manifest, and the same without."""
    from ldm.nn.vae import VAE

    config = {"block_out_channels": [4], "down_block_types": ["DownEncoderBlock2D"], "norm_num_groups": 2}
    config |= {"up_block_types": ["UpDecoderBlock2D"], "layers_per_block": 1, "latent_channels": 2}
    folder = tmp_path_factory.mktemp("mutants")
    with_manifest = save_parts(folder / "with", torch.float32, vae=VAE.from_config(config)) / "vae"
    without = shutil.copytree(with_manifest, folder / "without")
    (with_manifest / "manifest.json").write_text((folder / "with" / "manifest.json").read_text().replace('"vae/', '"'))
    (with_manifest / FILE).unlink()
    (with_manifest / FILE).symlink_to(without / FILE)  # so that each mutant is written once
    return with_manifest, without


def outcome(act, *args):
    """(what act(*args) gives, None) or (None, its ModelError's line); another error passes, and none takes a second."""
    start = time.process_time()
    try:
        return act(*args), None
    except ModelError as error:
        line = str(error)
        assert "\n" not in line and len(line) < 1000 and line.isprintable()
        return None, line
    finally:
        assert time.process_time() - start < 1


def whole(folder):
    return load_vae(folder, torch.device("cpu"), torch.float32)


def tensors(folder):
    return read_part(vae_layout(folder), "vae", torch.float32, torch.device("cpu"), {}, lambda size: None)


@pytest.mark.parametrize("count", [pytest.param(600, id="few"), pytest.param(2000, id="many", marks=pytest.mark.slow)])
def test_mutants_with_a_manifest_are_all_refused_and_without_one_sound_or_one_line(count, folders):
    with_manifest, without = folders
    raw = (without / FILE).read_bytes()
    original, reasons, loaded, loadable = tensors(with_manifest), set(), 0, 0
    assert whole(with_manifest)
    for number, (kind, mutant) in enumerate(mutants(raw, count)):
        write_anew(without / FILE, mutant)
        assert outcome(whole, with_manifest)[1], kind
        ours, line = outcome(tensors, without)
        if line:
            reasons.add(line.partition("sound safetensors file: ")[2])
            continue
        loaded += 1
        theirs = load(mutant)  # what is taken here, the library takes too, and reads the same
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name].to(tensor.dtype)) for name, tensor in ours.items()), kind
        fits = all(name in ours and ours[name].shape == t.shape for name, t in original.items())  # more is told
        if not fits or number % 20 == 0:
            line = outcome(whole, without)[1]
            assert (line is None) == (fits and all(t.is_floating_point() for t in theirs.values())), (kind, line)
            loadable += line is None
    assert count * 0.1 < loaded < count * 0.5 and loadable > count // 400 and len(reasons) > count // 20
