"""Damaged images by the thousand: `python tests/data/image_mutants.py COUNT [SEED]` prints what came of them.

Ends with an error where anything but ImageError is raised, an image takes more than a second of processor time, or
the process grows by more than 200 MB.
"""

import collections
import io
import json
import random
import resource
import struct
import sys
import time
import zlib

from PIL import Image

from ldm.data.images import ImageError, read_header, read_image

SECONDS, MEGABYTES = 1.0, 200
OURS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
NOT_OURS = ("ICO", "JPEG2000")


def originals():
    """(format, bytes): small images of nine formats in several modes."""
    plain = Image.linear_gradient("L").resize((40, 28))
    colour = Image.merge("RGB", (plain, plain.rotate(180), plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    clear = colour.copy()
    clear.putalpha(plain)
    deep = Image.new("I;16", (40, 28), 40_000)
    exif = Image.Exif()
    exif[0x0112] = 6
    modes = {"PNG": (colour, clear, plain, deep, colour.quantize(8), plain.convert("1"), plain.convert("LA"))}
    modes |= {"JPEG": (colour, plain, colour.convert("CMYK")), "WEBP": (colour, clear), "BMP": (colour, plain)}
    modes |= {"GIF": (plain, colour.quantize(8)), "AVIF": (colour, clear), "ICO": (clear,), "JPEG2000": (colour,)}
    modes |= {"TIFF": (colour, clear, deep, plain.convert("F"), plain.convert("I"), colour.convert("CMYK"))}
    for format, images in modes.items():
        for image in images:
            yield format, encoded(image, format, exif=exif) if format in ("JPEG", "PNG") else encoded(image, format)
    for format in ("PNG", "GIF", "WEBP"):
        yield format, encoded(colour, format, save_all=True, append_images=[clear.convert("RGB").rotate(90)] * 3)
    yield "JPEG", encoded(colour, "JPEG", progressive=True, icc_profile=bytes(500))
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        yield "TIFF", encoded(colour, "TIFF", compression=compression)


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def flip_bits(draw, data, _others):
    for _ in range(draw.randint(1, 6)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def flip_head(draw, data, _others):
    for _ in range(draw.randint(1, 4)):
        data[draw.randrange(min(len(data), 80))] = draw.choice((0, 1, 2, 127, 128, 255, draw.randrange(256)))


def numbers(draw, data, _others):
    value = draw.choice((0, 1, 0x7FFF, 0xFFFF, 10_000, 60_000, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 20))
    form = draw.choice(("<H", ">H", "<I", ">I"))
    raw = struct.pack(form, value & (0xFFFF if form[1] == "H" else 0xFFFFFFFF))
    at = draw.randrange(max(1, min(len(data), draw.choice((64, 400, 1 << 20))) - 4))
    data[at : at + len(raw)] = raw


def cut(draw, data, _others):
    del data[draw.randrange(len(data)) :]


def piece_out(draw, data, _others):
    at = draw.randrange(len(data))
    del data[at : at + draw.randint(1, 60)]


def piece_in(draw, data, _others):
    at = draw.randrange(len(data))
    data[at:at] = draw.randbytes(draw.randint(1, 60))


def piece_twice(draw, data, _others):
    at, size = draw.randrange(len(data)), draw.randint(1, 200)
    data[at:at] = data[at : at + size] * draw.randint(1, 20)


def spliced(draw, data, others):
    other = draw.choice(others)
    at = draw.randrange(len(data))
    data[at:] = other[draw.randrange(len(other)) :]


MUTATIONS = (flip_bits, flip_bits, flip_head, numbers, numbers, cut, piece_out, piece_in, piece_twice, spliced)


def with_right_sums(data):
    """A PNG whose chunks have the checksums that they should: so that damage comes further."""
    fixed, position = bytearray(data[:8]), 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        body = bytes(data[position + 4 : position + 8 + length])
        if position + 12 + length > len(data):
            break
        fixed += data[position : position + 4] + body + zlib.crc32(body).to_bytes(4, "big")
        position += 12 + length
    return bytes(fixed + data[position:])


def mutants(count, seed):
    """`count` times (format, bytes), the same for the same seed."""
    draw, files = random.Random(seed), list(originals())
    others = [data for _, data in files]
    for _ in range(count):
        format, data = draw.choice(files)
        mutant = bytearray(data)
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            draw.choice(MUTATIONS)(draw, mutant, others)
            mutant = mutant or bytearray(b"\0")
        raw = bytes(mutant)
        if raw.startswith(b"\x89PNG\r\n\x1a\n") and draw.random() < 0.7:
            raw = with_right_sums(raw)
        yield format, raw


def look(raw):
    """ "read", or the reason why it was refused. Raises whatever is no ImageError."""
    try:
        header = read_header(io.BytesIO(raw), "mutant")
        image = read_image(io.BytesIO(raw), "mutant", at_least=32)
    except ImageError as error:
        assert "\n" not in str(error) and len(str(error)) < 500, error
        return error.reason
    assert image.mode == "RGB" and min(image.size) >= 1
    assert max(image.size) <= max(header.width, header.height)
    return "read"


def main(count, seed=0):
    outcomes, slowest, formats = collections.Counter(), 0.0, collections.Counter()
    for format, raw in originals():  # decoders are loaded before memory is measured
        assert (look(raw) == "read") == (format in OURS), format
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for format, raw in mutants(count, seed):
        start = time.process_time()
        outcome = look(raw)
        taken = time.process_time() - start
        slowest = max(slowest, taken)
        assert taken < SECONDS, (format, taken, raw[:99])
        assert outcome != "read" or format in OURS or not raw.startswith((b"\0\0\1\0", b"\0\0\0\x0cjP")), format
        outcomes[outcome] += 1
        formats[format] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES, grown
    said = {"count": count, "outcomes": outcomes, "formats": formats, "slowest": slowest, "grown": grown}
    print(json.dumps(said))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
