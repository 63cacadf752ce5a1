"""ICC profiles of three colours and one gamma, as cameras and phones embed them (ICC.1:2001-04)."""

import struct

PRIMARIES = {  # colorants adapted to D50, gamma
    "Adobe RGB (1998)": ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457), 2.2),
    "Display P3": ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407), 2.2),
    "ProPhoto RGB": ((0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491), 1.8),
    "nearly sRGB": ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141), None),
}


def icc(name):
    """The bytes of a profile; a gamma of None is sRGB's own curve, in 1024 steps."""
    *colours, gamma = PRIMARIES[name]
    text = name.encode() + b"\0"
    curve = b"curv\0\0\0\0" + (_srgb() if gamma is None else struct.pack(">IH", 1, round(gamma * 256)))
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78), b"cprt": b"text\0\0\0\0-\0"}
    tags[b"wtpt"] = _xyz((0.9642, 1.0, 0.8249))
    for letter, colour in zip(b"rgb", colours):
        tags |= {bytes([letter]) + b"XYZ": _xyz(colour), bytes([letter]) + b"TRC": curve}
    table, body, begin = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, data in tags.items():
        table += tag + struct.pack(">II", begin + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">III", begin + len(body), 0, 0x02400000) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    head += _xyz((0.9642, 1.0, 0.8249))[8:]
    return head.ljust(128, b"\0") + table + body


def _xyz(values):
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _srgb():
    steps = (i / 1023 for i in range(1024))
    linear = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in steps)
    return struct.pack(">I1024H", 1024, *(round(65535 * value) for value in linear))
